"""The command `eval-platform`: every command is a thin call into the library.

Exit codes: 0 done; 1 something failed; 2 wrong usage, configuration or input; 3 something is held back; 4 left to
another worker.
"""

import getpass
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer

from eval_platform import __version__
from eval_platform.cli_shared import (
    EXIT_FAILED,
    EXIT_HELD,
    EXIT_USAGE,
    EXIT_WAITING,
    AsJson,
    RequireAll,
    State,
    configured,
    example,
    lock_of_suite,
    opened,
    refuse_skipped,
    suite_lock,
    synced,
)
from eval_platform.cli_store import store_app
from eval_platform.cli_tasks import task_named, tasks_app
from eval_platform.config import LOCK_NAME, load_config
from eval_platform.errors import ConfigError, EvalPlatformError
from eval_platform.identity import content_id
from eval_platform.store import open_store

if TYPE_CHECKING:
    from eval_platform.drive import Outcome
    from eval_platform.once import Action

app = typer.Typer(
    help="Evaluates every checkpoint of a training run as it arrives, and publishes only numbers that can be believed.",
    epilog="Start with `eval-platform doctor`, then `eval-platform up` beside your training run. Exit codes: 0 done; "
    "1 something failed; 2 wrong usage, configuration or input; 3 something is held back; 4 left to another worker.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(tasks_app, name="tasks")
app.add_typer(store_app)

Reason = Annotated[str, typer.Option("--reason", help="Why; recorded for good.")]
EvaluationId = Annotated[str, typer.Argument(help="evaluation_id, or the first digits that tell it apart.")]
Attempt = Annotated[int | None, typer.Option(min=1, help="Which attempt; default: the newest that has a result.")]
Later = Annotated[bool, typer.Option("--later", help="Only record it; a platform on these results answers it.")]


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    config: Annotated[
        Path | None, typer.Option("--config", help="eval_platform.toml; default: $EVAL_PLATFORM_CONFIG, then ./")
    ] = None,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    State.config_file = config


@app.command(epilog=example("eval-platform --config run7/eval_platform.toml up"))
def up() -> None:
    """Start the platform beside a training run: sync the tasks, then Dagster's daemon and web server.

    Every new checkpoint in the configured folders is evaluated by itself. Stays up until Ctrl-C.
    """
    from eval_platform import queueing
    from eval_platform import up as platform
    from eval_platform.terminal import err, say

    config, store = opened()
    lock = synced(config, store).lock
    if not lock.tasks:
        raise ConfigError("there is nothing to ask: no task file works", remedy="see `eval-platform tasks sync`")
    queueing.tiers(config.queue, config.suites, lock)  # what cannot be meant is said here, not in a sensor's tick
    err.print("starting Dagster …")
    with platform.platform(config, err.print) as running:
        say(f"UI        {running.url}")
        say(f"watching  {', '.join(root.path for root in config.checkpoints)}")
        say(f"results   {config.results}")
        say('ask       eval-platform sql "select * from leaderboard"')
        try:
            while True:
                time.sleep(1)
                for name in running.revive():
                    err.print(f"[yellow]the {name} ended and was started again[/]")
        except KeyboardInterrupt:
            err.print("stopping …")


@app.command(epilog=example("eval-platform run --checkpoint out/step_1000 --tasks copying,addition --limit 20"))
def run(
    checkpoint: Annotated[
        str | None, typer.Option(help="Folder of the checkpoint, s3://bucket/path, or org/model@revision of the hub.")
    ] = None,
    served: Annotated[
        str | None, typer.Option(metavar="NAME", help="Instead of a folder: a model of [[served]], behind a server.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Names, separated by commas; default: all configured.")] = None,
    suite: Annotated[
        str | None, typer.Option(help="Name of a suite, shipped or of [suites], configured or not.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="First N items only: for trying out, never on a board.")
    ] = None,
    results: Annotated[str | None, typer.Option(metavar="ROOT", help="Another results root, for this run.")] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the checkpoint's own Python in this one run; recorded.")
    ] = False,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Through the checkpoint's chat template, or not; default: [chat] apply."),
    ] = None,
    system_prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", help="What the chat begins with, in place of each task's own.")
    ] = None,
    require_all: RequireAll = False,
    old_lock: Annotated[
        bool, typer.Option("--old-lock", help="Ask the lock's tasks although the results root has newer ones.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """The whole job for one checkpoint, or one served model, without Dagster: same code, same store, same gate.

    A running platform on the same results root adopts what this does, and the other way round. What is answered
    already is not asked again.
    """
    from eval_platform import once
    from eval_platform.plan import Wanted
    from eval_platform.tasks import read_lock

    if tasks is not None and suite is not None:
        raise typer.BadParameter("give tasks or a suite, not both", param_hint="--suite")
    if (checkpoint is None) == (served is None):
        raise typer.BadParameter("give the folder of a checkpoint, or --served NAME", param_hint="--checkpoint")
    if served is not None and trust_remote_code:
        raise typer.BadParameter("a served model's code runs on its server", param_hint="--trust-remote-code")
    config = configured()
    lock_path = config.lock_path
    if results is not None:
        root = results if "://" in results else str(Path(results).resolve())
        config = config.model_copy(update={"results": root})
        # The configured lock goes with the configured results.
        lock_path = config.state_dir / "other_results" / content_id(root)[:8] / LOCK_NAME
    store = open_store(config.results, config.s3)
    lock = read_lock(lock_path)
    if results is not None or not lock_path.exists():
        lock = synced(config, store, lock_path).lock
    names = [name.strip() for name in tasks.split(",") if name.strip()] if tasks else None
    if suite is not None:
        lock, names = suite_lock(config, store, lock, lock_path, suite)
    if require_all:
        refuse_skipped(lock, names)
    wanted = Wanted(lock, names, old_lock, limit, trust_remote_code or None, chat, system_prompt)

    def job(on_message: Callable[[dict[str, Any]], None]) -> "Iterator[Outcome]":
        if checkpoint is None:
            assert served is not None
            return once.evaluate_served(config, store, served, wanted, actor=_actor(), on_message=on_message)
        return once.evaluate_folder(config, store, checkpoint, wanted, actor=_actor(), on_message=on_message)

    _finish(job, as_json)


@app.command(epilog=example("eval-platform status --tasks"))
def status(
    as_json: AsJson = False,
    all_tasks: Annotated[bool, typer.Option("--tasks", help="Every task of every checkpoint, with its ids.")] = False,
) -> None:
    """Where every checkpoint is: waiting and why, queued, running with time left, published, held or failed and why."""
    from eval_platform import status as library
    from eval_platform.tasks import read_lock
    from eval_platform.terminal import print_json, print_status, say

    config, store = opened()
    found = library.status(config, store, read_lock(config.lock_path))
    if as_json:
        print_json([asdict(one) for one in found])
    elif found:
        # How many work at once on a cluster is the cluster's to say.
        left = library.queue_left(found, config.worker.slots) if config.worker.launcher == "subprocess" else None
        print_status(found, all_tasks=all_tasks, queue_left=left)
    else:
        say(f"No checkpoint yet. Write one into {' or '.join(root.path for root in config.checkpoints)}")


@app.command(epilog=example('eval-platform sql "select key, task, value from leaderboard" --format csv'))
def sql(
    query: Annotated[
        str, typer.Argument(help="One SELECT over the views and tables; `-` reads it from standard input.")
    ],
    output: Annotated[
        Literal["table", "csv", "json", "markdown", "parquet"], typer.Option("--format", help="How it is written out.")
    ] = "table",
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds before the query is interrupted.")] = 60.0,
) -> None:
    """Ask in SQL (DuckDB), read-only, also while runs write.

    Views: leaderboard, learning_curves, samples, newest_arrivals, held, failed, failed_arrivals, skipped,
    reference_scores.
    Tables: arrivals, evaluations, scores, decisions, checks, tasks, datasets, skips, problems.
    """
    from eval_platform import warehouse

    config, store = opened()
    warehouse.refresh(store, config.catalog_path)
    text = sys.stdin.read() if query == "-" else query
    found = warehouse.query(config.catalog_path, store, text, timeout_s=timeout, references=config.reference_keys)
    _write(warehouse.render(found, output))


@app.command(epilog=example("eval-platform leaderboard --format markdown"))
def leaderboard(
    output: Annotated[
        Literal["table", "csv", "json", "markdown"], typer.Option("--format", help="How it is written out.")
    ] = "table",
) -> None:
    """The newest published score of every checkpoint on every task; with its 95 % interval in all but `table`."""
    from eval_platform import report, warehouse
    from eval_platform.terminal import print_board, say

    config, store = opened()
    warehouse.refresh(store, config.catalog_path)
    board = warehouse.query(
        config.catalog_path, store, "select * from leaderboard order by run, step desc nulls last, key, task"
    )
    if output == "markdown":
        print(report.leaderboard_markdown(board))
    elif output != "table":
        _write(warehouse.render(board, output))
    elif board.num_rows:
        print_board(board.to_pylist())
    else:
        say("Nothing is published yet: `eval-platform status` says why.")


@app.command(epilog=example("eval-platform report --suite instructeval --format markdown"))
def report(
    suite: Annotated[str, typer.Option(help="Name of a suite, shipped or of [suites], or of a group of lm-eval.")],
    limit: Annotated[int | None, typer.Option(min=1, help="Show trials of `run --limit N` instead of results.")] = None,
    output: Annotated[
        Literal["markdown", "csv", "json"], typer.Option("--format", help="How it is written out.")
    ] = "markdown",
) -> None:
    """A suite's table: every checkpoint's scores with their standard errors, by which rule, and what is not there."""
    import pyarrow as pa

    from eval_platform import report as library
    from eval_platform import warehouse
    from eval_platform.tasks import find_suite, read_lock
    from eval_platform.terminal import print_json

    config, store = opened()
    wanted = find_suite(suite, config.suites, read_lock(config.lock_path).groups)
    warehouse.refresh(store, config.catalog_path)
    board = library.suite_board(config.catalog_path, store, wanted, lock_of_suite(config, wanted), limit)
    if output == "json":
        print_json(library.as_json(board))
    elif output == "csv":
        _write(warehouse.render(pa.Table.from_pylist(library.as_rows(board)), "csv"))
    else:
        print(library.suite_markdown(board))


@app.command(epilog=example("eval-platform samples --checkpoint demo/tiny/step_0400 --task addition --wrong -n 3"))
def samples(
    checkpoint: Annotated[str | None, typer.Option(help="Key of a checkpoint.")] = None,
    task: Annotated[str | None, typer.Option(help="Name of a task.")] = None,
    evaluation: Annotated[str | None, typer.Option(help="evaluation_id instead of checkpoint and task.")] = None,
    attempt: Attempt = None,
    diff: Annotated[
        tuple[str, str] | None, typer.Option(metavar="A B", help="Keys of two checkpoints: the items that flipped.")
    ] = None,
    wrong: Annotated[bool, typer.Option("--wrong", help="Only what was answered wrongly.")] = False,
    n: Annotated[int, typer.Option("-n", min=1, help="How many.")] = 10,
    as_json: AsJson = False,
) -> None:
    """Look at answers: prompt, what was said, what was right. With --diff A B, the items that flipped."""
    from eval_platform import answers, warehouse
    from eval_platform.terminal import print_flip, print_json, print_sample, say

    config, store = opened()
    warehouse.refresh(store, config.catalog_path)
    if diff is not None:
        flips = answers.flipped(config.catalog_path, store, *diff, task=task, n=n)
        if as_json:
            print_json(asdict(flips))
            return
        for flip in flips.shown:
            print_flip(flip)
        say(f"{flips.items} items compared: {flips.better} better, {flips.worse} worse in {diff[1]} than in {diff[0]}")
        return
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
        print_json(found)
        return
    for row in found:
        print_sample(row)
    if not found:
        say("Nothing was answered wrongly.")


@app.command(epilog=example("eval-platform tokens --checkpoint out/step_1000 --task addition -k 3 --top 5"))
def tokens(
    checkpoint: Annotated[Path, typer.Option(help="Folder of the checkpoint.")],
    task: Annotated[str, typer.Option(help="Name of a task, or a task file.")],
    k: Annotated[int, typer.Option("-k", min=0, help="Which sample, from 0.")] = 0,
    top: Annotated[int, typer.Option(min=0, help="How many of the likeliest tokens to show at each place.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Which token made an answer likely or unlikely? Each scored token of a sample, with the likeliest ones beside it.

    Loads the checkpoint and asks it anew, as a base model; records nothing. Log-probabilities in nats.
    """
    from eval_platform import tasks as library
    from eval_platform.engine import load
    from eval_platform.terminal import print_json, print_tokens, say

    asked = task_named(task)
    if not k < len(asked.documents):
        raise typer.BadParameter(f"{asked.name} has samples 0 to {len(asked.documents) - 1}", param_hint="-k")
    (item,) = library.render(asked, [asked.documents[k]])
    engine = load(checkpoint.resolve(), load_config(State.config_file).run_settings(chat=False))
    found = [(request, engine.token_scores(request, top)) for request in item.requests if request.kind != "generate"]
    if as_json:
        print_json(
            [{"request": asdict(request), "tokens": [asdict(one) for one in scores]} for request, scores in found]
        )
    elif not found:
        say(f"{asked.name} asks for completions: none of their tokens is scored.")
    for request, scores in found if not as_json else ():
        print_tokens(request, scores)


@app.command(epilog=example("eval-platform doctor"))
def doctor(as_json: AsJson = False) -> None:
    """Look over installation, configuration, folders, tasks, device and Dagster home, and say what to fix."""
    from eval_platform import doctor as library
    from eval_platform.terminal import print_findings, print_json

    findings = library.examine(State.config_file)
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        print_findings(findings)
    if not all(finding.ok for finding in findings):
        raise typer.Exit(EXIT_FAILED)


@app.command(epilog=example("eval-platform bench --checkpoint out/step_1000 --tasks copying,addition --limit 50"))
def bench(
    checkpoint: Annotated[
        Path | None, typer.Option(help="Folder of the checkpoint; without one, only the machine is measured.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Names, separated by commas; default: all configured.")] = None,
    workload: Annotated[
        Path | None, typer.Option(help="File of requests instead of tasks, one JSON object a line.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="First N items of each task, or N lines.")] = None,
    as_json: AsJson = False,
) -> None:
    """How fast is the engine here, how fast could it be, and how fast is lm-evaluation-harness beside it?

    Measures the machine's rate of matrix products at the model's own shapes and of reading memory; counts what the
    work must compute at the least (unique tokens, needed rows of the head), which at that rate is the floor; then
    times our engine on it and, when it is installed, lm-eval with the best of three batch sizes. Records nothing.
    Run it while nothing else runs: two programs on the same cores measure each other.
    """
    from eval_platform.bench import report as library
    from eval_platform.bench import show
    from eval_platform.bench.requests import read_requests
    from eval_platform.tasks import read_lock
    from eval_platform.terminal import print_json

    if workload is not None and tasks is not None:
        raise typer.BadParameter("give tasks or a workload, not both", param_hint="--workload")
    if checkpoint is None and (workload is not None or tasks is not None or limit is not None):
        raise typer.BadParameter("work needs a checkpoint to do it", param_hint="--checkpoint")
    config = load_config(State.config_file)
    found: library.Report | library.MachineReport
    with show.progress() as (step, done):
        if checkpoint is None:
            found = library.bench_machine(config.engine.device, step)
        else:
            if workload is not None:
                requests = read_requests(workload, limit)
            else:
                config, store = opened()
                lock = read_lock(config.lock_path)
                if not lock.tasks:
                    lock = synced(config, store).lock
                names = [name.strip() for name in tasks.split(",") if name.strip()] if tasks else None
                requests = library.task_requests(store, lock, names, limit)
            settings = config.run_settings(chat=False)  # the tasks' requests as for a base model
            found = library.bench_checkpoint(checkpoint.resolve(), requests, settings, step=step, progress=done)
    if as_json:
        print_json(asdict(found))
    elif isinstance(found, library.MachineReport):
        show.print_machine(found)
    else:
        show.print_report(found)


@app.command(epilog=example('eval-platform release 3fa9c1d2 --reason "the jump is the new data mix"'))
def release(evaluation_id: EvaluationId, reason: Reason, attempt: Attempt = None, as_json: AsJson = False) -> None:
    """Publish a held evaluation on your word. What has a missing or non-finite score cannot be; rerun it."""
    _act("release", evaluation_id, attempt, reason, as_json)


@app.command(epilog=example('eval-platform retract 3fa9c1d2 --reason "test items were in the training data"'))
def retract(
    evaluation_id: EvaluationId,
    reason: Reason,
    attempt: Annotated[int | None, typer.Option(min=1, help="Only this attempt.")] = None,
    as_json: AsJson = False,
) -> None:
    """Take a published evaluation off the boards: every attempt that stands published, unless you name one."""
    _act("retract", evaluation_id, attempt, reason, as_json)


@app.command(epilog=example('eval-platform recheck 3fa9c1d2 --reason "the gate was upgraded"'))
def recheck(evaluation_id: EvaluationId, reason: Reason, attempt: Attempt = None, as_json: AsJson = False) -> None:
    """Run today's gate on stored answers, without inference. Its verdict stands over an earlier release."""
    _act("recheck", evaluation_id, attempt, reason, as_json)


@app.command(epilog=example('eval-platform rerun 3fa9c1d2 --reason "the GPU was faulty"'))
def rerun(evaluation_id: EvaluationId, reason: Reason, later: Later = False, as_json: AsJson = False) -> None:
    """Ask the model everything again, as another attempt.

    A platform that runs here (`eval-platform up`) takes it up by itself; else it is answered right now.
    """
    _act("rerun", evaluation_id, None, reason, as_json, later=later)


@app.command(epilog=example('eval-platform retry run7/step_1000 --reason "the disk has space again"'))
def retry(
    subject: Annotated[
        str, typer.Argument(help="evaluation_id of a failed attempt, or the key of a failed checkpoint.")
    ],
    reason: Reason,
    later: Later = False,
    as_json: AsJson = False,
) -> None:
    """Forgive failures, so that what failed for good is tried again.

    A platform that runs here (`eval-platform up`) takes it up by itself; else it is tried right now.
    """
    _act("retry", subject, None, reason, as_json, later=later)


@app.command(epilog=example("eval-platform backfill --task gsm8k_50"))
def backfill(
    task: Annotated[str | None, typer.Option(help="Only this task.")] = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate every known checkpoint on what it lacks: tasks added or changed since it arrived."""
    from eval_platform import once

    config, store = opened()
    _finish(
        lambda on_message: once.backfill(
            config, store, tasks=[task] if task else None, actor=_actor(), on_message=on_message
        ),
        as_json,
        nothing="Nothing is missing.",
    )


def _act(
    action: "Action", subject: str, attempt: int | None, reason: str, as_json: bool, *, later: bool = False
) -> None:
    """Record a person's word and, where something must now be answered, have it answered."""
    from eval_platform import once
    from eval_platform import up as platform
    from eval_platform.drive import drive
    from eval_platform.terminal import print_json, say

    config, store = opened()
    acted = once.act(config, store, action, subject, attempt=attempt, actor=_actor(), reason=reason)
    todo, told = acted.todo, acted.done
    running = platform.running(config)
    if action in ("rerun", "retry"):
        if todo is None:
            told += "\n  the checkpoint it was asked of is not known here; a platform that knows it takes it up"
        elif running is not None:
            told, todo = f"{told}; the platform at {running['url']} takes it up", None
        elif later:
            told, todo = f"{told}; the next platform on {config.results} takes it up", None
    if todo is None:
        if as_json:
            print_json({"done": told, "evaluation_id": acted.evaluation_id, "attempt": acted.attempt})
        else:
            say(told)
        return
    if not as_json:
        say(f"{told}; no platform runs here, so it is answered now")
    plan = todo
    _finish(
        lambda on_message: drive(plan, config, store, actor=_actor(), on_message=on_message),
        as_json,
        key=plan.arrival.key,
    )


def _finish(
    job: Callable[[Callable[[dict[str, Any]], None]], "Iterator[Outcome]"],
    as_json: bool,
    *,
    key: str | None = None,
    nothing: str = "Nothing was asked.",
) -> None:
    """Show a job's progress, then how every task ended; the worst of it is the exit code."""
    from eval_platform.terminal import outcome_json, print_json, print_outcomes, progress, say

    outcomes: list[tuple[str | None, Outcome]] = []
    with progress() as show:

        def on_message(message: dict[str, Any]) -> None:
            nonlocal key
            if message["type"] == "checkpoint":
                key = message["key"]
            show(message)

        for outcome in job(on_message):
            outcomes.append((key, outcome))
    if as_json:
        print_json([outcome_json(outcome, of) for of, outcome in outcomes])
    elif outcomes:
        print_outcomes(outcomes)
    else:
        say(nothing)
    states = {outcome.status for _, outcome in outcomes}
    for state, code in (("failed", EXIT_FAILED), ("held", EXIT_HELD), ("waiting", EXIT_WAITING)):
        if state in states:
            raise typer.Exit(code)


def _write(body: str | bytes) -> None:
    if isinstance(body, str):
        sys.stdout.write(body)
    elif sys.stdout.isatty():
        raise EvalPlatformError("parquet is not for a terminal", remedy="send it to a file: `... > answer.parquet`")
    else:
        sys.stdout.buffer.write(body)


def _actor() -> str:
    return getpass.getuser()


def main() -> NoReturn:
    """The entry point: errors meant for people are printed, not traced."""
    try:
        app(standalone_mode=True)
    except EvalPlatformError as error:
        from eval_platform.terminal import print_error

        print_error(error)
        sys.exit(EXIT_USAGE if error.class_ == "deterministic" else EXIT_FAILED)
    sys.exit(0)


if __name__ == "__main__":
    main()
