"""What the modules of the command share: the options before a command, the opened store, the exit codes."""

import os
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eval_platform.config import Config, load_config
from eval_platform.errors import ConfigError
from eval_platform.store import Store, open_store

if TYPE_CHECKING:
    from eval_platform.tasks import Suite, SyncReport, TaskLock

EXIT_FAILED, EXIT_USAGE, EXIT_HELD, EXIT_WAITING = 1, 2, 3, 4

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
RequireAll = Annotated[
    bool, typer.Option("--require-all", help="Fail when a task is skipped because its data cannot be had.")
]


def example(text: str) -> str:
    return f"Example: {text}"


class State:
    """The options before the command."""

    config_file: Path | None = None


def configured() -> Config:
    config = load_config(State.config_file)
    try:
        config.state_dir.mkdir(parents=True, exist_ok=True)
        writable = os.access(config.state_dir, os.W_OK | os.X_OK)
    except OSError as error:
        raise ConfigError(
            f"field state: the folder {config.state_dir} cannot be made: {error.strerror}", remedy=_STATE_REMEDY
        ) from error
    if not writable:
        raise ConfigError(f"field state: the folder {config.state_dir} is not writable", remedy=_STATE_REMEDY)
    return config


_STATE_REMEDY = "give this user the right to it, or set another `state` in eval_platform.toml or EVAL_PLATFORM_STATE"


def opened() -> tuple[Config, Store]:
    config = configured()
    return config, open_store(config.results, config.s3)


def synced(config: Config, store: Store, lock_path: Path | None = None) -> "SyncReport":
    """The tasks brought up to date; what is broken is told on standard error and stops nothing else."""
    from eval_platform.quality import check_items
    from eval_platform.tasks import sync_tasks
    from eval_platform.terminal import print_error, print_warning

    report = sync_tasks(config.tasks, store, lock_path or config.lock_path, config.suites, check=check_items)
    for error in report.errors:
        print_error(error)
    for name, warnings in report.warnings.items():
        for warning in warnings:
            print_warning(f"{name}: {warning.reason}")
    return report


def suite_lock(
    config: Config, store: Store, lock: "TaskLock", lock_path: Path, suite: str
) -> tuple["TaskLock", list[str]]:
    """(a lock with the tasks of a suite, their names): `lock` where it has them all, else one of the suite's own.

    A task that the suite names and that is not there is told on standard error and left out. Raises ConfigError when
    the suite is not there, or none of its tasks is.
    """
    from eval_platform.tasks import find_suite, shipped_suites

    names = list(find_suite(suite, config.suites, lock.groups).tasks)
    is_suite = suite in config.suites or suite in shipped_suites()  # a group is in the lock as far as it can be had
    if is_suite and any(name not in lock.tasks and name not in lock.skipped for name in names):
        selected = config.tasks.model_copy(update={"include": (), "suites": (suite,)})
        lock = synced(
            config.model_copy(update={"tasks": selected}), store, _suite_lock_path(config, lock_path, suite)
        ).lock
    there = [name for name in names if name in lock.tasks or name in lock.skipped]
    if not there:
        raise ConfigError(f"suite {suite}: none of its tasks is there", remedy="see `eval-platform tasks list --suite`")
    return lock, there


def lock_of_suite(config: Config, suite: "Suite") -> "TaskLock":
    """The lock that says what is asked of the suite: the configured one, or that of `run --suite`."""
    from eval_platform.tasks import read_lock

    lock = read_lock(config.lock_path)
    if all(name in lock.tasks or name in lock.skipped for name in suite.tasks):
        return lock
    aside = read_lock(_suite_lock_path(config, config.lock_path, suite.suite))
    return aside if aside.tasks or aside.skipped else lock


def _suite_lock_path(config: Config, lock_path: Path, suite: str) -> Path:
    """Where the lock of a suite lies that is not configured: in the state, beside what it is used with."""
    folder = config.state_dir if lock_path == config.lock_path else lock_path.parent
    return folder / "suites" / suite / lock_path.name


def refuse_skipped(lock: "TaskLock", names: Collection[str] | None = None) -> None:
    """What --require-all is for: raises ConfigError when tasks of `names` (None: any) are skipped for want of data."""
    missing = [f"{name} ({task.dataset})" for name, task in lock.skipped.items() if names is None or name in names]
    if missing:
        raise ConfigError(
            f"--require-all: {len(missing)} tasks have no data: {', '.join(missing)}",
            remedy="`eval-platform tasks list` says what was looked for and how to get it",
        )
