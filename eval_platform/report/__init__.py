"""How does it look? Tables and plots."""

from eval_platform.report.plots import embedded_picture, learning_curves_png
from eval_platform.report.tables import leaderboard_markdown, leaderboard_table

__all__ = ["embedded_picture", "leaderboard_markdown", "leaderboard_table", "learning_curves_png"]
