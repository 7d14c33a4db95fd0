"""DROP: 9,536 validation questions (77,409 for training) about passages, whose answers take counting or arithmetic.

A row is `section_id` (its passage), `query_id`, `passage`, `question`; `references`, the different answers that
annotators gave, each a text, or a JSON list of texts where an answer is several spans (`scoring/drop.py`); and
`spans`, the spans of all validated answers one after the other, as the hub's `ucinlp/drop` has them; none where it
leaves the question out, as an answer is two things at once (a number and spans).
"""

import json
import random
from collections.abc import Iterator
from typing import Any

from eval_platform.errors import TaskError
from eval_platform.tasks.catalogue.data import Card, Data, one_of

CARD = Card(
    title="DROP",
    homepage="https://allenai.org/data/drop",
    licence="CC BY-SA 4.0",
    citation=(
        "Dua et al., DROP: A Reading Comprehension Benchmark Requiring Discrete Reasoning Over Paragraphs, "
        "NAACL 2019, arXiv:1903.00161"
    ),
    hub="EleutherAI/drop",
    files=("drop/drop_dataset_dev.json", "drop/drop_dataset_train.json"),
)

_FILES = {"validation": "drop/drop_dataset_dev.json", "train": "drop/drop_dataset_train.json"}
INSTRUCTEVAL_SHOTS = 3


def rows(data: Data, split: str, config: str | None) -> list[dict[str, Any]]:
    """There are no configurations. Splits:

    validation, train: all questions; instructeval_shots and instructeval: what INSTRUCTEVAL asks of the validation
    questions (`instructeval_split`).
    """
    one_of("drop", "split", split, ("validation", "train", "instructeval", "instructeval_shots"))
    if config is not None:
        raise TaskError(f"dataset drop has no configurations, so no {config!r}", remedy="remove config")
    if split in _FILES:
        return _questions(data, split)
    shots, asked = instructeval_split(_questions(data, "validation"))
    return shots if split == "instructeval_shots" else asked


def instructeval_split(questions: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(shots, asked): of the questions whose spans are all one text, three drawn with seed 0, and those about other
    passages than these three. INSTRUCTEVAL's paper has 6,285 of them.
    """
    agreed = [row for row in questions if len({span.strip() for span in row["spans"]}) == 1]
    shots = random.Random(0).sample(agreed, INSTRUCTEVAL_SHOTS)
    passages = {row["passage"] for row in shots}
    return shots, [row for row in agreed if row["passage"] not in passages]


def _questions(data: Data, split: str) -> list[dict[str, Any]]:
    local = data.json(_FILES[split])
    if local is not None:
        return [
            _row(section_id, section["passage"], pair, pair.get("validated_answers") or [], split)
            for section_id, section in local.items()
            for pair in section["qa_pairs"]
        ]
    found = data.from_hub("drop", CARD, None, split)
    return [
        _row(row["section_id"], row["passage"], row, list(_apart(row["validated_answers"])), split) for row in found
    ]


def _apart(validated: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    """The hub keeps the validated answers as one object of lists."""
    for number, date, spans in zip(validated["number"], validated["date"], validated["spans"], strict=True):
        yield {"number": number, "date": date, "spans": spans}


def _row(
    section_id: str, passage: str, pair: dict[str, Any], validated: list[dict[str, Any]], split: str
) -> dict[str, Any]:
    answers = [_spans(answer) for answer in [pair["answer"], *validated]]
    references = [json.dumps(spans, ensure_ascii=False) if len(spans) > 1 else spans[0] for spans in answers]
    counted = [pair["answer"]] if split == "train" else validated
    return {
        "section_id": section_id,
        "query_id": pair["query_id"],
        "passage": passage,
        "question": pair["question"],
        "references": list(dict.fromkeys(references)),
        "spans": []
        if any(len(_kinds(answer)) > 1 for answer in counted)
        else [span for answer in counted for span in _spans(answer) if span],
    }


def _kinds(answer: dict[str, Any]) -> list[str]:
    """Which of number, date and spans an answer gives."""
    given = {
        "number": str(answer["number"]) != "",
        "date": any(answer["date"].values()),
        "spans": bool(answer["spans"]),
    }
    return [kind for kind, there in given.items() if there]


def _spans(answer: dict[str, Any]) -> list[str]:
    """An answer is a number, a date or spans, in this order of precedence as in the paper's scorer; "" for none."""
    if str(answer["number"]) != "":
        return [str(answer["number"])]
    if answer["spans"]:
        return [str(span) for span in answer["spans"]]
    return [" ".join(answer["date"].get(part, "") for part in ("day", "month", "year")).strip()]
