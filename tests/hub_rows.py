"""Rows as the Hugging Face hub has them, of the datasets that the standard tasks ask: 20 each.

Where the public items are at hand the rows are made of them, else invented: the hub itself can't be asked in tests.
"""

import csv
import gzip
import json
from pathlib import Path
from typing import Any

from eval_platform.tasks.catalogue.data import Data
from tests.data import originals

N = 20
Row = dict[str, Any]


class Hub(Data):
    """No folder, and a hub with one table."""

    def __init__(self, splits: dict[str, list[Row]]) -> None:
        super().__init__(None)
        self.splits = splits

    def hub(self, name: str, config: str | None, split: str, revision: str | None = None) -> list[Row] | None:
        return self.splits[split]


def _json(path: str) -> list[Any]:
    file = originals(path)
    body = (gzip.open if file.suffix == ".gz" else Path.open)(file, "rt", encoding="utf-8")
    with body:
        return [json.loads(line) for line in body] if ".jsonl" in path else json.load(body)


def _instructions(name: str, first: str, between: str, end: str) -> list[tuple[str, list[str], int]]:
    """(question, choices, index of the right one), cut by hand and not by the code under test."""
    found = []
    for row in _json(f"commonsense_mc/{name}.test.json.gz")[:N]:
        _, question = row["instruction"].split(": ", 1)
        question, rest = question.split(f"{first}1: ", 1)
        rest = rest[: rest.rindex("Answer format")].removesuffix(end)
        choices, k = [], 2
        while f"{between}{first}{k}: " in rest:
            choice, rest = rest.split(f"{between}{first}{k}: ", 1)
            choices.append(choice)
            k += 1
        found.append((question.removesuffix("\n\n"), [*choices, rest], int(row["answer"][-1]) - 1))
    return found


def _lettered(question: str, choices: list[str], right: int, key: str = "question") -> Row:
    letters = list("ABCDE"[: len(choices)])
    return {key: question, "choices": {"text": choices, "label": letters}, "answerKey": letters[right]}


def arc(name: str) -> list[Row]:
    return [_lettered(*item) for item in _instructions(name, "Answer", " ", "\n\n")]


def openbookqa() -> list[Row]:
    return [_lettered(*item, key="question_stem") for item in _instructions("openbookqa", "Answer", " ", "\n\n")]


def piqa() -> list[Row]:
    items = _instructions("piqa", "Solution", "\n\n", "\n\n")
    return [{"goal": goal, "sol1": choices[0], "sol2": choices[1], "label": right} for goal, choices, right in items]


def siqa() -> list[Row]:
    rows = []
    for text, choices, right in _instructions("social_i_qa", "Answer", " ", "\n\n"):
        context, question = text.rsplit(". ", 1)
        answers = dict(zip(("answerA", "answerB", "answerC"), choices, strict=True))
        rows.append({"context": f"{context}.", "question": question, **answers, "label": str(right + 1)})
    return rows


def winogrande() -> list[Row]:
    items = _instructions("winogrande", "Option", " ", " ")
    return [{"sentence": s, "option1": c[0], "option2": c[1], "answer": str(right + 1)} for s, c, right in items]


def gsm8k() -> list[Row]:
    return _json("gsm8k/test.jsonl.gz")[:N]


def ifeval() -> list[Row]:
    rows = _json("ifeval/input_data.jsonl")[:N]
    names = sorted({name for row in rows for said in row["kwargs"] for name in said})
    return [{**row, "kwargs": [{n: said.get(n) for n in names} for said in row["kwargs"]]} for row in rows]


def truthfulqa_choices() -> list[Row]:
    def targets(labels: dict[str, int]) -> Row:
        return {"choices": list(labels), "labels": list(labels.values())}

    return [
        {name: row[name] if name == "question" else targets(row[name]) for name in row}
        for row in _json("truthfulqa/v0_mc_task.json.gz")[:N]
    ]


def truthfulqa_questions() -> list[Row]:
    with originals("truthfulqa/TruthfulQA.csv").open(encoding="utf-8-sig", newline="") as file:
        # Those with the fewest answers: the harness takes long over each.
        rows = sorted(csv.DictReader(file), key=lambda row: sum(text.count(";") for text in row.values()))[:N]
    answers = {"correct_answers": "Correct Answers", "incorrect_answers": "Incorrect Answers"}
    return [
        {
            "question": row["Question"],
            "category": row["Category"],
            **{name: [a.strip() for a in row[column].split(";") if a.strip()] for name, column in answers.items()},
        }
        for row in rows
    ]


def bbq() -> list[Row]:
    """The first ten of two categories, ambiguous and disambiguated in turn."""
    return [row for name in ("Age", "Nationality") for row in _json(f"bbq/{name}.jsonl.gz")[: N // 2]]


def crows_pairs() -> list[Row]:
    with gzip.open(originals("crows_pairs/crows_pairs_anonymized.csv.gz"), "rt", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))[:N]
    return [{name: row[name] for name in ("sent_more", "sent_less", "bias_type", "stereo_antistereo")} for row in rows]


# Invented, with what makes prompts go wrong: white space at the ends, marks, other scripts.
_TEXTS = ["alpha", "Beta. ", "  gamma ray", "déjà vu", "日本", "7", "a\nb", "[title] x [step] y", "d  e  f", "'quoted'"]


def _text(k: int) -> str:
    return f"{_TEXTS[k % len(_TEXTS)]} and {_TEXTS[(k * 3 + 1) % len(_TEXTS)]}"


def hellaswag() -> list[Row]:
    return [
        {
            "activity_label": f"Doing {k}",
            "ctx_a": f"A man [title] stands. {_text(k)}",
            "ctx_b": f"then HE {_text(k + 1)}" if k % 3 else "",
            "endings": [f" {_text(k + n)} [header] z [title] w" for n in range(4)],
            "label": str(k % 4),
        }
        for k in range(N)
    ]


def boolq() -> list[Row]:
    return [{"passage": _text(k), "question": f"is it {_text(k + 2)}", "label": k % 2} for k in range(N)]


def commonsense_qa() -> list[Row]:
    return [_lettered(f" {_text(k)}? ", [_text(k + n) for n in range(5)], k % 5) for k in range(N)]


def lambada() -> list[Row]:
    return [{"text": f"It was {_text(k)} that said word{k}"} for k in range(N)]


def mmlu_pro() -> list[Row]:
    return [
        {
            "question": _text(k),
            "options": [f"{_text(k + n)} " for n in range(4 + k % 7)],
            "answer": "ABCD"[k % 4],
            "category": "law",
            "cot_content": f"A: Let's think step by step. {_text(k)} The answer is ({'ABCD'[k % 4]}).",
        }
        for k in range(N)
    ]


def mgsm() -> list[Row]:
    return [
        {"question": _text(k), "answer": None, "answer_number": k * 100, "equation_solution": None} for k in range(N)
    ]
