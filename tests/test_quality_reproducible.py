"""Two attempts of one evaluation: equal within the tolerance of their dtype, or one check fails on both."""

import math

import pyarrow as pa
import pytest
from quality_cases import edited, evaluate, with_log_likelihood

from eval_platform.quality.reproducibility import contradiction, reproducible


def shifted(samples, difference):
    """The samples with one log-likelihood moved by `difference` nats."""
    value = samples["choices"][2].as_py()[1]["log_likelihood"]
    return with_log_likelihood(samples, 2, 1, value + difference)


def outcome(record, samples, other, output_type="multiple_choice", dtype="float32"):
    return reproducible({**record, "dtype": dtype}, samples, [(1, other)], output_type)


def test_nothing_to_compare_with_is_no_check():
    record, samples, _ = evaluate()
    assert reproducible(record, samples, [], "multiple_choice") is None


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("float16", 2**-6), ("bfloat16", 2**-3)])
def test_log_likelihoods_may_differ_by_the_tolerance_of_their_dtype(dtype, tolerance):
    record, samples, _ = evaluate()
    assert outcome(record, samples, samples, dtype=dtype).passed
    for sign in (1, -1):
        assert outcome(record, samples, shifted(samples, sign * 0.99 * tolerance), dtype=dtype).passed
        check = outcome(record, samples, shifted(samples, sign * 1.01 * tolerance), dtype=dtype)
        assert not check.passed
        assert check.severity == "error"
        assert check.observed == {"attempts": [1]}
        assert "1 of 72 log-likelihoods differ" in check.reason


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_log_likelihood_that_is_none_never_agrees(value):
    record, samples, _ = evaluate()
    assert not outcome(record, samples, with_log_likelihood(samples, 0, 0, value)).passed


def test_the_tolerance_grows_with_the_tokens():
    record, samples, _ = evaluate("loglikelihood_rolling")
    value = samples["log_likelihood"][0].as_py()
    long = edited(samples, 0, n_tokens=1000)
    moved = edited(long, 0, log_likelihood=value + 0.009)
    assert outcome(record, long, moved, "loglikelihood_rolling").passed
    short = edited(moved, 0, n_tokens=100)
    assert not outcome(record, short, long, "loglikelihood_rolling").passed


def test_one_completion_may_differ_and_no_more_than_one_in_a_hundred():
    record, samples, _ = evaluate("generate_until", n=200)
    rows = samples.to_pylist()
    for count, passes in ((1, True), (2, True), (3, False)):
        changed = [row | {"response": "else"} if n < count else row for n, row in enumerate(rows)]
        other = pa.Table.from_pylist(changed, schema=samples.schema)
        assert outcome(record, samples, other, "generate_until").passed is passes


def test_other_samples_never_agree():
    record, samples, _ = evaluate()
    assert not outcome(record, samples, samples.slice(1)).passed


def test_the_other_side_names_the_rerun():
    record, samples, _ = evaluate()
    check = outcome(record, samples, shifted(samples, 1.0))
    told = contradiction(check, 2)
    assert (told.name, told.passed, told.observed) == (check.name, False, {"attempts": [2]})
    assert told.reason.startswith("attempt 2, a rerun, gave other answers")
