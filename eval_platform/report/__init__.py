"""How does it look? Tables and plots."""

from eval_platform.report.plots import embedded_picture, learning_curves_png, reference_lines
from eval_platform.report.suite_board import SuiteBoard, as_json, as_rows, board_of_rows, suite_board
from eval_platform.report.suite_tables import suite_markdown
from eval_platform.report.tables import leaderboard_markdown, leaderboard_table

__all__ = [
    "SuiteBoard",
    "as_json",
    "as_rows",
    "board_of_rows",
    "embedded_picture",
    "leaderboard_markdown",
    "leaderboard_table",
    "learning_curves_png",
    "reference_lines",
    "suite_board",
    "suite_markdown",
]
