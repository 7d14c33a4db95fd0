"""How records of the store look in Dagster's UI: the same metadata from a run and from the reconciliation sensor."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import dagster as dg
from dagster._core.event_api import PartitionKeyFilter
from dagster._core.instance.utils import RUNLESS_JOB_NAME

from assets.standing import Standing
from eval_platform.store import Store
from eval_platform.values import Arrival, Decision

NO_LINES: Mapping[str, float] = MappingProxyType({})
DATA_VERSION = "dagster/data_version"
DECISION_TAG = "eval/decision"


def data_version(record: Mapping[str, Any]) -> str:
    """What a `results/<task>` partition is made of: the evaluation and which attempt of it."""
    return f"{record['evaluation_id']}.{record['attempt']}"


def result_tags(record: Mapping[str, Any], decision: Decision) -> dict[str, str]:
    """The decision's number stands beside the version, so that a release or a retraction is seen to be new."""
    return {DATA_VERSION: data_version(record), DECISION_TAG: str(decision.n)}


def result_metadata(
    store: Store, record: Mapping[str, Any], decision: Decision, references: Mapping[str, float] = NO_LINES
) -> dict[str, Any]:
    """Numbers (they become plots over the partitions), the scores as a table, and where the answers lie.

    references: name -> the score of each reference on the task, as far as it is known.
    """
    primary = record["primary"]
    whole = [s for s in record["scores"] if s["subset"] == "" and s.get("subject") is None]
    main = next((s for s in whole if s["metric"] == primary["metric"]), None)
    metadata: dict[str, Any] = {
        "status": decision.status,
        "primary metric": primary["metric"],
        "evaluation_id": record["evaluation_id"],
        "attempt": str(record["attempt"]),  # text, or it would be a plot
        "checkpoint_id": record["checkpoint_id"],
        "origin": record["origin"],
        "seconds": round(record["seconds"], 2),
        "tokens": record["n_tokens"],
        "dagster/row_count": record["samples"]["rows"],
        "scores": dg.MetadataValue.md(_scores_table(record["scores"])),
        "decided by": f"{decision.actor} ({decision.action}, {decision.time})",
        "look at answers": dg.MetadataValue.md(
            f"`eval-platform samples --evaluation {record['evaluation_id']} --attempt {record['attempt']}`"
        ),
    }
    if decision.reasons:
        metadata["reasons"] = dg.MetadataValue.md("\n".join(f"- {reason}" for reason in decision.reasons))
    if main is not None and main["value"] is not None:
        metadata["score"] = float(main["value"])
        for name in ("ci_low", "ci_high", "standard_error"):
            if main[name] is not None:
                metadata[name] = float(main[name])
    for score in whole:
        if score["value"] is not None:
            metadata[score["metric"]] = float(score["value"])
    metadata |= {f"reference {name}": value for name, value in references.items()}
    metadata["samples"] = dg.MetadataValue.path(f"{store.uri}/{record['samples']['key']}")
    return metadata


def check_metadata(decision: Decision) -> dict[str, Any]:
    """Every rule's outcome as one table."""
    return {
        "decision": f"{decision.status} by {decision.actor} ({decision.action} {decision.n})",
        "gate version": decision.gate_version,
        "checks": dg.MetadataValue.md(
            _table(
                ("rule", "outcome", "reason"),
                [
                    (check.name, "passed" if check.passed else check.severity, check.reason)
                    for check in sorted(decision.checks, key=lambda c: (c.passed, c.severity))
                ],
            )
        ),
    }


def check_severity(decision: Decision) -> tuple[bool, dg.AssetCheckSeverity]:
    """ERROR when held, WARN when published with a warning."""
    if decision.status == "held":
        return False, dg.AssetCheckSeverity.ERROR
    return all(check.passed for check in decision.checks), dg.AssetCheckSeverity.WARN


def report_check(
    instance: dg.DagsterInstance, check: dg.AssetCheckKey, partition: str, decision: Decision, run_id: str | None = None
) -> None:
    """Tell Dagster of a decision outside the results of an op.

    Not as a runless event: of those Dagster takes only one per check and partition (a unique index over check, run and
    partition), and shows the row that was made last. So one outside any run gets the id of a run that never was.
    """
    if run_id is None:
        before = instance.event_log_storage.get_asset_check_execution_history(
            check, limit=1000, partition_filter=PartitionKeyFilter(key=partition)
        )
        run_id = f"mirrored-{len(before)}"
    passed, severity = check_severity(decision)
    evaluation = dg.AssetCheckEvaluation(
        asset_key=check.asset_key,
        check_name=check.name,
        passed=passed,
        severity=severity,
        metadata=check_metadata(decision),
        partition=partition,
    )
    event = dg.DagsterEvent(
        dg.DagsterEventType.ASSET_CHECK_EVALUATION.value, RUNLESS_JOB_NAME, event_specific_data=evaluation
    )
    instance.report_dagster_event(event, run_id)


def _scores_table(scores: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (
            s["subset"] or "all",
            s["metric"],
            _number(s["value"]),
            f"{_number(s['ci_low'])} … {_number(s['ci_high'])}",
            s["n"],
        )
        for s in scores
    ]
    return _table(("subset", "metric", "value", "95 % interval", "n"), rows)


def _number(value: float | None) -> str:
    return "—" if value is None else f"{value:.4g}"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += [
        "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows
    ]
    return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Line:
    """What became of one task, as `summary` lists it."""

    task: str
    status: str
    value: float | None
    reasons: Sequence[str]


def standing_line(one: Standing) -> Line:
    return Line(one.task, one.status, one.primary_value, one.reasons if one.status == "held" else ())


def summary_metadata(arrival: Arrival, lines: Sequence[Line]) -> dict[str, Any]:
    """How many tasks are published, held and failed, and one line a task: what became of it and why."""
    lines = sorted(lines, key=lambda line: line.task)
    rows = [(line.task, line.status, _number(line.value), " ".join(line.reasons)) for line in lines]
    body: dict[str, Any] = {
        status: sum(line.status == status for line in lines) for status in ("published", "held", "failed")
    }
    if arrival.step is not None:
        body["step"] = arrival.step
    return {**body, "tasks": dg.MetadataValue.md(_table(("task", "status", "score", "reasons"), rows))}
