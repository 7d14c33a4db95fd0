"""The mean over subsets: against Welch's interval of scipy, a stratified sample, and by simulation."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from eval_platform.statistics import macro_estimate, mean_estimate

_values = st.lists(st.floats(-5, 5), min_size=2, max_size=8)


@given(_values, _values)
def test_two_subsets_have_half_of_welchs_interval(a: list[float], b: list[float]) -> None:
    if np.std(a) < 1e-3 or np.std(b) < 1e-3:
        return
    found = macro_estimate([mean_estimate(a), mean_estimate(b)])

    # A mean of two independent means has the same error as half their difference.
    welch = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.95)
    assert found.value == pytest.approx((np.mean(a) + np.mean(b)) / 2)
    assert found.ci_low is not None
    assert found.ci_high is not None
    assert found.ci_high - found.ci_low == pytest.approx((welch.high - welch.low) / 2)
    assert (found.method, found.n) == ("t_macro", len(a) + len(b))


def test_every_subset_counts_the_same() -> None:
    found = macro_estimate([mean_estimate([1.0] * 98 + [0.0, 0.0]), mean_estimate([0.0, 0.0, 1.0, 0.0])])

    assert found.value == pytest.approx((0.98 + 0.25) / 2)
    errors = [math.sqrt(0.98 * 0.02 / 99), math.sqrt(0.25 * 0.75 / 3)]
    assert found.standard_error == pytest.approx(math.hypot(*errors) / 2)


def test_clusters_are_counted_as_such() -> None:
    parts = [mean_estimate([1.0, 1.0, 0.0, 0.0, 1.0], ["a", "a", "b", "b", "c"]), mean_estimate([0.0, 1.0, 0.5])]

    assert macro_estimate(parts).n_clusters == 6


def test_one_subset_is_its_own_estimate() -> None:
    alone = mean_estimate([0.0, 1.0, 1.0], proportion=True)

    assert macro_estimate([alone], proportion=True) is alone


@pytest.mark.parametrize(("value", "n"), [(0.0, 40), (1.0, 40)])
def test_without_variance_shares_have_wilsons_interval_of_all_items(value: float, n: int) -> None:
    parts = [mean_estimate([value] * 20, proportion=True), mean_estimate([value] * 20, proportion=True)]
    whole = mean_estimate([value] * n, proportion=True)
    found = macro_estimate(parts, proportion=True)

    assert (found.value, found.ci_low, found.ci_high) == (whole.value, whole.ci_low, whole.ci_high)
    assert (found.method, found.standard_error) == ("wilson_macro", 0.0)


def test_unequal_subsets_without_variance_have_a_wider_interval_than_all_items_together() -> None:
    parts = [mean_estimate([0.0] * n, proportion=True) for n in (2, 98)]
    found, whole = macro_estimate(parts, proportion=True), mean_estimate([0.0] * 100, proportion=True)

    assert found.ci_high is not None
    assert whole.ci_high is not None
    assert found.ci_high > 2 * whole.ci_high


@pytest.mark.parametrize(
    ("parts", "value", "why"),
    [
        ([[0.5, None], [1.0, 0.0]], None, "missing"),
        ([[0.5], [1.0, 0.0]], 0.5, "one item"),
        ([[0.25, 0.25], [0.75, 0.75]], 0.5, "no variance"),
    ],
)
def test_what_cannot_be_said_is_said_to_be_so(parts: list[list[float]], value: float | None, why: str) -> None:
    found = macro_estimate([mean_estimate(part) for part in parts])

    assert found.value == value
    assert found.ci_low is None
    assert why in found.method


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    shares, sizes, hits = (0.2, 0.5, 0.8), (12, 30, 60), 0
    for _ in range(600):
        parts = [
            mean_estimate(list(map(float, rng.random(n) < p)), proportion=True)
            for p, n in zip(shares, sizes, strict=True)
        ]
        found = macro_estimate(parts, proportion=True)
        hits += found.ci_low is not None and found.ci_high is not None and found.ci_low <= 0.5 <= found.ci_high

    assert 0.92 <= hits / 600 <= 0.98


def test_no_subset_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one subset"):
        macro_estimate([])
