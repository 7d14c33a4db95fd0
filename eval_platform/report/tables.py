"""The leaderboard as a table: one row a checkpoint, one column a task."""

from typing import TYPE_CHECKING, Any

import pyarrow as pa

from eval_platform.report.names import called

if TYPE_CHECKING:
    from rich.table import Table

MARKDOWN_ROWS = 100


def leaderboard_markdown(board: pa.Table) -> str:
    """`board`: rows of the view `leaderboard`. Newest step first, each cell the score and its 95 % interval.

    No mean over tasks: tasks have different scales, and a mean over whatever exists compares nothing.
    """
    rows = board.to_pylist()
    if not rows:
        return "_Nothing is published yet._"
    tasks = sorted({row["task"] for row in rows})
    by_key: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        by_key.setdefault((row["run"], called(row)), {"step": row["step"], "cells": {}})["cells"][row["task"]] = row
    ordered = sorted(by_key.items(), key=lambda entry: (entry[0][0], -(entry[1]["step"] or 0), entry[0][1]))
    metrics = {row["task"]: row["metric"] for row in rows}
    lines = [
        "| checkpoint | step | " + " | ".join(f"{task} ({metrics[task]})" for task in tasks) + " |",
        "|---|---:|" + "---:|" * len(tasks),
    ]
    for (_, key), entry in ordered[:MARKDOWN_ROWS]:
        cells = [_cell(entry["cells"].get(task)) for task in tasks]
        lines.append(f"| {key} | {'' if entry['step'] is None else entry['step']} | " + " | ".join(cells) + " |")
    if len(ordered) > MARKDOWN_ROWS:
        lines.append(f"\n{len(ordered) - MARKDOWN_ROWS} more: `eval-platform leaderboard`")
    return "\n".join(lines)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None or row["value"] is None:
        return ""
    if row["ci_low"] is None or row["ci_high"] is None:
        return f"{row['value']:.3f}"
    # No plus-minus: at 1.0 the interval has only one side. The space does not break.
    return f"{row['value']:.3f}\u00a0[{row['ci_low']:.2f},\u00a0{row['ci_high']:.2f}]"


def leaderboard_table(board: pa.Table) -> "Table":
    """The board for a screen that is looked at while it grows: a line a task, a column a checkpoint, by step."""
    from rich.table import Table

    rows = board.to_pylist()
    columns = {called(row): (row["run"], -1 if row["step"] is None else row["step"], called(row)) for row in rows}
    keys = sorted(columns, key=lambda key: columns[key])
    short = {called(row): called(row, "step") for row in rows if row["step"] is not None}
    names = [short.get(key, key.rpartition("/")[2]) for key in keys]
    table = Table("task", *names, box=None, padding=(0, 1, 0, 0))
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        cells.setdefault(row["task"], {})[called(row)] = "" if row["value"] is None else f"{row['value']:.2f}"
    for task, found in sorted(cells.items()):
        table.add_row(task, *(found.get(key, "") for key in keys))
    return table
