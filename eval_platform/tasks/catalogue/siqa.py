"""Social IQa: a situation between people, a question about it, three choices.

A row is `question` (situation and question with one blank between, as every prompt has them), `choices` and `answer`
(the index of the right one).

LLM-Adapters has the set too, but its texts are shorter than the original's table by 1,715 bytes at least (white space
at their ends, it seems), so it is not read.
"""

from typing import Any

from eval_platform.tasks.catalogue.data import Card, Data, no_config, one_of

CARD = Card(
    title="Social IQa",
    homepage="https://maartensap.com/social-iqa/",
    licence="CC BY 4.0",
    citation=("Sap et al., Social IQa: Commonsense Reasoning about Social Interactions, EMNLP 2019, arXiv:1904.09728"),
    hub="lighteval/siqa",
)


def rows(data: Data, split: str, config: str | None) -> list[dict[str, Any]]:
    """Splits validation (1,954) and train; there are no configurations."""
    one_of("siqa", "split", split, ("validation", "train"))
    no_config("siqa", config)
    found = data.from_hub("siqa", CARD, None, split)
    return [
        {
            "question": f"{row['context']} {row['question']}",
            "choices": [row["answerA"], row["answerB"], row["answerC"]],
            "answer": int(row["label"]) - 1,
        }
        for row in found
    ]
