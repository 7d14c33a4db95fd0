"""BIG-Bench Hard: 6,511 items of 27 subtasks (23 tasks, of which two have three sizes), and its authors' shots.

A row is `subtask`, `input` and `target`. For chain of thought it also has the subtask's `description`; a shot then has
`answer`, all that follows "Let's think step by step." in the authors' prompt, white space at its beginning included.
One item of the published file is cut short (snarks, position 88, at "The NBA:"); it is asked as it is there.
"""

from typing import Any

from eval_platform.errors import TaskError
from eval_platform.tasks.catalogue.data import Card, Data, NoData, one_of

# INSTRUCTEVAL reads the hub's lukaemon/bbh, a loading script, which `datasets` no longer runs; lm-evaluation-harness
# has gone over to this copy of it.
CARD = Card(
    title="BIG-Bench Hard",
    homepage="https://github.com/suzgunmirac/BIG-Bench-Hard",
    licence="MIT",
    citation=(
        "Suzgun et al., Challenging BIG-Bench Tasks and Whether Chain-of-Thought Can Solve Them, 2022, arXiv:2210.09261"
    ),
    hub="SaylorTwift/bbh",
    files=("bbh/bbh/{config}.json", "bbh/cot-prompts/{config}.txt"),
)

SUBTASKS = (
    "boolean_expressions",
    "causal_judgement",
    "date_understanding",
    "disambiguation_qa",
    "dyck_languages",
    "formal_fallacies",
    "geometric_shapes",
    "hyperbaton",
    "logical_deduction_five_objects",
    "logical_deduction_seven_objects",
    "logical_deduction_three_objects",
    "movie_recommendation",
    "multistep_arithmetic_two",
    "navigate",
    "object_counting",
    "penguins_in_a_table",
    "reasoning_about_colored_objects",
    "ruin_names",
    "salient_translation_error_detection",
    "snarks",
    "sports_understanding",
    "temporal_sequences",
    "tracking_shuffled_objects_five_objects",
    "tracking_shuffled_objects_seven_objects",
    "tracking_shuffled_objects_three_objects",
    "web_of_lies",
    "word_sorting",
)

# INSTRUCTEVAL takes its shots from the test items themselves: the first three of each file.
INSTRUCTEVAL_SHOTS = 3
_STEPS = "\nA: Let's think step by step."


def rows(data: Data, split: str, config: str | None) -> list[dict[str, Any]]:
    """A configuration is a subtask, without one all 27 in the order of their names. Splits:

    test: all items; first_three and after_first_three: its two parts as INSTRUCTEVAL cuts it;
    cot: all items with their description; cot_shots: the authors' three shots, which are no test items.
    """
    one_of("bbh", "split", split, ("test", "first_three", "after_first_three", "cot", "cot_shots"))
    subtasks = SUBTASKS if config is None else (one_of("bbh", "config", config, SUBTASKS),)
    return [row for subtask in subtasks for row in _subtask(data, split, subtask)]


def _subtask(data: Data, split: str, subtask: str) -> list[dict[str, Any]]:
    if split == "cot_shots":
        return _prompt(data, subtask)[1]
    items = _items(data, subtask)
    if split == "first_three":
        return items[:INSTRUCTEVAL_SHOTS]
    if split == "after_first_three":
        return items[INSTRUCTEVAL_SHOTS:]
    if split == "cot":
        description = _prompt(data, subtask)[0]
        return [{**item, "description": description} for item in items]
    return items


def _items(data: Data, subtask: str) -> list[dict[str, Any]]:
    local = data.json(f"bbh/bbh/{subtask}.json")
    found = data.from_hub("bbh", CARD, subtask, "test") if local is None else local["examples"]
    return [{"subtask": subtask, "input": item["input"], "target": item["target"]} for item in found]


def _prompt(data: Data, subtask: str) -> tuple[str, list[dict[str, Any]]]:
    """(description, shots) of the authors' chain-of-thought prompt, which only their repository has."""
    path = f"bbh/cot-prompts/{subtask}.txt"
    body = data.file(path)
    if body is None:
        raise NoData("bbh", data.tried)
    # A line that warns against training on it, a line of dashes, then the prompt.
    _, _, prompt = body.decode("utf-8").partition("-----\n")
    description, *questions = prompt.split("\n\nQ: ")
    shots = []
    for question in questions:
        asked, steps, answer = question.partition(_STEPS)
        if not steps:
            raise TaskError(f"{path}: a shot has no line {_STEPS.strip()!r}", remedy="copy the file anew")
        shots.append({"subtask": subtask, "description": description, "input": asked, "answer": answer})
    return description, shots
