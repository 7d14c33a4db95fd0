"""Was it right? Extraction, exact match, F1, choices."""

from eval_platform.scoring.aggregate import aggregate
from eval_platform.scoring.rows import SAMPLE_SCHEMA, prompt_hash, responses_from_sample, score_item, score_items
from eval_platform.scoring.terms import is_term

__all__ = ["SAMPLE_SCHEMA", "aggregate", "is_term", "prompt_hash", "responses_from_sample", "score_item", "score_items"]
