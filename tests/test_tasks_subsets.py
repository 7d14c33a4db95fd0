"""Subsets by several fields, means over them, shots of the asked document's kind, both orders, too long prompts."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from eval_platform.errors import TaskError
from eval_platform.scoring import aggregate, score_item
from eval_platform.tasks import Task, build_task, fit_shots, render
from eval_platform.values import Item, Response

ROWS = [
    {"q": f"{subject} {n}?", "a": "yes" if n % 2 else "no", "subject": subject, "field": field}
    for subject, field, count in (("optics", "science", 2), ("logic", "arts", 4), ("waves", "science", 6))
    for n in range(count)
]
DEV = [
    {"q": f"shot {subject} {n}", "a": "so", "subject": subject}
    for n in range(3)
    for subject in ("waves", "logic", "optics")
]


def _task(folder: Path, rows: Sequence[Mapping[str, Any]] = ROWS, **keys: Any) -> Task:
    for name, lines in (("rows", rows), ("dev", DEV)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    documents = {"file": "rows.jsonl", **keys.pop("documents", {})}
    text = {"task": "t", "documents": documents, "doc_to_text": "q", "doc_to_target": "a", **keys}
    (folder / "t.yaml").write_text(json.dumps(text))
    return build_task(folder / "t.yaml")


def _scores(task: Task, answer: Any) -> dict[tuple[str, str], float | None]:
    """(subset, metric) -> value when every item is answered by `answer(item)`."""
    rows = []
    for item in render(task):
        request = item.requests[0]
        rows += score_item(task, item, {(request.request_id, 0): Response(request.request_id, 0, text=answer(item))})
    return {(score.subset, score.metric): score.value for score in aggregate(task, rows)}


def _yes_in_optics(item: Item) -> str:
    return "yes" if item.document.subset == "optics" else "no"


def test_scores_for_every_value_of_every_field(tmp_path: Path) -> None:
    task = _task(tmp_path, documents={"subset": ["subject", "field"]})
    found = _scores(task, _yes_in_optics)

    assert {subset for subset, _ in found} == {"", "optics", "logic", "waves", "field=science", "field=arts"}
    assert found["", "exact_match"] == pytest.approx(6 / 12)
    assert found["field=science", "exact_match"] == pytest.approx(4 / 8)
    assert found["field=arts", "exact_match"] == found["logic", "exact_match"] == pytest.approx(2 / 4)


def test_a_mean_over_subsets_beside_one_over_items(tmp_path: Path) -> None:
    macro = [{"metric": "exact_match", "aggregation": "macro_mean"}, {"metric": "prefix_match"}]
    task = _task(tmp_path, documents={"subset": ["subject", "field"]}, metric_list=macro)
    found = _scores(task, lambda item: "no" if item.document.subset == "waves" else "yes and no")

    assert found["", "exact_match"] == pytest.approx((0 + 0 + 1 / 2) / 3)
    assert found["", "prefix_match"] == pytest.approx(6 / 12)
    assert found["field=science", "exact_match"] == pytest.approx((0 + 1 / 2) / 2)


def test_a_mean_over_subsets_is_another_task_and_the_same_question(tmp_path: Path) -> None:
    entry = {"metric": "exact_match"}
    plain = _task(tmp_path, documents={"subset": "subject"}, metric_list=[entry])
    named = _task(tmp_path, documents={"subset": "subject"}, metric_list=[entry | {"aggregation": "mean"}])
    macro = _task(tmp_path, documents={"subset": "subject"}, metric_list=[entry | {"aggregation": "macro_mean"}])

    assert plain.task_id == named.task_id != macro.task_id
    assert plain.ask_id == macro.ask_id


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"metric_list": [{"metric": "exact_match", "aggregation": "macro_mean"}]}, "subset"),
        ({"metric_list": [{"metric": "acc", "aggregation": "median"}]}, "aggregated by mean"),
        (
            {
                "output_type": "loglikelihood_rolling",
                "documents": {"subset": "subject"},
                "metric_list": [{"metric": "bits_per_byte", "aggregation": "macro_mean"}],
            },
            "no mean over items",
        ),
        ({"documents": {"subset": ["subject", "topic"]}}, "topic"),
        ({"max_input_tokens": 9}, "max_input_tokens"),
        (
            {
                "output_type": "multiple_choice",
                "doc_to_choice": ["no", "yes"],
                "metric_list": [{"metric": "acc_both_orders"}],
            },
            "doc_to_text_reversed",
        ),
        ({"num_fewshot": 1, "documents": {"fewshot": {"file": "dev.jsonl", "match": "topic"}}}, "no field 'topic'"),
        ({"num_fewshot": 4, "documents": {"fewshot": {"file": "dev.jsonl", "match": "subject"}}}, "only 3 documents"),
    ],
)
def test_what_cannot_be_meant_is_refused(keys: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=said):
        _task(tmp_path, **keys)


@pytest.mark.parametrize("sampler", ["first_n", "default"])
def test_shots_are_of_the_asked_documents_kind(sampler: str, tmp_path: Path) -> None:
    fewshot = {"file": "dev.jsonl", "match": "subject"}
    task = _task(tmp_path, documents={"fewshot": fewshot}, num_fewshot=2, fewshot_config={"sampler": sampler})

    for item in render(task):
        shots = item.prompt.split("\n\n")[:-1]
        assert len(shots) == 2
        assert all(shot.startswith(f"shot {item.document.fields['subject']} ") for shot in shots)
        if sampler == "first_n":
            assert [shot.split()[2] for shot in shots] == ["0", "1"]


def test_shots_of_the_documents_own_kind_leave_out_the_asked_one(tmp_path: Path) -> None:
    task = _task(
        tmp_path,
        documents={"fewshot": {"match": "subject"}},
        num_fewshot=1,
        fewshot_config={"sampler": "first_n"},
    )

    assert [item.prompt for item in render(task)][:3] == [
        "optics 1? yes\n\noptics 0?",
        "optics 0? no\n\noptics 1?",
        "logic 1? yes\n\nlogic 0?",
    ]
    assert task.ask_id != _task(tmp_path, num_fewshot=1, fewshot_config={"sampler": "first_n"}).ask_id


# --- both orders

ORDERS = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{q}} A: {{a}} B: {{b}} =",
    "doc_to_text_reversed": "{{q}} A: {{b}} B: {{a}} =",
    "doc_to_choice": ["A", "B"],
    "doc_to_target": 0,
    "metric_list": [{"metric": "acc_both_orders"}],
}


def _item_of_orders(folder: Path) -> tuple[Task, Item]:
    task = _task(folder, [{"q": "?", "a": "good", "b": "bad"}], **ORDERS)
    return task, next(render(task))


def test_both_orders_are_asked(tmp_path: Path) -> None:
    task, item = _item_of_orders(tmp_path)

    assert [(request.context, request.continuation) for request in item.requests] == [
        ("? A: good B: bad =", " A"),
        ("? A: good B: bad =", " B"),
        ("? A: bad B: good =", " B"),
        ("? A: bad B: good =", " A"),
    ]
    assert (item.target, task.chance) == ((0, 2), 0.5)


@pytest.mark.parametrize(
    ("a_first", "b_first", "a_last", "b_last", "score", "chosen"),
    [
        (-1.0, -2.0, -2.0, -1.0, 1.0, 0),  # the chosen response both times
        (-1.0, -2.0, -1.0, -2.0, 0.0, 0),  # always A: a tie, which is wrong
        (-2.0, -1.0, -1.0, -2.0, 0.0, 1),
        (-1.0, -2.0, -1.0, -1.5, 1.0, 0),  # A both times, but less so where it is wrong
        (math.nan, -2.0, -2.0, -1.0, None, None),
    ],
)
def test_the_sum_over_both_orders_decides(
    a_first: float,
    b_first: float,
    a_last: float,
    b_last: float,
    score: float | None,
    chosen: int | None,
    tmp_path: Path,
) -> None:
    task, item = _item_of_orders(tmp_path)
    # In the order of the requests: what means the chosen response, then what means the other.
    values = [a_first, b_first, b_last, a_last]
    answers = {
        (request.request_id, 0): Response(request.request_id, 0, log_likelihood=value, is_greedy=False, n_tokens=1)
        for request, value in zip(item.requests, values, strict=True)
    }
    (row,) = score_item(task, item, answers)

    assert (row["metrics"], row["chosen"]) == ({"acc_both_orders": score}, chosen)


# --- prompts that are too long


def _words(texts: Sequence[str]) -> list[int]:
    return [len(text.split()) for text in texts]


def test_shots_are_dropped_until_a_prompt_fits(tmp_path: Path) -> None:
    rows = [{"q": "word " * n, "a": "a", "subject": "waves"} for n in (1, 4, 8, 30)]
    fewshot = {"file": "dev.jsonl", "match": "subject"}
    task = _task(
        tmp_path,
        rows,
        documents={"fewshot": fewshot},
        num_fewshot=3,
        max_input_tokens=14,
        fewshot_config={"sampler": "first_n"},
    )
    items = list(render(task))
    fitted = fit_shots(task, items, _words, 14)

    # A shot has 4 words. As many of the first ones as fit; the last prompt is too long by itself.
    assert [item.shots_used for item in fitted] == [3, 2, 1, 0]
    assert fitted[0] == items[0]
    assert fitted[1].prompt == "shot waves 0 so\n\nshot waves 1 so\n\n" + rows[1]["q"]
    assert [item.document for item in fitted] == [item.document for item in items]
    assert fit_shots(task, items, _words, 1000) == items


def test_the_longest_prompt_is_part_of_what_is_asked(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"num_fewshot": 1, "documents": {"fewshot": {"file": "dev.jsonl"}}}

    assert _task(tmp_path, **keys).ask_id != _task(tmp_path, **keys, max_input_tokens=5).ask_id


def test_answers_that_nothing_is_compared_with_need_no_target(tmp_path: Path) -> None:
    task = _task(tmp_path, doc_to_target=None, metric_list=[{"metric": "answered"}])

    assert next(render(task)).target == ""
    assert _scores(task, lambda item: " \n" if item.document.position < 3 else "x")["", "answered"] == 0.75
