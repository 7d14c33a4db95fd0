"""The commands `eval-platform tasks ...`: what is asked, each a thin call into `eval_platform.tasks`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from eval_platform.cli_shared import EXIT_USAGE, AsJson, configured, example, opened, synced
from eval_platform.errors import EvalPlatformError

tasks_app = typer.Typer(help="What is asked: sync, list, validate, and the exact prompts.", no_args_is_help=True)


@tasks_app.command("sync", epilog=example("eval-platform tasks sync"))
def tasks_sync(as_json: AsJson = False) -> None:
    """Validate task files, freeze their documents, write the lock; a running platform reloads."""
    from eval_platform import up as platform
    from eval_platform.terminal import print_json, say

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
                "reloaded": reloaded,
            }
        )
    else:
        say(f"{len(report.lock.tasks)} tasks in {config.lock_path}")
        if report.changed:
            say(f"new or changed: {', '.join(report.changed)}")
            say("checkpoints that are known already are asked by `eval-platform backfill`")
        if reloaded:
            say("the running platform has reloaded its tasks")
    if report.errors:
        raise typer.Exit(EXIT_USAGE)


@tasks_app.command("list", epilog=example("eval-platform tasks list"))
def tasks_list(as_json: AsJson = False) -> None:
    """The tasks of the lock: what every new checkpoint is asked."""
    from eval_platform.tasks import read_lock
    from eval_platform.terminal import print_json, print_tasks, say

    config = configured()
    lock = read_lock(config.lock_path)
    if as_json:
        print_json({name: asdict(task) for name, task in lock.tasks.items()})
    elif lock.tasks:
        print_tasks(lock)
    else:
        say(f"No tasks in {config.lock_path}: run `eval-platform tasks sync`.")


@tasks_app.command("show", epilog=example("eval-platform tasks show addition -k 3"))
def tasks_show(
    name: Annotated[str, typer.Argument(help="Name of a task.")],
    k: Annotated[int, typer.Option("-k", min=0, help="Position of the sample.")] = 0,
) -> None:
    """The exact prompt of sample k, character for character, and what is asked of it."""
    from eval_platform.tasks import load_task, read_lock, show_prompt

    config, store = opened()
    lock = read_lock(config.lock_path)
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
