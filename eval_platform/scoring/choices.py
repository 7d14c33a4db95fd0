"""Which choice did the model find likeliest?"""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np


def chosen(log_likelihoods: Sequence[float | None], *, both_orders: bool = False) -> int | None:
    """Index of the highest log-likelihood, the first among equals; None when any is missing or not finite.

    both_orders: of n choices asked in two orders [2 n], the one with the highest sum.
    """
    if not _all_finite(log_likelihoods):
        return None
    x = np.array(log_likelihoods, dtype=float)
    return int(np.argmax(over_both_orders(x) if both_orders else x))


def choice_metric(
    metric: str,
    choices: Sequence[str],
    log_likelihoods: Sequence[float | None],
    unconditional: Sequence[float | None],
    right: Sequence[int],
) -> float | None:
    """1.0 when the choice preferred under `metric` is one of `right`, else 0.0.

    As `ConfigurableTask.process_results` of lm-evaluation-harness 0.4.13: acc compares log-likelihoods, acc_norm
    those per character (Unicode code point) and acc_bytes per UTF-8 byte of the choice without its delimiter,
    acc_mutual_info the log-likelihood less the unconditional one. Ties go to the first index.

    None when a log-likelihood that the metric needs is missing, NaN or infinite, or a choice has no length to divide
    by and no log-likelihood either: a NaN would be preferred by argmax, and no score may come of it.
    """
    if not _all_finite(log_likelihoods):
        return None
    x = np.array(log_likelihoods, dtype=float)
    if metric == "acc_both_orders":
        return _both_orders(x, right)
    if metric == "acc_mutual_info":
        if len(unconditional) != len(x) or not _all_finite(unconditional):
            return None
        x = x - np.array(unconditional, dtype=float)
    else:
        with np.errstate(divide="ignore", invalid="ignore"):  # an empty choice is -inf, so never preferred
            x = x / np.array([_LENGTHS[metric](choice) for choice in choices])
    if np.isnan(x).any():
        return None
    return float(int(np.argmax(x)) in right)


def over_both_orders(log_likelihoods: np.ndarray) -> np.ndarray:
    """Summed log-likelihoods of each of n choices that were asked in two orders [2 n] (`tasks.render`): [n]."""
    return log_likelihoods.reshape(2, -1).sum(axis=0)


def _both_orders(log_likelihoods: np.ndarray, right: Sequence[int]) -> float:
    """1.0 when a right choice has a larger sum than every wrong one (INSTRUCTEVAL's hhh.py); a tie is wrong.

    A tie must not be right: the first of the two orders is ours to choose, so the right choice may always be first.
    """
    sums = over_both_orders(log_likelihoods)
    is_right = np.isin(np.arange(len(sums)), right)
    return float(bool(is_right.any()) and (is_right.all() or sums[is_right].max() > sums[~is_right].max()))


_LENGTHS: Mapping[str, Callable[[str], float]] = MappingProxyType(
    {
        "acc": lambda choice: 1.0,
        "acc_norm": lambda choice: float(len(choice)),
        "acc_bytes": lambda choice: float(len(choice.encode())),
    }
)


def _all_finite(values: Sequence[float | None]) -> bool:
    return len(values) > 0 and all(value is not None and math.isfinite(value) for value in values)
