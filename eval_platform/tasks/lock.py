"""The lock file: which task each name stands for. Dagster's definitions and plans read it, and no task file."""

import json
import os
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from eval_platform.errors import SchemaError
from eval_platform.tasks.size import Size

LOCK_VERSION = 1


@dataclass(frozen=True, slots=True)
class LockedTask:
    """What must be known of a task without opening the store. The ids are identity, the rest is for people.

    suites: those of the configured suites that it is in, the first of them its group in Dagster. base_ask_id: what is
    asked where it is not asked as a chat; None where its file says nothing of chats, so that this is the ask_id. size:
    None in a lock from before it was counted.
    """

    task_id: str
    ask_id: str
    dataset_id: str
    n_documents: int
    output_type: str
    num_fewshot: int
    repeats: int
    primary_metric: str
    higher_is_better: bool
    chance: float | None
    score_names: tuple[str, ...]
    title: str
    about: str
    tags: tuple[str, ...]
    source: str
    licence: str
    suites: tuple[str, ...] = ()
    base_ask_id: str | None = None
    size: Size | None = None


@dataclass(frozen=True, slots=True)
class SkippedTask:
    """A task that is configured and cannot be asked, because its documents cannot be had.

    dataset: which. reason: what was tried, without names of this machine. remedy: how to get it.
    """

    dataset: str
    reason: str
    remedy: str


@dataclass(frozen=True, slots=True)
class GroupMean:
    """A mean over a group's tasks: of the metric after each of the filters; None: whichever filters the tasks have.

    by_size: every item counts the same, so that a task weighs what it has of them; else every task counts the same.
    """

    metric: str
    filters: tuple[str, ...] | None
    by_size: bool


@dataclass(frozen=True, slots=True)
class LockedGroup:
    """A group of lm-evaluation-harness that the configuration names, or that such a one holds: our names of its tasks,
    in its order, and the means that it defines over them."""

    title: str
    tasks: tuple[str, ...]
    means: tuple[GroupMean, ...] = ()


@dataclass(frozen=True, slots=True)
class TaskLock:
    """Task name -> what it stands for, tasks that are skipped for want of data, groups by name; all sorted by name."""

    tasks: Mapping[str, LockedTask]
    skipped: Mapping[str, SkippedTask] = field(default_factory=dict)
    groups: Mapping[str, LockedGroup] = field(default_factory=dict)


def read_lock(path: Path) -> TaskLock:
    """The lock at `path`; one without tasks when there is none yet.

    Raises SchemaError when it is not a lock, or was written by a newer eval-platform.
    """
    try:
        body: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version = body["schema_version"]
    except FileNotFoundError:
        return TaskLock({})
    except (ValueError, KeyError, TypeError) as error:
        raise SchemaError(f"{path} is not a task lock: {error!r}", remedy="run `eval-platform tasks sync`") from error
    if not isinstance(version, int) or version > LOCK_VERSION:
        raise SchemaError(
            f"{path} has schema version {version}; this eval-platform reads up to {LOCK_VERSION}",
            remedy="upgrade eval-platform on this machine",
        )
    try:
        return TaskLock(
            {name: _locked(entry) for name, entry in sorted(body["tasks"].items())},
            {name: SkippedTask(**entry) for name, entry in sorted(body.get("skipped", {}).items())},
            {name: _group(entry) for name, entry in sorted(body.get("groups", {}).items())},
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise SchemaError(f"{path} is not a task lock: {error!r}", remedy="run `eval-platform tasks sync`") from error


def write_lock(path: Path, lock: TaskLock) -> bool:
    """Write the lock unless it says the same already; True when written. A reader sees the old one or the new one."""
    body: dict[str, Any] = {"schema_version": LOCK_VERSION}
    body["tasks"] = {name: _entry(task) for name, task in lock.tasks.items()}
    if lock.skipped:
        body["skipped"] = {name: asdict(task) for name, task in lock.skipped.items()}
    if lock.groups:
        body["groups"] = {name: asdict(group) for name, group in lock.groups.items()}
    text = json.dumps(body, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")  # its own: two threads of one process may sync
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)
    return True


# Left out where they say nothing, so that a lock from before them stays what it was.
_LATER = ("suites", "base_ask_id", "size")


def _entry(task: LockedTask) -> dict[str, Any]:
    return {name: value for name, value in asdict(task).items() if name not in _LATER or value}


def _locked(entry: Mapping[str, Any]) -> LockedTask:
    known = {one.name: entry[one.name] for one in fields(LockedTask) if one.name not in _LATER}
    lists = {name: tuple(known[name]) for name in ("score_names", "tags")}
    size = Size(**entry["size"]) if "size" in entry else None
    later = {"suites": tuple(entry.get("suites", ())), "base_ask_id": entry.get("base_ask_id"), "size": size}
    return LockedTask(**{**known, **lists, **later})


def _group(entry: Mapping[str, Any]) -> LockedGroup:
    means = [
        GroupMean(one["metric"], None if one["filters"] is None else tuple(one["filters"]), one["by_size"])
        for one in entry["means"]
    ]
    return LockedGroup(entry["title"], tuple(entry["tasks"]), tuple(means))
