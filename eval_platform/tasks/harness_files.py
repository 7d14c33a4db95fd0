"""Which tasks does lm-evaluation-harness have, and which files define them? Without its index, which takes 46 s.

Its 13,000 task files are looked through as text for the keys `task` and `group`; only the files that define what was
asked for are read as YAML. Tags (names that stand only in other tasks' `tag`) are found by its own index.
"""

import difflib
import functools
import hashlib
import importlib.util
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from eval_platform.errors import TaskError
from eval_platform.tasks.lock import GroupMean, LockedGroup

_INSTALL = 'pip install "eval-platform[lm-eval]"'
_NAMED = re.compile(
    rb"""^["']?(task|group)["']?[ \t]*:[ \t]*["']?([^\s"'\[{#][^"'#\r\n]*?)["']?[ \t]*\r?$""", re.MULTILINE
)
# Keys of a group's file that are about the group; all others override its tasks' own (lm_eval/config/group.py).
_OF_GROUPS = frozenset({"group", "group_alias", "task", "aggregate_metric_list", "metadata"})
_OF_INDEX = frozenset({"tag", "group", "task_list"})


@dataclass(frozen=True, slots=True)
class Leaf:
    """One task of the harness. name: what we call it. file: its YAML, relative to lm_eval/tasks.

    overrides: keys that say something else than its file, the harness's own where it stands in a group, or a user's.
    groups: names of the configured groups or tags that led to it.
    """

    name: str
    task: str
    file: str
    overrides: Mapping[str, Any] = field(default_factory=dict)
    groups: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"task {self.task} of lm-eval"


def check_installed() -> None:
    """Raises TaskError when lm-eval is not there."""
    if importlib.util.find_spec("lm_eval") is None:
        raise TaskError("the package lm-eval is not installed, whose task this is", remedy=_INSTALL)


def harness_version() -> str:
    """The installed release of lm-eval."""
    check_installed()
    return version("lm_eval")


def folder() -> Path:
    """Where the installed lm-eval keeps its tasks. Raises TaskError when it is not there."""
    check_installed()
    spec = importlib.util.find_spec("lm_eval")
    assert spec is not None  # it is installed
    assert spec.submodule_search_locations  # and a package
    return Path(spec.submodule_search_locations[0]) / "tasks"


def leaves(name: str, overrides: Mapping[str, Any] | None = None) -> list[Leaf]:
    """The tasks that a name of the harness stands for: itself, or all of its group or tag.

    Raises TaskError naming the nearest names when there is none.
    """
    check_installed()
    found = list(_leaves(name, dict(overrides or {}), ()))
    if not found:
        raise TaskError(f"group {name} of lm-eval has no tasks", remedy="name one of its tasks")
    distinct = {leaf.name: leaf for leaf in found}  # a task that two groups of a group hold is asked once
    return list(distinct.values())


def groups(name: str) -> dict[str, LockedGroup]:
    """The group of this name and all that it holds, by the names that they have here; none for a task or a tag.

    Raises TaskError as `leaves`.
    """
    check_installed()
    file = _names()["group"].get(name)
    if name in _names()["task"] or file is None:
        return {}
    return _groups(name, read_config(file, functions=False))


def our_name(task: str) -> str:
    """A task's name with what ours may not hold replaced."""
    return re.sub(r"[^A-Za-z0-9_.-]", "-", task)[:100]


def read_config(file: str, *, functions: bool = True) -> dict[str, Any]:
    """What a YAML file of the harness says, its functions imported, or as text. Raises TaskError when one cannot be."""
    from lm_eval.tasks._yaml_loader import load_yaml

    quiet()
    try:
        return dict(load_yaml(_inside(file), resolve_func=functions))
    except Exception as error:  # what its modules raise while they are imported is not ours to list
        raise TaskError(
            f"lm-eval's {file} cannot be loaded: {type(error).__name__}: {error}",
            remedy=f"install what it needs, or repair it: {_INSTALL}",
        ) from error


def code_digest(file: str) -> str:
    """The SHA-256 of a task's YAML, the files it includes and the Python beside each of them."""
    files: dict[Path, None] = {}
    _gather(_inside(file), files)
    digest = hashlib.sha256()
    root = folder()
    for path in sorted(files):
        body = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()}\0{len(body)}\0".encode())
        digest.update(body)
    return digest.hexdigest()


def quiet() -> None:
    """The harness's warnings are about its own runs."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def _leaves(name: str, overrides: dict[str, Any], groups: tuple[str, ...]) -> Iterator[Leaf]:
    names = _names()
    if name in names["task"]:
        file = names["task"][name]
        own = str(overrides.get("task", name))
        yield Leaf(our_name(own), name, file, {k: v for k, v in overrides.items() if k != "task"}, groups)
    elif name in names["group"]:
        config = read_config(names["group"][name], functions=False)
        yield from _members(name, config, overrides, (*groups, name))
    else:
        yield from _tagged(name, overrides, (*groups, name))


def _members(
    group: str, config: Mapping[str, Any], overrides: dict[str, Any], groups: tuple[str, ...]
) -> Iterator[Leaf]:
    """As `TaskFactory._build_group_members` of lm-eval 0.4.13: the outer override wins, a member's own wins it."""
    said = {key: value for key, value in config.items() if key not in _OF_GROUPS | _OF_INDEX} | overrides
    members = config.get("task")
    for member in members if isinstance(members, list) else []:
        if isinstance(member, str):
            yield from _leaves(member, {k: v for k, v in said.items() if k != "task"}, groups)
        elif "group" in member:
            inner = {key: value for key, value in member.items() if key != "group"}
            if member["group"] in _names()["group"]:
                yield from _leaves(member["group"], said | inner, groups)
            else:
                yield from _members(group, member, overrides, groups)
        elif _is_known(member["task"]):
            own = {key: value for key, value in member.items() if key != "task"}
            yield from _leaves(member["task"], said | own, groups)
        else:
            raise TaskError(
                f"group {group} of lm-eval defines its task {member['task']} itself, without a file",
                remedy="name its other tasks one by one; this one is not supported",
            )


def _groups(name: str, config: Mapping[str, Any]) -> dict[str, LockedGroup]:
    """As `TaskFactory._build_group` of lm-eval 0.4.13: a group that stands only inside another has both names."""
    tasks = dict.fromkeys(leaf.name for leaf in _members(name, config, {}, ()))
    found = {our_name(name): LockedGroup(str(config.get("group_alias") or name), tuple(tasks), _means(config))}
    members = config.get("task")
    for member in members if isinstance(members, list) else []:
        inner = member.get("group", member.get("task")) if isinstance(member, Mapping) else member
        if file := _names()["group"].get(inner):
            found |= _groups(inner, read_config(file, functions=False))
        elif isinstance(member, Mapping) and "group" in member:
            found |= _groups(f"{name}::{inner}", member)
    return found


def _means(config: Mapping[str, Any]) -> tuple[GroupMean, ...]:
    """What `aggregate_metric_list` says (lm_eval/config/group.py). Its own function of an aggregation is never called
    there (`api/group.py:Group.aggregate`): it is the mean always."""
    said = config.get("aggregate_metric_list") or []
    found = []
    for one in [said] if isinstance(said, Mapping) else said:
        filters = one.get("filter_list")
        named = [filters] if isinstance(filters, str) else filters
        found.append(
            GroupMean(str(one["metric"]), None if named is None else tuple(named), one.get("weight_by_size", True))
        )
    return tuple(found)


def _is_known(name: str) -> bool:
    names = _names()
    return name in names["task"] or name in names["group"] or name in _index()


def _tagged(name: str, overrides: dict[str, Any], groups: tuple[str, ...]) -> Iterator[Leaf]:
    entry = _index().get(name)
    if entry is None:
        names = _names()
        near = difflib.get_close_matches(name, [*names["task"], *names["group"]], n=3)
        hint = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise TaskError(
            f"lm-eval {harness_version()} has no task, group or tag {name!r}{hint}",
            remedy="`python -m lm_eval ls tasks` lists them",
        )
    for task in sorted(entry.tags):
        yield from _leaves(task, overrides, groups)


@functools.cache
def _names() -> dict[str, dict[str, str]]:
    """Kind ("task" or "group") -> name -> file, relative to lm_eval/tasks; of two files of one name the first."""
    root = folder()
    found: dict[str, dict[str, str]] = {"task": {}, "group": {}}
    for path in sorted(root.glob("**/*.yaml"), key=lambda path: path.as_posix()):
        said = {kind.decode(): name.decode() for kind, name in reversed(_NAMED.findall(path.read_bytes()))}
        kind = "group" if "group" in said else "task"
        if kind in said:
            found[kind].setdefault(said[kind], path.relative_to(root).as_posix())
    return found


@functools.cache
def _index() -> Mapping[str, Any]:
    from lm_eval.tasks import TaskManager

    quiet()
    return TaskManager().task_index


def _inside(file: str) -> Path:
    """The path of a file of the harness. Raises TaskError for one that is not there or not in its folder."""
    root = folder()
    path = (root / file).resolve()
    if not path.is_relative_to(root.resolve()) or not path.is_file():
        raise TaskError(
            f"the installed lm-eval {harness_version()} has no task file {file}",
            remedy="install the release that the task was synced with, or run `eval-platform tasks sync`",
        )
    return path


def _gather(path: Path, files: dict[Path, None]) -> None:
    if path in files:
        return
    files[path] = None
    files.update(dict.fromkeys(sorted(path.parent.glob("*.py"))))
    from lm_eval.tasks._yaml_loader import load_yaml

    includes = load_yaml(path, resolve_func=False, recursive=False).get("include", [])
    for include in includes if isinstance(includes, list) else [includes]:
        _gather((path.parent / include).resolve(), files)
