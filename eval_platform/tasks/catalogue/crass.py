"""CRASS: 274 questions of what would have happened, with three or four choices of which one holds.

A row is `premise`, `question`, `options` and `answer` (the index of the right one). The file names the right option
first; here the options stand as INSTRUCTEVAL shuffles them, with one random.Random(0) over the file in its order.
"""

import random
from typing import Any

from eval_platform.errors import TaskError
from eval_platform.tasks.catalogue.data import Card, Data, NoData, one_of

_FILE = "crass/CRASS_FTM_main_data_set.csv"

CARD = Card(
    title="CRASS",
    homepage="https://github.com/apergo-ai/CRASS-data-set",
    licence="see the data's homepage",
    citation=(
        "Frohberg and Binder, CRASS: A Novel Data Set and Benchmark to Test Counterfactual Reasoning of Large "
        "Language Models, LREC 2022"
    ),
    files=(_FILE,),
)

# INSTRUCTEVAL's three shots are examples of the CRASS paper. These are our own, in their form: three options each,
# the second of them about something indifferent, the third about something impossible; right are C, B and C.
SHOTS: tuple[dict[str, Any], ...] = (
    {
        "premise": "A glass falls from a table.",
        "question": "What would have happened if an egg had fallen from the table?",
        "options": ["The egg would have stayed whole.", "The egg would have flown away.", "The egg would have broken."],
        "answer": 2,
    },
    {
        "premise": "A cat scratches a sofa.",
        "question": "What would have happened if a leaf had touched the sofa?",
        "options": [
            "The sofa would have been torn.",
            "Nothing special would have happened.",
            "The sofa would have run away.",
        ],
        "answer": 1,
    },
    {
        "premise": "A child eats an apple.",
        "question": "What would have happened if the child had eaten the moon?",
        "options": ["It would have been sweet.", "It would have been sour.", "That is not possible."],
        "answer": 2,
    },
)


def rows(data: Data, split: str, config: str | None) -> list[dict[str, Any]]:
    """Splits test, and shots, which are ours (see SHOTS); there are no configurations."""
    one_of("crass", "split", split, ("test", "shots"))
    if config is not None:
        raise TaskError(f"dataset crass has no configurations, so no {config!r}", remedy="remove config")
    if split == "shots":
        return [dict(shot) for shot in SHOTS]
    body = data.file(_FILE)
    if body is None:
        raise NoData("crass", data.tried)
    rng = random.Random(0)
    lines = body.decode("utf-8-sig").strip().split("\n")
    return [_row(number, line, rng) for number, line in enumerate(lines[1:], start=2)]


def _row(number: int, line: str, rng: random.Random) -> dict[str, Any]:
    """Two numbers, premise, question and up to four options, the first of them right, apart by semicolons."""
    fields = line.strip().split(";")
    options = [option.strip() for option in fields[4:8] if option.strip()]
    if len(options) < 2:
        raise TaskError(f"{_FILE}, line {number} has not two options: {line[:120]!r}", remedy="copy the file anew")
    right = options[0]
    rng.shuffle(options)
    return {
        "premise": fields[2].strip(),
        "question": fields[3].strip(),
        "options": options,
        "answer": options.index(right),
    }
