"""ARC: questions of science tests for pupils, mostly with four choices; an easy and a challenging part.

A row is `question`, `choices` and `answer` (the index of the right one).
"""

from typing import Any

from eval_platform.tasks.catalogue import llm_adapters
from eval_platform.tasks.catalogue.data import Card, Data, one_of

_CONFIGS = ("ARC-Easy", "ARC-Challenge")

CARD = Card(
    title="ARC",
    homepage="https://allenai.org/data/arc",
    licence="CC BY-SA 4.0",
    citation=(
        "Clark et al., Think you have Solved Question Answering? Try ARC, the AI2 Reasoning Challenge, 2018, "
        "arXiv:1803.05457"
    ),
    hub="allenai/ai2_arc",
    files=(llm_adapters.file_of("{config}"),),
)


def rows(data: Data, split: str, config: str | None) -> list[dict[str, Any]]:
    """Configurations ARC-Easy (2,376 in split test) and ARC-Challenge (1,172); the local file has split test alone."""
    one_of("arc", "split", split, ("test", "validation", "train"))
    config = one_of("arc", "config", config, _CONFIGS)
    local = llm_adapters.instructions(data, config) if split == "test" else None
    if local is not None:
        return local
    found = data.from_hub("arc", CARD, config, split)
    return [
        {
            "question": row["question"],
            "choices": list(row["choices"]["text"]),
            "answer": list(row["choices"]["label"]).index(row["answerKey"]),
        }
        for row in found
    ]
