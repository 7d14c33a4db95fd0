"""The commands `eval-platform tasks ...`: what is asked, each a thin call into `eval_platform.tasks`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from eval_platform.cli_shared import EXIT_USAGE, AsJson, RequireAll, configured, example, opened, refuse_skipped, synced
from eval_platform.errors import EvalPlatformError

tasks_app = typer.Typer(help="What is asked: sync, list, validate, and the exact prompts.", no_args_is_help=True)


@tasks_app.command("sync", epilog=example("eval-platform tasks sync"))
def tasks_sync(require_all: RequireAll = False, as_json: AsJson = False) -> None:
    """Validate task files, freeze their documents, write the lock; a running platform reloads.

    A task whose data cannot be had is skipped, and says so; one that was frozen before goes on with what was frozen.
    """
    from eval_platform import up as platform
    from eval_platform.terminal import print_json, print_skipped, say

    config, store = opened()
    report = synced(config, store)
    reloaded = platform.reload_code_location(config)
    if as_json:
        print_json(
            {
                "lock": str(config.lock_path),
                "tasks": list(report.lock.tasks),
                "changed": list(report.changed),
                "errors": [str(error) for error in report.errors],
                "skipped": {name: asdict(task) for name, task in report.lock.skipped.items()},
                "kept": {name: asdict(task) for name, task in report.kept.items()},
                "warnings": {name: [asdict(one) for one in found] for name, found in report.warnings.items()},
                "documents": {name: asdict(change) for name, change in report.documents.items()},
                "reloaded": reloaded,
            }
        )
    else:
        say(f"{len(report.lock.tasks)} tasks in {config.lock_path}")
        if report.changed:
            say(f"new or changed: {', '.join(report.changed)}")
            say("checkpoints that are known already are asked by `eval-platform backfill`")
        for name, change in report.documents.items():
            say(f"other documents than before: {name}: {change}")
        for name, task in report.kept.items():
            say(f"asked as it was frozen before: {name}; its data cannot be had now: {task.reason}")
        print_skipped(report.lock.skipped)
        if reloaded:
            say("the running platform has reloaded its tasks")
    if require_all:
        refuse_skipped(report.lock)
    if report.errors:
        raise typer.Exit(EXIT_USAGE)


@tasks_app.command("list", epilog=example("eval-platform tasks list"))
def tasks_list(
    suite: Annotated[str | None, typer.Option(help="Only the tasks of this suite.")] = None, as_json: AsJson = False
) -> None:
    """The tasks of the lock: what every new checkpoint is asked, and what is skipped because its data is not here."""
    from eval_platform.tasks import TaskLock, find_suite, read_lock
    from eval_platform.terminal import print_json, print_skipped, print_tasks, say

    config = configured()
    lock = read_lock(config.lock_path)
    absent: list[str] = []
    if suite is not None:
        names = find_suite(suite, config.suites).tasks
        absent = [name for name in names if name not in lock.tasks and name not in lock.skipped]
        lock = TaskLock(
            {name: lock.tasks[name] for name in names if name in lock.tasks},
            {name: lock.skipped[name] for name in names if name in lock.skipped},
        )
    if as_json:
        asked = {name: asdict(task) for name, task in lock.tasks.items()}
        print_json(asked | {name: {"skipped": asdict(task)} for name, task in lock.skipped.items()})
    elif lock.tasks or lock.skipped:
        print_tasks(lock)
        print_skipped(lock.skipped)
    elif not absent:
        say(f"No tasks in {config.lock_path}: run `eval-platform tasks sync`.")
    if absent and not as_json:
        say(f'not configured: {", ".join(absent)}; `suites = ["{suite}"]` under [tasks] asks them too')


@tasks_app.command("show", epilog=example("eval-platform tasks show addition -k 3"))
def tasks_show(
    name: Annotated[str, typer.Argument(help="Name of a task.")],
    k: Annotated[int, typer.Option("-k", min=0, help="Position of the sample.")] = 0,
) -> None:
    """The exact prompt of sample k, character for character, and what is asked of it."""
    from eval_platform.tasks import load_task, read_lock, show_prompt

    config, store = opened()
    lock = read_lock(config.lock_path)
    if name in lock.skipped:
        raise EvalPlatformError(
            f"{name} is skipped: no data: {lock.skipped[name].reason}", remedy=lock.skipped[name].remedy
        )
    if name not in lock.tasks:
        there = f"one of: {', '.join(lock.tasks)}; or " if lock.tasks else ""
        raise EvalPlatformError(
            f"no task named {name} in {config.lock_path}", remedy=f"{there}add it and run `eval-platform tasks sync`"
        )
    print(show_prompt(load_task(store, lock.tasks[name].task_id), k))


@tasks_app.command("validate", epilog=example("eval-platform tasks validate my_tasks/capitals.yaml"))
def tasks_validate(files: Annotated[list[Path], typer.Argument(help="Task files.")], as_json: AsJson = False) -> None:
    """Check task files without syncing them; errors name file, field and remedy."""
    from eval_platform.tasks import validate_file
    from eval_platform.terminal import print_json, say

    errors: dict[str, str | None] = {}
    for file in files:
        try:
            validate_file(file)
            errors[str(file)] = None
        except EvalPlatformError as error:
            errors[str(file)] = str(error)
    if as_json:
        print_json([{"file": file, "ok": error is None, "error": error} for file, error in errors.items()])
    else:
        for file, error in errors.items():
            say(f"ok   {file}" if error is None else f"bad  {error}")
    if any(errors.values()):
        raise typer.Exit(EXIT_USAGE)
