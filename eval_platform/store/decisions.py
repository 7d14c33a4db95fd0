"""May it be believed? Decisions on a committed attempt, numbered from 1; the highest stands."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

from eval_platform.store import layout, log
from eval_platform.store.base import Store
from eval_platform.store.records import create_record, read_record, utc_now
from eval_platform.values import Check, Decision

Status = Literal["published", "held"]
Action = Literal["gate", "release", "retract", "recheck"]


def append(
    store: Store,
    evaluation_id: str,
    attempt: int,
    *,
    status: Status,
    checks: Iterable[Check],
    reasons: Iterable[str],
    gate_version: str,
    actor: str,
    action: Action = "gate",
) -> Decision:
    """Record a decision under the next number and return the one that stands for this call.

    Action "gate" decides once: where any decision exists already that one is returned, so that a slow second gate
    never overrules a person. Every other action takes the next free number. A check's `observed` is kept as JSON,
    what is not finite as its name. Raises StoreError when the store cannot be written.
    """
    checks, reasons = tuple(checks), tuple(reasons)
    while True:
        last = standing(store, evaluation_id, attempt)
        if last is not None and action == "gate":
            return last
        n = last.n + 1 if last else 1
        time = utc_now()
        record = {
            "evaluation_id": evaluation_id,
            "attempt": attempt,
            "n": n,
            "status": status,
            "checks": [asdict(check) | {"observed": _as_json(check.observed)} for check in checks],
            "reasons": list(reasons),
            "gate_version": gate_version,
            "actor": actor,
            "time": time,
            "action": action,
        }
        log.write(store, "decision", evaluation_id=evaluation_id, attempt=attempt, n=n)
        key = layout.decision(evaluation_id, attempt, n)
        if create_record(store, key, record):
            return _read(store, key)


def standing(store: Store, evaluation_id: str, attempt: int) -> Decision | None:
    """The attempt's highest decision; None while it is undecided, which counts as held."""
    keys = _keys(store, evaluation_id).get(attempt)
    return _read(store, keys[max(keys)]) if keys else None


def history(store: Store, evaluation_id: str, attempt: int) -> list[Decision]:
    """Every decision on the attempt, n ascending."""
    keys = _keys(store, evaluation_id).get(attempt, {})
    return [_read(store, keys[n]) for n in sorted(keys)]


def standing_attempt(store: Store, evaluation_id: str) -> int | None:
    """The attempt that boards show: the lowest that stands published; None when none does."""
    by_attempt = _keys(store, evaluation_id)
    for attempt in sorted(by_attempt):
        keys = by_attempt[attempt]
        if _read(store, keys[max(keys)]).status == "published":
            return attempt
    return None


def _keys(store: Store, evaluation_id: str) -> dict[int, dict[int, str]]:
    """attempt -> n -> store key of every decision on the evaluation."""
    found: dict[int, dict[int, str]] = {}
    for entry in store.list(layout.decision_folder(evaluation_id), delimiter="/"):
        parsed = layout.parse_decision(entry.key)
        if parsed:
            attempt, n = parsed
            found.setdefault(attempt, {})[n] = entry.key
    return found


def _read(store: Store, key: str) -> Decision:
    record = read_record(store, key)
    del record["schema_version"]
    checks = tuple(Check(**check) for check in record.pop("checks"))
    return Decision(checks=checks, reasons=tuple(record.pop("reasons")), **record)


def _as_json(value: Any) -> Any:
    """`value` as JSON has it; NaN and infinities as "nan", "inf", "-inf"; anything foreign as its text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): _as_json(one) for key, one in value.items()}
    if isinstance(value, Sequence | set | frozenset):
        return [_as_json(one) for one in value]
    return str(value)
