"""HellaSwag: how a described scene goes on, four endings of which one is what happened.

A row is `query`, `choices` and `answer` (the index of the right one). Marks of the WikiHow pages that the scenes come
from are taken out of the texts as lm-evaluation-harness 0.4.13 does, since prompts everywhere are without them.
"""

import re
from typing import Any

from eval_platform.tasks.catalogue.data import Card, Data, no_config, one_of

_MARK = re.compile(r"\[.*?\]")

CARD = Card(
    title="HellaSwag",
    homepage="https://rowanzellers.com/hellaswag/",
    licence="MIT",
    citation="Zellers et al., HellaSwag: Can a Machine Really Finish Your Sentence?, ACL 2019, arXiv:1905.07830",
    hub="Rowan/hellaswag",
)


def rows(data: Data, split: str, config: str | None) -> list[dict[str, Any]]:
    """Splits validation (10,042) and train; the answers of test are not public. There are no configurations."""
    one_of("hellaswag", "split", split, ("validation", "train"))
    no_config("hellaswag", config)
    found = data.from_hub("hellaswag", CARD, None, split)
    return [row_of(row) for row in found]


def row_of(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the hub's as ours."""
    return {
        "query": _clean(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"),
        "choices": [_clean(ending) for ending in row["endings"]],
        "answer": int(row["label"]),
    }


def _clean(text: str) -> str:
    return _MARK.sub("", text.strip().replace(" [title]", ". ")).replace("  ", " ")
