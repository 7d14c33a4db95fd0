"""What a person asks for by hand: one checkpoint now, what is missing everywhere, a word on one result."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from eval_platform import checkpoints, quality, warehouse
from eval_platform.config import Config
from eval_platform.drive import Outcome, drive
from eval_platform.errors import ConfigError, EvalPlatformError
from eval_platform.plan import Plan, PlannedTask, Wanted, locked_names, not_asked, plan, plan_of
from eval_platform.store import Store, arrivals, commits, decisions, open_root, register_root, tries, watcher_id
from eval_platform.tasks import SkippedTask, TaskLock, read_lock
from eval_platform.values import RunSettings
from eval_platform.warehouse.connection import literal

_MISSING = """
    select a.key, a.n, t.name as task
    from newest_arrivals a cross join tasks t
    where t.current and not exists (
        select 1 from evaluations e
        where e.checkpoint_id = a.checkpoint_id and e.task_id = t.task_id and e.item_limit is null
    )
    order by a.run, a.step desc nulls last, a.key, t.name
"""

_FAILED_OF = """
    select distinct evaluation_id, attempt from evaluations
    where checkpoint_id = (select checkpoint_id from arrivals where key = {} and n = {}) and status = 'failed'
"""

Action = Literal["release", "retract", "recheck", "rerun", "retry"]
OnMessage = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True)
class Act:
    """What was recorded, in words; `todo` is what must now be answered for it to have an effect, by whoever does it."""

    done: str
    evaluation_id: str | None = None
    attempt: int | None = None
    todo: Plan | None = None


def evaluate_folder(
    config: Config,
    store: Store,
    folder: Path | str,
    wanted: Wanted,
    *,
    actor: str,
    on_message: OnMessage = lambda message: None,
) -> Iterator[Outcome]:
    """Register the checkpoint in `folder`, which may be s3://bucket/path, and evaluate it here.

    Tasks without data are skipped: their outcomes come last. So long as there is any other to ask, that is no error.
    Raises CheckpointError when the folder is not a whole checkpoint, ConfigError for an unknown task.
    """
    found = checkpoints.locate(
        folder,
        config.roots,
        config.cache_dir,
        lambda done, total: on_message(_staging(done, total)),
        config.s3,
    )
    open_root(store)
    for root in config.roots:
        register_root(store, root.name, root.path)
    yield from _evaluate(config, store, found, wanted, actor, on_message)


def evaluate_served(
    config: Config,
    store: Store,
    name: str,
    wanted: Wanted,
    *,
    actor: str,
    on_message: OnMessage = lambda message: None,
) -> Iterator[Outcome]:
    """As `evaluate_folder`, of the `[[served]]` model called `name`. Tasks that it cannot be asked are skipped.

    Raises ConfigError when there is no such model, or it can be asked none of the tasks.
    """
    entry = next((entry for entry in config.served if entry.name == name), None)
    if entry is None:
        known = ", ".join(entry.name for entry in config.served)
        raise ConfigError(
            f"no [[served]] model is called {name!r}; " + (f"there are {known}" if known else "there is none"),
            remedy="describe it in eval_platform.toml (docs/served.md)",
        )
    open_root(store)
    yield from _evaluate(config, store, checkpoints.as_found(entry), wanted, actor, on_message)


def _evaluate(
    config: Config,
    store: Store,
    found: checkpoints.Found,
    wanted: Wanted,
    actor: str,
    on_message: OnMessage,
) -> Iterator[Outcome]:
    wanted.settings(config, found.key)  # what cannot be is refused before anything is recorded
    arrival, _ = arrivals.register(store, watcher=watcher_id(config.state_dir), **asdict(found))
    on_message({"type": "checkpoint", "key": arrival.key})
    asked, skipped = split_skipped(wanted.lock, wanted.tasks)
    todo = plan(arrival, replace(wanted, tasks=asked), config, store)
    if not todo.tasks:
        raise ConfigError(
            f"{arrival.key} can be asked none of them: "
            + "; ".join(f"{name}: {why}" for name, why in todo.skipped.items()),
            remedy="name tasks of completions, or a provider that gives log-likelihoods",
        )
    yield from drive(todo, config, store, actor=actor, on_message=on_message)
    yield from skipped


def split_skipped(lock: TaskLock, tasks: Sequence[str] | None) -> tuple[list[str], list[Outcome]]:
    """(names to ask, how the others of `tasks` end: skipped); None: all of the lock.

    Where everything is skipped nothing is split off, so that the plan refuses it and says what is missing.
    """
    wanted = [*lock.tasks, *lock.skipped] if tasks is None else list(dict.fromkeys(tasks))
    asked = [name for name in wanted if name not in lock.skipped]
    if not asked:
        return wanted, []
    return asked, [_skipped(name, lock.skipped[name]) for name in wanted if name in lock.skipped]


def _skipped(name: str, task: SkippedTask) -> Outcome:
    return Outcome(name, "skipped", (f"no data: {task.reason}\n  remedy: {task.remedy}",))


def backfill(
    config: Config,
    store: Store,
    *,
    tasks: Sequence[str] | None = None,
    actor: str,
    on_message: OnMessage = lambda message: None,
) -> Iterator[Outcome]:
    """Evaluate every known checkpoint on the tasks of the lock that it has no result for, newest step first.

    A message of type `checkpoint` names each before its outcomes. Raises ConfigError for a task that is not
    in the lock, or skipped there.
    """
    lock = read_lock(config.lock_path)
    wanted = set(locked_names(lock, tasks))
    warehouse.refresh(store, config.catalog_path)
    missing: dict[tuple[str, int], list[str]] = {}
    impossible: dict[str, dict[str, str]] = {}  # of served models
    for row in warehouse.query(config.catalog_path, store, _MISSING).to_pylist():
        key = row["key"]
        if key not in impossible:
            impossible[key] = not_asked(config, lock, store, key)
        if row["task"] in wanted and row["task"] in lock.tasks and row["task"] not in impossible[key]:
            missing.setdefault((row["key"], row["n"]), []).append(row["task"])
    for (key, n), names in missing.items():
        arrival = arrivals.get(store, key, n)
        if arrival is None or (arrival.served is not None and config.served_at(key) is None):
            continue
        on_message({"type": "checkpoint", "key": key})
        todo = plan(arrival, Wanted(lock, names), config, store)
        yield from drive(todo, config, store, actor=actor, on_message=on_message)


def act(
    config: Config, store: Store, action: Action, subject: str, *, attempt: int | None, actor: str, reason: str
) -> Act:
    """release, retract, recheck, rerun or retry, recorded under `actor` and `reason`.

    `subject` is an evaluation_id or enough of its first digits; for retry also a checkpoint's key. A rerun that was
    asked for before and has no result yet is not asked for again: its plan is returned once more.
    """
    warehouse.refresh(store, config.catalog_path)
    if action == "retry" and "/" in subject:
        return _retry_arrival(config, store, subject, actor, reason)
    evaluation_id = _evaluation(config, store, subject)
    committed = commits.attempts(store, evaluation_id)
    # What is open has nothing yet that could be judged.
    newest = committed[-1] if committed and action in ("release", "recheck") else commits.slot(store, evaluation_id)
    chosen = attempt or newest
    todo: Plan | None = None
    match action:
        case "rerun":
            if commits.read(store, evaluation_id, chosen) is None and chosen > 1:
                done = f"attempt {chosen} of {evaluation_id} is open since an earlier rerun"
            else:
                chosen = quality.rerun(store, evaluation_id, actor, reason)
                done = f"attempt {chosen} of {evaluation_id} is open"
            todo = _again(config, store, evaluation_id, chosen)
        case "retry":
            todo = _again(config, store, evaluation_id, chosen)
            forgiven = quality.retry(store, tries.evaluation_subject(evaluation_id, chosen), actor, reason)
            done = f"{evaluation_id}: {_failed_tries(forgiven)} forgiven"
        case "release":
            decision = quality.release(store, evaluation_id, chosen, actor, reason)
            done = f"attempt {chosen}, decision {decision.n}: published"
        case "retract":
            # Boards show the lowest published attempt: all must go, or the next one would take its place.
            shown = [attempt] if attempt else _published(store, evaluation_id, committed) or [chosen]
            made = [quality.retract(store, evaluation_id, one, actor, reason) for one in shown]
            done = "; ".join(f"attempt {decision.attempt}, decision {decision.n}: held" for decision in made)
        case "recheck":
            decision = quality.recheck(store, config.catalog_path, evaluation_id, chosen, actor, reason)
            done = f"attempt {chosen}, decision {decision.n}: {decision.status}" + "".join(
                f"\n  {r}" for r in decision.reasons
            )
    warehouse.refresh(store, config.catalog_path)
    return Act(done, evaluation_id, chosen, todo)


def _published(store: Store, evaluation_id: str, attempts: Sequence[int]) -> list[int]:
    standing = {attempt: decisions.standing(store, evaluation_id, attempt) for attempt in attempts}
    return [attempt for attempt, decision in standing.items() if decision and decision.status == "published"]


def _retry_arrival(config: Config, store: Store, key: str, actor: str, reason: str) -> Act:
    """Forgive what failed of the newest arrival under `key`: its staging and loading, and every task that failed."""
    arrival = arrivals.newest(store, key)
    if arrival is None:
        raise EvalPlatformError(f"no checkpoint has arrived as {key}", remedy="see `eval-platform status`")
    todo = plan(arrival, Wanted(read_lock(config.lock_path)), config, store)
    failed = warehouse.query(config.catalog_path, store, _FAILED_OF.format(literal(key), arrival.n)).to_pylist()
    subjects = [tries.evaluation_subject(row["evaluation_id"], row["attempt"]) for row in failed]
    of_arrival = tries.arrival_subject(arrival)
    if not subjects or tries.state(store, of_arrival) is not None:
        subjects.insert(0, of_arrival)
    forgiven = [one for subject in subjects for one in quality.retry(store, subject, actor, reason)]
    warehouse.refresh(store, config.catalog_path)
    return Act(f"{key}: {_failed_tries(forgiven)} forgiven", todo=todo)


def _failed_tries(forgiven: Sequence[str]) -> str:
    return "1 failed try is" if len(forgiven) == 1 else f"{len(forgiven)} failed tries are"


def _again(config: Config, store: Store, evaluation_id: str, attempt: int) -> Plan | None:
    """What answers this attempt: the very task and settings of an earlier one, or of its own tries that failed.

    None when no arrival is known that could be asked.
    """
    committed = next((found for n in range(attempt, 0, -1) if (found := commits.read(store, evaluation_id, n))), None)
    record = committed or tries.asked(store, tries.evaluation_subject(evaluation_id, attempt))
    if not record:
        return None
    arrival = arrivals.get(store, record["key"], record["arrival"])
    if arrival is None:
        return None
    task = PlannedTask(record["task"], record["task_id"], record["ask_id"])
    return plan_of(arrival, (task,), {}, _settings_of(config, record), config, store)


def _settings_of(config: Config, record: Mapping[str, Any]) -> RunSettings:
    """The settings that a commit or a try recorded, with what is no part of them as it is configured now."""
    if "settings" not in record:  # a try from before tries recorded them
        return config.run_settings(key=record["key"], limit=record.get("limit"), chat=record.get("chat"))
    return RunSettings(
        **record["settings"],
        device=config.engine.device,
        batch_tokens=config.engine.batch_tokens,
        engine_path=config.engine.path,
        deterministic=config.engine.deterministic,
    )


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
