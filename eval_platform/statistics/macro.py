"""The mean of several subsets' scores, each subset counting the same."""

import math
from collections.abc import Sequence

from eval_platform.statistics import estimate as why
from eval_platform.statistics.estimate import Estimate, without_interval
from eval_platform.statistics.intervals import t_interval, wilson


def macro_estimate(parts: Sequence[Estimate], *, proportion: bool = False) -> Estimate:
    """The mean of the values of K independent estimates, one a subset.

    The subsets are the whole of what is meant (the 27 tasks of a benchmark), not drawn from more of them: only their
    items are. So the standard error is sqrt(sum s_k^2) / K, and the interval Student's t on the degrees of freedom of
    Welch and Satterthwaite (Satterthwaite 1946, Biometrics Bulletin 2:110-114), (sum s_k^2)^2 / sum(s_k^4 / (m_k - 1))
    with m_k items (or clusters). proportion: values are shares of 1, and the interval is cut to [0, 1]; where every
    value is 0, or every one 1, it is Wilson's with K^2 / sum(1 / m_k) trials, which is what the variance of the mean
    of shares comes to when all are equal. One subset alone is its own estimate.

    The value is None when that of a subset is. Raises ValueError without a subset.
    """
    if not parts:
        raise ValueError("a mean over subsets needs at least one subset")
    if len(parts) == 1:
        return parts[0]
    n = sum(part.n for part in parts)
    named = any(part.n_clusters is not None for part in parts)
    sizes = [part.n if part.n_clusters is None else part.n_clusters for part in parts]
    n_clusters = sum(sizes) if named else None
    values = [part.value for part in parts]
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return without_interval(why.MISSING, n, n_clusters)
    value = math.fsum(known) / len(known)
    errors = [part.standard_error for part in parts if part.standard_error is not None]
    if len(errors) < len(parts):
        return without_interval("a subset of one item or cluster has no variance", n, n_clusters, value=value)
    error = math.sqrt(math.fsum(s**2 for s in errors)) / len(parts)
    if error == 0 and proportion and value in (0.0, 1.0):
        trials = len(parts) ** 2 / math.fsum(1 / size for size in sizes)
        return Estimate(value, error, *wilson(value, math.floor(trials)), "wilson_macro", n, n_clusters)
    if error == 0:
        return without_interval(why.NO_VARIANCE, n, n_clusters, value=value, standard_error=error)
    # Relative to the largest, so that fourth powers of small numbers stay numbers.
    largest = max(errors)
    shares = [(s / largest) ** 2 for s in errors]
    freedom = math.fsum(shares) ** 2 / math.fsum(s**2 / (m - 1) for s, m in zip(shares, sizes, strict=True))
    low, high = t_interval(value, error, freedom)
    if proportion:
        low, high = max(low, 0.0), min(high, 1.0)
    return Estimate(value, error, low, high, "t_macro", n, n_clusters)
