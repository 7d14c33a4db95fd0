"""95 % intervals of one number."""

import math
from statistics import NormalDist

from eval_platform.statistics.estimate import CONFIDENCE

Z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)


def wilson(proportion: float, n: int) -> tuple[float, float]:
    """Wilson's score interval for a proportion of n independent trials (Wilson 1927, JASA 22:209-212).

    It keeps close to its level at small n and near 0 and 1, where the normal interval fails (Brown, Cai and
    DasGupta 2001, Statistical Science 16:101-133; Bowyer et al. 2025, arXiv:2503.01747).
    """
    denominator = 1 + Z**2 / n
    centre = (proportion + Z**2 / (2 * n)) / denominator
    half = Z / denominator * math.sqrt(proportion * (1 - proportion) / n + Z**2 / (4 * n**2))
    # At 0 and 1 the bound is exactly the proportion; rounding must not put it beyond.
    low = 0.0 if proportion == 0 else min(centre - half, proportion)
    high = 1.0 if proportion == 1 else max(centre + half, proportion)
    return max(low, 0.0), min(high, 1.0)


def t_interval(value: float, standard_error: float, degrees_of_freedom: float) -> tuple[float, float]:
    """Student's t interval around `value`."""
    from scipy.special import stdtrit  # scipy is slow to import and light callers come through here

    half = float(stdtrit(degrees_of_freedom, 0.5 + CONFIDENCE / 2)) * standard_error
    return value - half, value + half
