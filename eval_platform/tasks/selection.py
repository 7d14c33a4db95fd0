"""Which task files count? Those of the user's own folders, and the ones shipped."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from eval_platform import config
from eval_platform.errors import ConfigError, TaskError
from eval_platform.tasks.building import build_task
from eval_platform.tasks.harness_files import Leaf, groups, leaves, our_name
from eval_platform.tasks.lock import LockedGroup
from eval_platform.tasks.reading import read_task_file, task_name
from eval_platform.tasks.schema import TaskFile
from eval_platform.tasks.sections import did_you_mean
from eval_platform.tasks.suite import OwnSuites, suites_of_tasks
from eval_platform.tasks.templates import inside

LIBRARY = Path(__file__).parent / "library"


def library_tasks() -> list[str]:
    """Names of the tasks shipped."""
    return sorted(path.stem for path in LIBRARY.glob("*.yaml"))


@functools.cache
def bundled_tasks() -> tuple[str, ...]:
    """Names of those shipped tasks whose items are shipped or generated too: they need no data from elsewhere."""
    return tuple(name for name in library_tasks() if is_bundled(read_task_file(LIBRARY / f"{name}.yaml")))


def is_bundled(definition: TaskFile) -> bool:
    """Whether a task's items lie beside its file or are generated, its shots' too."""
    documents = definition.documents
    if documents is None:
        return False
    sources = [documents] if documents.fewshot is None else [documents, documents.fewshot]
    return all(source.dataset is None and source.hub is None for source in sources)


def select_files(tasks: config.Tasks, own_suites: OwnSuites) -> tuple[dict[str, list[Path]], list[TaskError]]:
    """Name -> the files that claim it, for the names selected; errors for names nobody claims and files without one.

    Nothing selected by name or suite means all of the user's own; without folders of one's own, and without tasks of
    lm-evaluation-harness, the tasks that ship with their items. Raises ConfigError for a folder or a suite that is not
    there.
    """
    own: dict[str, list[Path]] = {}
    errors: list[TaskError] = []
    for path in _files(tasks.folders):
        name = task_name(path)
        if name is None:
            errors.append(_nameless(path))
        else:
            own.setdefault(name, []).append(path)
    shipped = {name: LIBRARY / f"{name}.yaml" for name in library_tasks()}
    in_suites = suites_of_tasks(tasks.suites, own_suites)
    if not tasks.include and not in_suites:
        bundled = [] if tasks.lm_eval else bundled_tasks()
        return (own if tasks.folders else {name: [shipped[name]] for name in bundled}), errors
    selected: dict[str, list[Path]] = {}
    for name in dict.fromkeys((*tasks.include, *in_suites)):
        paths = own.get(name, []) + ([shipped[name]] if name in shipped else [])
        if paths:
            selected[name] = paths
        else:
            errors.append(
                TaskError(
                    f"{_named_by(name, in_suites)}: there is no task {name!r}{did_you_mean(name, [*own, *shipped])}",
                    remedy=f"shipped are {', '.join(shipped)}; your own are looked for in [tasks] folders",
                )
            )
    return selected, errors


@dataclass(frozen=True, slots=True)
class OfHarness:
    """What `[tasks] lm_eval` names: its tasks, groups as theirs; the groups; and names that are none."""

    tasks: tuple[Leaf, ...]
    groups: Mapping[str, LockedGroup]
    unknown: frozenset[str]


def select_harness(names: Sequence[str], errors: list[TaskError]) -> OfHarness:
    """What the names of lm-evaluation-harness stand for. Adds to `errors`."""
    unknown: set[str] = set()
    found: dict[str, Leaf] = {}
    in_groups: dict[str, LockedGroup] = {}
    for name in names:
        try:
            # A task that is named itself and stands in a group is asked as it is by itself.
            for leaf in leaves(name):
                if leaf.name not in found or not leaf.groups:
                    found[leaf.name] = leaf
            in_groups |= groups(name)
        except TaskError as error:
            errors.append(inside("[tasks] lm_eval: ", error))
            unknown.add(our_name(name))
    return OfHarness(tuple(found.values()), in_groups, frozenset(unknown))


def _named_by(task: str, in_suites: Mapping[str, Sequence[str]]) -> str:
    return f"suite {in_suites[task][0]}" if task in in_suites else "[tasks] include"


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
