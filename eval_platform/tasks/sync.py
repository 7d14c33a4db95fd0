"""`eval-platform tasks sync`: task files are checked, their documents frozen, their ids written to store and lock."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval_platform import config
from eval_platform.errors import ConfigError, TaskError
from eval_platform.store import Store, create_record, layout, log, read_record
from eval_platform.tasks.building import build_task, definition_record
from eval_platform.tasks.documents import as_documents
from eval_platform.tasks.lock import LockedTask, TaskLock, read_lock, write_lock
from eval_platform.tasks.reading import task_name
from eval_platform.tasks.schema import did_you_mean
from eval_platform.tasks.snapshots import freeze_documents
from eval_platform.tasks.task import Task

LIBRARY = Path(__file__).parent / "library"


@dataclass(frozen=True, slots=True)
class SyncReport:
    """What a sync did. changed: names that now stand for something else than before. errors: one a broken file."""

    lock: TaskLock
    changed: tuple[str, ...]
    errors: tuple[TaskError, ...]


def sync_tasks(tasks: config.Tasks, store: Store, lock_path: Path) -> SyncReport:
    """Bring store and lock up to date with the task files that `tasks` selects.

    A broken file is reported and never blocks the others: its name goes on standing for what the lock said before.
    Raises ConfigError for a folder that is not there, StoreError when the store cannot be written, SchemaError when
    the lock is from a newer eval-platform.
    """
    before = read_lock(lock_path)
    built, errors, broken = _build(tasks)
    locked = {name: before.tasks[name] for name in broken if name in before.tasks}
    changed = []
    for task in built:
        if _record(store, task):
            changed.append(task.name)
        locked[task.name] = _locked(task)
    lock = TaskLock(dict(sorted(locked.items())))
    write_lock(lock_path, lock)
    return SyncReport(lock, tuple(changed), tuple(errors))


def check_tasks(tasks: config.Tasks) -> list[TaskError]:
    """What is wrong with the selected task files, one error a file. Nothing is written."""
    return _build(tasks)[1]


def library_tasks() -> list[str]:
    """Names of the tasks shipped."""
    return sorted(path.stem for path in LIBRARY.glob("*.yaml"))


def _build(tasks: config.Tasks) -> tuple[list[Task], list[TaskError], set[str]]:
    """(tasks that work, errors of those that do not, the names the latter claim)."""
    files, errors = _select(tasks)
    built: dict[str, Task] = {}
    broken: set[str] = set()
    for name, paths in files.items():
        if len(paths) > 1:
            broken.add(name)
            listed = " and ".join(str(path) for path in paths)
            errors.append(TaskError(f"two tasks are called {name}: {listed}", remedy="rename one of them"))
            continue
        try:
            task = build_task(paths[0])
        except TaskError as error:
            broken.add(name)
            errors.append(error)
            continue
        twin = next((other for other in built.values() if other.task_id == task.task_id), None)
        if twin is not None:
            broken.add(name)
            errors.append(
                TaskError(
                    f"{paths[0]}: {name} asks and scores exactly what {twin.name} does ({files[twin.name][0]})",
                    remedy="remove one of the two files",
                )
            )
            continue
        built[name] = task
    return list(built.values()), errors, broken


def _select(tasks: config.Tasks) -> tuple[dict[str, list[Path]], list[TaskError]]:
    """Name -> the files that claim it, for the names selected; errors for names nobody claims and files without one."""
    own: dict[str, list[Path]] = {}
    errors: list[TaskError] = []
    for path in _files(tasks.folders):
        name = task_name(path)
        if name is None:
            errors.append(_nameless(path))
        else:
            own.setdefault(name, []).append(path)
    shipped = {name: LIBRARY / f"{name}.yaml" for name in library_tasks()}
    if not tasks.include:
        return (own if tasks.folders else {name: [path] for name, path in shipped.items()}), errors
    selected: dict[str, list[Path]] = {}
    for name in dict.fromkeys(tasks.include):
        paths = own.get(name, []) + ([shipped[name]] if name in shipped else [])
        if paths:
            selected[name] = paths
        else:
            errors.append(
                TaskError(
                    f"[tasks] include: there is no task {name!r}{did_you_mean(name, [*own, *shipped])}",
                    remedy=f"shipped are {', '.join(shipped)}; your own are looked for in [tasks] folders",
                )
            )
    return selected, errors


def _files(folders: Sequence[str]) -> list[Path]:
    found: dict[Path, None] = {}
    for folder in folders:
        if not Path(folder).is_dir():
            raise ConfigError(f"[tasks] folders: there is no folder {folder}", remedy="correct the path or create it")
        for path in sorted(Path(folder).rglob("*")):
            if path.suffix in (".yaml", ".yml") and path.is_file():
                found[path.resolve()] = None
    return list(found)


def _nameless(path: Path) -> TaskError:
    try:
        build_task(path)
    except TaskError as error:
        return error
    return TaskError(f"{path} has no name", remedy="give it one: `task: <name>`")


def _record(store: Store, task: Task) -> bool:
    """Freeze the task in the store; True when its name now stands for something else than before."""
    definition = task.definition
    card = {"source": definition.source, "licence": definition.licence, "citation": definition.citation}
    name = {
        "task_id": task.task_id,
        "ask_id": task.ask_id,
        "primary_metric": task.primary_metric,
        "higher_is_better": task.higher_is_better,
        "chance": task.chance,
        "title": definition.title,
        "about": definition.about,
        **card,
    }
    # What a name points to is there before the name is.
    freeze_documents(store, task.documents, card)
    if task.fewshot_dataset_id is not None:
        freeze_documents(store, as_documents(task.shots), card)
    create_record(store, layout.task(task.task_id), definition_record(task))
    while True:
        newest = layout.newest_numbered(store, layout.task_names(task.name))
        if newest is not None and _same(read_record(store, newest[1]), name):
            return False
        n = 1 if newest is None else newest[0] + 1
        log.write(store, "task", name=task.name, n=n, task_id=task.task_id)
        if create_record(store, layout.task_name(task.name, n), name):
            return True
        # Another sync took the number: look again at what the name now stands for.


def _same(record: dict[str, Any], name: dict[str, Any]) -> bool:
    return {key: value for key, value in record.items() if key != "schema_version"} == name


def _locked(task: Task) -> LockedTask:
    definition = task.definition
    tags: Iterable[str] = [definition.tag] if isinstance(definition.tag, str) else definition.tag or []
    return LockedTask(
        task_id=task.task_id,
        ask_id=task.ask_id,
        dataset_id=task.dataset_id,
        n_documents=len(task.documents),
        output_type=definition.output_type,
        num_fewshot=definition.shots,
        repeats=definition.repeats,
        primary_metric=task.primary_metric,
        higher_is_better=task.higher_is_better,
        chance=task.chance,
        score_names=definition.score_names,
        title=definition.title,
        about=definition.about,
        tags=tuple(tags),
        source=definition.source,
        licence=definition.licence,
    )
