"""MBPP: 974 short Python functions to be written from a sentence and three assertions.

A row is `task_id`, `text`, `code` (a reference solution), `test_list` (three assertions), `test_setup_code` (which
runs after the solution: two of them need it so) and `challenge_test_list`, as both sources have it. The splits are
the paper's, by number: prompt 1-10, test 11-510, validation 511-600, train 601-974. `shots` is the three of its
appendix that every model is shown: 2, 3 and 4.
"""

from typing import Any

from eval_platform.tasks.catalogue.data import Card, Data, one_of

CARD = Card(
    title="MBPP",
    homepage="https://github.com/google-research/google-research/tree/master/mbpp",
    licence="CC-BY-4.0",
    citation="Austin et al., Program Synthesis with Large Language Models, 2021, arXiv:2108.07732",
    hub="google-research-datasets/mbpp",
    files=("mbpp/mbpp.jsonl",),
)
FIELDS = ("task_id", "text", "code", "test_list", "test_setup_code", "challenge_test_list")
NUMBERS = {
    "prompt": range(1, 11),
    "test": range(11, 511),
    "validation": range(511, 601),
    "train": range(601, 975),
    "shots": (2, 3, 4),
}


def rows(data: Data, split: str, config: str | None) -> list[dict[str, Any]]:
    """Splits prompt, test, validation, train and shots; there is one configuration, `full`."""
    one_of("mbpp", "split", split, NUMBERS)
    if config is not None:
        one_of("mbpp", "config", config, ("full",))
    found = data.jsonl(CARD.files[0])
    if found is None:
        found = data.from_hub("mbpp", CARD, "full", "prompt" if split == "shots" else split)
    return [{field: row[field] for field in FIELDS} for row in found if row["task_id"] in NUMBERS[split]]
