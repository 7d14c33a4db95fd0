"""GSM8K: 8,792 word problems of grade school mathematics, each with a worked solution that ends in `#### <number>`.

A row is `question` and `answer` (the solution, calculator marks such as `<<2*3=6>>` left in), as both sources have it.
"""

from typing import Any

from eval_platform.tasks.catalogue.data import Card, Data, one_of

CARD = Card(
    title="GSM8K",
    homepage="https://github.com/openai/grade-school-math",
    licence="MIT",
    citation="Cobbe et al., Training Verifiers to Solve Math Word Problems, 2021, arXiv:2110.14168",
    hub="openai/gsm8k",
    files=("gsm8k/{split}.jsonl",),
)


def rows(data: Data, split: str, config: str | None) -> list[dict[str, Any]]:
    """Splits test (1,319) and train (7,473); there is one configuration, `main`."""
    one_of("gsm8k", "split", split, ("test", "train"))
    if config is not None:
        one_of("gsm8k", "config", config, ("main",))
    found = data.jsonl(f"gsm8k/{split}.jsonl")
    if found is None:
        found = data.from_hub("gsm8k", CARD, "main", split)
    return [{"question": row["question"], "answer": row["answer"]} for row in found]
