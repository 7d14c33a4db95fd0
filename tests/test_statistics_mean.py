"""Means: against closed forms, scipy and simulations whose truth is known."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from eval_platform.statistics import Estimate, mean_estimate
from eval_platform.statistics.clusters import group

finite = st.floats(-1e6, 1e6).map(lambda x: round(x, 6))


@settings(deadline=None)
@given(st.lists(finite, min_size=2, max_size=40))
def test_mean_equals_scipys_t_interval(values):
    estimate = mean_estimate(values)
    assert estimate.value == pytest.approx(np.mean(values), rel=1e-12, abs=1e-9)
    assert estimate.n == len(values)
    assert estimate.n_clusters is None
    if np.ptp(values) <= 1e-9 * np.abs(values).max():
        return  # rounding decides whether there is variance; see the tests of equal values
    error = stats.sem(values)
    assert estimate.standard_error == pytest.approx(error, rel=1e-6)
    low, high = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=error)
    assert estimate.method == "t"
    assert (estimate.ci_low, estimate.ci_high) == pytest.approx((low, high), rel=1e-6, abs=1e-6)


@settings(deadline=None)
@given(st.integers(1, 300), st.data())
def test_proportion_equals_scipys_wilson_interval(n, data):
    right = data.draw(st.integers(0, n))
    estimate = mean_estimate([1.0] * right + [0.0] * (n - right), proportion=True)
    oracle = stats.binomtest(right, n).proportion_ci(0.95, method="wilson")
    assert estimate.method == "wilson"
    assert estimate.value == right / n
    assert (estimate.ci_low, estimate.ci_high) == pytest.approx((oracle.low, oracle.high), abs=1e-12)
    assert 0 <= estimate.ci_low <= estimate.value <= estimate.ci_high <= 1
    if n > 1:
        assert estimate.standard_error == pytest.approx(math.sqrt(right / n * (1 - right / n) / (n - 1)))


@settings(deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=2, max_size=20), st.randoms())
def test_shares_that_are_not_all_zero_or_one_stay_within_their_range(values, random):
    estimate = mean_estimate(values, proportion=True)
    if estimate.ci_low is not None and estimate.ci_high is not None:
        assert 0 <= estimate.ci_low <= estimate.value <= estimate.ci_high <= 1
    shuffled = values[:]
    random.shuffle(shuffled)
    assert mean_estimate(shuffled, proportion=True).value == estimate.value
    if {0.25, 0.5} & set(values) and len(set(values)) > 1:
        assert estimate.method == "t"


@settings(deadline=None)
@given(st.lists(st.tuples(finite, st.integers(0, 4)), min_size=2, max_size=30))
def test_clustered_standard_error_equals_millers_double_sum(pairs):
    x = np.array([value for value, _ in pairs])
    c = np.array([cluster for _, cluster in pairs])
    count = len(set(c.tolist()))
    estimate = mean_estimate(x.tolist(), c.tolist())
    assert estimate.n_clusters == count
    if count == 1:
        assert (estimate.standard_error, estimate.method) == (None, "none: one cluster has no variance")
        return
    d = x - x.mean()
    # Miller 2024, section 2.2, written out: every pair of items of one cluster.
    pairs_of_cluster = sum(d[i] * d[j] for i in range(len(x)) for j in range(len(x)) if c[i] == c[j])
    expected = math.sqrt(max(pairs_of_cluster, 0) * count / (count - 1)) / len(x)
    assert estimate.standard_error == pytest.approx(expected, rel=1e-4, abs=1e-7 * (1 + np.abs(x).max()))


def test_each_item_its_own_cluster_is_no_clustering():
    values = [0.1, 0.7, 0.4, 0.9]
    alone, clustered = mean_estimate(values), mean_estimate(values, ["a", "b", None, "d"])
    assert clustered == replace(alone, n_clusters=4)


def test_perfectly_correlated_equal_clusters_have_the_error_of_their_means():
    means = [0.0, 1.0, 1.0, 0.0, 1.0]
    values = [mean for mean in means for _ in range(7)]
    clusters = [k for k in range(5) for _ in range(7)]
    estimate = mean_estimate(values, clusters, proportion=True)
    assert estimate.method == "t_clustered"
    assert estimate.standard_error == pytest.approx(stats.sem(means))
    assert estimate.n == 35
    assert estimate.n_clusters == 5


def test_an_item_without_cluster_stands_for_itself():
    groups = group(["a", None, "a", None, 1], 5)
    assert groups.count == 4
    assert groups.codes.tolist() == [0, 1, 0, 2, 3]
    assert group([None, 1], 2).count == 2  # the position 0 of the lone item is no cluster 0
    assert group([0, None, 1], 3).count == 3


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, -math.inf])
def test_a_missing_value_makes_the_mean_missing(bad):
    estimate = mean_estimate([1.0, bad, 0.0], proportion=True)
    assert estimate == Estimate(None, None, None, None, "none: a value is missing or not finite", 3)


def test_degenerate_cases_say_why():
    assert mean_estimate([]) == Estimate(None, None, None, None, "none: no items", 0)
    assert mean_estimate([3.0]) == Estimate(3.0, None, None, None, "none: one item has no variance", 1)
    assert mean_estimate([0.1] * 3) == Estimate(0.1, 0.0, None, None, "none: no variance between items", 3)
    one = mean_estimate([1.0], proportion=True)
    assert (one.method, one.standard_error) == ("wilson", None)
    half = mean_estimate([0.5, 0.5], proportion=True)
    assert (half.value, half.ci_low) == (0.5, None)
    # Every cluster has the same mean, so nothing can be learned about how clusters differ.
    balanced = mean_estimate([0.0, 1.0, 0.0, 1.0], ["a", "a", "b", "b"], proportion=True)
    assert (balanced.value, balanced.standard_error, balanced.ci_low) == (0.5, 0.0, None)


def test_all_wrong_in_clusters_is_not_certainty():
    estimate = mean_estimate([0.0] * 40, [k // 10 for k in range(40)], proportion=True)
    assert (estimate.method, estimate.value, estimate.ci_low) == ("wilson_clustered", 0.0, 0.0)
    assert estimate.ci_high == pytest.approx(stats.binomtest(0, 4).proportion_ci(method="wilson").high)


def test_wrong_use_is_refused():
    with pytest.raises(ValueError, match="3 items but 2 clusters"):
        mean_estimate([1.0, 2.0, 3.0], ["a", "b"])
    with pytest.raises(ValueError, match=r"within \[0, 1\]"):
        mean_estimate([0.0, 1.5], proportion=True)


def _coverage(draw, truth, replications, **kinds):
    hits = 0
    for _ in range(replications):
        values, clusters = draw()
        estimate = mean_estimate(values, clusters, **kinds)
        hits += estimate.ci_low is not None and estimate.ci_low <= truth <= estimate.ci_high
    return hits / replications


def test_the_intervals_hold_what_they_promise():
    rng = np.random.default_rng(7)
    normal = _coverage(lambda: (rng.normal(3, 2, 12).tolist(), None), 3, 3000)
    assert 0.935 < normal < 0.965
    share = _coverage(lambda: ((rng.random(50) < 0.8).astype(float).tolist(), None), 0.8, 3000, proportion=True)
    assert 0.93 < share < 0.97

    def passages():
        ability = np.repeat(rng.normal(0, 1, 25), 6)
        return (0.5 + ability + rng.normal(0, 1, 150)).tolist(), np.repeat(np.arange(25), 6).tolist()

    clustered = _coverage(passages, 0.5, 2000)
    assert 0.935 < clustered < 0.965
    naive = _coverage(lambda: (passages()[0], None), 0.5, 1000)
    assert naive < 0.8  # what clustering is for
