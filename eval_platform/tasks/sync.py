"""`eval-platform tasks sync`: task files are checked, their documents frozen, their ids written to store and lock."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from eval_platform import config
from eval_platform.errors import NoData, TaskError
from eval_platform.store import Store, create_record, find_record, layout, log, open_root, read_record
from eval_platform.tasks.building import definition_record, open_task, prove_task, with_chance
from eval_platform.tasks.differences import DocumentChange, compare_documents
from eval_platform.tasks.documents import as_documents
from eval_platform.tasks.facts import ItemFacts, item_facts
from eval_platform.tasks.harness_files import Leaf
from eval_platform.tasks.lock import LockedGroup, LockedTask, SkippedTask, TaskLock, read_lock, write_lock
from eval_platform.tasks.selection import LIBRARY, bundled_tasks, library_tasks, select_files, select_harness
from eval_platform.tasks.size import Size, size_of
from eval_platform.tasks.snapshots import freeze_documents, frozen_ids
from eval_platform.tasks.suite import NO_SUITES, OwnSuites, suites_of_tasks
from eval_platform.tasks.task import Task
from eval_platform.values import Check

__all__ = ["LIBRARY", "SyncReport", "bundled_tasks", "check_tasks", "library_tasks", "sync_tasks"]


# What looks at the items of tasks (`quality.check_items`): task name -> its checks.
Checker: TypeAlias = Callable[[Mapping[str, ItemFacts]], Mapping[str, Sequence[Check]]]


@dataclass(frozen=True, slots=True)
class SyncReport:
    """What a sync did; what was skipped is in the lock.

    changed: names that now stand for something else than before. errors: one a broken file. kept: tasks whose data
    cannot be had any more, but was frozen before: they go on being asked from that snapshot. documents: for each task
    whose documents are others than the lock said, in which way; shots: the same of what its shots come from.
    warnings: what the checks of data that this store had not seen before found and let through.
    """

    lock: TaskLock
    changed: tuple[str, ...]
    errors: tuple[TaskError, ...]
    kept: Mapping[str, SkippedTask]
    documents: Mapping[str, DocumentChange]
    shots: Mapping[str, DocumentChange]
    warnings: Mapping[str, tuple[Check, ...]]


@dataclass(frozen=True, slots=True)
class _Built:
    """tasks: that work. errors: of those that do not; broken: the names these claim. skipped: there is no data.

    facts: of the items of those tasks that are to be checked; sizes: of the tasks that were rendered. groups: of
    lm-evaluation-harness, as far as found.
    """

    tasks: list[Task]
    errors: list[TaskError]
    broken: set[str]
    skipped: dict[str, SkippedTask]
    facts: dict[str, ItemFacts]
    sizes: dict[str, Size]
    groups: Mapping[str, LockedGroup]


def sync_tasks(
    tasks: config.Tasks,
    store: Store,
    lock_path: Path,
    own_suites: OwnSuites = NO_SUITES,
    *,
    check: Checker | None = None,
) -> SyncReport:
    """Bring store and lock up to date with the task files that `tasks` selects; own_suites: `[suites]`.

    A broken file is reported and never blocks the others: its name goes on standing for what the lock said before. So
    does a task whose data cannot be had now, where this store has it from before; without that it is skipped, which
    the lock says too. `check` looks at the items of what this store has not seen before: an error makes the task a
    broken one, a warning is kept beside the snapshot and reported.
    Raises ConfigError for a folder or a suite that is not there, StoreError when the store cannot be written,
    SchemaError when the lock or the store is from a newer eval-platform.
    """
    before = read_lock(lock_path)
    open_root(store)

    def unseen(task: Task) -> bool:
        return check is not None and find_record(store, _checks_key(task)) is None

    def proven(opened: Task) -> Task | None:
        return _as_before(store, opened, before.tasks.get(opened.name))

    built = _build(tasks, own_suites, proven, unseen)
    warnings: dict[str, tuple[Check, ...]] = {}
    if check is not None and built.facts:
        warnings = _checked(store, built, check(built.facts))
    in_suites = suites_of_tasks(tasks.suites, own_suites)
    frozen = {name for name in built.skipped if name in before.tasks and _is_frozen(store, before.tasks[name])}
    # A group that cannot be looked up now (lm-eval is not installed) stands for its tasks.
    of_groups = {task for name in built.broken if name in before.groups for task in before.groups[name].tasks}
    broken = built.broken | (of_groups - {task.name for task in built.tasks} - set(built.skipped))
    locked = {name: before.tasks[name] for name in broken | frozen if name in before.tasks}
    changed: list[str] = []
    documents: dict[str, DocumentChange] = {}
    shots: dict[str, DocumentChange] = {}
    for task in built.tasks:
        if _record(store, task):
            changed.append(task.name)
        # What was not rendered is as the lock says.
        size = built.sizes[task.name] if task.name in built.sizes else before.tasks[task.name].size
        locked[task.name] = _locked(task, size)
        if task.name in before.tasks:
            old = before.tasks[task.name]
            if change := _change(store, old.dataset_id, task.dataset_id):
                documents[task.name] = change
            if old.ask_id != task.ask_id and (change := _change(store, _shots_of(store, old), task.fewshot_dataset_id)):
                shots[task.name] = change
    skipped = {name: skip for name, skip in built.skipped.items() if name not in frozen}
    locked = {name: replace(task, suites=in_suites.get(name, ())) for name, task in locked.items()}
    skipped |= {name: skip for name, skip in before.skipped.items() if name in broken and name not in locked}
    groups = {name: group for name, group in before.groups.items() if {*group.tasks} <= of_groups} | dict(built.groups)
    lock = TaskLock(dict(sorted(locked.items())), dict(sorted(skipped.items())), dict(sorted(groups.items())))
    write_lock(lock_path, lock)
    kept = {name: built.skipped[name] for name in sorted(frozen)}
    return SyncReport(lock, tuple(changed), tuple(built.errors), kept, documents, shots, warnings)


def check_tasks(tasks: config.Tasks, own_suites: OwnSuites = NO_SUITES) -> list[TaskError]:
    """What is wrong with the selected task files, one error a file; data that is not here is no fault of theirs.

    Nothing is written.
    """
    return _build(tasks, own_suites, lambda opened: None, lambda task: False).errors


def _build(
    tasks: config.Tasks,
    own_suites: OwnSuites,
    proven: Callable[[Task], Task | None],
    to_check: Callable[[Task], bool],
) -> _Built:
    """Every selected task; what `proven` knows of an opened one is not rendered once more."""
    selected, errors = select_files(tasks, own_suites)
    files: dict[str, list[Path | Leaf]] = {name: [*paths] for name, paths in selected.items()}
    of_harness = select_harness(tasks.lm_eval, errors)
    broken = set(of_harness.unknown)
    for leaf in of_harness.tasks:
        files.setdefault(leaf.name, []).append(leaf)
    facts: dict[str, ItemFacts] = {}
    sizes: dict[str, Size] = {}
    built: dict[str, Task] = {}
    skipped: dict[str, SkippedTask] = {}
    for name, paths in files.items():
        if len(paths) > 1:
            broken.add(name)
            listed = " and ".join(str(path) for path in paths)
            errors.append(TaskError(f"two tasks are called {name}: {listed}", remedy="rename one of them"))
            continue
        try:
            opened = open_task(paths[0])
            task, items = proven(opened), []
            if task is None or to_check(task):
                task, items = prove_task(opened, paths[0])
        except NoData as error:
            skipped[name] = SkippedTask(error.name, "; ".join(error.tried), error.remedy or "")
            continue
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
        if items:
            sizes[name] = size_of(items, task.repeats)
        if to_check(task):
            facts[name] = item_facts(task, items, shipped=_is_shipped(paths[0]))
    return _Built(list(built.values()), errors, broken, skipped, facts, sizes, of_harness.groups)


def _as_before(store: Store, opened: Task, locked: LockedTask | None) -> Task | None:
    """The opened task, when it is the one that the lock names and this store has; None when it must be rendered.

    What is asked decides every prompt and, unless it is said, chance. So with the same ask_id, and chance said or not
    said as it was, the task is the same when its task_id is.
    """
    if locked is None or opened.ask_id != locked.ask_id or locked.size is None:
        return None
    record = find_record(store, layout.task(locked.task_id))
    if record is None or record["definition"]["chance"] != opened.definition.chance:
        return None
    task = with_chance(opened, locked.chance)
    return task if task.task_id == locked.task_id else None


def _is_shipped(source: Path | Leaf) -> bool:
    return isinstance(source, Path) and source.parent == LIBRARY


def _checked(store: Store, built: _Built, found: Mapping[str, Sequence[Check]]) -> dict[str, tuple[Check, ...]]:
    """Warnings by task name. Moves tasks with errors to the broken ones; of the others the outcome is recorded."""
    warnings: dict[str, tuple[Check, ...]] = {}
    for task in [task for task in built.tasks if task.name in found]:
        failed = [one for one in found[task.name] if not one.passed]
        wrong = [one for one in failed if one.severity == "error"]
        if wrong:
            built.tasks.remove(task)
            built.broken.add(task.name)
            told = "; ".join(one.reason for one in wrong)
            built.errors.append(
                TaskError(
                    f"{task.name}: its data cannot be asked: {told}", remedy="mend the documents or the task file"
                )
            )
            continue
        checks = [asdict(one) for one in found[task.name]]
        create_record(store, _checks_key(task), {"task": task.name, "ask_id": task.ask_id, "checks": checks})
        if failed:
            warnings[task.name] = tuple(failed)
    return warnings


def _checks_key(task: Task) -> str:
    return layout.dataset_checks(task.dataset_id, task.ask_id)


def _is_frozen(store: Store, locked: LockedTask) -> bool:
    """Whether a worker could ask the task from this store (a lock may come from another machine than its data)."""
    return (
        find_record(store, layout.task(locked.task_id)) is not None
        and find_record(store, layout.dataset_card(locked.dataset_id)) is not None
    )


def _shots_of(store: Store, locked: LockedTask) -> str | None:
    """The snapshot that a locked task's shots came from."""
    record = find_record(store, layout.task(locked.task_id))
    return None if record is None else record["fewshot_dataset_id"]


def _change(store: Store, old: str | None, new: str | None) -> DocumentChange | None:
    """How one snapshot differs from another; None when it does not, or the store has not the old one."""
    if old is None or new is None or old == new:
        return None
    try:
        return compare_documents(frozen_ids(store, old), frozen_ids(store, new))
    except KeyError:
        return None


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


def _locked(task: Task, size: Size | None) -> LockedTask:
    definition = task.definition
    tags: Iterable[str] = [definition.tag] if isinstance(definition.tag, str) else definition.tag or []
    return LockedTask(
        task_id=task.task_id,
        ask_id=task.ask_id,
        dataset_id=task.dataset_id,
        n_documents=len(task.documents),
        output_type=definition.output_type,
        num_fewshot=definition.shots_shown,
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
        base_ask_id=task.base_ask_id,
        size=size,
    )
