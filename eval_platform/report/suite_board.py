"""What has each checkpoint scored on the tasks of a suite, by which rule, and what is missing?"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eval_platform import warehouse
from eval_platform.report.names import called
from eval_platform.report.suite_means import Cell, group_means, mean_cell
from eval_platform.store import Store
from eval_platform.tasks import Suite, TaskLock
from eval_platform.warehouse.connection import literal

# Every attempt of the suite's current tasks at the checkpoints that stand under their key now; a row a score.
_ROWS = """
    select a.key, a.run, a.step, e.chat, e.n_parameters, t.name as task, t.primary_metric, e.attempt, e.status,
        e.finished_at, e.reasons, s.metric, s.value, s.standard_error, s.ci_low, s.ci_high, s.n
    from evaluations e
    join tasks t on t.task_id = e.task_id and t.current
    join arrivals a on a.checkpoint_id = e.checkpoint_id and a.newest
    left join scores s on s.evaluation_id = e.evaluation_id and s.attempt = e.attempt
        and s.subset = '' and s.subject is null
    where t.name in ({tasks}) and e.item_limit is not distinct from {limit}
    order by a.run, a.step desc nulls last, a.key, e.chat, t.name, e.finished_at, e.attempt
"""

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Line:
    """One checkpoint; key says so where it was asked in chats. scores: task -> metric -> number, of what is published.

    missing: task -> why it is not. n_parameters: of the model, where it was recorded. average: of the suite's columns
    that count in it, None unless all are there; a mean over whatever there is would compare nothing. means: score ->
    the mean that the suite, a group of lm-evaluation-harness, defines of it; None likewise.
    """

    key: str
    run: str
    step: int | None
    n_parameters: int | None
    scores: Mapping[str, Mapping[str, Cell]]
    missing: Mapping[str, str]
    average: Cell | None
    means: Mapping[str, Cell | None]


@dataclass(frozen=True, slots=True)
class SuiteBoard:
    """primary: task -> the score that stands for it. absent: task -> why no checkpoint is asked it. limit: trials of
    so many items a task instead of whole evaluations.
    """

    suite: Suite
    limit: int | None
    primary: Mapping[str, str]
    absent: Mapping[str, str]
    lines: tuple[Line, ...]


def suite_board(catalog: Path, store: Store, suite: Suite, lock: TaskLock, limit: int | None = None) -> SuiteBoard:
    """The board of a suite, newest step of each run first, from an up-to-date catalog."""
    tasks = ", ".join(literal(task) for task in suite.tasks)
    query = _ROWS.format(tasks=tasks, limit="null" if limit is None else int(limit))
    return board_of_rows(suite, lock, warehouse.query(catalog, store, query).to_pylist(), limit)


def board_of_rows(suite: Suite, lock: TaskLock, rows: Sequence[Row], limit: int | None = None) -> SuiteBoard:
    """The same from the rows of the query. A task's primary metric is the lock's, or what was evaluated."""
    absent = {
        task: f"no data: {lock.skipped[task].reason}" if task in lock.skipped else "not configured"
        for task in suite.tasks
        if task not in lock.tasks
    }
    primary = {row["task"]: row["primary_metric"] for row in rows}
    primary |= {task: lock.tasks[task].primary_metric for task in suite.tasks if task in lock.tasks}
    by_key: dict[str, list[Row]] = {}
    for row in rows:
        by_key.setdefault(called(row), []).append(row)
    asked = [task for task in suite.tasks if task not in absent]
    names = {task: lock.tasks[task].score_names for task in suite.tasks if task in lock.tasks}
    # What a task would give that is not there (skipped for want of data) nobody knows: there is no mean without it.
    whole = len(names) == len(suite.tasks)
    lines = tuple(_line(suite, primary, asked, names if whole else {}, found) for found in by_key.values())
    return SuiteBoard(suite, limit, primary, absent, lines)


def _line(
    suite: Suite,
    primary: Mapping[str, str],
    asked: Sequence[str],
    names: Mapping[str, Sequence[str]],
    rows: Sequence[Row],
) -> Line:
    """names: task -> the scores that it gives, for the suite's means."""
    scores: dict[str, dict[str, Cell]] = {}
    missing = dict.fromkeys(asked, "not evaluated")
    for task in suite.tasks:
        attempts: dict[tuple[Any, int], list[Row]] = {}
        for row in rows:
            if row["task"] == task:
                attempts.setdefault((row["finished_at"], row["attempt"]), []).append(row)
        if not attempts:
            continue
        published = [found for found in attempts.values() if found[0]["status"] == "published"]
        newest = (published or list(attempts.values()))[-1]
        if published:
            missing.pop(task, None)
            scores[task] = {row["metric"]: _cell(row) for row in newest if row["metric"] is not None}
        else:
            lines = "\n".join(newest[0]["reasons"] or ()).splitlines()  # a remedy has a line of its own
            told = "; ".join(" ".join(line.split()) for line in lines if line.strip())
            missing[task] = f"{newest[0]['status']}: {told}" if told else newest[0]["status"]
    sizes = [row["n_parameters"] for row in rows if row["n_parameters"] is not None]
    counted = [column.task for column in suite.columns if column.average]
    first = rows[0]
    return Line(
        key=called(first),
        run=first["run"],
        step=first["step"],
        n_parameters=sizes[-1] if sizes else None,
        scores=scores,
        missing=missing,
        average=mean_cell([scores.get(task, {}).get(primary.get(task, "")) for task in counted]),
        means=group_means(suite.means, names, scores),
    )


def _cell(row: Row) -> Cell:
    return Cell(row["value"], row["standard_error"], row["ci_low"], row["ci_high"], row["n"])


def as_json(board: SuiteBoard) -> dict[str, Any]:
    """The whole board for programs."""
    return {
        "suite": board.suite.suite,
        "limit": board.limit,
        "columns": [
            {**column.model_dump(mode="json"), "metric": board.primary.get(column.task)}
            for column in board.suite.columns
        ],
        "absent": dict(board.absent),
        "checkpoints": [asdict(line) for line in board.lines],
    }


def as_rows(board: SuiteBoard) -> list[dict[str, Any]]:
    """One row a checkpoint, task and score; one without a number where a task is missing."""
    found: list[dict[str, Any]] = []
    empty = asdict(Cell(None, None, None, None, 0)) | {"n": None}
    for line in board.lines:
        about = {"checkpoint": line.key, "run": line.run, "step": line.step, "n_parameters": line.n_parameters}
        for column in board.suite.columns:
            task, primary = column.task, board.primary.get(column.task)
            named = {**about, "task": task, "column": column.title}
            cells = line.scores.get(task)
            if cells is None:
                reason = board.absent.get(task) or line.missing.get(task, "not evaluated")
                found.append({**named, "metric": primary, "is_primary": True, **empty, "missing": reason})
                continue
            for metric in (primary, *column.beside):
                cell = cells.get(metric or "")
                if cell is not None:
                    found.append(
                        {**named, "metric": metric, "is_primary": metric == primary, **asdict(cell), "missing": None}
                    )
        if line.average is not None:
            named = {**about, "task": None, "column": "average", "metric": None, "is_primary": None}
            found.append({**named, **asdict(line.average), "missing": None})
        for score, cell in line.means.items():
            if cell is not None:
                named = {**about, "task": None, "column": "mean", "metric": score, "is_primary": None}
                found.append({**named, **asdict(cell), "missing": None})
    return found
