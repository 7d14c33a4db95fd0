"""A number and how sure we are of it."""

from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Estimate:
    """A statistic of n items with its standard error and 95 % interval. No field is ever NaN or infinite.

    method: how the interval was made ("wilson", "t", "t_clustered", "t_log", ...), or "none: <reason>" where there is
    no interval. n_clusters: None when the items are independent of each other by assumption.
    """

    value: float | None
    standard_error: float | None
    ci_low: float | None
    ci_high: float | None
    method: str
    n: int
    n_clusters: int | None = None


def without_interval(
    reason: str,
    n: int,
    n_clusters: int | None = None,
    *,
    value: float | None = None,
    standard_error: float | None = None,
) -> Estimate:
    """What is left to say when there is no interval: why."""
    return Estimate(value, standard_error, None, None, f"none: {reason}", n, n_clusters)


NO_ITEMS = "no items"
MISSING = "a value is missing or not finite"
ONE_ITEM = "one item has no variance"
ONE_CLUSTER = "one cluster has no variance"
NO_VARIANCE = "no variance between items"
TOO_LARGE = "too large for a floating-point number"
