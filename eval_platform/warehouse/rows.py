"""Which catalog rows do the store's records of one subject make? Read as a whole, so the order of events is nothing.

A subject is what a log entry points at: ("evaluation", evaluation_id), ("arrival", key), ("task", name) or
("dataset", dataset_id). An incremental refresh and a rebuild read a subject through the same functions, and so agree.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from eval_platform.errors import SchemaError
from eval_platform.identity import ordered_id
from eval_platform.store import Store, find_record, layout, read_record, tries
from eval_platform.store.once import ReadOnce

Subject = tuple[str, str]
Row = dict[str, Any]
Rows = dict[str, list[Row]]  # table -> rows

# For each kind of subject the tables that its rows stand in, and the column that names it there.
OWNED: dict[str, tuple[tuple[str, str], ...]] = {
    "evaluation": tuple((table, "evaluation_id") for table in ("evaluations", "scores", "decisions", "checks")),
    "arrival": (("arrivals", "key"), ("skips", "key")),
    "task": (("tasks", "name"),),
    "dataset": (("datasets", "dataset_id"),),
}

# What a score's row says again of its evaluation.
_REPEATED = (
    *("evaluation_id", "attempt", "status", "shown", "warnings"),
    *("task_id", "checkpoint_id", "settings_id", "chat"),
)


@dataclass(slots=True)
class Reading:
    """What the records of a subject say now.

    unfinished: "open" while a try is at work or was killed without a word (then only time tells, no log entry will),
    "failed" when it failed and may be retried, None when nothing more is expected.
    """

    subject: Subject
    rows: Rows = field(default_factory=dict)
    unfinished: Literal["open", "failed"] | None = None

    def digest(self) -> str:
        """Equal when the rows are."""
        return ordered_id([table, json.dumps(rows, sort_keys=True, default=str)] for table, rows in self.rows.items())


def read_subject(store: Store, subject: Subject) -> Reading:
    """Every row of `subject`. What can't be read becomes a row of `problems` instead, never an error for the others.

    Raises StoreError when the storage fails.
    """
    kind, name = subject
    if store.requests_at_once > 1:
        store = ReadOnce(store)  # the same tries are looked at for several columns
    try:
        reading = _READERS[kind](store, name)
    except SchemaError as error:
        return damaged(subject, str(error))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        # A record that is JSON but not of the shape its name says: as damaged as one that is no JSON.
        return damaged(subject, f"a record of {kind} {name} is not of its kind: {error!r}; restore it from a copy")
    return reading


def read_subjects(store: Store, subjects: Sequence[Subject]) -> list[Reading]:
    """`read_subject` of each, in their order; several at once where each is many answers to wait for."""
    if store.requests_at_once == 1:
        return [read_subject(store, subject) for subject in subjects]
    with ThreadPoolExecutor(store.requests_at_once) as pool:
        return list(pool.map(lambda subject: read_subject(store, subject), subjects))


def damaged(subject: Subject, reason: str, unfinished: Literal["open"] | None = "open") -> Reading:
    """The reading of a subject that cannot be read; "open", it is looked at again until someone mends it."""
    return Reading(subject, {"problems": [{"subject": subject_text(subject), "reason": reason}]}, unfinished)


def subject_text(subject: Subject) -> str:
    return f"{subject[0]}:{subject[1]}"


def parse_subject(text: str) -> Subject:
    kind, _, name = text.partition(":")
    return kind, name


def all_subjects(store: Store) -> list[Subject]:
    """Every subject of the store, by listing: what a rebuild reads."""
    found: dict[Subject, None] = {}
    for prefix in ("evaluations/", "decisions/", "tries/evaluations/"):
        for entry in store.list(prefix, delimiter="/"):
            found["evaluation", entry.key.removeprefix(prefix).rstrip("/")] = None
    for entry in store.list(layout.ARRIVALS):
        arrival = layout.parse_arrival(entry.key)
        if arrival is not None:
            found["arrival", arrival[0]] = None
    for prefix, kind in (("tasks/by-name/", "task"), ("datasets/", "dataset")):
        for entry in store.list(prefix, delimiter="/"):
            found[kind, entry.key.removeprefix(prefix).rstrip("/")] = None
    return list(found)


def _arrival(store: Store, key: str) -> Reading:
    reading = Reading(("arrival", key), defaultdict(list))
    rows = reading.rows
    for entry in store.list(layout.arrival_folder(key), delimiter="/"):
        numbered, arrival = layout.numbered(entry.key), layout.parse_arrival(entry.key)
        if numbered is not None and layout.parse_skipped(numbered[1]) is not None:
            record = read_record(store, entry.key)
            rows["skips"].append({**record, "key": key, "n": numbered[0], "time": _time(record["time"])})
        if arrival is None or arrival[0] != key:
            continue
        n = arrival[1]
        record = read_record(store, entry.key)
        identity = find_record(store, layout.arrival_identity(key, n)) or {}
        subject = ("arrivals", key, n)
        failure = tries.state(store, subject)
        if failure is not None:
            reading.unfinished = reading.unfinished or "failed"
        elif _is_open(store, subject):
            reading.unfinished = "open"
        rows["arrivals"].append(
            {
                **record,
                "key": key,
                "n": n,
                "checkpoint_id": identity.get("checkpoint_id"),
                "weights_id": identity.get("weights_id"),
                "kind": identity.get("kind"),
                "tags": [(str(name), str(value)) for name, value in sorted((record.get("tags") or {}).items())],
                "arrived_at": _time(record.get("arrived_at")),
                "newest": False,
                "failed": failure is not None,
                "failure_class": failure.class_ if failure else None,
                "failure_reason": failure.reason if failure else None,
            }
        )
    known = [row for row in rows["arrivals"] if row["checkpoint_id"] is not None]
    if known:
        max(known, key=lambda row: row["n"])["newest"] = True
    return reading


def _evaluation(store: Store, evaluation_id: str) -> Reading:
    reading = Reading(("evaluation", evaluation_id), defaultdict(list))
    rows = reading.rows
    commits: dict[int, Row] = {}
    tombstones: dict[int, Row] = {}
    of_suffix = {".json": commits, ".pruned.json": tombstones}
    for entry in store.list(layout.evaluation_folder(evaluation_id), delimiter="/"):
        attempt, suffix = layout.numbered(entry.key) or (0, "")
        if suffix in of_suffix:
            of_suffix[suffix][attempt] = read_record(store, entry.key)
    standing = _decisions(store, evaluation_id, rows)
    for attempt, commit in sorted(commits.items()):
        row = _committed(evaluation_id, attempt, commit, standing.get(attempt))
        rows["evaluations"].append(row | _pruned(tombstones.get(attempt)))
    folder = f"tries/evaluations/{evaluation_id}/"
    for entry in store.list(folder, delimiter="/"):
        attempt = int(entry.key.removeprefix(folder).rstrip("/"))
        if attempt in commits:
            continue
        subject = ("evaluations", evaluation_id, attempt)
        failure = tries.state(store, subject)
        if failure is None:
            if _is_open(store, subject):
                reading.unfinished = "open"
            continue
        reading.unfinished = reading.unfinished or "failed"
        asked = tries.asked(store, subject)
        known = {"evaluation_id": evaluation_id, "attempt": attempt, "reasons": [failure.reason], "warnings": []}
        rows["evaluations"].append(
            {
                **asked,
                **known,
                "status": "failed",
                "shown": False,
                "settings": _json(asked["settings"]) if "settings" in asked else None,
                "item_limit": asked.get("limit"),
                "failure_class": failure.class_,
            }
        )
    published = [row for row in rows["evaluations"] if row["status"] == "published" and row["item_limit"] is None]
    if published:
        min(published, key=lambda row: row["attempt"])["shown"] = True
    for row in rows["evaluations"]:
        for score in commits.get(row["attempt"], {}).get("scores", ()):
            primary = score["metric"] == row["primary_metric"] and score["subset"] == "" and not score.get("subject")
            rows["scores"].append({**score, **{name: row.get(name) for name in _REPEATED}, "is_primary": primary})
    return reading


def _committed(evaluation_id: str, attempt: int, commit: Mapping[str, Any], decision: Row | None) -> Row:
    settings, planned = commit.get("settings") or {}, commit.get("planned") or {}
    primary, samples = commit.get("primary") or {}, commit.get("samples") or {}
    devices = commit.get("devices") or []
    numerics = commit.get("numerics_version")
    undecided = {"status": "held", "reasons": ["not decided yet: the gate has not run"], "warnings": []}
    return {
        **commit,
        **(undecided if decision is None else decision),
        "evaluation_id": evaluation_id,
        "attempt": attempt,
        "shown": False,
        "settings": _json(settings),
        "chat": bool(settings.get("chat")),
        "item_limit": settings.get("limit"),
        "primary_metric": primary.get("metric"),
        "primary_value": primary.get("value"),
        "higher_is_better": primary.get("higher_is_better"),
        "chance": primary.get("chance"),
        "devices": [devices] if isinstance(devices, str) else [str(device) for device in devices],
        "numerics_version": None if numerics is None else str(numerics),
        "versions": _json(commit.get("versions") or {}),
        "started_at": _time(commit.get("started_at")),
        "finished_at": _time(commit.get("finished_at")),
        "planned_items": planned.get("items"),
        "planned_samples": planned.get("samples"),
        "planned_sample_ids": planned.get("sample_ids"),
        "samples_key": samples.get("key"),
        "samples_rows": samples.get("rows"),
    }


def _pruned(tombstone: Row | None) -> Row:
    if tombstone is None:
        return {"samples_pruned_at": None, "samples_pruned_by": None}
    told = f"{tombstone['actor']}: {tombstone['rule']}"
    return {"samples_pruned_at": _time(tombstone["time"]), "samples_pruned_by": told}


def _decisions(store: Store, evaluation_id: str, rows: Rows) -> dict[int, Row]:
    """Adds the decisions and checks of every attempt to `rows`; returns what stands: status, reasons, warnings."""
    found: dict[int, list[tuple[int, Row]]] = defaultdict(list)
    for entry in store.list(layout.decision_folder(evaluation_id), delimiter="/"):
        decision = layout.parse_decision(entry.key)
        if decision is not None:
            attempt, n = decision
            found[attempt].append((n, read_record(store, entry.key)))
    standing: dict[int, Row] = {}
    for attempt, decisions in found.items():
        highest = max(n for n, _ in decisions)
        for n, record in decisions:
            ids = {"evaluation_id": evaluation_id, "attempt": attempt, "n": n}
            rows["decisions"].append(
                {
                    **record,
                    **ids,
                    "stands": n == highest,
                    "reasons": list(record.get("reasons") or ()),
                    "time": _time(record.get("time")),
                }
            )
            checks = record.get("checks") or ()
            rows["checks"] += [{**check, **ids, "observed": _json(check.get("observed"))} for check in checks]
            if n == highest:
                standing[attempt] = {
                    "status": record["status"],
                    "reasons": list(record.get("reasons") or ()) if record["status"] == "held" else [],
                    "warnings": [
                        f"{check['name']}: {check.get('reason', '')}"
                        for check in checks
                        if not check["passed"] and check.get("severity") == "warning"
                    ],
                }
    return standing


def _is_open(store: Store, subject: tries.Subject) -> bool:
    """Whether the newest try has neither ended well nor been told to end: its process works, or died without a word."""
    told = tries.history(store, subject)
    return bool(told) and told[-1].outcome is None


def _task(store: Store, name: str) -> Reading:
    numbered = sorted(layout.numbers(store, layout.task_names(name)))
    newest = max((n for n, _ in numbered), default=0)
    rows = [{**read_record(store, key), "name": name, "n": n, "current": n == newest} for n, key in numbered]
    return Reading(("task", name), {"tasks": rows})


def _dataset(store: Store, dataset_id: str) -> Reading:
    record = find_record(store, layout.dataset_card(dataset_id))
    if record is None:  # documents.parquet is written first
        return Reading(("dataset", dataset_id))
    row = {"dataset_id": dataset_id, "record": _json(record)}
    for column in ("source", "licence"):
        value = record.get(column)
        row[column] = value if value is None or isinstance(value, str) else _json(value)
    row["n"] = record.get("n")
    return Reading(("dataset", dataset_id), {"datasets": [row]})


_READERS = {"arrival": _arrival, "evaluation": _evaluation, "task": _task, "dataset": _dataset}


def _json(value: Any) -> str | None:
    return None if value is None else json.dumps(value, sort_keys=True, ensure_ascii=False)


def _time(text: str | None) -> datetime | None:
    if not text:
        return None
    time = datetime.fromisoformat(text)
    return time if time.tzinfo else time.replace(tzinfo=UTC)
