"""Every rule of the gate: silent on clean data, named when its fault is planted."""

import math
import random

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quality_cases import N_ITEMS, edited, evaluate, failed, with_log_likelihood

from eval_platform.quality import WARNINGS, History, run_checks
from eval_platform.quality.gate import verdict
from eval_platform.quality.rules import primary_score
from eval_platform.warehouse.history import EarlierScore

OUTPUT_TYPES = ("multiple_choice", "generate_until", "loglikelihood_rolling")
# One validation by Great Expectations takes a fifth of a second, so a few examples of each fault.
few = settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.too_slow])


NOTHING_KNOWN = History()


def checks_of(case, history=NOTHING_KNOWN):
    record, samples, definition = case
    return run_checks(record, samples, definition, history)


@pytest.mark.parametrize("output_type", OUTPUT_TYPES)
@given(seed=st.integers(0, 10_000), repeats=st.integers(1, 2))
@few
def test_clean_data_pass_every_check(output_type, seed, repeats):
    checks = checks_of(evaluate(output_type, seed=seed, repeats=repeats))
    assert failed(checks) == set()
    assert verdict(checks) == ("published", ())
    assert len({check.name for check in checks}) == len(checks)


rows = st.integers(0, N_ITEMS - 1)
choice = st.integers(0, 2)


@given(row=rows, choice=choice, value=st.sampled_from([math.nan, None]))
@few
def test_a_missing_log_likelihood_is_named(row, choice, value):
    record, samples, definition = evaluate()
    planted = with_log_likelihood(samples, row, choice, value)
    checks = run_checks(record, planted, definition, History())
    assert failed(checks) == {"log_likelihood_present"}
    reason = next(check.reason for check in checks if not check.passed)
    assert reason.startswith(f"1 of {3 * N_ITEMS} log-likelihoods")
    assert samples["sample_id"][row].as_py() in reason
    assert f"choice {choice}" in reason
    assert verdict(checks)[0] == "held"


@given(row=rows, choice=choice, value=st.one_of(st.sampled_from([math.inf, -math.inf]), st.floats(1e-5, 1e300)))
@few
def test_an_infinite_or_positive_log_likelihood_is_named(row, choice, value):
    record, samples, definition = evaluate()
    planted = with_log_likelihood(samples, row, choice, value)
    assert failed(run_checks(record, planted, definition, History())) == {"log_likelihood_in_range"}


def test_rounding_above_zero_is_accepted():
    record, samples, definition = evaluate()
    planted = with_log_likelihood(samples, 0, 0, 5e-7)
    assert failed(run_checks(record, planted, definition, History())) == set()


@pytest.mark.parametrize(("value", "name"), [(math.nan, "present"), (None, "present"), (-math.inf, "in_range")])
def test_a_rolling_log_likelihood_is_looked_at(value, name):
    record, samples, definition = evaluate("loglikelihood_rolling")
    planted = edited(samples, 3, log_likelihood=value)
    assert failed(run_checks(record, planted, definition, History())) == {f"log_likelihood_{name}"}


def test_a_row_without_choices_is_a_missing_log_likelihood():
    record, samples, definition = evaluate()
    for choices in (None, []):
        planted = edited(samples, 5, choices=choices)
        assert failed(run_checks(record, planted, definition, History())) == {"log_likelihood_present"}


def test_one_unconditional_log_likelihood_asks_for_all():
    record, samples, definition = evaluate()
    rows = samples.to_pylist()
    for row in rows:
        for one in row["choices"]:
            one["unconditional_log_likelihood"] = -2.0
    rows[4]["choices"][1]["unconditional_log_likelihood"] = None
    planted = pa.Table.from_pylist(rows, schema=samples.schema)
    checks = run_checks(record, planted, definition, History())
    assert failed(checks) == {"log_likelihood_present"}
    assert "choice 1 unconditional" in next(check.reason for check in checks if not check.passed)


@given(row=rows)
@few
def test_a_missing_sample_is_named(row):
    record, samples, definition = evaluate()
    planted = pa.concat_tables([samples.slice(0, row), samples.slice(row + 1)])
    checks = run_checks(record, planted, definition, History())
    assert failed(checks) == {"planned_rows", "planned_sample_ids"}
    reasons = " ".join(verdict(checks)[1])
    assert f"{N_ITEMS - 1} samples are stored, {N_ITEMS} were planned" in reasons


@given(row=rows)
@few
def test_a_duplicate_is_named(row):
    record, samples, definition = evaluate()
    planted = pa.concat_tables([samples, samples.slice(row, 1)])
    checks = run_checks(record, planted, definition, History())
    assert failed(checks) == {"planned_rows", "unique_samples"}


@given(row=rows, other=rows.filter(bool))
@few
def test_a_sample_in_place_of_another_is_named(row, other):
    record, samples, definition = evaluate()
    taken = samples["sample_id"][(row + other) % N_ITEMS].as_py() if other else None
    stranger = edited(samples, row, sample_id="0" * 32)
    assert failed(run_checks(record, stranger, definition, History())) == {"planned_sample_ids"}
    if taken != samples["sample_id"][row].as_py():
        twice = edited(samples, row, sample_id=taken)
        assert failed(run_checks(record, twice, definition, History())) == {"planned_sample_ids", "unique_samples"}


def test_samples_in_another_order_are_not_those_planned():
    record, samples, definition = evaluate()
    shuffled = samples.take(random.Random(1).sample(range(N_ITEMS), N_ITEMS))
    assert failed(run_checks(record, shuffled, definition, History())) == {"planned_sample_ids"}


def test_no_samples_at_all():
    record, samples, definition = evaluate()
    assert {"planned_rows", "planned_sample_ids"} <= failed(
        run_checks(record, samples.slice(0, 0), definition, History())
    )


@given(row=rows, value=st.sampled_from([math.nan, None]))
@few
def test_a_missing_sample_metric_is_named(row, value):
    record, samples, definition = evaluate()
    metrics = dict(samples["metrics"][row].as_py()) | {"acc": value}
    planted = edited(samples, row, metrics=list(metrics.items()))
    assert failed(run_checks(record, planted, definition, History())) == {"sample_metric_present"}
    absent = edited(samples, row, metrics=[(name, v) for name, v in metrics.items() if name != "acc"])
    assert failed(run_checks(record, absent, definition, History())) == {"sample_metric_present"}


@given(row=rows, value=st.one_of(st.sampled_from([math.inf, -math.inf]), st.floats(1.001, 1e9), st.floats(-9, -0.001)))
@few
def test_a_sample_metric_out_of_range_is_named(row, value):
    record, samples, definition = evaluate()
    metrics = dict(samples["metrics"][row].as_py()) | {"acc_norm": value}
    planted = edited(samples, row, metrics=list(metrics.items()))
    checks = run_checks(record, planted, definition, History())
    assert failed(checks) == {"sample_metric_in_range"}
    assert "acc_norm" in verdict(checks)[1][0]


def planted_score(record, n, **fields):
    scores = [dict(score) for score in record["scores"]]
    scores[n] |= fields
    return {**record, "scores": scores}


some_score = st.integers(0, 5)  # acc and acc_norm of the whole task and of two subsets


@given(n=some_score, value=st.sampled_from([math.nan, None]))
@few
def test_a_score_that_is_none_is_named(n, value):
    record, samples, definition = evaluate()
    planted = planted_score(record, n, value=value, standard_error=None, ci_low=None, ci_high=None)
    assert failed(run_checks(planted, samples, definition, History())) == {"score_present"}


@given(n=some_score, value=st.sampled_from([1.5, -0.5]))
@few
def test_a_score_out_of_range_is_named(n, value):
    record, samples, definition = evaluate()
    planted = planted_score(record, n, value=value, ci_low=value, ci_high=value)
    assert failed(run_checks(planted, samples, definition, History())) - set(WARNINGS) == {"score_in_range"}


@given(n=some_score, value=st.sampled_from([None, math.nan, math.inf, -0.1]))
@few
def test_a_standard_error_that_is_none_is_named(n, value):
    record, samples, definition = evaluate()
    planted = planted_score(record, n, standard_error=value)
    assert failed(run_checks(planted, samples, definition, History())) == {"standard_error"}


@pytest.mark.parametrize("fields", [{"ci_low": None}, {"ci_low": 1.0, "ci_high": 0.0}, {"ci_high": 0.0, "ci_low": 0.0}])
def test_an_interval_that_is_none_is_named(fields):
    record, samples, definition = evaluate()
    planted = planted_score(record, 2, **fields)
    assert failed(run_checks(planted, samples, definition, History())) == {"interval"}


def test_one_item_needs_no_standard_error():
    record, samples, definition = evaluate(n=1)
    assert record["scores"][0]["standard_error"] is None
    assert failed(run_checks(record, samples, definition, History())) - set(WARNINGS) == set()


def test_a_score_that_the_task_gives_must_be_there():
    record, samples, definition = evaluate()
    planted = {**record, "scores": [s for s in record["scores"] if s["metric"] != "acc_norm"]}
    assert failed(run_checks(planted, samples, definition, History())) == {"scores_complete"}


def test_a_model_of_nan_is_held_with_every_score_missing():
    case = evaluate(skill=1.0)
    record, samples, definition = case
    rows = samples.to_pylist()
    for row in rows:
        row["metrics"] = [(name, None) for name, _ in row["metrics"]]
        row["chosen"] = None
        for one in row["choices"]:
            one["log_likelihood"] = math.nan
    nothing = {
        "value": None,
        "standard_error": None,
        "ci_low": None,
        "ci_high": None,
        "interval_method": "none: missing",
    }
    planted = {
        **record,
        "scores": [{**score, **nothing} for score in record["scores"]],
        "primary": {**record["primary"], "value": None},
    }
    checks = run_checks(planted, pa.Table.from_pylist(rows, schema=samples.schema), definition, History())
    assert failed(checks) == {"log_likelihood_present", "sample_metric_present", "score_present"}
    status, reasons = verdict(checks)
    assert status == "held"
    assert reasons[0].startswith(f"log_likelihood_present: {3 * N_ITEMS} of {3 * N_ITEMS} log-likelihoods are NaN")


def test_answers_of_other_weights_and_other_prompts_hold():
    checks = checks_of(evaluate(), History(same_answers=("root/run/step_5",), other_prompts=("b" * 32,)))
    assert failed(checks) == {"own_answers", "same_prompts"}
    assert "root/run/step_5" in verdict(checks)[1][0]


def constant(case, output_type):
    record, samples, definition = case
    rows = samples.to_pylist()
    for row in rows:
        if output_type == "multiple_choice":
            row["chosen"] = 1
        else:
            row["response"] = "It is 7."
    return record, pa.Table.from_pylist(rows, schema=samples.schema), definition


@pytest.mark.parametrize("output_type", ["multiple_choice", "generate_until"])
def test_one_prediction_for_all_is_a_warning(output_type):
    checks = checks_of(constant(evaluate(output_type), output_type))
    assert failed(checks) == {"predictions_vary"}
    assert verdict(checks) == ("published", ())


def test_one_prediction_is_right_where_one_answer_is():
    record, samples, definition = constant(evaluate(), "multiple_choice")
    rows = [row | {"target": "1"} for row in samples.to_pylist()]
    samples = pa.Table.from_pylist(rows, schema=samples.schema)
    assert failed(run_checks(record, samples, definition, History())) == set()


def test_chance_is_a_warning_and_can_be_raised():
    # A third is right: every item gets the same choice, and the targets go round.
    guessing = evaluate(skill=1 / 3, n=90, seed=3)
    checks = checks_of(guessing)
    assert failed(checks) == {"above_chance"}
    assert verdict(checks)[0] == "published"

    raised = evaluate(skill=1 / 3, n=90, seed=3, quality={"raise": ["above_chance"]})
    status, reasons = verdict(checks_of(raised))
    assert status == "held"
    assert "is not distinguishable from chance (0.3333)" in reasons[0]


@given(skill=st.floats(0, 1), seed=st.integers(0, 100))
@few
def test_chance_is_compared_with_the_interval(skill, seed):
    record, samples, definition = evaluate(skill=skill, seed=seed)
    score = primary_score(record)
    assert ("above_chance" in failed(run_checks(record, samples, definition, History()))) == (score["ci_low"] <= 1 / 3)


def test_raising_what_is_no_warning_holds_and_says_which_there_are():
    checks = checks_of(evaluate(quality={"raise": ["above_change"]}))
    assert failed(checks) == {"quality_raise"}
    assert "above_chance" in verdict(checks)[1][0]


def generation_with(count, **fields):
    record, samples, definition = evaluate("generate_until")
    rows = [row | fields if n < count else row for n, row in enumerate(samples.to_pylist())]
    return record, pa.Table.from_pylist(rows, schema=samples.schema), definition


@pytest.mark.parametrize(
    ("name", "fields", "accepted"),
    [
        ("responses_not_empty", {"response": " \n"}, 1),
        ("responses_complete", {"finish_reason": "length"}, 2),
        ("prompts_complete", {"truncated_left_tokens": 5}, 2),
        ("responses_parsed", {"extracted": [("number", None)]}, 4),
    ],
)
def test_shares_above_their_threshold_warn(name, fields, accepted):
    assert failed(checks_of(generation_with(accepted, **fields))) == set()
    checks = checks_of(generation_with(accepted + 1, **fields))
    assert failed(checks) == {name}
    assert next(c.reason for c in checks if not c.passed).startswith(f"{accepted + 1} of {N_ITEMS}")


def test_a_task_sets_its_own_threshold():
    record, samples, _ = generation_with(3, response="")
    lenient = evaluate("generate_until", quality={"empty_share": 0.2})[2]
    assert failed(run_checks(record, samples, lenient, History())) == set()


def test_without_stop_strings_reaching_the_length_says_nothing():
    record, samples, definition = generation_with(N_ITEMS, finish_reason="length")
    assert failed(run_checks(record, samples, definition, History())) == {"responses_complete"}
    free = evaluate("generate_until", generation_kwargs={"until": []})[2]
    assert failed(run_checks(record, samples, free, History())) == set()


def test_a_fall_from_the_checkpoint_before_warns_and_a_rise_does_not():
    case = evaluate(skill=0.6, seed=5, n=96)
    score = primary_score(case[0])

    def previous(value):
        return History(previous=EarlierScore("root/run/step_5", 5, value, 0.02))

    error = math.hypot(score["standard_error"], 0.02)
    assert failed(checks_of(case, previous(score["value"] + 4.01 * error))) == {"score_steady"}
    assert failed(checks_of(case, previous(score["value"] + 3.99 * error))) == set()
    assert failed(checks_of(case, previous(0.0))) == set()


def test_where_lower_is_better_a_rise_warns():
    case = evaluate("loglikelihood_rolling")
    score = primary_score(case[0])
    better = History(previous=EarlierScore("root/run/step_5", 5, score["value"] - 100 * score["standard_error"], 0.0))
    worse = History(previous=EarlierScore("root/run/step_5", 5, score["value"] + 100 * score["standard_error"], 0.0))
    assert failed(checks_of(case, better)) == {"score_steady"}
    assert failed(checks_of(case, worse)) == set()
