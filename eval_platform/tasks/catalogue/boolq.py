"""BoolQ: yes-or-no questions that people typed into a search engine, each with a passage that answers it.

A row is `passage`, `question` (without its question mark), `answer` (1: yes, 0: no) and `passage_id`, since several
questions may have one passage.
"""

from typing import Any

from eval_platform.identity import content_id
from eval_platform.tasks.catalogue.data import Card, Data, no_config, one_of

CARD = Card(
    title="BoolQ",
    homepage="https://github.com/google-research-datasets/boolean-questions",
    licence="CC BY-SA 3.0",
    citation=(
        "Clark et al., BoolQ: Exploring the Surprising Difficulty of Natural Yes/No Questions, NAACL 2019, "
        "arXiv:1905.10044"
    ),
    hub="aps/super_glue",
)


def rows(data: Data, split: str, config: str | None) -> list[dict[str, Any]]:
    """Splits validation (3,270) and train; there are no configurations."""
    one_of("boolq", "split", split, ("validation", "train"))
    no_config("boolq", config)
    found = data.from_hub("boolq", CARD, "boolq", split)
    return [
        {
            "passage": row["passage"],
            "question": row["question"],
            "answer": int(row["label"]),
            "passage_id": content_id(row["passage"]),
        }
        for row in found
    ]
