"""A suite is a named list of tasks: one choice in the configuration, one group in Dagster, one table of a report."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from eval_platform.errors import ConfigError, TaskError
from eval_platform.tasks.lock import GroupMean, LockedGroup
from eval_platform.tasks.sections import did_you_mean

SUITES = Path(__file__).parent / "suites"

# Own suites, as `[suites]` of the configuration has them: name -> names of tasks.
OwnSuites = Mapping[str, Sequence[str]]
NO_SUITES: OwnSuites = MappingProxyType({})


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Column(_Section):
    """A task in a suite's table. beside: scores shown beside its primary one. average: it counts in the average."""

    task: str
    title: str
    beside: tuple[str, ...] = ()
    average: bool = False


class Suite(_Section):
    """Tasks that belong together, in the order of their table. means: what is computed over all that have the score."""

    suite: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    title: str
    about: str = ""
    source: str = ""
    citation: str = ""
    columns: tuple[Column, ...] = Field(min_length=1)
    means: tuple[GroupMean, ...] = ()

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(column.task for column in self.columns)


def shipped_suites() -> list[str]:
    """Names of the suites shipped."""
    return sorted(path.stem for path in SUITES.glob("*.yaml"))


def find_suite(name: str, own: OwnSuites, groups: Mapping[str, LockedGroup] = MappingProxyType({})) -> Suite:
    """The suite of this name, one's own, shipped, or a group of lm-evaluation-harness that the lock has.

    Raises ConfigError when there is none, or one's own is called as one that is shipped.
    """
    shipped = shipped_suites()
    if name in own and name in shipped:
        raise ConfigError(
            f"[suites]: a suite called {name} is shipped, so {name!r} would mean two", remedy="rename yours"
        )
    if name in own:
        return Suite(suite=name, title=name, columns=tuple(Column(task=task, title=task) for task in own[name]))
    if name in shipped:
        return read_suite(SUITES / f"{name}.yaml")
    if name in groups:
        group = groups[name]
        columns = tuple(Column(task=task, title=task) for task in group.tasks)
        return Suite(suite=name, title=group.title, columns=columns, means=group.means)
    known = [*own, *shipped, *groups]
    raise ConfigError(
        f"there is no suite {name!r}{did_you_mean(name, known)}",
        remedy=f"name one of {', '.join(known)}, or add your own under [suites]",
    )


def read_suite(path: Path) -> Suite:
    """The suite in a file. Raises TaskError naming file and field."""
    try:
        suite = Suite.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (yaml.YAMLError, ValidationError) as error:
        raise TaskError(f"{path} is not a suite: {error}", remedy="mend the file") from error
    if suite.suite != path.stem:
        raise TaskError(f"{path} says suite: {suite.suite}", remedy="name file and suite alike")
    return suite


def suites_of_tasks(names: Sequence[str], own: OwnSuites) -> dict[str, tuple[str, ...]]:
    """Task -> those of the suites `names` that it is in, in their order. Raises ConfigError as `find_suite`."""
    found: dict[str, tuple[str, ...]] = {}
    for name in dict.fromkeys(names):
        for task in find_suite(name, own).tasks:
            found[task] = (*found.get(task, ()), name)
    return found
