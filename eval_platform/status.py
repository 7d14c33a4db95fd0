"""Where is every checkpoint on the road? Waiting, queued, running, published, held or failed, and why."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from eval_platform import launching, planning, queueing, warehouse
from eval_platform.checkpoints import Watch, discover
from eval_platform.config import Config
from eval_platform.plan import not_asked
from eval_platform.served import ROOT as SERVED_ROOT
from eval_platform.store import Store
from eval_platform.tasks import TaskLock
from eval_platform.values import Incomplete, known_sum

# missing: not asked, and nobody is about to: the task came later, or a person cancelled its run. skipped: its data
# cannot be had, a served model cannot be asked it, its tier is not for this checkpoint, or the queue passed it over.
State = Literal["waiting", "refused", "queued", "running", "published", "held", "failed", "missing", "skipped"]

_TASKS = """
    select a.key, a.n, a.run, a.step, a.arrived_at, coalesce(a.tags['last'] = 'true', false) as is_last,
        a.uri,
        e.task, e.status, e.reasons, e.evaluation_id, e.attempt,
        e.status = 'held' and not exists (
            select 1 from decisions d where d.evaluation_id = e.evaluation_id and d.attempt = e.attempt
        ) as undecided
    from arrivals a
    left join evaluations e
      on e.checkpoint_id = a.checkpoint_id and not e.stale and e.item_limit is null
    where a.n = (select max(b.n) from arrivals b where b.key = a.key)
    qualify e.attempt is null or row_number() over (
        partition by a.key, e.task, e.settings_id
        order by (e.status = 'published') desc, e.attempt * if(e.status = 'published', 1, -1)
    ) = 1
    order by a.run, a.step, a.key, e.task
"""

_FAILED_ARRIVALS = "select key, n, reason from failed_arrivals"
_PASSED_OVER = "select key, tier, tasks, reason from skipped"


@dataclass(frozen=True, slots=True)
class TaskStatus:
    """One task on one checkpoint. seconds_left: from what is done, else what was expected when it was planned."""

    task: str
    state: State
    reason: str = ""
    done: int | None = None
    total: int | None = None
    seconds_left: float | None = None
    evaluation_id: str | None = None
    attempt: int | None = None


@dataclass(frozen=True, slots=True)
class CheckpointStatus:
    """One key; `state` is the one of its tasks that most wants attention. where: its workers' machines and devices.

    seconds_left: until its workers have ended, or while it is queued what one worker is expected to take; None where
    that is not known. workers: what each of its workers still needs; waiting: what is queued of it that none of them
    has, for one worker (0: nothing is). waits_for_cluster: a worker is a job that has not begun.
    """

    key: str
    state: State
    reason: str = ""
    run: str | None = None
    step: int | None = None
    arrival: int | None = None
    tasks: tuple[TaskStatus, ...] = ()
    where: str = ""
    seconds_left: float | None = None
    workers: tuple[float | None, ...] = ()
    waiting: float | None = 0.0
    waits_for_cluster: bool = False


_ATTENTION: tuple[State, ...] = ("failed", "held", "running", "queued", "missing", "published", "skipped")


def status(config: Config, store: Store, lock: TaskLock) -> list[CheckpointStatus]:
    """Every checkpoint in the watched folders or in the store, by run and step."""
    warehouse.refresh(store, config.catalog_path)
    with warehouse.connect(config.catalog_path, store, samples=False) as con:
        rows = con.sql(_TASKS).to_arrow_table().to_pylist()
        failed = con.sql(_FAILED_ARRIVALS).to_arrow_table().to_pylist()
        over = con.sql(_PASSED_OVER).to_arrow_table().to_pylist()
        by_key: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            by_key.setdefault(row["key"], []).append(row)
        models = {
            key: planning.Model(
                group[0]["run"], planning.parameters_at(group[0]["uri"]), config.run_settings(key=key).chat
            )
            for key, group in by_key.items()
            if group[0]["task"] is None  # of others nothing is queued
        }
        expected = planning.expected(con, set(models.values()), lock.tasks)
    broken = {(row["key"], row["n"]): row["reason"] for row in failed}
    at_work: dict[str, list[launching.Running]] = {}
    for one in launching.running(config):
        at_work.setdefault(one.plan.arrival.key, []).append(one)
    cancelled: dict[str, dict[str, str]] = {}
    for row in (row for row in over if row["tier"].startswith(queueing.CANCELLED)):
        why = f"{row['reason']}; {_by_hand(row['key'], by_key[row['key']][0]['uri'])}"
        cancelled.setdefault(row["key"], {}).update(dict.fromkeys(row["tasks"], why))
    unasked = _unasked(config, lock, by_key, over)
    found = [
        _one(
            key,
            group,
            lock,
            broken,
            at_work.get(key, []),
            expected[models[key]] if key in models else planning.Expected({}, None),
            not_asked(config, lock, store, key),
            unasked[key],
            cancelled.get(key, {}),
        )
        for key, group in by_key.items()
    ]
    return [*found, *sorted(_not_arrived(config, set(by_key)), key=lambda one: (one.run or "", one.step or 0, one.key))]


def _not_arrived(config: Config, known: set[str]) -> Iterator[CheckpointStatus]:
    for entry in config.served:
        if entry.key not in known:
            reason = f"configured, not asked yet: `eval-platform run --served {entry.name}` does it at once"
            yield CheckpointStatus(entry.key, "waiting", reason, entry.run or entry.name, entry.step)
    for candidate in discover(config.roots, dict.fromkeys(known, ""), Watch(), s3=config.s3):
        if isinstance(candidate, Incomplete):
            yield CheckpointStatus(candidate.key, "refused" if candidate.refused else "waiting", candidate.reason)
        elif (beside := config.beside_reference(candidate.key)) is not None:
            yield CheckpointStatus(candidate.key, "refused", beside)
        else:
            reason = "found, not taken up yet: `eval-platform up` does it by itself, `eval-platform run` at once"
            yield CheckpointStatus(candidate.key, "waiting", reason, candidate.run, candidate.step)


def _one(
    key: str,
    rows: Sequence[dict[str, Any]],
    lock: TaskLock,
    broken: dict[tuple[str, int], str],
    workers: Sequence[launching.Running],
    expected: planning.Expected,
    impossible: dict[str, str],
    unasked: dict[str, str],
    cancelled: dict[str, str],
) -> CheckpointStatus:
    first = rows[0]
    known = {row["task"]: row for row in rows if row["task"] is not None}
    reason = broken.get((key, first["n"]), "")
    tasks = []
    for name in lock.tasks:
        if name in impossible:
            tasks.append(TaskStatus(name, "skipped", impossible[name]))
        elif name in known and known[name]["undecided"]:
            gated: State = "running" if workers else "queued"
            tasks.append(TaskStatus(name, gated, "answered, not through the gate yet"))
        elif name in known:
            row = known[name]
            reasons = "; ".join(row["reasons"] or ())
            evaluation_id, attempt = row["evaluation_id"], row["attempt"]
            tasks.append(TaskStatus(name, row["status"], reasons, evaluation_id=evaluation_id, attempt=attempt))
        elif reason:
            tasks.append(TaskStatus(name, "failed", reason))
        elif (worker := _whose(workers, name)) is not None:
            tasks.append(_running(name, worker))
        elif name in cancelled:
            tasks.append(TaskStatus(name, "missing", cancelled[name]))
        elif name in unasked:
            tasks.append(TaskStatus(name, "skipped", unasked[name]))
        else:
            # Others are answered, or it came by hand: no run will come back to it for this task.
            left: State = "missing" if known or key.startswith("adhoc/") else "queued"
            tasks.append(TaskStatus(name, left))
    tasks += [TaskStatus(name, "skipped", f"no data: {skip.reason}") for name, skip in lock.skipped.items()]
    states = {task.state for task in tasks}
    no_tasks: State = "queued"
    worst = min(states, key=_ATTENTION.index) if states else no_tasks
    told = set(unasked.values() if worst == "skipped" else cancelled.values() if worst == "missing" else ())
    if len(told) == 1:  # not in its tasks alone, which are shown when they are asked for
        reason = told.pop()
    where = "; ".join(dict.fromkeys(worker.where for worker in workers if worker.where))
    given = {task.name for worker in workers for task in worker.plan.tasks}
    queued = [expected.tasks.get(task.task) for task in tasks if task.state == "queued" and task.task not in given]
    waiting = known_sum([expected.load, *queued]) if queued else 0.0
    each = tuple(_worker_left(worker) for worker in workers)
    seconds_left = waiting if worst == "queued" else None
    if workers:
        seconds_left = None if None in each else max(one for one in each if one is not None)
    return CheckpointStatus(
        key,
        worst,
        reason,
        first["run"],
        first["step"],
        first["n"],
        tuple(tasks),
        where,
        seconds_left,
        each,
        waiting,
        any(worker.waits for worker in workers),
    )


def queue_left(found: Sequence[CheckpointStatus], slots: int) -> float | None:
    """Seconds until all that is at work or queued is done, on so many slots; None where that is not known."""
    at_work = [seconds for one in found for seconds in one.workers]
    waiting = [one.waiting for one in found if one.waiting != 0]
    if None in at_work or None in waiting or not (at_work or waiting):
        return None
    return planning.end_of_queue([one or 0.0 for one in at_work], [one or 0.0 for one in waiting], slots)


def _by_hand(key: str, uri: str) -> str:
    """How a person has a checkpoint evaluated whose run was cancelled."""
    again = "to have it evaluated re-execute that run there"
    command = f"run --checkpoint {shlex.quote(uri)}"
    if key.startswith(f"{SERVED_ROOT}/"):
        command = f"run --served {shlex.quote(key.removeprefix(f'{SERVED_ROOT}/'))}"
    elif uri.startswith("hf://"):
        return again  # the address names a commit, which `run` takes for another checkpoint
    return f"{again}, or `eval-platform {command}`"


def _unasked(
    config: Config, lock: TaskLock, by_key: Mapping[str, Sequence[dict[str, Any]]], over: Sequence[dict[str, Any]]
) -> dict[str, dict[str, str]]:
    """Key -> task -> why the queue does not ask it of this checkpoint (yet): passed over, or its tier is not due."""
    found: dict[str, dict[str, str]] = {key: {} for key in by_key}
    if config.queue is None:
        return found
    roots = {root.name for root in config.checkpoints}
    runs: dict[str, list[queueing.Point]] = {}
    answered: dict[str, set[str]] = {}
    for key, rows in by_key.items():
        row = rows[0]
        answered[key] = {row["task"] for row in rows if row["task"] is not None}
        if key.partition("/")[0] in roots:
            arrived = row["arrived_at"].isoformat() if row["arrived_at"] is not None else ""
            point = queueing.Point(key, row["n"], row["step"], arrived, row["is_last"])
            runs.setdefault(row["run"], []).append(point)
    over = [row for row in over if not row["tier"].startswith(queueing.CANCELLED)]
    passed = {(row["key"], row["tier"]) for row in over}
    now = datetime.now(UTC)
    tiers = queueing.tiers(config.queue, config.suites, lock)
    for tier in tiers:
        for run in runs.values() if not tier.takes_all else ():
            asked = {
                p.key
                for p in run
                if p.key in config.reference_keys
                or (p.key, tier.name) in passed
                or queueing.was_asked(tier, tiers, answered[p.key])
            }
            ended = queueing.has_ended(run, config.queue.idle_minutes, now)
            due = {point.key for point in queueing.points_of(run, tier, asked, ended=ended)}
            for point in run:
                if point.key not in asked | due:
                    found[point.key] |= dict.fromkeys(tier.tasks, f"tier {tier.name} is for {tier.told}")
    for row in over:
        if row["key"] in found:
            found[row["key"]] |= dict.fromkeys(row["tasks"], row["reason"])
    return found


def _whose(workers: Sequence[launching.Running], name: str) -> launching.Running | None:
    """Of those that are to answer the task the one that is at it, if any: of a checkpoint's tiers each has its own."""
    asked = [worker for worker in workers if any(task.name == name for task in worker.plan.tasks)]
    return next((worker for worker in asked if _started(worker, name)), asked[-1] if asked else None)


def _started(worker: launching.Running, name: str) -> dict[str, Any] | None:
    """Its last: a cluster's job that is begun anew goes on in the same file."""
    return next((m for m in reversed(worker.messages) if m["type"] == "started" and m["task"] == name), None)


def _running(name: str, worker: launching.Running) -> TaskStatus:
    expected = worker.plan.expected_seconds.get(name)
    started = _started(worker, name)
    if started is None:
        return TaskStatus(name, "queued", seconds_left=expected)
    since = worker.messages[worker.messages.index(started) :]
    progress = [m for m in since if m["type"] == "progress" and m["task"] == name]
    done, total = progress[-1]["done"] if progress else 0, started["total"]
    left = None if expected is None or not total else expected * (total - done) / total
    if progress:  # the first is told when the model is loaded, with what the journal had
        asked, spent = done - progress[0]["done"], progress[-1]["time"] - progress[0]["time"]
        left = spent / asked * (total - done) if asked and spent > 0 else left
    return TaskStatus(name, "running", done=done, total=total, seconds_left=left)


def _worker_left(worker: launching.Running) -> float | None:
    """Seconds until the worker has done what it was given; None where that is not known."""
    ended = {m["task"] for m in worker.messages if m["type"] in ("committed", "linked", "failed", "waiting")}
    left = [_running(task.name, worker).seconds_left for task in worker.plan.tasks if task.name not in ended]
    is_loaded = not left or any(m["type"] == "loaded" for m in worker.messages)
    return known_sum([0.0 if is_loaded else worker.plan.expected_load_seconds, *left])
