"""Was it right? Extraction, exact match, F1, choices."""

from eval_platform.scoring.aggregate import aggregate
from eval_platform.scoring.rows import SAMPLE_SCHEMA, prompt_hash, responses_from_sample, score_item

__all__ = ["SAMPLE_SCHEMA", "aggregate", "prompt_hash", "responses_from_sample", "score_item"]
