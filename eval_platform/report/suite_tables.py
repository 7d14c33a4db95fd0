"""A suite's board as Markdown: the table of its numbers, the same by other rules, and what is not there."""

from collections.abc import Sequence

from eval_platform.report.suite_board import Line, SuiteBoard
from eval_platform.report.suite_means import Cell
from eval_platform.tasks.metrics import METRICS
from eval_platform.tasks.suite import Column

# What a score's metric means to a reader of the table.
_RULES = {
    "prefix_match": "lenient: the answer begins with the right one",
    "exact_match": "strict: the answer is the right one",
    "pass@1": "the share of programs that pass the problem's tests",
    "acc_both_orders": "asked in both orders; the letters of the chosen response are likelier",
    "drop_em": "DROP's own exact match",
    "drop_f1": "DROP's own F1",
    "answered": "how many answers are not empty; no measure of quality",
}


def suite_markdown(board: SuiteBoard) -> str:
    """Shares in percent, with their standard error and the number of items."""
    suite = board.suite
    parts = [f"## {suite.title}"]
    if board.limit is not None:
        parts.append(f"_The first {board.limit} items of each task: a trial, and no result._")
    if board.lines:
        parts += [_main_table(board), _rules(board)]
        beside = [column for column in suite.columns if column.beside and column.task not in board.absent]
        if beside:
            parts += ["### The same answers by other rules", _beside_table(board, beside)]
    else:
        parts.append("_Nothing is evaluated yet._")
        if board.limit is None:
            name = suite.suite
            parts.append(
                f"`eval-platform run --checkpoint FOLDER --suite {name}` asks it. What was run with `--limit N` is a "
                f"trial, shown by `eval-platform report --suite {name} --limit N`."
            )
    parts += _missing(board)
    return "\n\n".join(parts)


def _main_table(board: SuiteBoard) -> str:
    columns = board.suite.columns
    averaged = any(column.average for column in columns)
    heads = [_head(column.title, board.primary.get(column.task)) for column in columns]
    means = list(dict.fromkeys(score for line in board.lines for score in line.means))
    lines = []
    for line in board.lines:
        cells = [
            _shown(line, column.task, board.primary.get(column.task), absent=column.task in board.absent)
            for column in columns
        ]
        average = [_average(line)] if averaged else []
        group = [_mean(line, score) for score in means]
        lines.append([line.key, _size(line.n_parameters), *cells, *average, *group])
    last = [*(["average"] if averaged else []), *(_head("mean", score) for score in means)]
    return _table(["checkpoint", "size", *heads, *last], lines)


def _beside_table(board: SuiteBoard, columns: Sequence[Column]) -> str:
    named = [
        (column, metric) for column in columns for metric in (board.primary.get(column.task), *column.beside) if metric
    ]
    heads = [_head(column.title, metric) for column, metric in named]
    lines = [
        [line.key, *(_shown(line, column.task, metric, absent=False) for column, metric in named)]
        for line in board.lines
    ]
    return _table(["checkpoint", *heads], lines)


def _rules(board: SuiteBoard) -> str:
    there = [column for column in board.suite.columns if column.task not in board.absent]
    used = [board.primary.get(column.task) for column in there]
    used += [metric for column in there for metric in column.beside]
    told = [f"- `{metric}`: {_RULES[metric]}" for metric in dict.fromkeys(used) if metric in _RULES]
    counted = [column.title for column in board.suite.columns if column.average]
    if counted:
        told.append(f"- average: the mean of {', '.join(counted)}, where all are there")
    if board.suite.means:
        by_size = {mean.by_size for mean in board.suite.means}
        how = "every item" if by_size == {True} else "every task" if by_size == {False} else "every item or every task"
        told.append(
            f"- mean: lm-evaluation-harness's of this group, {how} counting the same, where all tasks are there"
        )
    return "Per cent ± standard error (n items).\n\n" + "\n".join(told)


def _missing(board: SuiteBoard) -> list[str]:
    titles = {column.task: column.title for column in board.suite.columns}
    told = [f"- {titles[task]} (`{task}`): {reason}" for task, reason in board.absent.items()]
    told += [
        f"- {titles[task]} (`{task}`) of {line.key}: {reason}"
        for line in board.lines
        for task, reason in line.missing.items()
    ]
    return ["### Not there", "\n".join(told)] if told else []


def _head(title: str, metric: str | None) -> str:
    return title if metric is None else f"{title} ({metric})"


def _shown(line: Line, task: str, metric: str | None, *, absent: bool) -> str:
    cell = line.scores.get(task, {}).get(metric or "")
    if cell is None:
        state = "skipped" if absent else line.missing.get(task, "").partition(":")[0]
        return "" if state == "not evaluated" else state
    return _number(cell, is_share=_is_share(metric or ""))


def _average(line: Line) -> str:
    return "" if line.average is None else _number(line.average, is_share=True)


def _mean(line: Line, score: str) -> str:
    cell = line.means.get(score)
    return "" if cell is None else _number(cell, is_share=_is_share(score))


def _is_share(metric: str) -> bool:
    known = METRICS.get(metric.partition(",")[0])
    return known is not None and (known.low, known.high) == (0.0, 1.0)


def _number(cell: Cell, *, is_share: bool) -> str:
    if cell.value is None:
        return "none"
    scale, digits = (100, 1) if is_share else (1, 3)
    error = "" if cell.standard_error is None else f" ± {cell.standard_error * scale:.{digits}f}"
    return f"{cell.value * scale:.{digits}f}{error} ({cell.n})"


def _size(n_parameters: int | None) -> str:
    if n_parameters is None:
        return ""
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if n_parameters >= unit:
            return f"{n_parameters / unit:.3g}{name}"
    return str(n_parameters)


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = "|---|" + "---:|" * (len(heads) - 1)
    body = [f"| {' | '.join(heads)} |", rule, *(f"| {' | '.join(line)} |" for line in lines)]
    return "\n".join(body)
