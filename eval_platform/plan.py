"""What is asked of one arrival: pinned task ids and settings, small enough to hand to a worker as one JSON file."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from eval_platform import __version__
from eval_platform.config import Config
from eval_platform.errors import ConfigError, SchemaError
from eval_platform.identity import content_id
from eval_platform.sandbox import Mode
from eval_platform.served import ROOT, ServedModel, why_not
from eval_platform.store import Store, arrivals, layout, records
from eval_platform.tasks import Size, TaskLock
from eval_platform.tasks.sections import did_you_mean
from eval_platform.values import IMPORTED, Arrival, RunSettings, Served

PLAN_VERSION = 1
_ONE_RELEASE = "install the same eval-platform for the platform and its workers"


class OtherRelease(SchemaError):
    """A plan that another release of the platform wrote: what it asks may mean something else here."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What somebody wants asked. tasks: of the lock, None for all; old_lock: although the results root has newer ones.

    limit: only the first items. The rest goes before what is configured where it is not None.
    """

    lock: TaskLock
    tasks: Sequence[str] | None = None
    old_lock: bool = False
    limit: int | None = None
    trust_remote_code: bool | None = None
    chat: bool | None = None
    system_prompt: str | None = None

    def settings(self, config: Config, key: str) -> RunSettings:
        """How the model `key` runs for it. Raises as `Config.run_settings` does."""
        return config.run_settings(
            key=key,
            limit=self.limit,
            trust_remote_code=self.trust_remote_code,
            chat=self.chat,
            system_prompt=self.system_prompt,
        )


@dataclass(frozen=True, slots=True)
class PlannedTask:
    """A task as the lock pinned it when the plan was made."""

    name: str
    task_id: str
    ask_id: str
    base_ask_id: str | None = None  # where it is asked without a chat, of which its file says something
    size: Size | None = None  # None where the lock does not say


@dataclass(frozen=True, slots=True)
class Plan:
    """One worker's job. Which tasks are already answered is seen by the worker, once it knows the checkpoint_id.

    skipped: tasks that cannot be asked of this model, and why. served: a served model's `[[served]]` entry, as JSON.
    expected_seconds: of each task, where it can be told (`planning`); expected_load_seconds: of the model.
    """

    arrival: Arrival
    tasks: tuple[PlannedTask, ...]
    settings: RunSettings
    store: str
    cache: str
    holds: str  # the platform's own cache, where its holds are: of use to a worker that sees that folder
    lease_seconds: float
    retry_wait_seconds: float
    sandbox: Mode = "cold"  # where programs that the model writes are run
    s3: Mapping[str, Any] = field(default_factory=dict)  # [s3] as configured; never a credential
    skipped: Mapping[str, str] = field(default_factory=dict)
    served: Mapping[str, Any] | None = None
    platform: str = __version__  # the release that made it
    expected_seconds: Mapping[str, float] = field(default_factory=dict)
    expected_load_seconds: float | None = None
    together: str = ""  # an id that the shards of one launch have in common; empty: it has no others

    def to_json(self) -> str:
        return json.dumps({"plan_version": PLAN_VERSION, **asdict(self)}, indent=1)

    def refuse_other_release(self) -> None:
        """Raises OtherRelease when another release than this one made it."""
        if self.platform != __version__:
            raise OtherRelease(
                f"the plan is of eval-platform {self.platform}, this worker of {__version__}", remedy=_ONE_RELEASE
            )

    def served_model(self) -> ServedModel | None:
        return None if self.served is None else ServedModel(**self.served)


def launch_id(plan: Plan) -> str:
    """16 hex digits of what the plan asks, by which a cluster's job is named: whoever comes again finds it running.

    The same for two plans of the same tasks, settings, arrival and results root; leases and caches are not part of it.
    """
    asked = {
        "arrival": [plan.arrival.key, plan.arrival.n],
        "tasks": sorted(task.task_id for task in plan.tasks),
        "settings": asdict(plan.settings),
        "store": plan.store,
    }
    return content_id(asked)[:16]


def read_plan(path: Path) -> Plan:
    """Raises OtherRelease when the plan's form, or that of a part of it, is another's than this release's."""
    body: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    version = body.pop("plan_version", None)
    unknown = sorted(body.keys() - {one.name for one in fields(Plan)})
    if version != PLAN_VERSION or unknown:
        more = f" with fields unknown here ({', '.join(unknown)})" if unknown else ""
        raise OtherRelease(
            f"{path}: plan version {version} of eval-platform {body.get('platform', '?')}{more}; this worker is "
            f"{__version__} and reads version {PLAN_VERSION}",
            remedy=_ONE_RELEASE,
        )
    try:
        body["arrival"] = arrivals.read_arrival(body["arrival"])
        body["tasks"] = tuple(_read_task(**task) for task in body["tasks"])
        body["settings"] = RunSettings(**body["settings"])
        return Plan(**body)
    except (KeyError, TypeError) as error:
        raise OtherRelease(
            f"{path}: of eval-platform {body.get('platform', '?')}, and not as {__version__} writes them: {error}",
            remedy=_ONE_RELEASE,
        ) from error


def _read_task(*, size: Mapping[str, int] | None, **ids: str) -> PlannedTask:
    return PlannedTask(**ids, size=None if size is None else Size(**size))


def plan(arrival: Arrival, wanted: Wanted, config: Config, store: Store) -> Plan:
    """Everything asked of `arrival`.

    Raises ConfigError when a name is unknown or skipped for want of data, or when the store knows a newer task under
    a name than the lock pins; for a served model that is not configured; and as `Config.run_settings` does.
    """
    lock = wanted.lock
    names = locked_names(lock, wanted.tasks)
    if not names:
        raise ConfigError("there is nothing to ask: the lock has no tasks", remedy="run `eval-platform tasks sync`")
    locked = [(name, lock.tasks[name]) for name in names]
    planned = tuple(PlannedTask(name, task.task_id, task.ask_id, task.base_ask_id, task.size) for name, task in locked)
    if not wanted.old_lock:
        _refuse_old_lock(store, planned)
    reasons = not_asked(config, lock, store, arrival.key)
    return plan_of(
        arrival,
        tuple(task for task in planned if task.name not in reasons),
        {task.name: reasons[task.name] for task in planned if task.name in reasons},
        wanted.settings(config, arrival.key),
        config,
        store,
    )


def locked_names(lock: TaskLock, tasks: Sequence[str] | None) -> list[str]:
    """The lock's tasks of these names, each once; None: all. Raises ConfigError for one that it has not, or skips."""
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
            f"no task named {', '.join(unknown)} in the lock{did_you_mean(unknown[0], lock.tasks)}; it has "
            f"{', '.join(lock.tasks) or 'none'}",
            remedy="add it to [tasks] and run `eval-platform tasks sync`",
        )
    return names


def plan_of(
    arrival: Arrival,
    tasks: tuple[PlannedTask, ...],
    skipped: Mapping[str, str],
    settings: RunSettings,
    config: Config,
    store: Store,
) -> Plan:
    """The plan of tasks that are pinned already, with what else a worker must know. Raises as `served_entry` does."""
    return Plan(
        arrival=arrival,
        tasks=tasks,
        settings=settings,
        store=store.uri,
        cache=str(config.cache_dir),
        holds=str(config.cache_dir),
        lease_seconds=config.worker.lease_seconds,
        retry_wait_seconds=config.worker.retry_wait_seconds,
        sandbox=config.sandbox.mode,
        s3=config.s3.model_dump(exclude_none=True),
        skipped=skipped,
        served=served_entry(config, arrival),
    )


def served_entry(config: Config, arrival: Arrival) -> dict[str, Any] | None:
    """The `[[served]]` entry of a served model's arrival, as JSON; None for a checkpoint.

    Raises ConfigError when it is configured no more, or as another model.
    """
    if arrival.served is None:
        return None
    entry = config.served_at(arrival.key)
    if entry is None:
        raise ConfigError(
            f"{arrival.key}: the configuration has no [[served]] model {arrival.key.removeprefix(f'{ROOT}/')!r}",
            remedy="name it there again: how it is asked stands nowhere else",
        )
    if entry.identity != arrival.served:
        raise ConfigError(
            f"{arrival.key}@{arrival.n} is {_shown(arrival.served)}; the configuration now says "
            f"{_shown(entry.identity)}",
            remedy="give another model a name of its own, or ask the newest arrival",
        )
    return entry.model_dump(mode="json")


def _shown(served: Served) -> str:
    return ", ".join(f"{name} {value}" for name, value in asdict(served).items() if value is not None)


def not_asked(config: Config, lock: TaskLock, store: Store, key: str) -> dict[str, str]:
    """Tasks of the lock that cannot be asked of the model `key`, and why; of a checkpoint there are none."""
    if key.startswith(f"{IMPORTED}/"):
        return dict.fromkeys(lock.tasks, "the model is known only by results that were imported")
    entry = config.served_at(key)
    if entry is None:
        return {}
    found: dict[str, str] = {}
    for name, task in lock.tasks.items():
        definition = _definition(store, task.task_id)
        why = why_not(entry, definition) if definition is not None else None
        if why is not None:
            found[name] = why
    return found


# By results root and task_id: a definition never changes.
_definitions: dict[tuple[str, str], Mapping[str, Any]] = {}


def _definition(store: Store, task_id: str) -> Mapping[str, Any] | None:
    """The keys of a task's definition; None where it was never synced to this results root, which `plan` refuses."""
    if (store.uri, task_id) not in _definitions:
        record = records.find_record(store, layout.task(task_id))
        if record is None:
            return None
        _definitions[store.uri, task_id] = record["definition"]
    return _definitions[store.uri, task_id]


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
