"""IFEval's four scores of a response: of the prompt as a whole and of its instructions, strictly and loosely."""

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from eval_platform.scoring.ifeval.verdict import Verdict, verdict
from eval_platform.scoring.terms import Terms, ratio_of

SCORES = tuple(f"{level}_level_{way}_acc" for way in ("strict", "loose") for level in ("prompt", "inst"))


def ifeval(metric: str, answer: str | None, fields: Mapping[str, Any]) -> float | Terms:
    """`metric` is one of SCORES.

    fields: instruction_id_list and kwargs, as in IFEval's data. On the level of instructions the score of many
    prompts is instructions followed over instructions given.
    """
    found = _verdict(answer, json.dumps([fields["instruction_id_list"], fields["kwargs"]]))
    followed = found.strict if "strict" in metric else found.loose
    return float(all(followed)) if metric.startswith("prompt") else ratio_of(sum(followed), len(followed))


@lru_cache(maxsize=8)
def _verdict(answer: str | None, asked: str) -> Verdict:
    """Kept because four scores ask for it in a row."""
    return verdict(answer, *json.loads(asked))
