"""WinoGrande: sentences with a blank `_` that one of two options fills.

A row is `sentence`, `options` (two) and `answer` (the index of the right one).
"""

from typing import Any

from eval_platform.tasks.catalogue import llm_adapters
from eval_platform.tasks.catalogue.data import Card, Data, one_of

CARD = Card(
    title="WinoGrande",
    homepage="https://winogrande.allenai.org/",
    licence="Apache-2.0",
    citation=(
        "Sakaguchi et al., WinoGrande: An Adversarial Winograd Schema Challenge at Scale, 2019, arXiv:1907.10641"
    ),
    hub="allenai/winogrande",
    files=(llm_adapters.file_of("winogrande"),),
)


def rows(data: Data, split: str, config: str | None) -> list[dict[str, Any]]:
    """Splits validation (1,267; the local file calls them test) and train; configuration winogrande_xl."""
    one_of("winogrande", "split", split, ("validation", "train"))
    if config is not None:
        one_of("winogrande", "config", config, ("winogrande_xl",))
    local = llm_adapters.instructions(data, "winogrande") if split == "validation" else None
    if local is not None:
        return [{"sentence": row["question"], "options": row["choices"], "answer": row["answer"]} for row in local]
    found = data.from_hub("winogrande", CARD, "winogrande_xl", split)
    return [
        {"sentence": r["sentence"], "options": [r["option1"], r["option2"]], "answer": int(r["answer"]) - 1}
        for r in found
    ]
