"""What Great Expectations has no words for: comparisons with the plan, with chance and with other evaluations.

Every rule is a pure function that returns a Check, or None where the question does not arise (chance of a task that
has none, empty completions of a task that is not answered in text).
"""

import math
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from eval_platform.identity import ordered_id
from eval_platform.quality.history import History
from eval_platform.tasks.schema import TaskFile
from eval_platform.values import Check

# Below this many items one prediction for all is too likely by chance: 8 items of 2 choices, 2 in 2**8.
CONSTANT_MIN_ITEMS = 8
# Shares above which the gate warns unless a task says otherwise. Judgement, not measurement: a few odd answers are
# normal, and an answer cut short or not parsed is often a wrong answer given by the setup and not by the model.
EMPTY_SHARE = 0.05
TRUNCATED_SHARE = 0.1
UNPARSED_SHARE = 0.2
# How many standard errors of the difference a score may fall from one checkpoint to the next. The items are the same,
# so the two errors are positively correlated and the true error of the difference is smaller: 4 is on the quiet side,
# about 1 false alarm in 30,000 for normal errors, since a curve of 20 tasks x 1,000 checkpoints is looked at 20,000
# times.
JUMP_STANDARD_ERRORS = 4.0


def planned_sample_ids(samples: pa.Table, planned: Mapping[str, Any]) -> Check:
    """The samples are those of the planned items, in their order (repeats of one item counted once)."""
    ids = list(dict.fromkeys(samples["sample_id"].to_pylist()))
    found = ordered_id(ids)
    if found == planned["sample_ids"]:
        return Check("planned_sample_ids", passed=True, severity="error")
    reason = (
        f"the stored samples are not those planned: {len(ids)} items with the id {found}, planned were "
        f"{planned['items']} with the id {planned['sample_ids']}"
    )
    return Check("planned_sample_ids", passed=False, severity="error", reason=reason, observed={"sample_ids": found})


def scores_complete(evaluation: Mapping[str, Any], definition: TaskFile) -> Check:
    """Every score that the task gives is there for the whole task."""
    there = {score["metric"] for score in evaluation["scores"] if score["subset"] == ""}
    missing = [name for name in definition.score_names if name not in there]
    if not missing:
        return Check("scores_complete", passed=True, severity="error")
    reason = f"the commit has no score {', '.join(missing)} for the whole task"
    return Check("scores_complete", passed=False, severity="error", reason=reason, observed={"missing": missing})


def own_answers(history: History) -> Check:
    """No other weights gave the same log-likelihoods to the last bit: two models never agree so far."""
    if not history.same_answers:
        return Check("own_answers", passed=True, severity="error")
    others = ", ".join(history.same_answers[:3])
    reason = (
        f"every log-likelihood is bit-identical to that of other weights ({others}): either one model was answered "
        f"for another, or the same weights were saved anew"
    )
    return Check(
        "own_answers", passed=False, severity="error", reason=reason, observed={"keys": list(history.same_answers)}
    )


def same_prompts(evaluation: Mapping[str, Any], history: History) -> Check:
    """The same ask, tokenizer and settings give the same prompts."""
    if not history.other_prompts:
        return Check("same_prompts", passed=True, severity="error")
    reason = (
        f"the prompts ({evaluation['prompts_id']}) differ from those that the same task, tokenizer and settings gave "
        f"before ({', '.join(history.other_prompts[:3])}): something that is in no id leaked into rendering"
    )
    observed = {"prompts_ids": list(history.other_prompts)}
    return Check("same_prompts", passed=False, severity="error", reason=reason, observed=observed)


def predictions_vary(samples: pa.Table, output_type: str) -> Check | None:
    """Not one and the same prediction for all items, where the right answers differ.

    The prediction is the index of the likeliest choice or the whole completion, of the first repeat.
    """
    column = {"multiple_choice": "chosen", "generate_until": "response"}.get(output_type)
    if column is None:
        return None
    # The prediction is null where a log-likelihood is not finite, which other checks tell of.
    rows = zip(*(samples[name].to_pylist() for name in ("repeat", "target", column)), strict=True)
    first = [(target, prediction) for repeat, target, prediction in rows if repeat == 0]
    if len(first) < CONSTANT_MIN_ITEMS or len({target for target, _ in first}) < 2:
        return None
    predictions = [prediction for _, prediction in first]
    if len(set(predictions)) > 1 or predictions[0] is None:
        return Check("predictions_vary", passed=True, severity="warning")
    shown = f"choice {predictions[0]}" if column == "chosen" else repr(predictions[0][:80])
    reason = f"the model gives one answer to all {len(predictions)} items: {shown}"
    return Check("predictions_vary", passed=False, severity="warning", reason=reason, observed={"prediction": shown})


def above_chance(evaluation: Mapping[str, Any]) -> Check | None:
    """The primary score is better than chance beyond its 95 % interval: the interval neither contains chance nor lies
    on its worse side. Without an interval the value itself is compared."""
    primary, score = evaluation["primary"], primary_score(evaluation)
    chance, higher = primary["chance"], primary["higher_is_better"]
    if chance is None or score is None:
        return None
    bound = score["ci_low"] if higher else score["ci_high"]
    bound = score["value"] if bound is None else bound
    if bound > chance if higher else bound < chance:
        return Check("above_chance", passed=True, severity="warning")
    reason = f"{primary['metric']} {_shown(score)} is not distinguishable from chance ({chance:.4g}), or worse"
    observed = {"value": score["value"], "ci_low": score["ci_low"], "ci_high": score["ci_high"], "chance": chance}
    return Check("above_chance", passed=False, severity="warning", reason=reason, observed=observed)


def score_steady(evaluation: Mapping[str, Any], history: History) -> Check | None:
    """The primary score did not fall from the run's previous published checkpoint by more than chance explains."""
    score, previous = primary_score(evaluation), history.previous
    if previous is None or score is None:
        return None
    if score["standard_error"] is None or previous.standard_error is None:
        return None
    error = math.hypot(score["standard_error"], previous.standard_error)
    loss = previous.value - score["value"]
    if not evaluation["primary"]["higher_is_better"]:
        loss = -loss
    if loss <= JUMP_STANDARD_ERRORS * error:
        return Check("score_steady", passed=True, severity="warning")
    reason = (
        f"{evaluation['primary']['metric']} went from {previous.value:.4g} at step {previous.step} ({previous.key}) to "
        f"{score['value']:.4g}, worse by more than {JUMP_STANDARD_ERRORS:g} standard errors of the difference "
        f"({error:.2g})"
    )
    observed = {"previous": previous.value, "previous_key": previous.key, "value": score["value"]}
    return Check("score_steady", passed=False, severity="warning", reason=reason, observed=observed)


def responses_not_empty(samples: pa.Table, definition: TaskFile) -> Check | None:
    """Few completions are empty or only white space."""
    if definition.output_type != "generate_until":
        return None
    empty = sum(not (text or "").strip() for text in samples["response"].to_pylist())
    limit = definition.quality.empty_share
    return _share("responses_not_empty", empty, samples.num_rows, limit, EMPTY_SHARE, "responses are empty")


def responses_complete(samples: pa.Table, definition: TaskFile) -> Check | None:
    """Few completions ended because they reached the task's maximum length.

    Without stop strings a task asks for so many tokens and takes what comes: reaching the length says nothing.
    """
    if definition.generation is None or not definition.generation.stop:
        return None
    cut = sum(reason == "length" for reason in samples["finish_reason"].to_pylist())
    limit = definition.quality.truncated_share
    return _share(
        "responses_complete", cut, samples.num_rows, limit, TRUNCATED_SHARE, "responses were cut off at maximum length"
    )


def prompts_complete(samples: pa.Table, definition: TaskFile) -> Check | None:
    """Few prompts lost tokens on their left because the model's window is too short."""
    cut = sum((n or 0) > 0 for n in samples["truncated_left_tokens"].to_pylist())
    limit = definition.quality.truncated_share
    what = "prompts did not fit the model's window and lost their beginning"
    return _share("prompts_complete", cut, samples.num_rows, limit, TRUNCATED_SHARE, what)


def responses_parsed(samples: pa.Table, definition: TaskFile) -> Check | None:
    """Few completions in which the filters of the primary metric found no answer."""
    if definition.output_type != "generate_until":
        return None
    name = definition.primary_metric.partition(",")[2] or "none"
    rows = [dict(row or ()) for row in samples["extracted"].to_pylist()]
    found = [row[name] for row in rows if name in row]  # no entry: a filter took one answer of all repeats
    unparsed = sum(text is None for text in found)
    limit = definition.quality.unparsed_share
    what = f"responses hold no answer that the filter {name!r} finds"
    return _share("responses_parsed", unparsed, len(found), limit, UNPARSED_SHARE, what)


def primary_score(evaluation: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The score that the evaluation is known by, its primary metric over the whole task; None without a number."""
    metric = evaluation["primary"]["metric"]
    for score in evaluation["scores"]:
        if score["metric"] == metric and score["subset"] == "" and score["subject"] is None:
            value = score["value"]
            return score if value is not None and math.isfinite(value) else None
    return None


def _share(name: str, count: int, total: int, limit: float | None, default: float, what: str) -> Check | None:
    if total == 0:
        return None
    limit = default if limit is None else limit
    observed = {"count": count, "total": total, "limit": limit}
    if count / total <= limit:
        return Check(name, passed=True, severity="warning", observed=observed)
    reason = f"{count} of {total} {what}; up to {limit:.3g} of them is accepted"
    return Check(name, passed=False, severity="warning", reason=reason, observed=observed)


def _shown(score: Mapping[str, Any]) -> str:
    if score["ci_low"] is None or score["ci_high"] is None:
        return f"{score['value']:.4g}"
    return f"{score['value']:.4g} [{score['ci_low']:.4g}, {score['ci_high']:.4g}]"
