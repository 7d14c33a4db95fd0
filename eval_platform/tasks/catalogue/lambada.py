"""LAMBADA: passages of novels whose last word people guess only when they have read the whole passage.

A row is `text`. This is OpenAI's form of the test set, with the punctuation and capitals of the books.
"""

from typing import Any

from eval_platform.tasks.catalogue.data import Card, Data, one_of

CARD = Card(
    title="LAMBADA (OpenAI)",
    homepage="https://zenodo.org/records/2630551",
    licence="modified MIT, as OpenAI released it; the original set is CC BY 4.0",
    citation=(
        "Paperno et al., The LAMBADA dataset: Word prediction requiring a broad discourse context, ACL 2016, "
        "arXiv:1606.06031"
    ),
    hub="EleutherAI/lambada_openai",
)


def rows(data: Data, split: str, config: str | None) -> list[dict[str, Any]]:
    """Split test (5,153); there is one configuration, `default`, the English one."""
    one_of("lambada", "split", split, ("test",))
    if config is not None:
        one_of("lambada", "config", config, ("default",))
    found = data.from_hub("lambada", CARD, "default", split)
    return [{"text": row["text"]} for row in found]
