"""What is asked of one arrival: pinned task ids and settings, small enough to hand to a worker as one JSON file."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from eval_platform import __version__
from eval_platform.config import Config
from eval_platform.errors import ConfigError, SchemaError
from eval_platform.sandbox import Mode
from eval_platform.store import Store, layout, records
from eval_platform.tasks import TaskLock
from eval_platform.values import Arrival, RunSettings

PLAN_VERSION = 1


@dataclass(frozen=True, slots=True)
class PlannedTask:
    """A task as the lock pinned it when the plan was made."""

    name: str
    task_id: str
    ask_id: str


@dataclass(frozen=True, slots=True)
class Plan:
    """One worker's job. Which tasks are already answered is seen by the worker, once it knows the checkpoint_id."""

    arrival: Arrival
    tasks: tuple[PlannedTask, ...]
    settings: RunSettings
    store: str
    cache: str
    lease_seconds: float
    retry_wait_seconds: float
    sandbox: Mode = "cold"  # where programs that the model writes are run
    s3: Mapping[str, Any] = field(default_factory=dict)  # [s3] as configured; never a credential

    def to_json(self) -> str:
        return json.dumps({"plan_version": PLAN_VERSION, "platform": __version__, **asdict(self)}, indent=1)


def read_plan(path: Path) -> Plan:
    """Raises SchemaError when the plan was written by a newer platform."""
    body: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    version = body.pop("plan_version", None)
    platform = body.pop("platform", "?")
    if version != PLAN_VERSION:
        raise SchemaError(
            f"{path}: plan version {version} of eval-platform {platform}; this worker is {__version__} and reads "
            f"version {PLAN_VERSION}",
            remedy="install the same eval-platform for the platform and its workers",
        )
    body["arrival"] = Arrival(**body["arrival"])
    body["tasks"] = tuple(PlannedTask(**task) for task in body["tasks"])
    body["settings"] = RunSettings(**body["settings"])
    return Plan(**body)


def plan(
    arrival: Arrival,
    lock: TaskLock,
    config: Config,
    store: Store,
    *,
    tasks: Sequence[str] | None = None,
    settings: RunSettings | None = None,
    old_lock: bool = False,
) -> Plan:
    """Everything asked of `arrival`: the lock's tasks, or those named in `tasks`.

    Raises ConfigError when a name is unknown or skipped for want of data, or when the store knows a newer task under
    a name than the lock pins (`old_lock` lets an older lock through).
    """
    names = list(lock.tasks) if tasks is None else list(dict.fromkeys(tasks))
    skipped = [f"{name} ({lock.skipped[name].reason})" for name in names if name in lock.skipped]
    if skipped:
        raise ConfigError(
            f"there is no data for {', '.join(skipped)}",
            remedy="`eval-platform tasks list` says how to get it; then run `eval-platform tasks sync`",
        )
    unknown = [name for name in names if name not in lock.tasks]
    if unknown:
        raise ConfigError(
            f"no task named {', '.join(unknown)} in the lock; it has {', '.join(lock.tasks) or 'none'}",
            remedy="add it to [tasks] and run `eval-platform tasks sync`",
        )
    if not names:
        raise ConfigError("there is nothing to ask: the lock has no tasks", remedy="run `eval-platform tasks sync`")
    planned = tuple(PlannedTask(name, lock.tasks[name].task_id, lock.tasks[name].ask_id) for name in names)
    if not old_lock:
        _refuse_old_lock(store, planned)
    return Plan(
        arrival=arrival,
        tasks=planned,
        settings=settings or config.run_settings(key=arrival.key),
        store=store.uri,
        cache=str(config.cache_dir),
        lease_seconds=config.worker.lease_seconds,
        retry_wait_seconds=config.worker.retry_wait_seconds,
        sandbox=config.sandbox.mode,
        s3=config.s3.model_dump(exclude_none=True),
    )


def _refuse_old_lock(store: Store, planned: Sequence[PlannedTask]) -> None:
    for task in planned:
        newest = layout.newest_numbered(store, layout.task_names(task.name))
        if newest is None:
            raise ConfigError(
                f"task {task.name} is in the lock but not in the results root {store.uri}",
                remedy="run `eval-platform tasks sync`",
            )
        current = records.read_record(store, newest[1])["task_id"]
        if current != task.task_id:
            raise ConfigError(
                f"task {task.name}: the lock pins {task.task_id[:8]} but the results root has since got {current[:8]}",
                remedy="run `eval-platform tasks sync`, or say --old-lock to ask the older task once more",
            )
