"""Which results stand on a key, and which are missing? Asked of the catalog, so that a run of Dagster and the
reconciliation sensor, which mirrors what happened outside its runs, show the same."""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from eval_platform.queueing import CANCELLED, LAST_TAG, Point
from eval_platform.tasks import TaskLock
from resources.warehouse import WarehouseResource

# {asked} are the lock's tasks. A decision on the highest decided attempt of an evaluation; where several settings
# were evaluated, what was finished last. `newest` is the arrival that boards show.
_STANDING = """
    with asked(task, task_id, ask_id, base_ask_id) as (values {asked}),
    decided as (
        select e.checkpoint_id, l.task, e.evaluation_id, e.attempt, d.n as decision, e.finished_at, d.time,
            e.status, e.reasons, e.primary_value
        from evaluations e
        join asked l on l.task_id = e.task_id
        join decisions d on d.evaluation_id = e.evaluation_id and d.attempt = e.attempt and d.stands
        where e.item_limit is null
        qualify e.attempt = max(e.attempt) over (partition by e.evaluation_id)
    ),
    standing as (
        select a.key, a.n, d.* exclude (checkpoint_id, finished_at)
        from arrivals a join decided d on d.checkpoint_id = a.checkpoint_id
        where a.newest
        qualify row_number() over (
            partition by a.key, d.task order by d.finished_at desc, d.evaluation_id desc
        ) = 1
    )
"""

_MARKS = """
    select key, sha256(string_agg(
        task || ':' || evaluation_id || '.' || attempt || '#' || decision, chr(10) order by task
    ))[:32] as mark
    from standing group by key order by max(time) desc, key
"""

_ONE_BY_ONE = """
    select key, n, task, evaluation_id, attempt, decision, status, reasons, primary_value
    from standing where key in ({keys}) order by key, task
"""

# Newest arrivals that may still be evaluated, with the tasks that have neither a decision nor a final failure.
# `answered`: those of them whose very answers are stored, so that they need no model.
_UNFINISHED = """
    with asked(task, task_id, ask_id, base_ask_id) as (values {asked}),
    newest as (select key, max(n) as n from arrivals group by key),
    settled as (
        select distinct e.checkpoint_id, e.task_id
        from evaluations e
        left join decisions d on d.evaluation_id = e.evaluation_id and d.attempt = e.attempt and d.stands
        where e.item_limit is null and (d.n is not null or e.status = 'failed')
    ),
    stored as (
        select distinct checkpoint_id, ask_id from evaluations where status = 'published' and item_limit is null
    )
    select a.key, a.n, list(l.task order by l.task) as missing,
        coalesce(list(l.task order by l.task) filter (stored.ask_id is not null), []) as answered
    from arrivals a
    join newest using (key, n)
    cross join asked l
    left join settled on settled.checkpoint_id = a.checkpoint_id and settled.task_id = l.task_id
    left join stored on stored.checkpoint_id = a.checkpoint_id and stored.ask_id in (l.ask_id, l.base_ask_id)
    where not a.failed and settled.task_id is null
    group by a.key, a.n
    order by max(a.arrived_at) desc, a.key
"""


# Newest arrivals that may be evaluated, on the curves of their runs.
_CURVES = """
    with newest as (select key, max(n) as n from arrivals group by key)
    select key, n, run, step, arrived_at, coalesce(tags['{last}'] = 'true', false) as is_last
    from arrivals join newest using (key, n)
    where not failed
"""

_PASSED_OVER = f"""
    select key, n, run, step, arrived_at, tier, tasks from skipped
    where not starts_with(tier, '{CANCELLED}') order by all
"""


@dataclass(frozen=True, slots=True)
class Standing:
    """A result that stands on a key, and which decision on it does."""

    key: str
    n: int
    task: str
    evaluation_id: str
    attempt: int
    decision: int
    status: str
    reasons: tuple[str, ...]
    primary_value: float | None


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A key's newest arrival and the tasks that it has no result for; `answered` need only be scored."""

    key: str
    n: int
    missing: frozenset[str]
    answered: frozenset[str]


@dataclass(frozen=True, slots=True)
class Skipped:
    """A newest arrival that the queue passed over, for the tasks of one tier."""

    key: str
    n: int
    run: str
    step: int | None
    arrived_at: str
    tier: str
    tasks: frozenset[str]


def marks(warehouse: WarehouseResource, lock: TaskLock) -> dict[str, str]:
    """Key -> an id over everything that stands on it, last decided first. The data version of its `summary`."""
    if not lock.tasks:
        return {}
    rows = warehouse.query(_STANDING.format(asked=_asked(lock)) + _MARKS)
    return dict(zip(rows["key"].to_pylist(), rows["mark"].to_pylist(), strict=True))


def standing(warehouse: WarehouseResource, lock: TaskLock, keys: Collection[str]) -> dict[str, list[Standing]]:
    """What stands on each of `keys`, by task."""
    found: dict[str, list[Standing]] = {key: [] for key in keys}
    if not lock.tasks or not keys:
        return found
    text = _STANDING.format(asked=_asked(lock)) + _ONE_BY_ONE.format(keys=", ".join(_literal(key) for key in keys))
    for row in warehouse.query(text).to_pylist():
        row["reasons"] = tuple(row["reasons"] or ())
        found[row["key"]].append(Standing(**row))
    return found


def unfinished(warehouse: WarehouseResource, lock: TaskLock) -> list[Unfinished]:
    """Arrivals that lack something, newest first."""
    if not lock.tasks:
        return []
    rows: list[dict[str, Any]] = warehouse.query(_UNFINISHED.format(asked=_asked(lock))).to_pylist()
    return [Unfinished(r["key"], r["n"], frozenset(r["missing"]), frozenset(r["answered"])) for r in rows]


def queue(warehouse: WarehouseResource) -> tuple[dict[str, list[Point]], list[Skipped]]:
    """(training run -> the checkpoints that arrived of it, what was passed over and nobody has asked since)."""
    arrived, over = warehouse.queries(_CURVES.format(last=LAST_TAG), _PASSED_OVER)
    curves: dict[str, list[Point]] = {}
    for row in arrived.to_pylist():
        point = Point(row["key"], row["n"], row["step"], _iso(row["arrived_at"]), row["is_last"])
        curves.setdefault(row["run"], []).append(point)
    return curves, [
        Skipped(**{**row, "arrived_at": _iso(row["arrived_at"]), "tasks": frozenset(row["tasks"])})
        for row in over.to_pylist()
    ]


def reference_scores(warehouse: WarehouseResource) -> dict[str, dict[str, float]]:
    """Task -> name of a reference -> its published score; asked of nobody where none is configured."""
    found: dict[str, dict[str, float]] = {}
    if warehouse.store.config().references:
        text = "select task, reference, value from reference_scores where value is not null"
        for row in warehouse.query(f"{text} order by task, reference, settings_id").to_pylist():
            found.setdefault(row["task"], {})[row["reference"]] = row["value"]
    return found


def _iso(time: datetime | None) -> str:
    return "" if time is None else time.isoformat()


def _asked(lock: TaskLock) -> str:
    rows = [(name, task.task_id, task.ask_id, task.base_ask_id or task.ask_id) for name, task in lock.tasks.items()]
    return ", ".join(f"({', '.join(map(_literal, row))})" for row in rows)


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
