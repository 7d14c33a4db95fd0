"""The mean of items' values."""

import math
from collections.abc import Hashable, Sequence

import numpy as np

from eval_platform.statistics import estimate as why
from eval_platform.statistics.clusters import Groups, group
from eval_platform.statistics.estimate import Estimate, without_interval
from eval_platform.statistics.intervals import t_interval, wilson


def mean_estimate(
    values: Sequence[float | None],
    clusters: Sequence[Hashable | None] | None = None,
    *,
    proportion: bool = False,
) -> Estimate:
    """The mean of `values`, one per item, as an estimate of the mean over all items that could have been asked.

    clusters: items of one cluster (questions on one passage) are not independent; see `standard_error_of_mean`.
    proportion: each value is a share of 1. Where all are 0 or 1 and independent the interval is Wilson's; where
    they are clustered and all equal it is Wilson's with the clusters as trials (the variance of values within [0, 1]
    is largest when they are 0 or 1 and all of a cluster agree, so this is never too narrow); else Student's t, cut to
    [0, 1]. Without `proportion`: Student's t, on clusters - 1 degrees of freedom (n - 1 without clusters).

    A None, NaN or infinite value makes the mean None: an item is never left out silently. Raises ValueError when
    clusters and values differ in length or a proportion lies outside [0, 1].
    """
    n = len(values)
    groups = group(clusters, n)
    if n == 0:
        return without_interval(why.NO_ITEMS, 0, groups.reported)
    x = np.array([math.nan if value is None else value for value in values], dtype=float)
    if not np.isfinite(x).all():
        return without_interval(why.MISSING, n, groups.reported)
    if proportion and (x.min() < 0 or x.max() > 1):
        raise ValueError(f"proportions lie within [0, 1]; these reach from {x.min()} to {x.max()}")
    # fsum is exact, so the order of the items does not show in the last digits; rounding may not leave the range.
    mean = min(max(math.fsum(x) / n, float(x.min())), float(x.max()))
    error = standard_error_of_mean(x, groups)
    independent = groups.count == n
    zero_or_one = proportion and bool(np.isin(x, (0.0, 1.0)).all())

    if zero_or_one and independent:
        return Estimate(mean, error, *wilson(mean, n), "wilson", n, groups.reported)
    if error is None:
        reason = why.ONE_ITEM if n == 1 else why.ONE_CLUSTER
        return without_interval(reason, n, groups.reported, value=mean)
    if zero_or_one and mean in (0.0, 1.0):
        return Estimate(mean, error, *wilson(mean, groups.count), "wilson_clustered", n, groups.reported)
    if error == 0:
        return without_interval(why.NO_VARIANCE, n, groups.reported, value=mean, standard_error=error)
    low, high = t_interval(mean, error, groups.count - 1)
    if proportion:
        low, high = max(low, 0.0), min(high, 1.0)
    return Estimate(mean, error, low, high, f"t{groups.suffix}", n, groups.reported)


def standard_error_of_mean(x: np.ndarray, groups: Groups) -> float | None:
    """Standard error of the mean of `x` [n]; None where there is but one item or one cluster.

    With S_c the sum of (x_i - mean) over cluster c and C clusters: sqrt(C / (C - 1) * sum S_c^2) / n. This is Miller
    2024 (arXiv:2411.00640), section 2.2, times sqrt(C / (C - 1)), which removes the bias that few clusters bring, so
    that items each in a cluster of their own give the sample standard deviation (with n - 1) over sqrt(n).
    """
    if groups.count < 2:
        return None
    deviations = x - math.fsum(x) / len(x)
    return scaled_root_sum_of_squares(groups.sums(deviations), float(np.abs(x).max()), len(x))


def scaled_root_sum_of_squares(sums: np.ndarray, scale: float, total: float) -> float:
    """sqrt(C / (C - 1) * sum of squares of `sums` [C]) / total; 0 where the sums are but rounding errors of `scale`."""
    count = len(sums)
    root = math.sqrt(count / (count - 1) * math.fsum(sums**2))
    # A deviation is off by an ulp of the values' size; that is no variance.
    return 0.0 if root <= 16 * np.finfo(float).eps * scale * math.sqrt(count) else root / total
