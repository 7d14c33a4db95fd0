"""IMPACT, the writing part of INSTRUCTEVAL: 200 prompts, 50 each informative, professional, argumentative, creative.

A row is `category`, `definition` (what kind of text is wanted) and `prompt`. There are no right answers: texts are
judged.
"""

from typing import Any

from eval_platform.errors import TaskError
from eval_platform.tasks.catalogue.data import Card, Data, one_of

_FILE = "impact/data.jsonl"

CARD = Card(
    title="IMPACT",
    homepage="https://github.com/declare-lab/instruct-eval",
    licence="Apache-2.0",
    citation=(
        "Chia et al., INSTRUCTEVAL: Towards Holistic Evaluation of Instruction-Tuned Large Language Models, 2023, "
        "arXiv:2306.04757"
    ),
    hub="declare-lab/InstructEvalImpact",
    revision="6f3f81347598ee984893e238b62b5850386c7892",
    files=(_FILE,),
)


def rows(data: Data, split: str, config: str | None) -> list[dict[str, Any]]:
    """The one split is called train, as on the hub; there are no configurations."""
    one_of("impact", "split", split, ("train",))
    if config is not None:
        raise TaskError(f"dataset impact has no configurations, so no {config!r}", remedy="remove config")
    found = data.jsonl(_FILE)
    if found is None:
        found = data.from_hub("impact", CARD, None, split)
    return [{"category": row["Category"], "definition": row["Definition"], "prompt": row["Prompt"]} for row in found]
