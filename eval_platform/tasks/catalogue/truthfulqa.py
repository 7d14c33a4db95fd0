"""TruthfulQA: 817 questions that many people answer wrongly, with true and false answers.

A row of configuration multiple_choice is `question`, `mc1_choices` (the first is the true one), `mc2_choices` and
`mc2_true` (the indices of the true ones); of configurations generation and generation_revised it is `question`,
`category`, `correct_answers` and `incorrect_answers`, each answer ending with a full stop, "I have no comment." among
the true ones (so lm-evaluation-harness 0.4.13 compares them).
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from eval_platform.tasks.catalogue.data import Card, Data, NoData, one_of

_CHOICES_FILE = "truthfulqa/v0_mc_task.json"
_QUESTIONS_FILE = "truthfulqa/TruthfulQA.csv"
_NO_COMMENT = "I have no comment."

CARD = Card(
    title="TruthfulQA",
    homepage="https://github.com/sylinrl/TruthfulQA",
    licence="Apache-2.0",
    citation="Lin et al., TruthfulQA: Measuring How Models Mimic Human Falsehoods, ACL 2022, arXiv:2109.07958",
    hub="truthfulqa/truthful_qa",
    files=(_CHOICES_FILE, _QUESTIONS_FILE),
)


def rows(data: Data, split: str, config: str | None) -> list[dict[str, Any]]:
    """The one split is called validation; configurations are multiple_choice, generation and generation_revised.

    multiple_choice is the first release (`v0` in the repository), which the hub has too. The repository's file of
    questions was revised after the hub took its copy: so generation is the hub's, and generation_revised the file's.
    """
    one_of("truthfulqa", "split", split, ("validation",))
    config = one_of("truthfulqa", "config", config, ("multiple_choice", "generation", "generation_revised"))
    local = {"multiple_choice": _choices, "generation_revised": _questions}.get(config)
    found = None if local is None else local(data)
    if found is not None:
        return found
    if config == "generation_revised":  # the hub has the earlier revision only
        raise NoData("truthfulqa", data.tried)
    table = data.from_hub("truthfulqa", CARD, config, split)
    if config == "generation":
        return [
            _with_answers(r["question"], r["category"], r["correct_answers"], r["incorrect_answers"]) for r in table
        ]
    return [
        _with_choices(
            row["question"],
            *(dict(zip(row[k]["choices"], row[k]["labels"], strict=True)) for k in ("mc1_targets", "mc2_targets")),
        )
        for row in table
    ]


def _choices(data: Data) -> list[dict[str, Any]] | None:
    found = data.json(_CHOICES_FILE)
    if found is None:
        return None
    return [_with_choices(row["question"], row["mc1_targets"], row["mc2_targets"]) for row in found]


def _questions(data: Data) -> list[dict[str, Any]] | None:
    found = data.csv(_QUESTIONS_FILE)
    if found is None:
        return None
    return [
        _with_answers(
            row["Question"], row["Category"], row["Correct Answers"].split(";"), row["Incorrect Answers"].split(";")
        )
        for row in found
    ]


def _with_choices(question: str, mc1: Mapping[str, int], mc2: Mapping[str, int]) -> dict[str, Any]:
    return {
        "question": question,
        "mc1_choices": list(mc1),
        "mc1_true": list(mc1.values()).index(1),
        "mc2_choices": list(mc2),
        "mc2_true": [k for k, label in enumerate(mc2.values()) if label == 1],
    }


def _with_answers(question: str, category: str, correct: Sequence[str], incorrect: Sequence[str]) -> dict[str, Any]:
    true = _ended(correct)
    return {
        "question": question.strip(),
        "category": category,
        "correct_answers": true if _NO_COMMENT in true else [*true, _NO_COMMENT],
        "incorrect_answers": _ended(incorrect),
    }


def _ended(answers: Iterable[str]) -> list[str]:
    stripped = (answer.strip() for answer in answers)
    return [answer if answer.endswith(".") else f"{answer}." for answer in stripped if answer]
