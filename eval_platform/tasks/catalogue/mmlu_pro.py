"""MMLU-Pro: 12,032 questions of 14 subjects with up to ten choices, and five worked examples of each subject.

A row is `question`, `options`, `answer` (a letter), `category` (the subject) and `reasoning`: the worked solution,
without the words that begin it in every prompt; empty in split test.
"""

from typing import Any

from eval_platform.tasks.catalogue.data import Card, Data, no_config, one_of

_BEGINNING = "A: Let's think step by step. "

CARD = Card(
    title="MMLU-Pro",
    homepage="https://github.com/TIGER-AI-Lab/MMLU-Pro",
    licence="MIT",
    citation=(
        "Wang et al., MMLU-Pro: A More Robust and Challenging Multi-Task Language Understanding Benchmark, 2024, "
        "arXiv:2406.01574"
    ),
    hub="TIGER-Lab/MMLU-Pro",
)


def rows(data: Data, split: str, config: str | None) -> list[dict[str, Any]]:
    """Splits test and validation (the worked examples); there are no configurations."""
    one_of("mmlu_pro", "split", split, ("test", "validation"))
    no_config("mmlu_pro", config)
    found = data.from_hub("mmlu_pro", CARD, None, split)
    return [row_of(row) for row in found]


def row_of(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the hub's as ours."""
    return {
        "question": row["question"],
        "options": list(row["options"]),
        "answer": row["answer"],
        "category": row["category"],
        "reasoning": row["cot_content"].replace(_BEGINNING, ""),
    }
