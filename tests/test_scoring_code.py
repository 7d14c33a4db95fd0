"""Programs as answers: pass@k against its definition, verdicts in the rows, and what a task file may say."""

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from eval_platform.errors import TaskError
from eval_platform.scoring import aggregate, responses_from_sample, score_item, score_items
from eval_platform.scoring.code import pass_at_k
from eval_platform.scoring.filters import extract
from eval_platform.tasks import build_task, render
from eval_platform.tasks.schema import TaskFile
from eval_platform.tasks.scoring_keys import FilterStep
from eval_platform.tasks.task import Task, ask_id, task_id
from eval_platform.values import Document, Item, Response, make_request
from tests.machine import needs_sandbox

ADD = {
    "task": "add",
    "documents": {"file": "documents.jsonl"},
    "doc_to_text": "{{head}}",
    "doc_to_target": "{{tests}}",
    "code": {"program": "{{head}}{{completion}}\n{{tests}}"},
    "metric_list": [{"metric": "pass@1"}, {"metric": "pass@2"}],
    "repeats": 3,
}
FIELDS = {"head": "def add(a, b):\n", "tests": "assert add(2, 3) == 5"}


# -- pass@k ----------------------------------------------------------------------------------------------------------


@given(st.data())
def test_pass_at_k_is_the_share_of_draws_with_one_that_passes(data):
    """By its definition: all ways to draw k of the n completions, counted one by one."""
    n = data.draw(st.integers(1, 9))
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
    assert pass_at_k(n, c, k) == float(Fraction(sum(map(any, draws)), len(draws)))


@given(st.data())
def test_pass_at_k_is_the_papers_product(data):
    """Chen et al. 2021, figure 3: a product of n factors, which rounds where ours does not."""
    n = data.draw(st.integers(1, 300))
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    product = 1.0 if n - c < k else 1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1))
    assert pass_at_k(n, c, k) == pytest.approx(product, abs=1e-12)
    none_passes = math.prod((Fraction(max(n - c - i, 0), n - i) for i in range(k)), start=Fraction(1))
    assert pass_at_k(n, c, k) == float(1 - none_passes)


@pytest.mark.parametrize(("n", "c", "k"), [(3, 4, 1), (3, -1, 1), (3, 1, 4), (3, 1, 0)])
def test_pass_at_k_of_what_cannot_be_is_refused(n, c, k):
    with pytest.raises(ValueError, match="not defined"):
        pass_at_k(n, c, k)


# -- rows ------------------------------------------------------------------------------------------------------------


def make_task(**said: Any) -> Task:
    return Task("add", TaskFile.model_validate(ADD | said), "", "", "", None, (), (), None)


def make_item(n: int = 0) -> Item:
    document = Document(f"sample {n}", n, FIELDS)
    return Item(document, (make_request("generate", f"prompt {n}"),), (), FIELDS["tests"], "")


def completed(item: Item, *texts: str | None, finish_reason: str = "stop") -> dict[Any, Response]:
    request = item.requests[0]
    return {
        (request.request_id, n): Response(request.request_id, n, text=text, n_tokens=3, finish_reason=finish_reason)
        for n, text in enumerate(texts)
    }


def test_every_completion_has_its_verdict_and_the_item_its_estimate():
    needs_sandbox()
    task, items = make_task(), [make_item(0), make_item(1), make_item(2)]
    answers = (
        completed(items[0], "    return a + b", "    return a - b", "    return undefined")
        | completed(items[1], "    return b + a", "    return sum((a, b))", "    return (a")
        | completed(items[2], "    raise SystemExit", "    return None", "    pass")
    )

    rows = score_items(task, items, answers)

    assert [dict(row["extracted"])["verdict"].partition(":")[0] for row in rows] == [
        *("passed", "assertion", "exception"),
        *("passed", "passed", "syntax"),
        *("exit", "assertion", "assertion"),
    ]
    assert rows[2]["extracted"]["verdict"] == "exception: NameError: name 'undefined' is not defined"
    assert rows[2]["extracted"]["none"] == "    return undefined"
    assert [row["metrics"] for row in rows[:3]] == [
        {"pass@1": 1.0, "pass@2": pytest.approx(2 / 3)},
        {"pass@1": 0.0},
        {"pass@1": 0.0},
    ]
    first, second = aggregate(task, rows)
    assert (first.metric, second.metric) == ("pass@1", "pass@2")
    assert first.value == pytest.approx((1 / 3 + 2 / 3 + 0) / 3)
    assert second.value == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert second.standard_error == pytest.approx(np.std([2 / 3, 1, 0], ddof=1) / np.sqrt(3))
    assert second.n == 3
    # Scored again without the model: from what the rows hold.
    by_sample = {item.document.sample_id: item for item in items}
    back = [r for row in rows for r in responses_from_sample(task, by_sample[row["sample_id"]], row)]
    assert score_items(task, items, {(r.request_id, r.repeat): r for r in back}, "warm") == rows


def test_filters_stand_between_completion_and_program():
    needs_sandbox()
    item = make_item()
    fence = [
        {"name": "fence", "filter": [{"function": "code_fence"}]},
        {"name": "raw", "filter": [{"function": "lowercase"}]},
    ]
    task = make_task(filter_list=fence, metric_list=[{"metric": "pass@1"}], repeats=1)

    (row,) = score_items(task, [item], completed(item, "    return a + b\n```\nThat was it."))

    assert row["metrics"] == {"pass@1,fence": 1.0, "pass@1,raw": 0.0}
    assert row["extracted"]["verdict,fence"] == "passed"
    assert row["extracted"]["verdict,raw"].startswith("syntax: ")
    assert row["extracted"]["fence"] == "    return a + b\n"


def test_an_answer_that_is_none_is_not_run():
    """One whose logits were not numbers: the item has no score, and the sample says so."""
    item, task = make_item(), make_task()
    answers = completed(item, "    return a + b", "    return a + b", None, finish_reason="non_finite")

    rows = score_items(task, [item], answers)

    assert [row["metrics"] for row in rows] == [{"pass@1": None, "pass@2": None}] * 3
    assert [row["extracted"]["verdict"] for row in rows] == [None] * 3
    assert [score.value for score in aggregate(task, rows)] == [None, None]


def test_one_item_alone_is_not_scored_without_verdicts():
    item = make_item()
    with pytest.raises(ValueError, match="score_items"):
        score_item(make_task(), item, completed(item, "a", "b", "c"))


@settings(max_examples=50)
@given(st.text(alphabet=" \nab", max_size=40))
def test_instructevals_filters_do_what_its_words_say(text):
    """Lines get a space until their indent is even; of the rest, what stands before the first empty line."""

    def even(line: str) -> str:
        while (len(line) - len(line.lstrip(" "))) % 2:
            line = " " + line
        return line

    padded = "\n".join(even(line) for line in text.split("\n"))
    steps = [FilterStep(function="even_indents"), FilterStep(function="first_block")]
    assert extract(steps[:1], [text])[0].text == padded
    while padded.startswith("\n"):
        padded = padded[1:]
    assert extract(steps, [text])[0].text == padded.partition("\n\n")[0]


# -- task files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"code": None}, "belong together"),
        ({"metric_list": [{"metric": "exact_match"}]}, "belong together"),
        ({"metric_list": [{"metric": "pass@1"}, {"metric": "exact_match"}]}, "in another task"),
        ({"repeats": 1}, "pass@2 needs `repeats: 2`"),
        ({"metric_list": [{"metric": "pass@7"}]}, "no metric is called 'pass@7'"),
        ({"filter_list": [{"name": "v", "filter": [{"function": "majority_vote"}]}]}, "takes one of them"),
        ({"filter_list": [{"name": "verdict", "filter": [{"function": "lowercase"}]}]}, "rename it"),
        ({"code": {"program": "x", "timeout": 0}}, "greater than 0"),
        ({"output_type": "multiple_choice", "doc_to_choice": ["a"]}, "does not apply to multiple_choice"),
        ({"unsafe_code": True}, "unsafe_code"),
    ],
)
def test_a_task_file_that_cannot_be_meant_is_refused(said, message):
    with pytest.raises(ValidationError, match=message):
        TaskFile.model_validate({key: value for key, value in (ADD | said).items() if value is not None})


@pytest.mark.parametrize(
    ("program", "document", "message"),
    [
        ("{{completion}}{{nothing}}", '{"head": "h", "tests": "t"}', "code.program, document 0 names a missing field"),
        ("{{completion}}", '{"head": "h", "tests": "t", "completion": "x"}', "has a field 'completion'"),
        ("{{completion", '{"head": "h", "tests": "t"}', "is not a Jinja template"),
    ],
)
def test_a_program_that_cannot_be_made_is_found_before_a_checkpoint_waits(tmp_path, program, document, message):
    (tmp_path / "documents.jsonl").write_text(document + "\n")
    (tmp_path / "add.yaml").write_text(
        f"task: add\ndocuments: {{file: documents.jsonl}}\ndoc_to_text: head\ndoc_to_target: tests\n"
        f"code: {{program: '{program}'}}\nmetric_list: [{{metric: pass@1}}]\n"
    )
    with pytest.raises(TaskError, match=message):
        list(render(build_task(tmp_path / "add.yaml")))


def test_how_programs_run_is_scoring_and_asks_nothing_anew():
    one, other = (TaskFile.model_validate(ADD | {"code": {"program": "x", "timeout": t}}) for t in (3.0, 4.0))
    assert ask_id(one, "d", None) == ask_id(other, "d", None)
    assert task_id(one, "a", None) != task_id(other, "a", None)
