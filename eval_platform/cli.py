"""The command `eval-platform`: every command is a thin call into the library.

Exit codes: 0 done; 1 something failed; 2 wrong usage, configuration or input; 3 something is held back; 4 left to
another worker.
"""

import getpass
import json
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from eval_platform import __version__
from eval_platform.config import Config, load_config
from eval_platform.errors import EvalPlatformError, QueryError
from eval_platform.store import Store, open_store

EXIT_FAILED, EXIT_USAGE, EXIT_HELD, EXIT_WAITING = 1, 2, 3, 4

app = typer.Typer(
    help="Evaluates every checkpoint of a training run as it arrives, and publishes only numbers that can be believed.",
    epilog="Start with `eval-platform doctor`, then `eval-platform up` beside your training run.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
tasks_app = typer.Typer(help="What is asked: sync, list, validate, and the exact prompts.", no_args_is_help=True)
app.add_typer(tasks_app, name="tasks")

out = Console()
err = Console(stderr=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
Reason = Annotated[str, typer.Option("--reason", help="Why; recorded for good.")]
EvaluationId = Annotated[str, typer.Argument(help="evaluation_id, or the first digits that tell it apart.")]
Attempt = Annotated[int | None, typer.Option(help="Which attempt; default: the newest.")]


class _State:
    """The options before the command."""

    config_file: Path | None = None


def _config() -> Config:
    return load_config(_State.config_file)


def _opened() -> tuple[Config, Store]:
    config = _config()
    return config, open_store(config.results)


def _version(wanted: bool) -> None:
    if wanted:
        out.print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    config: Annotated[
        Path | None, typer.Option("--config", help="eval_platform.toml; default: $EVAL_PLATFORM_CONFIG, then ./")
    ] = None,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
) -> None:
    _State.config_file = config


@app.command()
def up() -> None:
    """Start the platform beside a training run: sync the tasks, then Dagster's daemon and web server.

    Every new checkpoint in the configured folders is evaluated by itself. Stays up until Ctrl-C.
    """
    from eval_platform import up as platform

    # Stopped in order however it is told to: a service manager says SIGTERM, a shell's background job ignores Ctrl-C.
    for signal_ in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signal_, signal.default_int_handler)
    config, store = _opened()
    _sync(config, store, quiet=True)
    err.print("starting Dagster …")
    with platform.platform(config, err.print) as running:
        out.print(f"UI        {running.url}", highlight=False)
        out.print(f"watching  {', '.join(root.path for root in config.checkpoints)}", highlight=False)
        out.print(f"results   {config.results}", highlight=False)
        out.print('ask       eval-platform sql "select * from leaderboard"', highlight=False)
        try:
            while True:
                time.sleep(1)
                for name in running.revive():
                    err.print(f"[yellow]the {name} ended and was started again[/]")
        except KeyboardInterrupt:
            err.print("stopping …")


@app.command()
def run(
    checkpoint: Annotated[Path, typer.Option(help="Folder of the checkpoint.")],
    tasks: Annotated[str | None, typer.Option(help="Names, separated by commas; default: all configured.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="First N items only: for trying out, never on a board.")
    ] = None,
    results: Annotated[str | None, typer.Option(help="Another results root.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option(help="Run the checkpoint's own Python in this one run; recorded.")
    ] = False,
    old_lock: Annotated[
        bool, typer.Option(help="Ask the lock's tasks although the results root has newer ones.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """The whole job for one checkpoint, without Dagster: same code, same store, same gate.

    A running platform on the same results root adopts what this does, and the other way round.
    """
    from eval_platform import once

    config = _config()
    if results is not None:
        config = config.model_copy(update={"results": results if "://" in results else str(Path(results).resolve())})
    store = open_store(config.results)
    if not config.lock_path.exists() or results is not None:
        _sync(config, store, quiet=True)
    names = [name.strip() for name in tasks.split(",") if name.strip()] if tasks else None
    outcomes = []
    with _progress() as progress:
        bars: dict[str, Any] = {}
        for outcome in once.evaluate_folder(
            config,
            store,
            checkpoint,
            tasks=names,
            limit=limit,
            trust_remote_code=trust_remote_code or None,
            old_lock=old_lock,
            actor=_actor(),
            on_message=lambda message: _show(progress, bars, message),
        ):
            outcomes.append(outcome)
    if as_json:
        print(json.dumps([_outcome_json(outcome) for outcome in outcomes], indent=1))
    else:
        _print_outcomes(outcomes)
    states = {outcome.status for outcome in outcomes}
    for state, code in (("failed", EXIT_FAILED), ("held", EXIT_HELD), ("waiting", EXIT_WAITING)):
        if state in states:
            raise typer.Exit(code)


@app.command()
def status(
    as_json: AsJson = False,
    all_tasks: Annotated[bool, typer.Option("--tasks", help="One line per task.")] = False,
) -> None:
    """Where every checkpoint is: waiting and why, queued, running with time left, published, held or failed and why."""
    from eval_platform import status as library
    from eval_platform.tasks import read_lock

    config, store = _opened()
    found = library.status(config, store, read_lock(config.lock_path))
    if as_json:
        print(json.dumps([asdict(one) for one in found], indent=1))
        return
    table = Table("checkpoint", "step", "state", "tasks", "what to know", box=None)
    for one in found:
        table.add_row(
            one.key, "" if one.step is None else str(one.step), _coloured(one.state), _tally(one), escape(_why(one))
        )
        if all_tasks:
            for task in one.tasks:
                table.add_row(f"  {task.task}", "", _coloured(task.state), _left(task), escape(task.reason))
    out.print(table if found else "No checkpoint yet. Write one into: " + ", ".join(r.path for r in config.checkpoints))


@app.command()
def sql(
    query: Annotated[
        str, typer.Argument(help="One SELECT over the views and tables; `-` reads it from standard input.")
    ],
    output: Annotated[str, typer.Option("--format", help="table, csv, json, markdown or parquet.")] = "table",
    timeout: Annotated[float, typer.Option(help="Seconds before the query is interrupted.")] = 60.0,
) -> None:
    """Ask in SQL (DuckDB), read-only, also while runs write.

    Views: leaderboard, learning_curves, samples, held, failed.
    Tables: arrivals, evaluations, scores, decisions, checks, tasks, datasets, failures.
    """
    from eval_platform import warehouse

    config, store = _opened()
    warehouse.refresh(store, config.catalog_path)
    text = sys.stdin.read() if query == "-" else query
    answer = warehouse.query(config.catalog_path, store, text, timeout_s=timeout)
    body = warehouse.render(answer, output)
    if isinstance(body, bytes):
        sys.stdout.buffer.write(body)
    else:
        print(body)


@app.command()
def leaderboard(
    output: Annotated[str, typer.Option("--format", help="table, csv, json or markdown.")] = "table",
) -> None:
    """The newest published score of every checkpoint on every task, with its 95 % interval."""
    from eval_platform import report, warehouse

    config, store = _opened()
    warehouse.refresh(store, config.catalog_path)
    board = warehouse.query(
        config.catalog_path, store, "select * from leaderboard order by run, step desc nulls last, key, task"
    )
    if output == "markdown":
        print(report.leaderboard_markdown(board))
    elif output == "table":
        out.print(report.leaderboard_table(board))
    else:
        print(warehouse.render(board, output))


@app.command()
def samples(
    checkpoint: Annotated[str | None, typer.Option(help="Key of a checkpoint.")] = None,
    task: Annotated[str | None, typer.Option(help="Name of a task.")] = None,
    evaluation: Annotated[str | None, typer.Option(help="evaluation_id instead of checkpoint and task.")] = None,
    attempt: Attempt = None,
    diff: Annotated[
        tuple[str, str] | None, typer.Option(help="Two checkpoints A B: the items whose answer flipped.")
    ] = None,
    wrong: Annotated[bool, typer.Option(help="Only what was answered wrongly.")] = False,
    n: Annotated[int, typer.Option("-n", min=1, help="How many.")] = 10,
    as_json: AsJson = False,
) -> None:
    """Look at answers: prompt, what was said, what was right. With --diff A B, the items that flipped."""
    from eval_platform import answers, warehouse

    config, store = _opened()
    warehouse.refresh(store, config.catalog_path)
    if diff is not None:
        found = answers.flipped(config.catalog_path, store, *diff, task=task, n=n)
    else:
        found = answers.look(
            config.catalog_path,
            store,
            checkpoint=checkpoint,
            task=task,
            evaluation_id=evaluation,
            attempt=attempt,
            wrong=wrong,
            n=n,
        )
    if as_json:
        print(json.dumps(found, indent=1, default=str))
        return
    for row in found:
        out.rule(escape(str(row.pop("title"))))
        for name, value in row.items():
            out.print(f"[bold]{name}[/]  {escape(str(value))}", highlight=False)
    if not found:
        out.print("Nothing to show.")


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Look over installation, configuration, folders, tasks, device and Dagster home, and say what to fix."""
    from eval_platform import doctor as library

    findings = library.examine(_State.config_file)
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    else:
        for finding in findings:
            mark = "[green]ok  [/]" if finding.ok else "[red]FIX [/]"
            out.print(f"{mark} {finding.what}: {escape(finding.found)}", highlight=False)
            if not finding.ok:
                out.print(f"     -> {escape(finding.remedy)}", highlight=False)
    if not all(finding.ok for finding in findings):
        raise typer.Exit(EXIT_FAILED)


@app.command()
def release(evaluation_id: EvaluationId, reason: Reason, attempt: Attempt = None) -> None:
    """Publish a held evaluation on your word. What has a missing or non-finite score cannot be; rerun it."""
    _act("release", evaluation_id, attempt, reason)


@app.command()
def retract(evaluation_id: EvaluationId, reason: Reason, attempt: Attempt = None) -> None:
    """Take a published evaluation off the boards."""
    _act("retract", evaluation_id, attempt, reason)


@app.command()
def recheck(evaluation_id: EvaluationId, reason: Reason, attempt: Attempt = None) -> None:
    """Run today's gate on stored answers, without inference."""
    _act("recheck", evaluation_id, attempt, reason)


@app.command()
def rerun(evaluation_id: EvaluationId, reason: Reason) -> None:
    """Open another attempt: the model is asked everything again. A running platform takes it up by itself."""
    _act("rerun", evaluation_id, None, reason)


@app.command()
def retry(
    subject: Annotated[
        str, typer.Argument(help="evaluation_id of a failed attempt, or the key of a failed checkpoint.")
    ],
    reason: Reason,
) -> None:
    """Forgive failures, so that what failed for good is tried again."""
    _act("retry", subject, None, reason)


@app.command()
def backfill(
    task: Annotated[str | None, typer.Option(help="Only this task.")] = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate every known checkpoint on what it lacks: tasks added or changed since it arrived."""
    from eval_platform import once

    config, store = _opened()
    outcomes = []
    with _progress() as progress:
        bars: dict[str, Any] = {}
        for outcome in once.backfill(
            config,
            store,
            tasks=[task] if task else None,
            actor=_actor(),
            on_message=lambda message: _show(progress, bars, message),
        ):
            outcomes.append(outcome)
    if as_json:
        print(json.dumps([_outcome_json(outcome) for outcome in outcomes], indent=1))
    else:
        _print_outcomes(outcomes)
    if any(outcome.status == "failed" for outcome in outcomes):
        raise typer.Exit(EXIT_FAILED)


@tasks_app.command("sync")
def tasks_sync() -> None:
    """Validate task files, freeze their documents, write the lock; a running platform reloads."""
    from eval_platform import up as platform

    config, store = _opened()
    _sync(config, store, quiet=False)
    if platform.reload_code_location(config):
        out.print("the running platform has reloaded its tasks")


@tasks_app.command("list")
def tasks_list(as_json: AsJson = False) -> None:
    """The tasks of the lock: what every new checkpoint is asked."""
    from eval_platform.tasks import read_lock

    lock = read_lock(_config().lock_path)
    if as_json:
        print(json.dumps({name: asdict(task) for name, task in lock.tasks.items()}, indent=1))
        return
    table = Table("task", "documents", "primary metric", "chance", "task_id", "about", box=None)
    for name, task in lock.tasks.items():
        chance = "" if task.chance is None else f"{task.chance:.3g}"
        table.add_row(
            name,
            str(task.n_documents),
            task.primary_metric,
            chance,
            task.task_id[:8],
            (task.about or "").splitlines()[0],
        )
    out.print(table)


@tasks_app.command("show")
def tasks_show(
    name: Annotated[str, typer.Argument(help="Name of a task.")],
    k: Annotated[int, typer.Option("-k", min=0, help="Position of the sample.")] = 0,
) -> None:
    """The exact prompt of sample k, character for character, and what is asked of it."""
    from eval_platform.tasks import load_task, read_lock, show_prompt

    config, store = _opened()
    lock = read_lock(config.lock_path)
    if name not in lock.tasks:
        raise EvalPlatformError(
            f"no task named {name} in {config.lock_path}", remedy=f"one of: {', '.join(lock.tasks)}"
        )
    print(show_prompt(load_task(store, lock.tasks[name].task_id), k))


@tasks_app.command("validate")
def tasks_validate(files: Annotated[list[Path], typer.Argument(help="Task files.")]) -> None:
    """Check task files without syncing them; errors name file, field and remedy."""
    from eval_platform.tasks import validate_file

    broken = 0
    for file in files:
        try:
            validate_file(file)
            out.print(f"[green]ok[/]  {file}")
        except EvalPlatformError as error:
            broken += 1
            out.print(f"[red]bad[/] {escape(str(error))}")
    if broken:
        raise typer.Exit(EXIT_USAGE)


def _sync(config: Config, store: Store, *, quiet: bool) -> None:
    from eval_platform.tasks import sync_tasks

    report = sync_tasks(config.tasks, store, config.lock_path)
    for error in report.errors:
        err.print(f"[red]{escape(str(error))}[/]")
    if not quiet:
        out.print(f"{len(report.lock.tasks)} tasks in {config.lock_path}")
    if report.errors and not quiet:
        raise typer.Exit(EXIT_USAGE)


def _act(action: str, subject: str, attempt: int | None, reason: str) -> None:
    from eval_platform import once

    config, store = _opened()
    out.print(once.act(config, store, action, subject, attempt=attempt, actor=_actor(), reason=reason))


def _actor() -> str:
    return getpass.getuser()


def _progress() -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=err,
        transient=True,
    )


def _show(progress: Progress, bars: dict[str, Any], message: dict[str, Any]) -> None:
    """A worker's message on the progress display."""
    match message["type"]:
        case "staging":
            bar = bars.setdefault("", progress.add_task("reading the checkpoint") if "" not in bars else bars[""])
            progress.update(bar, completed=message["done"], total=message["total"])
        case "started":
            bars[message["task"]] = progress.add_task(message["task"], total=message["total"])
        case "progress" if message["task"] in bars:
            progress.update(bars[message["task"]], completed=message["done"], total=message["total"])
        case "committed" | "linked" if message["task"] in bars:
            progress.update(bars[message["task"]], visible=False)
        case "failed":
            progress.console.print(f"[red]{message['task'] or 'checkpoint'}: {escape(message['reason'])}[/]")


def _outcome_json(outcome: Any) -> dict[str, Any]:
    record = outcome.record
    return {
        "task": outcome.task,
        "status": outcome.status,
        "reasons": list(outcome.reasons),
        "linked": outcome.linked,
        **{
            name: record.get(name) for name in ("key", "evaluation_id", "attempt", "checkpoint_id", "scores", "primary")
        },
    }


def _print_outcomes(outcomes: list[Any]) -> None:
    table = Table("task", "status", "metric", "value", "95 % interval", "n", "why", box=None)
    for outcome in outcomes:
        primary = outcome.record.get("primary", {})
        score = next(
            (
                s
                for s in outcome.record.get("scores", ())
                if s["metric"] == primary["metric"] and s["subset"] == "" and s["subject"] is None
            ),
            None,
        )
        cells = ["", "", "", ""]
        if score is not None:
            low, high = score["ci_low"], score["ci_high"]
            cells = [
                score["metric"],
                "—" if score["value"] is None else f"{score['value']:.4f}",
                "" if low is None or high is None else f"{low:.4f} … {high:.4f}",
                str(score["n"]),
            ]
        table.add_row(outcome.task, _coloured(outcome.status), *cells, escape(" ".join(outcome.reasons)))
    out.print(table)


_COLOURS = {"published": "green", "held": "yellow", "failed": "red", "refused": "red", "running": "cyan"}


def _coloured(state: str) -> str:
    colour = _COLOURS.get(state)
    return f"[{colour}]{state}[/]" if colour else state


def _tally(one: Any) -> str:
    counts: dict[str, int] = {}
    for task in one.tasks:
        counts[task.state] = counts.get(task.state, 0) + 1
    return ", ".join(f"{count} {state}" for state, count in counts.items())


def _why(one: Any) -> str:
    if one.reason:
        return one.reason
    told = [f"{task.task}: {task.reason}" for task in one.tasks if task.reason]
    left = [task.seconds_left for task in one.tasks if task.seconds_left is not None]
    if one.state == "running" and left:
        told.insert(0, f"about {sum(left):.0f} s left")
    return "; ".join(told[:2])


def _left(task: Any) -> str:
    if task.total:
        return f"{task.done}/{task.total}"
    return ""


def main() -> NoReturn:
    """The entry point: errors meant for people are printed, not traced."""
    try:
        app(standalone_mode=True)
    except QueryError as error:
        err.print(f"[red]{escape(str(error))}[/]")
        sys.exit(EXIT_USAGE)
    except EvalPlatformError as error:
        err.print(f"[red]error:[/] {escape(str(error))}")
        sys.exit(EXIT_USAGE if error.class_ == "deterministic" else EXIT_FAILED)
    sys.exit(0)


if __name__ == "__main__":
    main()
