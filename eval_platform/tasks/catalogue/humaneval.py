"""HumanEval: 164 Python functions to be written from signature and docstring, each with tests.

A row is `task_id`, `prompt` (imports, signature, docstring), `canonical_solution` (the body), `test` (defines
`check`) and `entry_point` (the function's name), as both sources have it. What passes is
`prompt + body + test + check(entry_point)`.
"""

from typing import Any

from eval_platform.tasks.catalogue.data import Card, Data, one_of

CARD = Card(
    title="HumanEval",
    homepage="https://github.com/openai/human-eval",
    licence="MIT",
    citation="Chen et al., Evaluating Large Language Models Trained on Code, 2021, arXiv:2107.03374",
    hub="openai/openai_humaneval",
    files=("humaneval/HumanEval.jsonl",),
)
FIELDS = ("task_id", "prompt", "canonical_solution", "test", "entry_point")


def rows(data: Data, split: str, config: str | None) -> list[dict[str, Any]]:
    """The one split is test; there is one configuration, `openai_humaneval`."""
    one_of("humaneval", "split", split, ("test",))
    if config is not None:
        one_of("humaneval", "config", config, ("openai_humaneval",))
    found = data.jsonl(CARD.files[0])
    if found is None:
        found = data.from_hub("humaneval", CARD, "openai_humaneval", split)
    return [{field: row[field] for field in FIELDS} for row in found]
