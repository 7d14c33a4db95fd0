"""What do we know? The DuckDB catalog and SQL over it, rebuilt from the store at any time."""

from eval_platform.warehouse.catalog import behind, rebuild, refresh
from eval_platform.warehouse.compare import differences
from eval_platform.warehouse.formats import FORMATS, render
from eval_platform.warehouse.history import previous_scores, prompts_ids, same_answers
from eval_platform.warehouse.sql import connect, query

__all__ = [
    "FORMATS",
    "behind",
    "connect",
    "differences",
    "previous_scores",
    "prompts_ids",
    "query",
    "rebuild",
    "refresh",
    "render",
    "same_answers",
]
