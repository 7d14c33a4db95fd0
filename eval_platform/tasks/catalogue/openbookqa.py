"""OpenBookQA: 500 questions of elementary science in split test, four choices each.

A row is `question`, `choices` and `answer` (the index of the right one).
"""

from typing import Any

from eval_platform.tasks.catalogue import llm_adapters
from eval_platform.tasks.catalogue.data import Card, Data, one_of

CARD = Card(
    title="OpenBookQA",
    homepage="https://allenai.org/data/open-book-qa",
    licence="Apache-2.0",
    citation=(
        "Mihaylov et al., Can a Suit of Armor Conduct Electricity? A New Dataset for Open Book Question Answering, "
        "EMNLP 2018, arXiv:1809.02789"
    ),
    hub="allenai/openbookqa",
    files=(llm_adapters.file_of("openbookqa"),),
)


def rows(data: Data, split: str, config: str | None) -> list[dict[str, Any]]:
    """Splits test, validation and train (the local file: test); there is one configuration, `main`."""
    one_of("openbookqa", "split", split, ("test", "validation", "train"))
    if config is not None:
        one_of("openbookqa", "config", config, ("main",))
    local = llm_adapters.instructions(data, "openbookqa") if split == "test" else None
    if local is not None:
        return local
    found = data.from_hub("openbookqa", CARD, "main", split)
    return [
        {
            "question": row["question_stem"],
            "choices": list(row["choices"]["text"]),
            "answer": list(row["choices"]["label"]).index(row["answerKey"].strip()),
        }
        for row in found
    ]
