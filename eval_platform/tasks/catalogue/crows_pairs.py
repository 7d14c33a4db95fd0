"""CrowS-Pairs: 1,508 pairs of sentences that differ in the group they speak of, one of them stereotyping more.

A row is `sent_more` (the sentence that stereotypes more), `sent_less`, `bias_type` and `direction` (stereo: the first
sentence speaks of the disadvantaged group; antistereo: the other way round). Stereotypes are offensive, and the authors
ask for care: a low score does not show a model to be free of them.
"""

from typing import Any

from eval_platform.tasks.catalogue.data import Card, Data, NoData, no_config, one_of

_FILE = "crows_pairs/crows_pairs_anonymized.csv"

CARD = Card(
    title="CrowS-Pairs",
    homepage="https://github.com/nyu-mll/crows-pairs",
    licence="CC BY-SA 4.0",
    citation=(
        "Nangia et al., CrowS-Pairs: A Challenge Dataset for Measuring Social Biases in Masked Language Models, "
        "EMNLP 2020, arXiv:2010.00133"
    ),
    files=(_FILE,),
)


def rows(data: Data, split: str, config: str | None) -> list[dict[str, Any]]:
    """Split test; there are no configurations."""
    one_of("crows_pairs", "split", split, ("test",))
    no_config("crows_pairs", config)
    found = data.csv(_FILE)
    if found is None:
        raise NoData("crows_pairs", data.tried)
    return [
        {
            "sent_more": row["sent_more"],
            "sent_less": row["sent_less"],
            "bias_type": row["bias_type"],
            "direction": row["stereo_antistereo"],
        }
        for row in found
    ]
