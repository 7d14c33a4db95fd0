"""Learning curves as a picture: one panel a task, one line a run, its 95 % intervals as a band."""

import base64
import math
import os
import uuid
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pyarrow as pa

from eval_platform.report.names import called

COLUMNS = 3
# Beside the runs' own colours, and darker than the grey of chance.
_REFERENCE_COLOURS = ("black", "dimgray", "saddlebrown", "darkslateblue")


def learning_curves_png(board: pa.Table, path: Path, references: Mapping[str, str] = MappingProxyType({})) -> Path:
    """Draw the rows of the view `leaderboard` that have a step; the file is replaced atomically. Returns `path`.

    references: key -> name of the checkpoints whose scores are a horizontal line in every panel of their task.
    """
    # matplotlib takes half a second and a font cache: only who draws pays for it.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    lines = reference_lines(board, references)
    for row in board.to_pylist():
        if row["step"] is not None and row["value"] is not None:
            curves[row["task"]][called(row, "run")].append(row)
    columns = min(COLUMNS, len(curves)) or 1
    n_rows = math.ceil(len(curves) / columns) or 1
    figure = Figure(figsize=(4.2 * columns, 2.8 * n_rows), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(n_rows, columns, squeeze=False).flat)
    for panel in panels[len(curves) :]:
        panel.set_visible(False)
    for panel, task in zip(panels, sorted(curves), strict=False):
        for run, rows in sorted(curves[task].items()):
            rows.sort(key=lambda row: row["step"])
            steps = [row["step"] for row in rows]
            (line,) = panel.plot(steps, [row["value"] for row in rows], marker="o", markersize=3, label=run)
            banded = [row for row in rows if row["ci_low"] is not None and row["ci_high"] is not None]
            panel.fill_between(
                [row["step"] for row in banded],
                [row["ci_low"] for row in banded],
                [row["ci_high"] for row in banded],
                color=line.get_color(),
                alpha=0.2,
                linewidth=0,
            )
        first = next(iter(curves[task].values()))[0]
        metric, chance = first["metric"], first["chance"]
        for shade, (name, value) in enumerate(lines.get(task, ())):
            colour = _REFERENCE_COLOURS[shade % len(_REFERENCE_COLOURS)]
            panel.axhline(value, color=colour, linestyle=":", linewidth=1.5, label=name)
        if chance is not None:
            panel.axhline(chance, color="grey", linestyle="--", linewidth=1, label="chance")
        panel.set_title(task, fontsize=10)
        panel.set_ylabel(metric, fontsize=8)
        panel.set_xlabel("step", fontsize=8)
        panel.tick_params(labelsize=8)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{uuid.uuid4().hex}.png")
    figure.savefig(aside, dpi=90)
    os.replace(aside, path)
    return path


def reference_lines(board: pa.Table, references: Mapping[str, str]) -> dict[str, list[tuple[str, float]]]:
    """Task -> (what the line is called, its height), by name; of the rows of `leaderboard` whose key is a reference's.

    One that was evaluated with two settings has a line of each, as it has two rows on the leaderboard.
    """
    found: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for row in board.to_pylist():
        if row["key"] in references and row["value"] is not None:
            name = called({**row, "name": references[row["key"]]}, "name")
            found[row["task"]].append((name, row["value"]))
    return {task: sorted(lines) for task, lines in found.items()}


def embedded_picture(path: Path, title: str) -> str:
    """The picture inside Markdown, so that Dagster's page shows it without a server for files."""
    return f"![{title}](data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()})"
