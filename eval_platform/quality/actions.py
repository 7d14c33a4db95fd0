"""What a person may do about a result. Every act is recorded with who did it and why, and can be undone by another."""

import math
from pathlib import Path
from typing import Any

from eval_platform.errors import EvalPlatformError
from eval_platform.quality.gate import GATE_VERSION, committed, judge, verdict
from eval_platform.store import Store, commits, decisions, tries
from eval_platform.values import IMPORTED, Check, Decision


def release(store: Store, evaluation_id: str, attempt: int, actor: str, reason: str) -> Decision:
    """Publish what the gate held. Raises EvalPlatformError when it is not held, or has a number that is none."""
    standing = _standing(store, evaluation_id, attempt, actor, reason)
    if standing.status == "published":
        raise EvalPlatformError(
            f"evaluation {evaluation_id} attempt {attempt} is published already (decision {standing.n}, "
            f"{standing.action} by {standing.actor})",
            remedy="nothing is needed; `eval-platform retract` takes it back",
        )
    missing = _missing_scores(committed(store, evaluation_id, attempt))
    if missing:
        raise EvalPlatformError(
            f"evaluation {evaluation_id} attempt {attempt} cannot be released: {missing}",
            remedy="only a new answer helps: mend the cause, then `eval-platform rerun`",
        )
    return _append(store, standing, "published", standing.checks, (reason,), actor, "release")


def retract(store: Store, evaluation_id: str, attempt: int, actor: str, reason: str) -> Decision:
    """Hold what is published. Raises EvalPlatformError when it is held already."""
    standing = _standing(store, evaluation_id, attempt, actor, reason)
    if standing.status == "held":
        raise EvalPlatformError(
            f"evaluation {evaluation_id} attempt {attempt} is held already (decision {standing.n}, {standing.action} "
            f"by {standing.actor})",
            remedy="nothing is needed; `eval-platform release` publishes it",
        )
    return _append(store, standing, "held", standing.checks, (reason,), actor, "retract")


def recheck(store: Store, catalog: Path, evaluation_id: str, attempt: int, actor: str, reason: str) -> Decision:
    """Put the stored result through this version's gate again, without asking the model.

    Its verdict stands, over a person's earlier release or retraction too. A contradiction between attempts is found
    anew, but held against this attempt only. `catalog` must be fresh.
    """
    _named(actor, reason)
    evaluation = committed(store, evaluation_id, attempt)
    checks = judge(store, catalog, evaluation)
    status, reasons = verdict(checks)
    return decisions.append(
        store,
        evaluation_id,
        attempt,
        status=status,
        checks=checks,
        reasons=(*reasons, f"rechecked: {reason}"),
        gate_version=GATE_VERSION,
        actor=actor,
        action="recheck",
    )


def rerun(store: Store, evaluation_id: str, actor: str, reason: str) -> int:
    """Ask for the evaluation to be answered afresh; returns the attempt that is now open.

    Raises EvalPlatformError when nothing is committed yet or an attempt is open already.
    """
    _named(actor, reason)
    first = commits.read(store, evaluation_id, 1)
    if first is not None and first.get("origin") == IMPORTED:
        raise EvalPlatformError(
            f"evaluation {evaluation_id} was imported from {first[IMPORTED]['file']}: its model cannot be asked here",
            remedy="ask it where it was asked and import the new results, or evaluate the checkpoint here",
        )
    return commits.open_rerun(store, evaluation_id, actor, reason)


def retry(store: Store, subject: tries.Subject, actor: str, reason: str) -> list[str]:
    """Forgive what failed, so that it is tried again; returns the forgiven tries.

    subject: `tries.evaluation_subject(...)`, or `tries.arrival_subject(...)` for what failed before it had an id.
    Raises EvalPlatformError when nothing failed.
    """
    _named(actor, reason)
    return tries.retry(store, subject, actor, reason)


def _standing(store: Store, evaluation_id: str, attempt: int, actor: str, reason: str) -> Decision:
    _named(actor, reason)
    committed(store, evaluation_id, attempt)
    standing = decisions.standing(store, evaluation_id, attempt)
    if standing is None:
        raise EvalPlatformError(
            f"evaluation {evaluation_id} attempt {attempt} has not been through the gate yet",
            remedy="wait for the platform to adopt it, or `eval-platform recheck` it now",
        )
    return standing


def _named(actor: str, reason: str) -> None:
    for what, text in (("who", actor), ("why", reason)):
        if not text.strip():
            raise EvalPlatformError(
                f"an act on a result must say {what}: it is on record for good", remedy="give a reason and a name"
            )


def _missing_scores(evaluation: dict[str, Any]) -> str | None:
    """Which numbers are none, in words; None where all are there."""
    if not evaluation["scores"] or evaluation["primary"]["value"] is None:
        return f"its primary score {evaluation['primary']['metric']} is missing"
    none = [
        f"{score['metric']} of {score['subset'] or 'the whole task'}"
        for score in evaluation["scores"]
        if score["value"] is None or not math.isfinite(score["value"])
    ]
    return f"{len(none)} scores are missing or not finite ({', '.join(none[:3])})" if none else None


def _append(
    store: Store,
    standing: Decision,
    status: decisions.Status,
    checks: tuple[Check, ...],
    reasons: tuple[str, ...],
    actor: str,
    action: decisions.Action,
) -> Decision:
    """A decision over the gate's, whose checks it keeps: they are what was overruled."""
    return decisions.append(
        store,
        standing.evaluation_id,
        standing.attempt,
        status=status,
        checks=checks,
        reasons=reasons,
        gate_version=standing.gate_version,
        actor=actor,
        action=action,
    )
