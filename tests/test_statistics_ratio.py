"""Ratios and the bootstrap: against closed forms, scipy and simulations whose truth is known."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from eval_platform.statistics import Estimate, bootstrap_estimate, mean_estimate, ratio_estimate

finite = st.floats(-1e3, 1e3).map(lambda x: round(x, 6))


@settings(deadline=None)
@given(st.lists(finite, min_size=1, max_size=30), st.sampled_from([None, 3]))
def test_a_ratio_to_ones_is_the_mean(values, clusters):
    names = None if clusters is None else [k % clusters for k in range(len(values))]
    ratio, mean = ratio_estimate(values, [1.0] * len(values), names), mean_estimate(values, names)
    assert ratio.value == pytest.approx(mean.value, abs=1e-12)
    assert (ratio.n, ratio.n_clusters) == (mean.n, mean.n_clusters)
    if np.ptp(values) > 1e-6:
        assert ratio.standard_error == pytest.approx(mean.standard_error, rel=1e-6, abs=1e-9)
        assert ratio.method == mean.method
        if ratio.ci_low is not None:
            assert (ratio.ci_low, ratio.ci_high) == pytest.approx((mean.ci_low, mean.ci_high), rel=1e-6, abs=1e-9)


def test_the_standard_error_is_cochrans():
    rng = np.random.default_rng(0)
    b = rng.integers(1, 50, 40).astype(float)
    a = 2 * b + rng.normal(0, 3, 40)
    estimate = ratio_estimate(a, b)
    r = a.sum() / b.sum()
    variance = ((a - r * b) ** 2).sum() / 39 / 40 / b.mean() ** 2
    assert estimate.value == pytest.approx(r)
    assert estimate.standard_error == pytest.approx(math.sqrt(variance))
    assert (estimate.ci_low, estimate.ci_high) == pytest.approx(stats.t.interval(0.95, 39, r, math.sqrt(variance)))
    exponential = ratio_estimate(a, b, transform="exp")
    assert exponential.method == "t_log"
    assert exponential.value == pytest.approx(math.exp(r))
    assert exponential.standard_error == pytest.approx(math.exp(r) * math.sqrt(variance))
    assert exponential.ci_low == pytest.approx(math.exp(estimate.ci_low))
    assert exponential.ci_high == pytest.approx(math.exp(estimate.ci_high))


@pytest.mark.parametrize("transform", ["identity", "exp"])
def test_the_interval_holds_what_it_promises(transform):
    rng, hits = np.random.default_rng(3), 0
    truth = 1.2 if transform == "identity" else math.exp(1.2)
    for _ in range(2000):
        words = rng.integers(20, 200, 40).astype(float)
        surprise = words * (1.2 + rng.normal(0, 0.2, 40))
        estimate = ratio_estimate(surprise, words, transform=transform)
        hits += estimate.ci_low <= truth <= estimate.ci_high
    assert 0.93 < hits / 2000 < 0.97


def test_the_interval_holds_with_clusters():
    rng, hits = np.random.default_rng(4), 0
    names = np.repeat(np.arange(30), 4).tolist()
    for _ in range(1500):
        words = rng.integers(50, 150, 120).astype(float)
        level = 1.2 + np.repeat(rng.normal(0, 0.2, 30), 4)
        estimate = ratio_estimate(words * level, words, names)
        hits += estimate.ci_low <= 1.2 <= estimate.ci_high
    assert 0.93 < hits / 1500 < 0.97


def test_degenerate_ratios_say_why():
    def nothing(reason, n):
        return Estimate(None, None, None, None, f"none: {reason}", n)

    assert ratio_estimate([], []) == nothing("no items", 0)
    assert ratio_estimate([1.0, None], [1, 1]) == nothing("a value is missing or not finite", 2)
    assert ratio_estimate([1.0, 2.0], [1, math.nan]) == nothing("a value is missing or not finite", 2)
    assert ratio_estimate([0.0, 0.0], [0, 0]) == nothing("the denominators sum to 0", 2)
    assert ratio_estimate([4000.0, 1.0], [2, 2], transform="exp") == nothing("too large for a floating-point number", 2)
    assert ratio_estimate([4.0], [2]) == Estimate(2.0, None, None, None, "none: one item has no variance", 1)
    same = ratio_estimate([0.2, 0.4, 0.6], [1, 2, 3])
    assert (same.value, same.standard_error, same.ci_low) == (pytest.approx(0.2), 0.0, None)
    wide = ratio_estimate([0.0, 500.0], [1, 1], transform="exp")
    assert wide.value == pytest.approx(math.exp(250))
    assert (wide.ci_low, wide.ci_high, wide.method) == (None, None, "none: too large for a floating-point number")
    with pytest.raises(ValueError, match="2 numerators but 1 denominators"):
        ratio_estimate([1.0, 2.0], [1])
    with pytest.raises(ValueError, match="negative"):
        ratio_estimate([1.0, 2.0], [1, -1])


def _mean_of(x):
    return lambda counts: counts @ x / counts.sum(axis=1)


def test_bootstrap_agrees_with_scipys():
    x = np.random.default_rng(1).exponential(2, 60)
    for interval, name in (("bca", "BCa"), ("percentile", "percentile")):
        ours = bootstrap_estimate(_mean_of(x), 60, interval=interval, replicates=20_000)
        theirs = stats.bootstrap((x,), np.mean, method=name, n_resamples=20_000, rng=np.random.default_rng(5))
        assert ours.method == f"bootstrap_{interval}"
        assert ours.value == pytest.approx(x.mean())
        assert ours.standard_error == pytest.approx(theirs.standard_error, rel=0.02)
        width = theirs.confidence_interval.high - theirs.confidence_interval.low
        assert ours.ci_low == pytest.approx(theirs.confidence_interval.low, abs=0.04 * width)
        assert ours.ci_high == pytest.approx(theirs.confidence_interval.high, abs=0.04 * width)


def test_bootstrap_draws_whole_clusters():
    rng = np.random.default_rng(2)
    x = np.repeat(rng.normal(0, 1, 30), 5)
    names = np.repeat(np.arange(30), 5).tolist()
    clustered = bootstrap_estimate(_mean_of(x), 150, names, replicates=4000)
    assert clustered.method == "bootstrap_bca_clustered"
    assert clustered.n_clusters == 30
    # The bootstrap's variance is that with C in place of C - 1.
    expected = mean_estimate(x.tolist(), names).standard_error * math.sqrt(29 / 30)
    assert clustered.standard_error == pytest.approx(expected, rel=0.05)
    assert bootstrap_estimate(_mean_of(x), 150, names, replicates=4000) == clustered
    assert bootstrap_estimate(_mean_of(x), 150, names, replicates=4000, seed=1) != clustered


def test_bootstrap_of_corpus_f1_covers_the_truth():
    rng, hits = np.random.default_rng(11), 0

    def f1_of(gold, said):
        tp, wrong = gold & said, gold ^ said
        return lambda counts: 2 * (counts @ tp) / (2 * (counts @ tp) + counts @ wrong)

    for _ in range(400):
        gold = rng.random(80) < 0.5
        said = gold ^ (rng.random(80) < 0.2)
        estimate = bootstrap_estimate(f1_of(gold, said), 80, replicates=600)
        hits += estimate.ci_low <= 0.8 <= estimate.ci_high  # 2*.4 / (2*.4 + .2)
    assert 0.92 < hits / 400 < 0.98


def test_degenerate_bootstraps_say_why():
    assert bootstrap_estimate(_mean_of(np.zeros(0)), 0).method == "none: no items"
    assert bootstrap_estimate(_mean_of(np.ones(1)), 1).method == "none: one item has no variance"
    assert bootstrap_estimate(_mean_of(np.ones(4)), 4, ["a"] * 4).method == "none: one cluster has no variance"
    flat = bootstrap_estimate(_mean_of(np.ones(4)), 4, replicates=50)
    assert (flat.value, flat.standard_error, flat.ci_low) == (1.0, 0.0, None)
    assert bootstrap_estimate(lambda c: np.full(len(c), math.nan), 4).value is None

    def last_only(counts):
        with np.errstate(invalid="ignore", divide="ignore"):
            return counts[:, -1] / counts[:, -1]

    sometimes = bootstrap_estimate(last_only, 4, replicates=50)
    assert (sometimes.value, sometimes.method) == (1.0, "none: the statistic is not defined on every resample")
    # A maximum: no resample exceeds it, so BCa has no finite bias correction on a continuous sample's edge.
    x = np.arange(1.0, 6.0)
    top = bootstrap_estimate(lambda counts: np.where(counts > 0, x, 0).max(axis=1), 5, replicates=200)
    assert top.ci_high == 5
