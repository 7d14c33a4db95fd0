"""A ratio of two sums: what is weighted by tokens, words or bytes."""

import math
from collections.abc import Hashable, Sequence
from typing import Literal

import numpy as np

from eval_platform.statistics import estimate as why
from eval_platform.statistics.clusters import group
from eval_platform.statistics.estimate import Estimate, without_interval
from eval_platform.statistics.intervals import t_interval
from eval_platform.statistics.mean import scaled_root_sum_of_squares


def ratio_estimate(
    numerators: Sequence[float | None],
    denominators: Sequence[float | None],
    clusters: Sequence[Hashable | None] | None = None,
    *,
    transform: Literal["identity", "exp"] = "identity",
) -> Estimate:
    """f(sum of numerators / sum of denominators), both one per item; f is the identity or exp.

    The ratio R has the standard error of its linearisation (the delta method; Cochran 1977, Sampling Techniques,
    section 6.4): with D_c the sum of (a_i - R b_i) over cluster c (or item) and C of them,
    sqrt(C / (C - 1) * sum D_c^2) / sum b_i. The interval is Student's t on C - 1 degrees of freedom. exp, for
    perplexities: the interval is made for R and then transformed (method "t_log"), so that it stays above 0; the
    standard error is exp(R) times that of R.

    A None, NaN or infinite entry makes the value None; so does a result too large for a float. Raises ValueError
    when lengths differ or a denominator is negative.
    """
    n = len(numerators)
    if len(denominators) != n:
        raise ValueError(f"{n} numerators but {len(denominators)} denominators: give one of each per item")
    groups = group(clusters, n)
    if n == 0:
        return without_interval(why.NO_ITEMS, 0, groups.reported)
    a = np.array([math.nan if value is None else value for value in numerators], dtype=float)
    b = np.array([math.nan if value is None else value for value in denominators], dtype=float)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return without_interval(why.MISSING, n, groups.reported)
    if b.min() < 0:
        raise ValueError(f"a denominator is negative: {b.min()}")
    total = math.fsum(b)
    if total == 0:
        return without_interval("the denominators sum to 0", n, groups.reported)
    ratio = math.fsum(a) / total
    value = _apply(transform, ratio)
    if value is None:
        return without_interval(why.TOO_LARGE, n, groups.reported)
    if groups.count < 2:
        reason = why.ONE_ITEM if n == 1 else why.ONE_CLUSTER
        return without_interval(reason, n, groups.reported, value=value)

    scale = float(max(np.abs(a).max(), np.abs(ratio * b).max()))
    error = scaled_root_sum_of_squares(groups.sums(a - ratio * b), scale, total)
    if error == 0:
        return without_interval(why.NO_VARIANCE, n, groups.reported, value=value, standard_error=0.0)
    low, high = (_apply(transform, bound) for bound in t_interval(ratio, error, groups.count - 1))
    error_of_value = error if transform == "identity" else error * value
    if low is None or high is None or not math.isfinite(error_of_value):
        return without_interval(why.TOO_LARGE, n, groups.reported, value=value)
    method = f"{'t' if transform == 'identity' else 't_log'}{groups.suffix}"
    return Estimate(value, error_of_value, low, high, method, n, groups.reported)


def _apply(transform: Literal["identity", "exp"], x: float) -> float | None:
    """f(x), None where it overflows."""
    if transform == "identity":
        return x if math.isfinite(x) else None
    try:
        return math.exp(x)
    except OverflowError:
        return None
