"""The bootstrap, for statistics that have no formula of their own."""

import math
from collections.abc import Callable, Hashable, Sequence
from statistics import NormalDist
from typing import Literal

import numpy as np

from eval_platform.statistics import estimate as why
from eval_platform.statistics.clusters import Groups, group
from eval_platform.statistics.estimate import CONFIDENCE, Estimate, without_interval

# Entries of a counts matrix held at once (int64: 32 MB).
_CHUNK_ENTRIES = 1 << 22

Statistic = Callable[[np.ndarray], np.ndarray]


def bootstrap_estimate(
    statistic: Statistic,
    n: int,
    clusters: Sequence[Hashable | None] | None = None,
    *,
    interval: Literal["bca", "percentile"] = "bca",
    replicates: int = 2000,
    seed: int = 0,
) -> Estimate:
    """A statistic of n items with its bootstrap standard error and interval.

    statistic: takes counts [k, n], in each row how often each item occurs in one resample, and returns the k values.
    So a mean is `counts @ x / counts.sum(axis=1)`. It is called with rows in bulk and must not draw at random.
    clusters: whole clusters are drawn (the items of one come or go together); an item without one is drawn alone.
    interval: BCa, bias-corrected and accelerated (Efron 1987, JASA 82:171-185; Efron and Tibshirani 1993, chapter
    14), or percentile. Where BCa is not defined (all replicates on one side of the value) the percentile interval
    is given and named. The standard error is the standard deviation of the replicates.

    The same seed gives the same numbers. A value or replicate that is not finite leaves the value, or the interval,
    None. Raises ValueError when `clusters` does not have n entries.
    """
    groups = group(clusters, n)
    if n == 0:
        return without_interval(why.NO_ITEMS, 0, groups.reported)
    value = float(statistic(np.ones((1, n), dtype=np.int64))[0])
    if not math.isfinite(value):
        return without_interval(why.MISSING, n, groups.reported)
    if groups.count < 2:
        reason = why.ONE_ITEM if n == 1 else why.ONE_CLUSTER
        return without_interval(reason, n, groups.reported, value=value)

    draws = _resampled(statistic, groups, replicates, np.random.default_rng(seed))
    if not np.isfinite(draws).all():
        return without_interval("the statistic is not defined on every resample", n, groups.reported, value=value)
    error = float(draws.std(ddof=1))
    if draws.min() == draws.max():
        return without_interval(why.NO_VARIANCE, n, groups.reported, value=value, standard_error=0.0)
    tails = (0.5 - CONFIDENCE / 2, 0.5 + CONFIDENCE / 2)
    corrected = _bca_tails(value, draws, _leave_one_out(statistic, groups), tails) if interval == "bca" else None
    low, high = np.quantile(draws, corrected or tails)
    method = f"bootstrap_{'percentile' if corrected is None else 'bca'}{groups.suffix}"
    return Estimate(value, error, float(low), float(high), method, n, groups.reported)


def _resampled(statistic: Statistic, groups: Groups, replicates: int, rng: np.random.Generator) -> np.ndarray:
    """The statistic of `replicates` resamples of the groups: [replicates]."""
    rows = max(1, _CHUNK_ENTRIES // len(groups.codes))
    found = []
    for start in range(0, replicates, rows):
        k = min(rows, replicates - start)
        drawn = rng.integers(groups.count, size=(k, groups.count)) + groups.count * np.arange(k)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=k * groups.count).reshape(k, groups.count)
        found.append(np.asarray(statistic(counts[:, groups.codes]), dtype=float))
    return np.concatenate(found)


def _leave_one_out(statistic: Statistic, groups: Groups) -> np.ndarray:
    """The statistic without each group in turn: [groups]."""
    rows = max(1, _CHUNK_ENTRIES // len(groups.codes))
    found = []
    for start in range(0, groups.count, rows):
        left_out = np.arange(start, min(start + rows, groups.count))
        found.append(np.asarray(statistic((groups.codes != left_out[:, None]).astype(np.int64)), dtype=float))
    return np.concatenate(found)


def _bca_tails(
    value: float, draws: np.ndarray, left_out: np.ndarray, tails: tuple[float, float]
) -> tuple[float, float] | None:
    """The quantiles of `draws` that make the BCa interval; None where it is not defined."""
    normal = NormalDist()
    # Ties count half, as in scipy.stats.bootstrap: for a discrete statistic that leaves no spurious bias.
    below = float(((draws < value).mean() + (draws <= value).mean()) / 2)
    influence = left_out.mean() - left_out
    squares = float((influence**2).sum())
    if not 0 < below < 1 or not math.isfinite(squares) or squares == 0:
        return None
    bias = normal.inv_cdf(below)
    acceleration = float((influence**3).sum()) / (6 * squares**1.5)

    shifted = [bias + normal.inv_cdf(tail) for tail in tails]
    if any(acceleration * shift >= 1 for shift in shifted):  # beyond the pole of the correction
        return None
    low, high = (normal.cdf(bias + shift / (1 - acceleration * shift)) for shift in shifted)
    return low, high
