"""The commands `eval-platform tasks ...`: what is asked, each a thin call into `eval_platform.tasks`."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from eval_platform.cli_shared import (
    EXIT_FAILED,
    EXIT_USAGE,
    AsJson,
    RequireAll,
    configured,
    example,
    opened,
    refuse_skipped,
    synced,
)
from eval_platform.errors import EvalPlatformError, NoData

if TYPE_CHECKING:
    from eval_platform.tasks import Chat, LockedTask, Task, TaskLock

tasks_app = typer.Typer(
    help="What is asked: make a task file, check it, sync it, look at its prompts, compare.", no_args_is_help=True
)


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
                "documents": {name: str(change) for name, change in report.documents.items()},
                "shots": {name: str(change) for name, change in report.shots.items()},
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
        for name, change in report.shots.items():
            say(f"other shots than before: {name}: {change}")
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
    suite: Annotated[str | None, typer.Option(help="Only the tasks of this suite, or group of lm-eval.")] = None,
    as_json: AsJson = False,
) -> None:
    """The tasks of the lock: what every new checkpoint is asked, and what is skipped because its data is not here."""
    from eval_platform.tasks import TaskLock, find_suite, library_tasks, read_lock
    from eval_platform.terminal import print_json, print_skipped, print_tasks, say

    config = configured()
    lock = read_lock(config.lock_path)
    absent: list[str] = []
    if suite is not None:
        names = find_suite(suite, config.suites, lock.groups).tasks
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
        if not (config.tasks.include or config.tasks.suites or config.tasks.folders):
            say(f"of {len(library_tasks())} tasks shipped (docs/tasks.md); `include` under [tasks] asks others")
    elif not absent:
        say(f"No tasks in {config.lock_path}: run `eval-platform tasks sync`.")
    if absent and not as_json:
        say(f'not configured: {", ".join(absent)}; `suites = ["{suite}"]` under [tasks] asks them too')


@tasks_app.command("show", epilog=example("eval-platform tasks show addition -k 3"))
def tasks_show(
    name: Annotated[str, typer.Argument(help="Name of a task, or a task file.")],
    k: Annotated[int, typer.Option("-k", min=0, help="Position of the sample.")] = 0,
    chat: Annotated[
        bool, typer.Option("--chat", help="As a conversation, through the chat template of --tokenizer.")
    ] = False,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder of the checkpoint whose chat template is used.")
    ] = None,
    system_prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="As of `run --system-prompt`.")] = None,
) -> None:
    """The exact prompt of sample k, character for character, and what is asked of it."""
    from eval_platform.tasks import show_prompt

    if chat != (tokenizer is not None):
        raise typer.BadParameter("--chat and --tokenizer go together", param_hint="--chat")
    if system_prompt is not None and not chat:
        raise typer.BadParameter("a system prompt is part of a conversation; give --chat too", param_hint="--chat")
    print(show_prompt(task_named(name), k, _chat(tokenizer, system_prompt) if tokenizer is not None else None))


@tasks_app.command("validate", epilog=example("eval-platform tasks validate my_tasks/capitals.yaml"))
def tasks_validate(files: Annotated[list[Path], typer.Argument(help="Task files.")], as_json: AsJson = False) -> None:
    """Check task files without syncing them; errors name file, field and remedy.

    Where the data cannot be had only the keys are checked, and it says so: that is no fault of the file.
    """
    from eval_platform.tasks import validate_file
    from eval_platform.terminal import print_json, say

    errors: dict[str, str | None] = {}
    no_data: dict[str, str] = {}
    for file in files:
        errors[str(file)] = None
        try:
            validate_file(file)
        except NoData as error:
            no_data[str(file)] = "; ".join(error.tried)
        except EvalPlatformError as error:
            errors[str(file)] = str(error)
    if as_json:
        print_json(
            [
                {"file": file, "ok": error is None, "error": error, "no_data": no_data.get(file)}
                for file, error in errors.items()
            ]
        )
    else:
        for file, error in errors.items():
            keys_only = f" (its keys; no data: {no_data[file]})" if file in no_data else ""
            say(f"ok   {file}{keys_only}" if error is None else f"bad  {error}")
    if any(errors.values()):
        raise typer.Exit(EXIT_USAGE)


@tasks_app.command("new", epilog=example("eval-platform tasks new my_tasks/capitals.jsonl --task capitals"))
def tasks_new(
    documents: Annotated[Path, typer.Argument(help="File of documents: JSONL, JSON, CSV or Parquet.")],
    task: Annotated[str | None, typer.Option(help="Name of the task; default: the file's.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write a commented task file beside a file of documents, guessing its fields, and show the first prompt.

    Never overwrites a file. Look at the prompt, mend what was guessed wrongly, name the folder in [tasks] folders,
    then `eval-platform tasks sync`.
    """
    from eval_platform.tasks import build_task, new_task_file, show_prompt
    from eval_platform.terminal import print_json, say

    made = new_task_file(documents, task)
    shown = show_prompt(build_task(made), 0)
    if as_json:
        print_json({"file": str(made), "task": made.stem, "prompt": shown})
        return
    print(shown)
    say(f"written: {made}")
    say("next: mend what was guessed, name its folder in [tasks] folders, then `eval-platform tasks sync`")


@tasks_app.command("lint", epilog=example("eval-platform tasks lint my_tasks/capitals.yaml --tokenizer out/step_1000"))
def tasks_lint(
    tasks: Annotated[
        list[str] | None, typer.Argument(help="Names of tasks or task files; default: every task of the lock.")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder of a checkpoint: are the labels of choices one token each?")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Look for what measures something else than the task means to; each finding with its figures.

    White space at the seam of prompt and answer, stop strings and delimiters inside the shots, gold that leans to one
    place, items that stand twice, shots that are asked too. Ends with 1 when something should be looked at.
    """
    from eval_platform.tasks import lint, read_lock
    from eval_platform.terminal import print_json, print_lint

    encode = _encoder(tokenizer) if tokenizer is not None else None
    names = tasks or list(read_lock(configured().lock_path).tasks)
    if not names:
        raise EvalPlatformError(
            "there is no task to look at", remedy="name a task file, or run `eval-platform tasks sync`"
        )
    found = {name: lint(task_named(name), encode) for name in names}
    if as_json:
        print_json({name: [asdict(one) for one in findings] for name, findings in found.items()})
    else:
        print_lint(found)
    if any(one.wrong for findings in found.values() for one in findings):
        raise typer.Exit(EXIT_FAILED)


@tasks_app.command("diff", epilog=example("eval-platform tasks diff gsm8k_50 my_tasks/gsm8k_50.yaml"))
def tasks_diff(
    a: Annotated[str, typer.Argument(help="Name of a task, a task file, or a lock file (.json).")],
    b: Annotated[str, typer.Argument(help="The same, to compare with it.")],
    as_json: AsJson = False,
) -> None:
    """What differs from A to B: in asking, in scoring, in the documents; and the first prompt that is another.

    A difference in asking or documents runs the model again; one in scoring alone is answered from what is stored.
    Of two lock files (`git show HEAD:eval_platform.lock.json > old.json`): tasks added, removed, and each one changed.
    """
    from eval_platform.tasks import compare_locks, compare_tasks, read_lock
    from eval_platform.terminal import print_json, print_lock_difference, print_task_difference

    locks = [one.endswith(".json") for one in (a, b)]
    if any(locks) and not all(locks):
        raise typer.BadParameter("compare two tasks or two lock files", param_hint="B")
    if all(locks):
        for one in (a, b):
            if not Path(one).is_file():
                raise EvalPlatformError(f"there is no lock file {one}", remedy="give the path of a lock")
        _, store = opened()
        between = compare_locks(read_lock(Path(a)), read_lock(Path(b)), store)
        if as_json:
            print_json(asdict(between))
        else:
            print_lock_difference(between)
        return
    difference = compare_tasks(task_named(a), task_named(b))
    if as_json:
        print_json(asdict(difference))
    else:
        print_task_difference(difference)


def task_named(named: str) -> "Task":
    """The task of a file, of the lock by its name, as it was frozen, or one that is shipped and not configured."""
    from eval_platform.tasks import build_task, library_tasks, load_task, read_lock
    from eval_platform.tasks.selection import LIBRARY

    if named.endswith((".yaml", ".yml")):
        return build_task(Path(named))
    config, store = opened()
    lock = read_lock(config.lock_path)
    if named not in lock.tasks and named not in lock.skipped and named in library_tasks():
        return build_task(LIBRARY / f"{named}.yaml")
    return load_task(store, _locked(lock, named, config.lock_path).task_id)


def _locked(lock: "TaskLock", name: str, path: Path) -> "LockedTask":
    """Raises EvalPlatformError when the lock has no such task, saying why where it is skipped."""
    if name in lock.skipped:
        missing = lock.skipped[name]
        raise EvalPlatformError(f"{name} is skipped: no data: {missing.reason}", remedy=missing.remedy)
    if name not in lock.tasks:
        there = f"one of: {', '.join(lock.tasks)}; or " if lock.tasks else ""
        raise EvalPlatformError(
            f"no task named {name} in {path}", remedy=f"{there}add it and run `eval-platform tasks sync`"
        )
    return lock.tasks[name]


def _chat(folder: Path, system_prompt: str | None) -> "Chat":
    """A conversation through the chat template of the checkpoint in `folder`, as a run is configured to hold it."""
    from eval_platform.engine import chat_template, resolve_settings
    from eval_platform.tasks import Chat

    said = configured().run_settings(chat=True, system_prompt=system_prompt)
    settings = resolve_settings(said, folder)
    return Chat(chat_template(folder, settings), settings.system_prompt, settings.shots_as_turns)


def _encoder(folder: Path) -> Callable[[str], Sequence[int]]:
    """A checkpoint's tokenizer, as a function from a text to its tokens without special ones."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        raise EvalPlatformError(
            f"{folder} has no tokenizer: {error}", remedy="name the folder of a checkpoint"
        ) from error
    return lambda text: tokenizer.encode(text, add_special_tokens=False)
