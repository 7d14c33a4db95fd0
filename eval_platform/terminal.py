"""How does the terminal show it? Answers on standard output, progress and errors on standard error.

Lists are aligned text without borders, and never cut: what is piped on is whole, a terminal wraps it.
"""

import json
import math
import textwrap
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from eval_platform import planning
from eval_platform.doctor import Finding
from eval_platform.drive import Outcome
from eval_platform.engine import TokenScore
from eval_platform.keeping import Chosen, Moved, TakenOver, Verified
from eval_platform.status import CheckpointStatus, TaskStatus
from eval_platform.tasks import Finding as LintFinding
from eval_platform.tasks import LockDifference, SkippedTask, TaskDifference, TaskLock
from eval_platform.tasks.compare import MISSING, Change
from eval_platform.values import Request

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

Message = dict[str, Any]

# What is held names examples after its reason: `eval-platform sql "select * from held"` has them whole.
REASON_LINES = {"held": 2}
LONGEST_REASON = 10
SHOWN_REASONS = 2
SHOWN_FINDINGS = 20
_INDENT = "    "
_COLOURS = {
    "published": "green",
    "held": "yellow",
    "skipped": "yellow",
    "failed": "red",
    "refused": "red",
    "running": "cyan",
}
_WHAT_NEXT = {
    "held": "held       `eval-platform status --tasks` gives the evaluation ids; then `samples --evaluation ID` to "
    "look, `release ID` or `rerun ID` to act",
    "failed": "failed     mend the cause, then `eval-platform retry ID-or-checkpoint --reason ...`",
    "skipped": "skipped    each says why; where there is no data, `eval-platform tasks list` says how to get it",
    "missing": "missing    not asked yet: where it says nothing else (a task added later, a trial by hand) "
    "`eval-platform backfill` asks it",
}


def say(text: str) -> None:
    """One thing a person should know, on standard output."""
    out.print(text, soft_wrap=True, markup=False)


def print_json(value: Any) -> None:
    """For machines. NaN and infinities, which JSON has not, are null."""
    print(json.dumps(_plain(value), indent=1, ensure_ascii=False, allow_nan=False))


def _plain(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {name: _plain(part) for name, part in value.items()}
        case list() | tuple():
            return [_plain(part) for part in value]
        case _:
            return value


def print_error(error: Exception) -> None:
    err.print(f"[red]error:[/] {escape(str(error))}", soft_wrap=True)


def print_warning(text: str) -> None:
    err.print(f"[yellow]warning:[/] {escape(text)}", soft_wrap=True)


def aligned(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[list[str]]:
    """The cells padded to their columns' widths (`right`: numbers of the columns of numbers), the last one not."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    last = len(widths) - 1
    return [
        [
            cell.rjust(width) if i in right else cell if i == last else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in rows
    ]


def print_rows(
    header: Sequence[str], rows: Sequence[Sequence[str]], right: Collection[int] = (), state: int = -1
) -> None:
    """A list under its header; column number `state` is coloured."""
    first, *body = aligned([header, *rows], right)
    out.print(f"[bold]{escape('  '.join(first).rstrip())}[/]", soft_wrap=True)
    for row in body:
        out.print(_line(row, state), soft_wrap=True)


def _line(cells: Sequence[str], state: int) -> str:
    shown = [_coloured(cell) if i == state else escape(cell) for i, cell in enumerate(cells)]
    return "  ".join(shown).rstrip()


def _coloured(cell: str) -> str:
    colour = _COLOURS.get(cell.strip())
    return f"[{colour}]{cell}[/]" if colour else escape(cell)


def _told(text: str, state: str) -> None:
    """Why it is in this state, indented and wrapped, cut where it grows too long; a remedy on lines of its own."""
    lines = REASON_LINES.get(state, LONGEST_REASON)
    width = max(40, out.width - len(_INDENT))
    what, _, remedy = text.partition("\n  remedy: ")
    for part in (what, f"remedy: {remedy}") if remedy else (what,):
        wrapped = textwrap.wrap(
            " ".join(part.split()),
            width,
            max_lines=lines,
            placeholder=" …",
            break_on_hyphens=False,
            subsequent_indent="  ",
        )
        for line in wrapped:
            out.print(escape(_INDENT + line), soft_wrap=True)


def print_status(found: Sequence[CheckpointStatus], *, all_tasks: bool, queue_left: float | None = None) -> None:
    """One line a checkpoint; below it what is wrong or waited for, and with `all_tasks` every task.

    queue_left: seconds until all is done.
    """
    header = ("state", "checkpoint", "step", "tasks")
    rows = [(one.state, one.key, "" if one.step is None else str(one.step), _tally(one)) for one in found]
    first, *body = aligned([header, *rows], right=(2,))
    out.print(f"[bold]{escape('  '.join(first).rstrip())}[/]", soft_wrap=True)
    for one, row in zip(found, body, strict=True):
        out.print(_line(row, state=0), soft_wrap=True)
        if one.reason:
            _told(one.reason, one.state)
        if one.where or one.seconds_left is not None:
            what = "once it has begun" if one.waits_for_cluster else "left" if one.workers else "for one worker"
            about = [] if one.seconds_left is None else [f"about {planning.duration(one.seconds_left)} {what}"]
            _told("; ".join([*([f"on {one.where}"] if one.where else []), *about]), one.state)
        if all_tasks:
            _print_tasks(one)
            continue
        quiet = ("published", "skipped")  # what is skipped is the same for every checkpoint
        told = [task for task in one.tasks if task.reason and task.state not in quiet and task.reason != one.reason]
        for task in told[:SHOWN_REASONS]:
            _told(f"{task.task}: {task.reason}", task.state)
        if len(told) > SHOWN_REASONS:
            _told(f"and {len(told) - SHOWN_REASONS} more: `eval-platform status --tasks`", one.state)
    if queue_left is not None:
        end = datetime.now(UTC) + timedelta(seconds=queue_left)
        out.print()
        say(f"all that is at work or queued is expected to take {planning.duration(queue_left)}, until {end:%H:%M} UTC")
    states = {one.state for one in found} | {task.state for one in found for task in one.tasks}
    hints = [hint for state, hint in _WHAT_NEXT.items() if state in states]
    if hints:
        out.print()
        for hint in hints:
            say(hint)


def _print_tasks(one: CheckpointStatus) -> None:
    if not one.tasks:
        return
    cells = [(task.state, task.task, (task.evaluation_id or "")[:8], _done(task)) for task in one.tasks]
    for task, row in zip(one.tasks, aligned(cells), strict=True):
        out.print(f"  {_line(row, state=0)}", soft_wrap=True)
        if task.reason and task.reason != one.reason:
            _told(task.reason, task.state)


def _tally(one: CheckpointStatus) -> str:
    counts: dict[str, int] = {}
    for task in one.tasks:
        counts[task.state] = counts.get(task.state, 0) + 1
    return ", ".join(f"{count} {state}" for state, count in counts.items())


def _done(task: TaskStatus) -> str:
    told = f"{task.done}/{task.total}" if task.total else ""
    if task.seconds_left is None:
        return told
    return f"{told} about {planning.duration(task.seconds_left)} left".strip()


def print_board(rows: Sequence[Mapping[str, Any]]) -> None:
    """Rows of the view `leaderboard`: a line a checkpoint, a column a task; on a terminal in blocks that fit it."""
    from eval_platform.report.names import called  # the package draws with pyarrow, which no other command here needs

    tasks = sorted({row["task"] for row in rows})
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        cells.setdefault(called(row), {})[row["task"]] = "none" if row["value"] is None else f"{row['value']:.3f}"
    key_width = max(len(key) for key in cells)
    block: list[str] = []
    used = key_width
    for task in [*tasks, None]:
        width = 2 + max(len(task), *(len(found.get(task, "")) for found in cells.values())) if task else 0
        if block and (task is None or (out.is_terminal and used + width > out.width)):
            lines = [(key, *(found.get(name, "") for name in block)) for key, found in cells.items()]
            print_rows(("checkpoint", *block), lines, right=range(1, len(block) + 1))
            if task is not None:
                out.print()
            block, used = [], key_width
        if task is not None:
            block.append(task)
            used += width


def print_tasks(lock: TaskLock) -> None:
    """The lock, one line a task."""
    rows = []
    for name, task in lock.tasks.items():
        chance = "" if task.chance is None else f"{task.chance:.3g}"
        rows.append((name, str(task.n_documents), task.primary_metric, chance, task.task_id[:8]))
    print_rows(("task", "documents", "primary metric", "chance", "task_id"), rows, right=(1, 3))


def print_skipped(skipped: Mapping[str, SkippedTask]) -> None:
    """Tasks that are not asked for want of data: those that lack the same, once."""
    by_cause: dict[SkippedTask, list[str]] = {}
    for name, task in skipped.items():
        by_cause.setdefault(task, []).append(name)
    for task, names in by_cause.items():
        out.print(f"[yellow]skipped: no data[/]  {escape(', '.join(names))}", soft_wrap=True)
        for told in (task.reason, f"-> {task.remedy}"):
            _told(told, "skipped")


def print_lint(found: Mapping[str, Sequence[LintFinding]]) -> None:
    """What `tasks lint` found, task by task."""
    for name, findings in found.items():
        out.print(f"[bold]{escape(name)}[/]", soft_wrap=True)
        for finding in findings:
            mark = "[yellow]look[/]" if finding.wrong else "[green]ok  [/]"
            out.print(f"  {mark} {escape(f'{finding.rule}: {finding.told}')}", soft_wrap=True)
            if finding.examples:
                out.print(escape(f"       such as {', '.join(finding.examples)}"), soft_wrap=True)
        if not findings:
            say("  nothing found")


def print_task_difference(found: TaskDifference) -> None:
    """What `tasks diff` found between two tasks."""
    if found.same:
        say(f"{found.a} and {found.b} ask and score the same")
        return
    _print_changes("asked otherwise (the model runs again)", found.asking)
    _print_changes("scored otherwise (from stored answers)", found.scoring)
    for what, change in (("documents", found.documents), ("shots", found.shots)):
        if change is not None:
            say(f"{what}: {change}")
    if found.prompt is not None:
        prompt = found.prompt
        say(f"{prompt.asked_otherwise} of {prompt.common} common documents are asked otherwise; the first of them:")
        _side_by_side((found.a, prompt.a), (found.b, prompt.b))
        at = next(
            (n for n, (a, b) in enumerate(zip(prompt.a, prompt.b, strict=False)) if a != b),
            min(len(prompt.a), len(prompt.b)),
        )
        begin = max(0, at - 20)
        say(f"from character {at}: {prompt.a[begin : at + 30]!r} and {prompt.b[begin : at + 30]!r}")


def _print_changes(what: str, changes: Sequence[Change]) -> None:
    if changes:
        out.print(f"[bold]{escape(what)}[/]", soft_wrap=True)
        for change in changes:
            say(f"  {change.key}: {_short(change.a)} -> {_short(change.b)}")


def _short(value: Any) -> str:
    text = value if value == MISSING else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:197]}..."


def _side_by_side(left: tuple[str, str], right: tuple[str, str]) -> None:
    """Two named texts in two columns of the terminal."""
    table = Table(box=None, expand=True, padding=(0, 2, 0, 0))
    for name, _ in (left, right):
        table.add_column(escape(name), ratio=1, overflow="fold")
    table.add_row(Text(left[1]), Text(right[1]))
    out.print(table)


def print_lock_difference(found: LockDifference) -> None:
    """What `tasks diff` found between two locks."""
    if found.same:
        say("both locks stand for the same tasks")
        return
    for what, names in (("added", found.added), ("removed", found.removed), ("newly skipped", found.newly_skipped)):
        if names:
            say(f"{what}: {', '.join(names)}")
    for name, difference in found.changed.items():
        out.print(f"[bold cyan]── {escape(name)}[/]", soft_wrap=True)
        if difference is None:
            say("another task; the results root has not both of them to compare")
        else:
            print_task_difference(difference)


def print_findings(findings: Sequence[Finding]) -> None:
    """What `doctor` found, and under each fault its remedy."""
    for finding in findings:
        mark = "[green]ok  [/]" if finding.ok else "[red]FIX [/]"
        out.print(f"{mark} {escape(finding.what)}: {escape(finding.found)}", soft_wrap=True)
        if not finding.ok:
            out.print(f"     -> {escape(finding.remedy)}", soft_wrap=True)


def print_verified(found: Verified) -> None:
    """What `verify` found: the first of each kind of trouble in full, then how many more there are of it."""
    shown: dict[tuple[str, str], int] = {}
    for finding in found.findings:
        top = finding.key.partition("/")[0]
        shown[finding.kind, top] = shown.get((finding.kind, top), 0) + 1
        if shown[finding.kind, top] <= SHOWN_FINDINGS:
            mark = "[red]damage[/]  " if finding.kind == "damage" else "[yellow]leftover[/]"
            out.print(f"{mark} {escape(finding.key)}: {escape(finding.problem)}", soft_wrap=True)
            out.print(f"         -> {escape(finding.remedy)}", soft_wrap=True)
    for (kind, top), n in shown.items():
        if n > SHOWN_FINDINGS:
            say(f"{kind}   {n - SHOWN_FINDINGS} more under {top}/; --json lists them all")
    damaged = sum(finding.kind == "damage" for finding in found.findings)
    verdict = f"{damaged} are damaged or lost" if damaged else "whole"
    say(f"{found.files:,} files, {_megabytes(found.n_bytes)}: {verdict}; {len(found.findings) - damaged} leftovers")


def print_chosen(chosen: Chosen, *, done: bool) -> None:
    """Whose samples go, one line a checkpoint."""
    by_key: dict[str, list[int]] = {}
    for one in chosen.prune:
        by_key.setdefault(one.key, []).append(one.n_bytes)
    if by_key:
        rows = [(key, str(len(sizes)), _megabytes(sum(sizes))) for key, sizes in by_key.items()]
        print_rows(("checkpoint", "evaluations", "samples"), rows, right=(1, 2))
    verb = "pruned" if done else "would be pruned"
    n = len(chosen.prune)
    say(f"the samples of {n} evaluations {verb}, {_megabytes(chosen.n_bytes)}; those of {chosen.kept} are kept")


def print_moved(moved: Moved, source: str, target: str) -> None:
    """What came over, and what did not."""
    for one in moved.said:
        mark = "[red]refused[/]" if one.kind == "refused" else "[yellow]kept   [/]"
        out.print(f"{mark} {escape(one.key)}: {escape(one.reason)}", soft_wrap=True)
    say(
        f"{source} -> {target}: {moved.evaluations} evaluations copied ({moved.files} files), "
        f"{moved.present} were there already"
    )


def print_taken_over(done: TakenOver, source: str) -> None:
    """What became of every result that was found."""
    marks = {"taken": "[green]taken   [/]", "present": "present ", "left_out": "left out", "fault": "[red]fault   [/]"}
    for one in done.told:
        text = one.text if one.key is None or one.task is None or one.kind == "fault" else f"{one.key}: {one.text}"
        out.print(f"{marks[one.kind]} {escape(text)}", soft_wrap=True)
    say(
        f"{source}: {done.count('taken')} evaluations taken over, {done.count('present')} were there already, "
        f"{done.count('fault')} could not be read"
    )


def _megabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.1f} MB"


def outcome_json(outcome: Outcome, key: str | None) -> dict[str, Any]:
    """One task's end: its state, and of what was committed ids and scores."""
    record = outcome.record
    names = ("evaluation_id", "attempt", "checkpoint_id", "origin", "scores", "primary")
    return {
        "key": key,
        "task": outcome.task,
        "status": outcome.status,
        "reasons": list(outcome.reasons),
        "linked": outcome.linked,
        **{name: record.get(name) for name in names},
    }


def print_outcomes(outcomes: Sequence[tuple[str | None, Outcome]]) -> None:
    """(checkpoint, how one of its tasks ended): the scores, then why what is not published is not."""
    several = len({key for key, _ in outcomes}) > 1
    rows = [((key or "",) if several else ()) + _score_cells(outcome) for key, outcome in outcomes]
    first = ("checkpoint",) if several else ()
    header = (*first, "task", "status", "metric", "value", "95 % interval", "n", "")
    shift = len(first)
    print_rows(header, rows, right=(3 + shift, 5 + shift), state=1 + shift)
    reasons: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for key, outcome in outcomes:
        if outcome.reasons:
            name = f"{key} {outcome.task}" if several else outcome.task
            reasons.setdefault((outcome.status, outcome.reasons), []).append(name)
    for (status, told), names in reasons.items():
        out.print(f"[bold]{escape(', '.join(names))}[/]", soft_wrap=True)
        for reason in told:
            _told(reason, status)
    held = [outcome.record["evaluation_id"] for _, outcome in outcomes if outcome.status == "held"]
    if held:
        say(f"held back; look with `eval-platform samples --evaluation {held[0][:8]}`, then release or rerun it")


def _score_cells(outcome: Outcome) -> tuple[str, ...]:
    primary = outcome.record.get("primary", {})
    score = next(
        (
            s
            for s in outcome.record.get("scores", ())
            if s["metric"] == primary["metric"] and s["subset"] == "" and s["subject"] is None
        ),
        None,
    )
    origin = outcome.record.get("origin", "")
    note = "already answered" if outcome.linked else origin if origin not in ("", "asked") else ""
    if score is None:
        return (outcome.task, outcome.status, "", "", "", "", note)
    low, high = score["ci_low"], score["ci_high"]
    return (
        outcome.task,
        outcome.status,
        score["metric"],
        "none" if score["value"] is None else f"{score['value']:.4f}",
        "" if low is None or high is None else f"{low:.4f} … {high:.4f}",
        str(score["n"]),
        note,
    )


def print_sample(row: Mapping[str, Any]) -> None:
    """One of `answers.look`."""
    repeat = f", repeat {row['repeat']}" if row["repeat"] else ""
    subset = f" ({row['subset']})" if row["subset"] else ""
    _heading(f"{row['key']}  {row['task']} #{row['position']}{subset}{repeat}")
    _field("prompt", row["prompt"])
    _print_answer("answered", row)
    if "choices" not in row and row["target"] != row["prompt"]:
        _field("right", row["target"])
    for name, value in row["extracted"].items():
        _field("extracted" if name == "none" else f"extracted {name}", "nothing" if value is None else value)
    _field("scores", ", ".join(f"{name} {_number(value)}" for name, value in row["scores"].items()))
    if row["finish_reason"] != "scored":
        _field("finished", row["finish_reason"])


def print_flip(row: Mapping[str, Any]) -> None:
    """One of `answers.flipped`."""
    better = "better" if row["b"]["score"] > row["a"]["score"] else "worse"
    _heading(f"{row['task']} #{row['position']}: {better}")
    _field("prompt", row["prompt"])
    for side in (row["a"], row["b"]):
        _print_answer(f"{side['key']}, score {_number(side['score'])}", side)
    if "choices" not in row["a"]:
        _field("right", row["target"])


def _print_answer(name: str, answer: Mapping[str, Any]) -> None:
    if "choices" not in answer:
        response = answer["response"]
        _field(name, "(nothing: the text itself was scored)" if response is None else response)
        return
    out.print(f"[bold]{escape(name)}[/]", soft_wrap=True)
    rows = [(choice["text"], _number(choice["log_likelihood"])) for choice in answer["choices"]]
    for choice, cells in zip(answer["choices"], aligned([(repr(text), number) for text, number in rows]), strict=True):
        mark = "->" if choice["chosen"] else "  "
        right = "  right" if choice["right"] else ""
        line = escape(f"  {mark} {'  '.join(cells)}{right}")
        out.print(f"[bold]{line}[/]" if choice["chosen"] else line, soft_wrap=True)


def print_tokens(request: Request, scores: Sequence[TokenScore]) -> None:
    """Each scored token of a request on a line of its own, and what was likelier there."""
    total = sum(score.log_probability for score in scores)
    _heading(f"{request.continuation!r}  {total:.4f}" if request.continuation is not None else f"text  {total:.4f}")
    rows = [
        (
            repr(score.text),
            f"{score.log_probability:.4f}",
            "best" if score.is_greedy else "",
            "  ".join(f"{text!r} {value:.2f}" for text, value in score.alternatives),
        )
        for score in scores
    ]
    print_rows(("token", "nats", "", "likeliest there"), rows, right={1})


def _heading(text: str) -> None:
    out.print(f"[bold cyan]── {escape(text)}[/]", soft_wrap=True)


def _field(name: str, value: object) -> None:
    """A value of one line beside its name, a longer one below it."""
    text = str(value)
    if "\n" in text:
        out.print(f"[bold]{escape(name)}[/]", soft_wrap=True)
        say(textwrap.indent(text, "  "))
    else:
        out.print(f"[bold]{escape(name)}[/]  {escape(text)}", soft_wrap=True)


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"


@contextmanager
def steps() -> Iterator[Callable[[str, int, int], None]]:
    """A display that is told what is being done, how much of it is done and of how much; one bar for each."""
    with _bars() as bars:
        known: dict[str, TaskID] = {}

        def step(what: str, done: int, total: int) -> None:
            if what not in known:
                known[what] = bars.add_task(escape(what))
            bars.update(known[what], completed=done, total=total)

        yield step


def _bars() -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )


@contextmanager
def progress() -> Iterator[Callable[[Message], None]]:
    """A display that takes a worker's messages. Bars where standard error is a terminal, else only what went wrong."""
    with _bars() as bars:
        yield partial(_show, bars, {})


def _show(progress: Progress, bars: dict[str, TaskID], message: Message) -> None:
    def bar(name: str, text: str, total: int | None = None) -> TaskID:
        if name not in bars:
            bars[name] = progress.add_task(escape(text), total=total)
        return bars[name]

    if "slot" in bars and message["type"] != "slot":
        progress.update(bars.pop("slot"), visible=False)
    match message["type"]:
        case "checkpoint":
            bars.clear()
        case "slot":
            progress.update(bar("slot", message["reason"]), description=escape(message["reason"]))
        case "staging":
            progress.update(bar("staging", "reading the checkpoint"), completed=message["done"], total=message["total"])
        case "planned" if not progress.disable:
            err.print(escape(planning.planned(message, datetime.now(UTC))), soft_wrap=True)
        case "started":
            bar(message["task"], message["task"], message["total"])
        case "progress":
            progress.update(bar(message["task"], message["task"]), completed=message["done"], total=message["total"])
        case "committed" | "linked" if message["task"] in bars:
            progress.update(bars[message["task"]], visible=False)
        case "failed" if message["class"] == "infrastructure":
            what = message["task"] or "checkpoint"
            err.print(f"[yellow]{escape(what)}: {escape(message['reason'])}[/]", soft_wrap=True)
