"""PIQA: goals of everyday life with two solutions, of which one works.

A row is `goal`, `solutions` (two) and `answer` (the index of the one that works).
"""

from typing import Any

from eval_platform.tasks.catalogue import llm_adapters
from eval_platform.tasks.catalogue.data import Card, Data, no_config, one_of

CARD = Card(
    title="PIQA",
    homepage="https://yonatanbisk.com/piqa/",
    licence="AFL-3.0",
    citation="Bisk et al., PIQA: Reasoning about Physical Commonsense in Natural Language, 2019, arXiv:1911.11641",
    hub="baber/piqa",
    files=(llm_adapters.file_of("piqa"),),
)


def rows(data: Data, split: str, config: str | None) -> list[dict[str, Any]]:
    """Splits validation (1,838; the local file calls them test) and train; there are no configurations."""
    one_of("piqa", "split", split, ("validation", "train"))
    no_config("piqa", config)
    local = llm_adapters.instructions(data, "piqa") if split == "validation" else None
    if local is not None:
        return [{"goal": row["question"], "solutions": row["choices"], "answer": row["answer"]} for row in local]
    found = data.from_hub("piqa", CARD, None, split)
    return [{"goal": r["goal"], "solutions": [r["sol1"], r["sol2"]], "answer": int(r["label"])} for r in found]
