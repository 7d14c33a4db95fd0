"""The Great Expectations suites: what every sample and every score of an evaluation must be.

Great Expectations takes seconds to import, so it is imported on first use, once per process; `warm` begins that in a
thread while the model still answers. One validation costs a hundredth of a second per expectation and no more for
more rows, hence few expectations over prepared columns (`frames`), first with yes or no as their only result; only
what failed is validated again for its counts and examples.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from eval_platform.importing import collector_paused
from eval_platform.quality import frames
from eval_platform.values import Check, Severity

if TYPE_CHECKING:
    import pandas as pd
    from great_expectations.core import ExpectationSuite, ExpectationValidationResult
    from great_expectations.core.batch_definition import BatchDefinition
    from great_expectations.expectations.expectation import Expectation

# log_softmax subtracts a logarithm that is never below the largest logit, so in exact arithmetic, and in torch's own
# kernels, no log-likelihood is above 0; fused GPU kernels approximate exp and log and may exceed it by their rounding.
POSITIVE_ROUNDING = 1e-6
_LARGEST = sys.float_info.max
_EXAMPLES = 3
_INDEX = ("sample_id", "repeat", "part", "subset", "metric", "value", "ci_low", "ci_high")
_lock = threading.RLock()  # neither importing GX nor using its context is safe from two threads


@dataclass(frozen=True, slots=True)
class Rule:
    """One expectation, the check it belongs to and the sentence that says what its failure means.

    The sentence may name {unexpected}, {total}, {observed} and {examples}; shown: the columns that examples tell, all
    that are known of them when None.
    """

    check: str
    expectation: Expectation
    sentence: str
    shown: tuple[str, ...] | None = None


def warm() -> threading.Thread:
    """Import Great Expectations in a background thread; the first validation waits for it if it must."""
    thread = threading.Thread(target=_batch_definition, name="import great_expectations", daemon=True)
    thread.start()
    return thread


def check_samples(samples: pa.Table, planned_rows: int, output_type: str, metrics: Sequence[str]) -> list[Check]:
    """What holds for any task's samples.

    Args:
        samples: the evaluation's samples (`scoring.SAMPLE_SCHEMA`).
        planned_rows: items times repeats, from the commit.
        output_type: the task's; says which log-likelihoods must be there.
        metrics: names of the metrics that every sample must carry.
    """
    checks = validate(samples.select(["sample_id", "repeat"]).to_pandas(), row_rules(planned_rows))
    likelihoods = frames.log_likelihoods(samples, output_type)
    if likelihoods is not None:
        checks += validate(likelihoods, likelihood_rules())
    return checks + validate(frames.sample_metrics(samples, metrics), metric_rules())


def check_scores(scores: Sequence[Mapping[str, Any]]) -> list[Check]:
    """What holds for the scores of any evaluation: there, in range, with a standard error and its interval."""
    return validate(frames.scores(scores), score_rules())


def row_rules(planned_rows: int) -> list[Rule]:
    """Frame: one row per sample."""
    gxe = expectations()
    return [
        Rule(
            "planned_rows",
            gxe.ExpectTableRowCountToEqual(value=planned_rows),
            f"{{observed}} samples are stored, {planned_rows} were planned",
        ),
        Rule(
            "unique_samples",
            gxe.ExpectCompoundColumnsToBeUnique(column_list=["sample_id", "repeat"]),
            "{unexpected} of {total} samples share their sample_id and repeat with another ({examples})",
        ),
    ]


def likelihood_rules() -> list[Rule]:
    """Frame: `frames.log_likelihoods`."""
    gxe = expectations()
    return [
        Rule(
            "log_likelihood_present",
            gxe.ExpectColumnValuesToNotBeNull(column="log_likelihood"),
            "{unexpected} of {total} log-likelihoods are NaN or missing ({examples}): the model or the engine fails",
        ),
        Rule(
            "log_likelihood_in_range",
            gxe.ExpectColumnValuesToBeBetween(
                column="log_likelihood", min_value=-_LARGEST, max_value=POSITIVE_ROUNDING
            ),
            "{unexpected} of {total} log-likelihoods are infinite or above 0 ({examples}): the model or the engine "
            "fails",
        ),
    ]


def metric_rules() -> list[Rule]:
    """Frame: `frames.sample_metrics`."""
    gxe = expectations()
    return [
        Rule(
            "sample_metric_present",
            gxe.ExpectColumnValuesToNotBeNull(column="value"),
            "{unexpected} of {total} metric values of samples are NaN or missing ({examples})",
        ),
        Rule(
            "sample_metric_in_range",
            gxe.ExpectColumnValuesToBeBetween(column="outside", min_value=0, max_value=0),
            "{unexpected} of {total} metric values of samples are infinite or out of their metric's range ({examples})",
        ),
    ]


def score_rules() -> list[Rule]:
    """Frame: `frames.scores`."""
    gxe = expectations()
    return [
        Rule(
            "score_present",
            gxe.ExpectColumnValuesToNotBeNull(column="value"),
            "{unexpected} of {total} scores cannot be computed ({examples})",
        ),
        Rule(
            "score_in_range",
            gxe.ExpectColumnValuesToBeBetween(column="outside", min_value=0, max_value=0),
            "{unexpected} of {total} scores are infinite or out of their metric's range ({examples})",
        ),
        Rule(
            "standard_error",
            gxe.ExpectColumnValuesToBeBetween(column="standard_error", min_value=0, max_value=_LARGEST),
            "{unexpected} of {total} standard errors are missing, infinite or below 0 ({examples})",
        ),
        Rule(
            "interval",
            gxe.ExpectColumnValuesToBeBetween(column="outside_interval", min_value=0, max_value=0),
            "{unexpected} of {total} intervals are missing, out of order or do not contain their value ({examples})",
        ),
    ]


def validate(frame: pd.DataFrame, rules: Sequence[Rule]) -> list[Check]:
    """One Check per rule, in their order. An expectation that crashes is a failed check: it has shown nothing."""
    with _lock:
        batch = _batch_definition().get_batch({"dataframe": frame})
        first = batch.validate(_suite(rules), result_format="BOOLEAN_ONLY").results
        succeeded = {_number(result): bool(result.success) for result in first}
        failed = [(n, rule) for n, rule in enumerate(rules) if not succeeded.get(n, False)]
        details: dict[int, ExpectationValidationResult] = {}
        if failed:
            result_format = {
                "result_format": "SUMMARY",
                "unexpected_index_column_names": [name for name in _INDEX if name in frame.columns],
                "partial_unexpected_count": _EXAMPLES,
            }
            second = batch.validate(_suite(rules, only={n for n, _ in failed}), result_format=result_format).results
            details = {_number(result): result for result in second}
    return [
        Check(rule.check, passed=True, severity=_severity(rule))
        if succeeded.get(n, False)
        else _failure(rule, details.get(n))
        for n, rule in enumerate(rules)
    ]


def _suite(rules: Sequence[Rule], only: set[int] | None = None) -> ExpectationSuite:
    """The suite of `rules`; every expectation carries its place, since results come back in another order."""
    import great_expectations as gx

    expectations = []
    for n, rule in enumerate(rules):
        if only is None or n in only:
            rule.expectation.meta = {"n": n}
            expectations.append(rule.expectation)
    return gx.ExpectationSuite(name="suite", expectations=expectations)


def _number(result: ExpectationValidationResult) -> int:
    config = result.expectation_config
    return config.meta["n"] if config is not None and config.meta else -1


def _severity(rule: Rule) -> Severity:
    """Great Expectations' severity in our words: critical holds the evaluation."""
    return "error" if rule.expectation.severity.value == "critical" else "warning"


def _failure(rule: Rule, result: ExpectationValidationResult | None) -> Check:
    crash = _crash(result)
    if crash is not None:
        reason = f"the check {rule.check} could not run: {crash}; nothing is known, so nothing is published"
        return Check(rule.check, passed=False, severity="error", reason=reason, observed={"crash": crash})
    found = (result.result if result is not None else None) or {}
    examples = [_example(example, rule.shown) for example in found.get("partial_unexpected_index_list") or ()]
    observed = {
        "unexpected": found.get("unexpected_count"),
        "total": found.get("element_count"),
        "observed": found.get("observed_value"),
        "examples": examples,
    }
    observed = {name: value for name, value in observed.items() if value not in (None, [])}
    sentence = rule.sentence.format(
        unexpected=observed.get("unexpected"),
        total=observed.get("total"),
        observed=observed.get("observed"),
        examples="; ".join(examples) or "no example",
    )
    return Check(rule.check, passed=False, severity=_severity(rule), reason=sentence, observed=observed)


def _crash(result: ExpectationValidationResult | None) -> str | None:
    """What a metric raised; GX reports it as a failure like any other, under one of two shapes of exception_info."""
    if result is None:
        return "Great Expectations returned no result for it"
    info = result.exception_info or {}
    for entry in (info, *(value for value in info.values() if isinstance(value, dict))):
        if entry.get("raised_exception"):
            return str(entry.get("exception_message"))
    return None


def _example(found: Mapping[str, Any] | int, shown: tuple[str, ...] | None) -> str:
    """One unexpected row in words, e.g. "sample_id 3f.., repeat 0, log_likelihood nan"; by its number if nameless."""
    if not isinstance(found, Mapping):
        return f"row {found}"
    parts = []
    for name, value in sorted(found.items(), key=lambda pair: _ORDER.get(pair[0], len(_ORDER))):
        if value == "" or value is None or (shown is not None and name not in shown):
            continue
        number = isinstance(value, float) and not math.isnan(value)
        parts.append(f"{name} {value:.6g}" if number else f"{name} {value}")
    return ", ".join(parts)


_ORDER = {name: n for n, name in enumerate(_INDEX)}


def expectations() -> Any:
    """The module `great_expectations.expectations`, once nobody is importing it any more."""
    with _lock:
        import great_expectations.expectations as gxe

        return gxe


@cache
def _make_batch_definition() -> BatchDefinition:
    """One pandas asset for the whole process, to which every frame is handed in turn: it keeps only the last one."""
    with collector_paused():
        import great_expectations as gx
        from great_expectations.data_context.types.base import ProgressBarsConfig

    context = gx.get_context(mode="ephemeral")
    context.enable_analytics(False)
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    asset = context.data_sources.add_pandas("evaluation").add_dataframe_asset("frame")
    return asset.add_batch_definition_whole_dataframe("whole")


def _batch_definition() -> BatchDefinition:
    with _lock:
        return _make_batch_definition()
