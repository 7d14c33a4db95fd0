"""The gate: every check of one evaluation, and the decision that follows from them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from eval_platform.errors import EvalPlatformError
from eval_platform.quality import reproducibility, rules, suites
from eval_platform.quality.history import History, read_history
from eval_platform.quality.imported import check_imported
from eval_platform.store import Store, commits, decisions, layout, read_record
from eval_platform.tasks import load_task
from eval_platform.tasks.schema import TaskFile
from eval_platform.values import IMPORTED, Check, Decision

# Raised whenever a rule or a threshold changes: `recheck` then judges stored results anew, without inference.
GATE_VERSION = "1"

# What only warns unless a task file's `quality: {raise: [...]}` names it.
WARNINGS = (
    "predictions_vary",
    "above_chance",
    "score_steady",
    "responses_not_empty",
    "responses_complete",
    "prompts_complete",
    "responses_parsed",
)


def run_checks(evaluation: Mapping[str, Any], samples: pa.Table, definition: TaskFile, history: History) -> list[Check]:
    """Everything that is asked of one evaluation, reproducibility aside; pure but for Great Expectations.

    Args:
        evaluation: the commit record (docs/architecture.md, "Records").
        samples: its samples.
        definition: its task's; says which log-likelihoods and metrics must be there, thresholds, what to raise.
        history: what is known of other evaluations.
    """
    output_type = definition.output_type
    found = [
        *suites.check_samples(samples, evaluation["planned"]["samples"], output_type, definition.score_names),
        rules.planned_sample_ids(samples, evaluation["planned"]),
        *suites.check_scores(evaluation["scores"]),
        rules.scores_complete(evaluation, definition),
        rules.own_answers(history),
        rules.same_prompts(evaluation, history),
        rules.predictions_vary(samples, output_type),
        rules.above_chance(evaluation),
        rules.score_steady(evaluation, history),
        rules.responses_not_empty(samples, definition),
        rules.responses_complete(samples, definition),
        rules.prompts_complete(samples, definition),
        rules.responses_parsed(samples, definition),
    ]
    checks = [check for check in found if check is not None]
    raised = set(definition.quality.raise_)
    unknown = sorted(raised - set(WARNINGS))
    if unknown:
        reason = (
            f"task {definition.task}: quality.raise names {', '.join(unknown)}; the warnings that can be raised are "
            f"{', '.join(WARNINGS)}"
        )
        checks.append(Check("quality_raise", passed=False, severity="error", reason=reason))
    return [replace(check, severity="error") if check.name in raised else check for check in checks]


def judge(store: Store, catalog: Path, evaluation: Mapping[str, Any]) -> list[Check]:
    """Read what the checks need from store and catalog (which must be fresh), and run them.

    Raises StoreError or SchemaError when the samples are not those that were committed.
    """
    samples = commits.read_samples(store, evaluation)
    if evaluation.get("origin") == IMPORTED:
        theirs = read_record(store, layout.task(evaluation["task_id"]))["definition"]
        return check_imported(
            evaluation, samples, theirs, [record for _, record in _published_others(store, evaluation)]
        )
    definition = load_task(store, evaluation["task_id"]).definition
    checks = run_checks(evaluation, samples, definition, read_history(store, catalog, evaluation))
    others = [
        (attempt, commits.read_samples(store, record)) for attempt, record in _published_others(store, evaluation)
    ]
    check = reproducibility.reproducible(evaluation, samples, others, definition.output_type)
    return checks if check is None else [*checks, check]


def decide(store: Store, evaluation: Mapping[str, Any], checks: Sequence[Check], actor: str) -> Decision:
    """The first decision on an attempt. Whoever comes second gets the one that stands.

    Where a rerun contradicts attempts that stand published, those are held as well.
    """
    status, reasons = verdict(checks)
    decision = decisions.append(
        store,
        evaluation["evaluation_id"],
        evaluation["attempt"],
        status=status,
        checks=checks,
        reasons=reasons,
        gate_version=GATE_VERSION,
        actor=actor,
        action="gate",
    )
    hold_contradicted(store, decision)
    return decision


def verdict(checks: Sequence[Check]) -> tuple[decisions.Status, tuple[str, ...]]:
    """Held, with one sentence for each error that failed, else published. Warnings stay with their checks."""
    reasons = tuple(
        f"{check.name}: {check.reason}" for check in checks if not check.passed and check.severity == "error"
    )
    return ("held" if reasons else "published"), reasons


def hold_contradicted(store: Store, decision: Decision) -> None:
    """Hold the published attempts that a gate's decision found this one to contradict.

    Safe to repeat, as after a crash between the two: an attempt that was already held for this one is left alone, so
    that a person's later release stands.
    """
    failed = [c for c in decision.checks if c.name == reproducibility.NAME and not c.passed]
    if decision.action != "gate" or not failed:
        return
    for attempt in failed[0].observed["attempts"]:
        told = reproducibility.contradiction(failed[0], decision.attempt)
        past = decisions.history(store, decision.evaluation_id, attempt)
        if not past or any(_names(d, decision.attempt) for d in past):
            continue
        kept = [check for check in past[-1].checks if check.name != reproducibility.NAME]
        decisions.append(
            store,
            decision.evaluation_id,
            attempt,
            status="held",
            checks=[*kept, told],
            reasons=(f"{told.name}: {told.reason}",),
            gate_version=GATE_VERSION,
            actor=decision.actor,
            action="recheck",
        )


def committed(store: Store, evaluation_id: str, attempt: int) -> dict[str, Any]:
    """The commit. Raises EvalPlatformError when that attempt has none."""
    record = commits.read(store, evaluation_id, attempt)
    if record is None:
        known = commits.attempts(store, evaluation_id)
        there = f"it has the attempts {', '.join(map(str, known))}" if known else "nothing is committed under that id"
        raise EvalPlatformError(
            f"evaluation {evaluation_id} has no result for attempt {attempt}: {there}",
            remedy='look it up with `eval-platform sql "select evaluation_id, attempt, task, status from evaluations"`',
        )
    return record


def _published_others(store: Store, evaluation: Mapping[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    """The other attempts that stand published and whose samples are kept: those pruned can be compared no more."""
    evaluation_id = evaluation["evaluation_id"]
    others = []
    for attempt in commits.attempts(store, evaluation_id):
        standing = decisions.standing(store, evaluation_id, attempt)
        published = standing is not None and standing.status == "published"
        if attempt != evaluation["attempt"] and published and commits.tombstone(store, evaluation_id, attempt) is None:
            others.append((attempt, committed(store, evaluation_id, attempt)))
    return others


def _names(decision: Decision, attempt: int) -> bool:
    return any(
        check.name == reproducibility.NAME and not check.passed and attempt in check.observed["attempts"]
        for check in decision.checks
    )
