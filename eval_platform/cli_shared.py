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
    from eval_platform.tasks import SyncReport, TaskLock

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
    return config, open_store(config.results)


def synced(config: Config, store: Store, lock_path: Path | None = None) -> "SyncReport":
    """The tasks brought up to date; what is broken is told on standard error and stops nothing else."""
    from eval_platform.tasks import sync_tasks
    from eval_platform.terminal import print_error

    report = sync_tasks(config.tasks, store, lock_path or config.lock_path)
    for error in report.errors:
        print_error(error)
    return report


def refuse_skipped(lock: "TaskLock", names: Collection[str] | None = None) -> None:
    """What --require-all is for: raises ConfigError when tasks of `names` (None: any) are skipped for want of data."""
    missing = [f"{name} ({task.dataset})" for name, task in lock.skipped.items() if names is None or name in names]
    if missing:
        raise ConfigError(
            f"--require-all: {len(missing)} tasks have no data: {', '.join(missing)}",
            remedy="`eval-platform tasks list` says what was looked for and how to get it",
        )
