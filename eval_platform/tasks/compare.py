"""What makes two tasks, or two locks, different? What is asked, how it is scored, and on which documents."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eval_platform.errors import TaskError
from eval_platform.store import Store
from eval_platform.tasks.building import load_task
from eval_platform.tasks.differences import DocumentChange, compare_documents
from eval_platform.tasks.documents import as_documents
from eval_platform.tasks.lock import TaskLock
from eval_platform.tasks.render import render
from eval_platform.tasks.show import show_item
from eval_platform.tasks.task import Task, how_it_is_scored, what_is_asked
from eval_platform.values import Document

# What follows from other differences, which are told themselves.
_FOLLOWS = {"dataset_id", "ask_id"}
MISSING = "(not there)"


@dataclass(frozen=True, slots=True)
class Change:
    """One value that differs; key: its place, with dots."""

    key: str
    a: Any
    b: Any


@dataclass(frozen=True, slots=True)
class PromptChange:
    """The first document that both have and that is asked otherwise: as `tasks show` shows it, of each.

    asked_otherwise, common: of how many common documents that holds.
    """

    sample_id: str
    a: str
    b: str
    asked_otherwise: int
    common: int


@dataclass(frozen=True, slots=True)
class TaskDifference:
    """asking and scoring: values that differ (a change of scoring alone is answered without the model).

    documents, shots: None where they are the same. prompt: None where every common document is asked the same.
    """

    a: str
    b: str
    asking: tuple[Change, ...]
    scoring: tuple[Change, ...]
    documents: DocumentChange | None
    shots: DocumentChange | None
    prompt: PromptChange | None

    @property
    def same(self) -> bool:
        return not (self.asking or self.scoring or self.documents or self.shots or self.prompt)


@dataclass(frozen=True, slots=True)
class LockDifference:
    """Names only one lock has, and what became of those that stand for another task in each.

    changed: name -> the difference, None where a store that has both tasks was not at hand.
    """

    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: Mapping[str, TaskDifference | None]
    newly_skipped: tuple[str, ...]

    @property
    def same(self) -> bool:
        return not (self.added or self.removed or self.changed or self.newly_skipped)


def compare_tasks(a: Task, b: Task) -> TaskDifference:
    """What differs from `a` to `b`."""
    return TaskDifference(
        a.name,
        b.name,
        tuple(_changes(_asked(a), _asked(b))),
        tuple(_changes(_scored(a), _scored(b))),
        compare_documents(_ids(a.documents), _ids(b.documents)) or None,
        compare_documents(_ids(as_documents(a.shots)), _ids(as_documents(b.shots))) or None,
        _first_prompt(a, b),
    )


def compare_locks(a: TaskLock, b: TaskLock, store: Store) -> LockDifference:
    """What differs from `a` to `b`; tasks that stand for something else are compared where `store` has both."""
    changed: dict[str, TaskDifference | None] = {}
    for name in a.tasks:
        if name in b.tasks and a.tasks[name].task_id != b.tasks[name].task_id:
            changed[name] = _stored_difference(store, a.tasks[name].task_id, b.tasks[name].task_id)
    return LockDifference(
        tuple(name for name in b.tasks if name not in a.tasks),
        tuple(name for name in a.tasks if name not in b.tasks),
        changed,
        tuple(name for name in b.skipped if name not in a.skipped),
    )


def _asked(task: Task) -> dict[str, Any]:
    return what_is_asked(task.definition, task.dataset_id, task.fewshot_dataset_id)


def _scored(task: Task) -> dict[str, Any]:
    return how_it_is_scored(task.definition, task.ask_id, task.chance)


def _ids(documents: Sequence[Document]) -> list[str]:
    return [document.sample_id for document in documents]


def _stored_difference(store: Store, a: str, b: str) -> TaskDifference | None:
    try:
        return compare_tasks(load_task(store, a), load_task(store, b))
    except TaskError:  # a lock of another results root: its ids are all that is known here
        return None


def _changes(a: Mapping[str, Any], b: Mapping[str, Any], at: str = "") -> list[Change]:
    found = []
    for key in dict.fromkeys([*a, *b]):
        if key in _FOLLOWS:
            continue
        ours, theirs = a.get(key, MISSING), b.get(key, MISSING)
        if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
            found += _changes(ours, theirs, f"{at}{key}.")
        elif ours != theirs:
            found.append(Change(f"{at}{key}", ours, theirs))
    return found


def _first_prompt(a: Task, b: Task) -> PromptChange | None:
    theirs = {item.document.sample_id: item for item in render(b)}
    first: PromptChange | None = None
    otherwise = common = 0
    for item in render(a):
        sample_id = item.document.sample_id
        if sample_id not in theirs:
            continue
        common += 1
        other = theirs[sample_id]
        if (item.requests, item.target) != (other.requests, other.target):
            otherwise += 1
            if first is None:
                first = PromptChange(sample_id, show_item(item), show_item(other), 0, 0)
    if first is None:
        return None
    return PromptChange(first.sample_id, first.a, first.b, otherwise, common)
