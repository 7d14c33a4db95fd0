"""CommonsenseQA: questions that need common sense, five choices each.

A row is `question`, `choices` (five) and `answer` (the index of the right one).
"""

from typing import Any

from eval_platform.tasks.catalogue.data import Card, Data, no_config, one_of

CARD = Card(
    title="CommonsenseQA",
    homepage="https://www.tau-nlp.sites.tau.ac.il/commonsenseqa",
    licence="MIT",
    citation=(
        "Talmor et al., CommonsenseQA: A Question Answering Challenge Targeting Commonsense Knowledge, NAACL 2019, "
        "arXiv:1811.00937"
    ),
    hub="tau/commonsense_qa",
)


def rows(data: Data, split: str, config: str | None) -> list[dict[str, Any]]:
    """Splits validation (1,221) and train; the answers of test are not public. There are no configurations."""
    one_of("commonsense_qa", "split", split, ("validation", "train"))
    no_config("commonsense_qa", config)
    found = data.from_hub("commonsense_qa", CARD, None, split)
    return [
        {
            "question": row["question"],
            "choices": list(row["choices"]["text"]),
            "answer": list(row["choices"]["label"]).index(row["answerKey"]),
        }
        for row in found
    ]
