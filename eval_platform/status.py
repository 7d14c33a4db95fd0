"""Where is every checkpoint on the road? Waiting, queued, running, published, held or failed, and why."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from eval_platform import launch, warehouse
from eval_platform.checkpoints import Watch, discover
from eval_platform.config import Config
from eval_platform.plan import not_asked
from eval_platform.store import Store
from eval_platform.tasks import TaskLock
from eval_platform.values import Incomplete

# missing: not asked, and nobody is about to: `eval-platform backfill` asks it. skipped: its data cannot be had, or a
# served model cannot be asked it.
State = Literal["waiting", "refused", "queued", "running", "published", "held", "failed", "missing", "skipped"]

_TASKS = """
    select a.key, a.n, a.run, a.step, e.task, e.status, e.reasons, e.seconds, e.evaluation_id, e.attempt,
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


@dataclass(frozen=True, slots=True)
class TaskStatus:
    """One task on one checkpoint. `seconds_left` is a guess from what is done and from the task's last run."""

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
    """One key; `state` is the one of its tasks that most wants attention."""

    key: str
    state: State
    reason: str = ""
    run: str | None = None
    step: int | None = None
    arrival: int | None = None
    tasks: tuple[TaskStatus, ...] = ()


_ATTENTION: tuple[State, ...] = ("failed", "held", "running", "queued", "missing", "published", "skipped")


def status(config: Config, store: Store, lock: TaskLock) -> list[CheckpointStatus]:
    """Every checkpoint in the watched folders or in the store, by run and step."""
    warehouse.refresh(store, config.catalog_path)
    with warehouse.connect(config.catalog_path, store, samples=False) as con:
        rows = con.sql(_TASKS).to_arrow_table().to_pylist()
        failed = con.sql(_FAILED_ARRIVALS).to_arrow_table().to_pylist()
    broken = {(row["key"], row["n"]): row["reason"] for row in failed}
    usual = {row["task"]: row["seconds"] for row in rows if row["seconds"] is not None}
    at_work = {one.plan.arrival.key: one for one in launch.running(config)}
    by_key: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_key.setdefault(row["key"], []).append(row)
    found = [
        _one(key, group, lock, broken, at_work.get(key), usual, not_asked(config, lock, store, key))
        for key, group in by_key.items()
    ]
    return [*found, *sorted(_not_arrived(config, set(by_key)), key=lambda one: (one.run or "", one.step or 0, one.key))]


def _not_arrived(config: Config, known: set[str]) -> Iterator[CheckpointStatus]:
    for entry in config.served:
        if entry.key not in known:
            reason = f"configured, not asked yet: `eval-platform run --served {entry.name}` does it at once"
            yield CheckpointStatus(entry.key, "waiting", reason, entry.run or entry.name, entry.step)
    for candidate in discover(config.checkpoints, dict.fromkeys(known, ""), Watch(), s3=config.s3):
        if isinstance(candidate, Incomplete):
            yield CheckpointStatus(candidate.key, "refused" if candidate.refused else "waiting", candidate.reason)
        else:
            reason = "found, not taken up yet: `eval-platform up` does it by itself, `eval-platform run` at once"
            yield CheckpointStatus(candidate.key, "waiting", reason, candidate.run, candidate.step)


def _one(
    key: str,
    rows: Sequence[dict[str, Any]],
    lock: TaskLock,
    broken: dict[tuple[str, int], str],
    worker: launch.Running | None,
    usual: dict[str, float],
    impossible: dict[str, str],
) -> CheckpointStatus:
    first = rows[0]
    known = {row["task"]: row for row in rows if row["task"] is not None}
    reason = broken.get((key, first["n"]), "")
    tasks = []
    for name in lock.tasks:
        if name in impossible:
            tasks.append(TaskStatus(name, "skipped", impossible[name]))
        elif name in known and known[name]["undecided"]:
            gated: State = "running" if worker else "queued"
            tasks.append(TaskStatus(name, gated, "answered, not through the gate yet"))
        elif name in known:
            row = known[name]
            reasons = "; ".join(row["reasons"] or ())
            evaluation_id, attempt = row["evaluation_id"], row["attempt"]
            tasks.append(TaskStatus(name, row["status"], reasons, evaluation_id=evaluation_id, attempt=attempt))
        elif reason:
            tasks.append(TaskStatus(name, "failed", reason))
        elif worker is not None and name in {task.name for task in worker.plan.tasks}:
            tasks.append(_running(name, worker, usual))
        else:
            # Others are answered, or it came by hand: no run will come back to it for this task.
            left: State = "missing" if known or key.startswith("adhoc/") else "queued"
            tasks.append(TaskStatus(name, left))
    tasks += [TaskStatus(name, "skipped", f"no data: {skip.reason}") for name, skip in lock.skipped.items()]
    states = {task.state for task in tasks}
    no_tasks: State = "queued"
    worst = min(states, key=_ATTENTION.index) if states else no_tasks
    return CheckpointStatus(key, worst, reason, first["run"], first["step"], first["n"], tuple(tasks))


def _running(name: str, worker: launch.Running, usual: dict[str, float]) -> TaskStatus:
    started = next((m for m in worker.messages if m["type"] == "started" and m["task"] == name), None)
    if started is None:
        return TaskStatus(name, "queued", seconds_left=usual.get(name))
    progress = [m for m in worker.messages if m["type"] == "progress" and m["task"] == name]
    last = progress[-1] if progress else {"done": 0, "time": started["time"]}
    done, total = last["done"], started["total"]
    spent = last["time"] - started["time"]
    left = spent / done * (total - done) if done and spent > 0 else usual.get(name)
    return TaskStatus(name, "running", done=done, total=total, seconds_left=left)
