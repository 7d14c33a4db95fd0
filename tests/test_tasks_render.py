"""From documents to items: what lm-eval has no say in (subsets, limits, references), and errors that name the place."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval_platform.errors import TaskError
from eval_platform.tasks import Task, build_task, prompts_id, render, show_prompt
from eval_platform.tasks.shots import draw_shots

CHOICE = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{q}}",
    "doc_to_choice": "cs",
    "doc_to_target": "label",
}
ROWS = [{"q": f"what is {n}?", "cs": ["a", "b", "c"], "label": n % 3, "a": f"it is {n}"} for n in range(12)]


def _build(folder: Path, rows: list[dict[str, Any]] = ROWS, **keys: Any) -> Task:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = {"task": "t", "documents": {"file": "rows.jsonl"}, "doc_to_text": "q", "doc_to_target": "a", **keys}
    (folder / "t.yaml").write_text(json.dumps(text))  # JSON is YAML
    return build_task(folder / "t.yaml")


def test_choices(tmp_path: Path) -> None:
    task = _build(tmp_path, **CHOICE)
    item = list(render(task))[4]

    assert [(r.kind, r.context, r.continuation) for r in item.requests] == [
        ("choice", "what is 4?", f" {c}") for c in "abc"
    ]
    assert (item.choices, item.target, item.prompt, item.shots_used) == (("a", "b", "c"), 1, "what is 4?", 0)
    assert task.chance == pytest.approx(1 / 3)


def test_several_right_choices_raise_chance(tmp_path: Path) -> None:
    rows = [{**row, "label": [0, 2]} for row in ROWS[:3]] + [{**ROWS[0], "label": [1]}]
    task = _build(tmp_path, rows, **CHOICE)

    assert [item.target for item in render(task)] == [(0, 2), (0, 2), (0, 2), (1,)]
    assert task.chance == pytest.approx((3 * 2 / 3 + 1 / 3) / 4)


def test_a_right_choice_may_be_named_by_its_text(tmp_path: Path) -> None:
    rows = [{**row, "label": "c"} for row in ROWS]

    assert [item.target for item in render(_build(tmp_path, rows, **CHOICE))] == [2] * 12


@pytest.mark.parametrize(
    ("value", "target"),
    [("text", "text"), (7, "7"), (["x", "y"], ("x", "y")), ("[1, 2]", "[1, 2]"), ("", "")],
)
def test_references_of_completions(value: Any, target: Any, tmp_path: Path) -> None:
    task = _build(tmp_path, [{"q": "?", "a": value}])

    assert next(render(task)).target == target


@pytest.mark.parametrize(
    ("text", "target"), [("['x', 'y']", ("x", "y")), ("[not a list]", "[not a list]"), ("[]", "[]")]
)
def test_a_template_may_give_a_list_of_references(text: str, target: Any, tmp_path: Path) -> None:
    task = _build(tmp_path, [{"q": "?", "a": text}], doc_to_target="{{a}}")

    assert next(render(task)).target == target


def test_unconditional_requests_come_after_the_choices(tmp_path: Path) -> None:
    task = _build(tmp_path, **CHOICE, metric_list=[{"metric": "acc_mutual_info"}])
    item = next(render(task))

    assert [request.context for request in item.requests] == ["what is 0?"] * 3 + [""] * 3
    assert [request.continuation for request in item.requests] == [" a", " b", " c"] * 2
    assert len(item.choices) == 3


def test_a_shot_is_never_the_asked_document(tmp_path: Path) -> None:
    for sampler in ("default", "first_n"):
        task = _build(tmp_path, num_fewshot=11, fewshot_config={"sampler": sampler})
        for item in render(task):
            question = item.document.fields["q"]
            assert item.prompt.count(question) == 1
            assert item.prompt.endswith(question)
            assert item.shots_used == 11


@pytest.fixture(scope="module")
def task_with_shots(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return _build(tmp_path_factory.mktemp("shots"), num_fewshot=3)


@given(limit=st.none() | st.integers(0, 15), positions=st.none() | st.sets(st.integers(0, 11)))
def test_a_part_is_rendered_as_in_the_whole(
    task_with_shots: Task, limit: int | None, positions: set[int] | None
) -> None:
    """Also with the default sampler, whose random numbers depend on all documents before."""
    task = task_with_shots
    whole = list(render(task))
    documents = None if positions is None else [task.documents[position] for position in positions]

    part = list(render(task, documents, limit=limit))

    assert part == [item for item in whole[:limit] if positions is None or item.document.position in positions]


def test_too_few_documents_for_the_shots(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"num_fewshot is 12, but there are only 11 documents to draw shots from"):
        _build(tmp_path, num_fewshot=12)


@given(
    pool=st.lists(st.integers(0, 5), max_size=9),
    asked=st.lists(st.integers(0, 5), max_size=4),
    n=st.integers(0, 4),
    sampler=st.sampled_from(["default", "first_n"]),
    exclude=st.booleans(),
)
def test_shots_are_n_of_the_pool(pool: list[int], asked: list[int], n: int, sampler: str, exclude: bool) -> None:
    rows, questions = [{"x": x} for x in pool], [{"x": x} for x in asked]
    drawn, refused = [], False
    try:
        drawn = list(draw_shots(sampler, rows, questions, n, exclude_asked=exclude))
    except TaskError:
        refused = True

    # Refused only when it must be: some document leaves too few others (the default sampler wants one to spare).
    spare = 1 if exclude and sampler == "default" else 0
    possible = all(
        len([row for row in rows if not exclude or row != question]) >= n and len(rows) >= n + spare
        for question in questions
    )
    assert refused == (not possible and n > 0)
    for question, shots in zip(questions, drawn, strict=False):
        assert len(shots) == n
        assert all(row in rows for row in shots)
        assert not (exclude and question in shots)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a template's missing field": (
        {"doc_to_text": "{{qestion}}"},
        r"document 0: doc_to_text: the template '\{\{qestion\}\}' names a missing field: 'qestion' is undefined",
    ),
    "a way out of the sandbox": ({"doc_to_text": "{{q.__class__.__mro__}}"}, "tries to leave its sandbox"),
    "no template": ({"description": "{% if %}"}, "description: the template .* is not a Jinja template"),
    "choices that are no list": ({**CHOICE, "doc_to_choice": "{{q}}"}, "doc_to_choice gives 'what is 0\\?', which is"),
    "a choice that is empty": ({**CHOICE, "doc_to_choice": ["a", ""]}, "none empty"),
    "a choice that is not there": ({**CHOICE, "doc_to_choice": ["a", "b"]}, "document 2: doc_to_target gives 2, but"),
    "an answer that is no choice": (
        {**CHOICE, "doc_to_target": "a"},
        "doc_to_target gives 'it is 0', which is neither",
    ),
    "a shot without text": (
        {"num_fewshot": 1, "doc_to_target": "label", "fewshot_config": {"sampler": "first_n"}},
        "doc_to_target of a shot is 1, which is not a text",
    ),
    "a question that is a list": ({"doc_to_text": "cs"}, "doc_to_text: field 'cs' is"),
    "a question that is a number": ({"doc_to_text": "label"}, "doc_to_text gives the number 0, which is not a text"),
    "a rolling text that is a number": (
        {"output_type": "loglikelihood_rolling", "doc_to_target": "label"},
        "doc_to_target gives 0, which is not a text",
    ),
    "an empty continuation": ({"output_type": "loglikelihood", "doc_to_target": "{{''}}"}, "doc_to_target gives ''"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_cannot_be_asked_is_refused_with_its_place(wrong: str, tmp_path: Path) -> None:
    keys, said = WRONG[wrong]

    with pytest.raises(TaskError, match=said) as caught:
        _build(tmp_path, **keys)

    assert str(caught.value).startswith(f"{tmp_path / 't.yaml'}: task t, document ")
    assert caught.value.remedy


def test_a_field_that_only_some_documents_have(tmp_path: Path) -> None:
    rows = [ROWS[0], {key: value for key, value in ROWS[1].items() if key != "q"}]

    with pytest.raises(TaskError, match="document 1: doc_to_text: the document has no field 'q'"):
        _build(tmp_path, rows)


def test_prompts_id_is_what_is_asked_and_what_is_right(tmp_path: Path) -> None:
    items = list(render(_build(tmp_path, **CHOICE)))
    other_prompt = list(render(_build(tmp_path, **{**CHOICE, "doc_to_text": "{{q}} "})))
    other_target = list(render(_build(tmp_path, [{**row, "label": 0} for row in ROWS], **CHOICE)))

    ids = {prompts_id(some) for some in (items, items[::-1], items[:-1], other_prompt, other_target)}

    assert len(ids) == 5
    assert prompts_id(iter(items)) == prompts_id(items)


def test_show_prompt_shows_each_character(tmp_path: Path) -> None:
    shown = show_prompt(_build(tmp_path, **CHOICE), 4)

    assert shown.splitlines()[1:] == [
        "what is 4?",
        "--- scored: ' a'",
        "--- scored: ' b'  <- right",
        "--- scored: ' c'",
    ]
    assert "--- right: 'it is 3'" in show_prompt(_build(tmp_path), 3)
    with pytest.raises(TaskError, match="has no sample 12"):
        show_prompt(_build(tmp_path), 12)
