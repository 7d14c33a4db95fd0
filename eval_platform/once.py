"""What a person asks for by hand: one checkpoint now, what is missing everywhere, a word on one result."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eval_platform import checkpoints, quality, warehouse
from eval_platform.config import Config
from eval_platform.drive import Outcome, drive
from eval_platform.errors import EvalPlatformError
from eval_platform.plan import plan
from eval_platform.store import Store, arrivals, commits, register_root, tries, watcher_id
from eval_platform.tasks import read_lock

_MISSING = """
    select a.key, a.n, t.name as task
    from newest_arrivals a cross join tasks t
    where t.current and not exists (
        select 1 from evaluations e
        where e.checkpoint_id = a.checkpoint_id and e.task_id = t.task_id and e.item_limit is null
          and e.status in ('published', 'held')
    )
    order by a.run, a.step desc nulls last, a.key, t.name
"""

OnMessage = Callable[[dict[str, Any]], None]


def evaluate_folder(
    config: Config,
    store: Store,
    folder: Path,
    *,
    tasks: Sequence[str] | None = None,
    limit: int | None = None,
    trust_remote_code: bool | None = None,
    old_lock: bool = False,
    actor: str,
    on_message: OnMessage = lambda message: None,
) -> Iterator[Outcome]:
    """Register the checkpoint in `folder` and evaluate it here. Raises CheckpointError when it is not a whole one."""
    found = checkpoints.locate(
        folder, config.checkpoints, config.cache_dir, lambda done, total: on_message(_staging(done, total))
    )
    for root in config.checkpoints:
        register_root(store, root.name, root.path)
    arrival, _ = arrivals.register(store, watcher=watcher_id(config.state_dir), **asdict(found))
    settings = config.run_settings(limit=limit, trust_remote_code=trust_remote_code)
    todo = plan(arrival, read_lock(config.lock_path), config, store, tasks=tasks, settings=settings, old_lock=old_lock)
    yield from drive(todo, config, store, actor=actor, on_message=on_message)


def backfill(
    config: Config,
    store: Store,
    *,
    tasks: Sequence[str] | None = None,
    actor: str,
    on_message: OnMessage = lambda message: None,
) -> Iterator[Outcome]:
    """Evaluate every known checkpoint on the tasks of the lock that it has no result for, newest step first."""
    lock = read_lock(config.lock_path)
    wanted = set(tasks or lock.tasks)
    warehouse.refresh(store, config.catalog_path)
    missing: dict[tuple[str, int], list[str]] = {}
    for row in warehouse.query(config.catalog_path, store, _MISSING).to_pylist():
        if row["task"] in wanted and row["task"] in lock.tasks:
            missing.setdefault((row["key"], row["n"]), []).append(row["task"])
    for (key, n), names in missing.items():
        arrival = arrivals.get(store, key, n)
        if arrival is not None:
            yield from drive(
                plan(arrival, lock, config, store, tasks=names), config, store, actor=actor, on_message=on_message
            )


def act(
    config: Config, store: Store, action: str, subject: str, *, attempt: int | None, actor: str, reason: str
) -> str:
    """release, retract, recheck, rerun or retry; returns what was done, in words.

    `subject` is an evaluation_id or enough of its first digits; for retry also a checkpoint's key.
    """
    warehouse.refresh(store, config.catalog_path)
    if action == "retry" and "/" in subject:
        arrival = arrivals.newest(store, subject)
        if arrival is None:
            raise EvalPlatformError(f"no checkpoint has arrived as {subject}", remedy="see `eval-platform status`")
        forgiven = quality.retry(store, tries.arrival_subject(arrival), actor, reason)
        return f"{subject}: {len(forgiven)} failed tries are forgiven; it is tried again"
    evaluation_id = _evaluation(config, store, subject)
    chosen = attempt or commits.slot(store, evaluation_id)
    match action:
        case "rerun":
            opened = quality.rerun(store, evaluation_id, actor, reason)
            done = f"attempt {opened} of {evaluation_id} is open; a running platform takes it up"
        case "retry":
            forgiven = quality.retry(store, tries.evaluation_subject(evaluation_id, chosen), actor, reason)
            done = f"{evaluation_id}: {len(forgiven)} failed tries are forgiven; it is tried again"
        case "release":
            done = f"decision {quality.release(store, evaluation_id, chosen, actor, reason).n}: published"
        case "retract":
            done = f"decision {quality.retract(store, evaluation_id, chosen, actor, reason).n}: held"
        case "recheck":
            decision = quality.recheck(store, config.catalog_path, evaluation_id, chosen, actor, reason)
            done = f"decision {decision.n}: {decision.status}" + "".join(f"\n  {r}" for r in decision.reasons)
        case _:
            raise ValueError(action)
    warehouse.refresh(store, config.catalog_path)
    return done


def _evaluation(config: Config, store: Store, digits: str) -> str:
    """The one evaluation_id that begins with `digits`."""
    if not digits or any(c not in "0123456789abcdef" for c in digits):
        raise EvalPlatformError(f"{digits!r} is not an evaluation_id", remedy="see the view `held`, or `evaluations`")
    text = f"select distinct evaluation_id from evaluations where evaluation_id like '{digits}%' order by all"
    found = warehouse.query(config.catalog_path, store, text)["evaluation_id"].to_pylist()
    if len(found) != 1:
        raise EvalPlatformError(
            f"{digits} names {len(found)} evaluations" + (f": {', '.join(found[:5])}" if found else ""),
            remedy="give more digits" if found else 'see `eval-platform sql "select * from held"`',
        )
    return found[0]


def _staging(done: int, total: int) -> dict[str, Any]:
    return {"type": "staging", "done": done, "total": total}
