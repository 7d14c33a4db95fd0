"""`tasks new`, `tasks lint` and `tasks diff`: what they make of planted cases, and how a person sees it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from cli_tools import Place
from scipy import stats

from eval_platform.errors import TaskError
from eval_platform.tasks import build_task, bundled_tasks, compare_tasks, lint, new_task_file, render
from eval_platform.tasks.selection import LIBRARY


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def task_of(folder: Path, rows: list[dict[str, Any]], name: str = "t", **keys: Any) -> Any:
    write(folder / f"{name}.jsonl", rows)
    said = {"task": name, "documents": {"file": f"{name}.jsonl"}, "doc_to_text": "{{q}}", "doc_to_target": "{{a}}"}
    (folder / f"{name}.yaml").write_text(json.dumps({**said, **keys}))
    return build_task(folder / f"{name}.yaml")


# --- new


@pytest.mark.parametrize(
    ("row", "output_type", "target", "choices"),
    [
        ({"question": "Q?", "choices": ["a", "b"], "answer": 1}, "multiple_choice", 1, ("a", "b")),
        ({"id": "7", "query": "Q?", "options": ["a", "b"], "label": "b"}, "multiple_choice", 1, ("a", "b")),
        ({"question": "Q?", "A": "x", "B": "y", "C": "z", "answer": "C"}, "multiple_choice", 2, ("x", "y", "z")),
        ({"question": "Q?", "choices": ["a", "b"], "answer": 2}, "multiple_choice", 1, ("a", "b")),
        ({"question": "Q?", "choices": ["a", "b"], "label": "1"}, "multiple_choice", 1, ("a", "b")),
        (
            {"question": "Q?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "B"},
            "multiple_choice",
            1,
            ("a", "b"),
        ),
        ({"note": "long, but no answer", "cities": ["a", "b"], "right": 0}, "multiple_choice", 0, ("a", "b")),
        ({"question": "Q?", "answer": "Paris"}, "generate_until", "Paris", ()),
        ({"Instruction": "Say so.", "output": "so"}, "generate_until", "so", ()),
        ({"my question": "?", "prompt": "Q?", "right answer": "x", "target": "y"}, "generate_until", "y", ()),
        ({"text": "A story."}, "loglikelihood_rolling", "A story.", ()),
        ({"anything": "A story."}, "loglikelihood_rolling", "A story.", ()),
    ],
)
def test_new_makes_a_task_of_documents_as_people_have_them(
    row: dict[str, Any], output_type: str, target: Any, choices: tuple[str, ...], tmp_path: Path
) -> None:
    made = new_task_file(write(tmp_path / "my file.jsonl", [row]))

    task = build_task(made)
    (item,) = render(task)
    assert made == tmp_path / "my_file.yaml"
    assert (task.name, task.definition.output_type) == ("my_file", output_type)
    assert (item.target, item.choices) == (target, choices)
    assert "# guessed: " in made.read_text()


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"answer": "w"}, "document 2: 'answer' is 'w', which names none of its choices"),
        ({"answer": 1}, "document 2: 'answer' is 1, which names none"),
        ({"answer": None}, "document 2: 'answer' is None, which names none"),
        ({"question": None}, "document 2 has no 'question'"),
    ],
)
def test_new_says_which_document_does_not_fit(other: dict[str, Any], words: str, tmp_path: Path) -> None:
    row = {"question": "Q?", "choices": ["x", "y"], "answer": "y"}
    file = write(tmp_path / "a.jsonl", [row, {**row, "answer": "x"}, row | other])

    with pytest.raises(TaskError, match=words):
        new_task_file(file)
    assert not (tmp_path / "a.yaml").exists()


def test_new_never_overwrites_and_leaves_nothing_broken_behind(tmp_path: Path) -> None:
    rows = write(tmp_path / "a.jsonl", [{"question": "Q?", "answer": "x"}])
    made = new_task_file(rows)
    made.write_text("mine")

    with pytest.raises(TaskError, match="is there already"):
        new_task_file(rows)
    assert made.read_text() == "mine"
    assert new_task_file(rows, "other").name == "other.yaml"

    write(tmp_path / "unknown.jsonl", [{"x": 1, "y": 2}])
    with pytest.raises(TaskError, match="no question and answer can be made out of the fields x, y"):
        new_task_file(tmp_path / "unknown.jsonl")
    write(tmp_path / "empty.jsonl", [{"text": ""}])  # guessed, and then nothing to ask
    with pytest.raises(TaskError, match="doc_to_target gives ''"):
        new_task_file(tmp_path / "empty.jsonl")
    assert sorted(path.name for path in tmp_path.glob("*.yaml")) == ["a.yaml", "other.yaml"]
    with pytest.raises(TaskError, match="no file of documents"):
        new_task_file(tmp_path / "absent.jsonl")


# --- lint


def found(task: Any, **keys: Any) -> dict[str, str]:
    """rule -> what is told, of what should be looked at."""
    return {finding.rule: finding.told for finding in lint(task, **keys) if finding.wrong}


QUESTIONS = [{"q": f"Question {n}:", "a": f"answer {n}", "c": ["yes", "no"], "r": n % 2} for n in range(40)]
CHOICES: dict[str, Any] = {"output_type": "multiple_choice", "doc_to_choice": "c", "doc_to_target": "{{r}}"}


@pytest.mark.parametrize(
    ("keys", "rows", "rule", "told"),
    [
        ({**CHOICES, "target_delimiter": ""}, QUESTIONS, "glued", "40 of 40 items"),
        ({**CHOICES, "doc_to_text": "{{q}} "}, QUESTIONS, "double_space", "40 of 40 items"),
        (CHOICES, [{**row, "c": [" yes", "no"]} for row in QUESTIONS], "double_space", "40 of 40 items"),
        ({"doc_to_text": "{{q}} "}, QUESTIONS, "trailing_space", "40 of 40 items"),
        (
            {"generation_kwargs": {"until": ["answer 1"]}, "num_fewshot": 2},
            QUESTIONS,
            "stop_in_shot",
            "11 of 40 shots have the stop string 'answer 1'",
        ),
        ({"generation_kwargs": {"until": ["answer 1"]}}, QUESTIONS, "stop_in_gold", "11 of 40 items"),
        (
            {"num_fewshot": 1, "fewshot_config": {"sampler": "first_n"}},
            [{**row, "q": f"One.\n\nTwo {row['q']}"} for row in QUESTIONS],
            "delimiter_in_shot",
            r"1 of 1 shots have the delimiter between shots, '\n\n', inside them",
        ),
        (CHOICES, [*QUESTIONS, {**QUESTIONS[0], "id": 1}], "duplicate_items", "2 of 41 items"),
        (CHOICES, [*QUESTIONS, {**QUESTIONS[0], "r": 1}], "contradictory_items", "2 of 41 items"),
    ],
)
def test_lint_finds_what_is_planted(
    keys: dict[str, Any], rows: list[dict[str, Any]], rule: str, told: str, tmp_path: Path
) -> None:
    task = task_of(tmp_path, rows, **keys)

    assert told in found(task)[rule]
    clean = task_of(tmp_path, QUESTIONS, "clean", **(CHOICES if "output_type" in keys else {}))
    assert found(clean) == {}


def test_lint_tests_the_places_of_the_gold_with_the_exact_or_the_chi_square_test(tmp_path: Path) -> None:
    two = [{**row, "r": int(n < 8)} for n, row in enumerate(QUESTIONS)]
    four = [{**row, "c": ["a", "b", "c", "d"], "r": [0, 0, 0, 1, 2, 3][n % 6]} for n, row in enumerate(QUESTIONS)]
    mixed = [
        {**row, "c": ["a", "b", "c", "d"][: 4 if n % 3 == 1 else 3], "r": n % 2 * 2 if n % 3 else 0}
        for n, row in enumerate(QUESTIONS)
    ]
    rows = {"two": two, "four": four, "mixed": mixed}
    told = {name: found_all(task_of(tmp_path, its, name, **CHOICES)) for name, its in rows.items()}

    assert told["two"] == (True, stats.binomtest(32, 40).pvalue)
    assert told["four"] == (False, stats.chisquare([21, 7, 6, 6]).pvalue)
    # Every third item has four choices: the 27 with three are looked at, 21 of them right at the first place.
    assert told["mixed"] == (True, stats.chisquare([21, 0, 6]).pvalue)
    few = task_of(tmp_path, QUESTIONS[:6], "few", **CHOICES)
    assert "too few to test" in next(one.told for one in lint(few) if one.rule == "gold_position")


def found_all(task: Any) -> tuple[bool, Any]:
    (one,) = [finding for finding in lint(task) if finding.rule == "gold_position"]
    return one.wrong, pytest.approx(float(one.told.rpartition("p = ")[2]), rel=0.05)


def test_lint_counts_the_tokens_of_labels_where_they_stand(tmp_path: Path) -> None:
    letters = [{**row, "c": ["A", "(B)"]} for row in QUESTIONS]
    task = task_of(tmp_path, letters, **CHOICES)

    by_character = found(task, encode=lambda text: [ord(c) for c in text])
    assert by_character == {"label_tokens": "tokens of the labels where they stand: ' (B)' 4, ' A' 2"}
    assert found(task, encode=str.split) == {}  # type: ignore[arg-type]


def test_the_bundled_tasks_have_nothing_that_misleads() -> None:
    look = {name: found(build_task(LIBRARY / f"{name}.yaml")) for name in bundled_tasks()}

    assert {name: rules for name, rules in look.items() if rules} == {}


# --- diff


def test_a_difference_is_of_asking_of_scoring_or_of_documents(tmp_path: Path) -> None:
    base = task_of(tmp_path, QUESTIONS)
    asked = compare_tasks(base, task_of(tmp_path, QUESTIONS, "asked", doc_to_text="{{q}}?", num_fewshot=1))
    scored = compare_tasks(base, task_of(tmp_path, QUESTIONS, "scored", metric_list=[{"metric": "f1"}], repeats=2))
    data = compare_tasks(base, task_of(tmp_path, [*QUESTIONS[1:], {**QUESTIONS[0], "a": "x"}], "data"))

    assert compare_tasks(base, base).same
    assert {change.key: (change.a, change.b) for change in asked.asking}["doc_to_text"] == ("{{q}}", "{{q}}?")
    assert "shots" in {change.key.partition(".")[0] for change in asked.asking}
    assert (asked.scoring, asked.documents) == ((), None)
    assert asked.prompt is not None
    assert (asked.prompt.sample_id, asked.prompt.asked_otherwise, asked.prompt.common) == (
        base.documents[0].sample_id,
        40,
        40,
    )
    assert asked.prompt.a.startswith("Question 0:\n")
    assert {change.key for change in scored.scoring} == {"metrics", "repeats", "primary_metric"}
    assert (scored.asking, scored.documents, scored.prompt) == ((), None, None)
    assert data.documents is not None
    assert (len(data.documents.added), len(data.documents.removed), data.prompt) == (1, 1, None)


# --- as commands


@pytest.fixture
def place(tmp_path: Path) -> Place:
    (tmp_path / "my_tasks").mkdir()
    (tmp_path / "eval_platform.toml").write_text('[tasks]\nfolders = ["my_tasks"]\n')
    write(
        tmp_path / "my_tasks" / "capitals.jsonl",
        [{"question": f"Capital of {n}?", "answer": f"city {n}"} for n in range(4)],
    )
    return Place(tmp_path)


def test_from_documents_to_a_task_that_is_asked(place: Place) -> None:
    documents = place.folder / "my_tasks" / "capitals.jsonl"

    made = place("tasks", "new", str(documents))
    file = documents.with_suffix(".yaml")
    assert made.code == 0, made.err
    assert "Question: Capital of 0?\nAnswer:" in made.out
    assert f"written: {file}" in made.out
    again = place("tasks", "new", str(documents))
    assert (again.code, "is there already" in again.err) == (2, True)
    assert place("tasks", "new", str(documents), "--task", "more", "--json").json["task"] == "more"
    (documents.parent / "more.yaml").unlink()

    assert place("tasks", "sync", "--json").json["tasks"] == ["capitals"]
    assert place("tasks", "show", "capitals").out == place("tasks", "show", str(file)).out
    assert place("tasks", "lint").code == 0
    assert "nothing found" in place("tasks", "lint", "capitals").out
    assert "add: " in place("tasks", "show", "addition").out  # shipped, and not configured here


def test_diff_of_tasks_and_of_locks(place: Place) -> None:
    folder, lock = place.folder / "my_tasks", place.folder / "eval_platform.lock.json"
    place("tasks", "new", str(folder / "capitals.jsonl"))
    place("tasks", "sync")
    shutil.copy(lock, place.folder / "old.json")
    file = folder / "capitals.yaml"
    file.write_text(file.read_text().replace("Question: ", "Q: "))

    told = place("tasks", "diff", "capitals", str(file))
    assert told.code == 0, told.err
    assert 'doc_to_text: "Question: {{question}}\\nAnswer:" -> "Q: {{question}}\\nAnswer:"' in told.out
    assert "4 of 4 common documents are asked otherwise" in told.out
    assert "from character 1: " in told.out
    assert place("tasks", "diff", str(file), str(file)).out == "capitals and capitals ask and score the same\n"

    write(folder / "more.jsonl", [{"text": "A story."}])
    place("tasks", "new", str(folder / "more.jsonl"))
    place("tasks", "sync")
    locks = place("tasks", "diff", str(place.folder / "old.json"), str(lock), "--json").json
    assert (locks["added"], locks["removed"]) == (["more"], [])
    assert [change["key"] for change in locks["changed"]["capitals"]["asking"]] == ["doc_to_text"]
    assert "added: more" in place("tasks", "diff", str(place.folder / "old.json"), str(lock)).out
    assert "both locks stand" in place("tasks", "diff", str(lock), str(lock)).out
    assert place("tasks", "diff", "capitals", str(lock)).code == 2
    assert "there is no lock file" in place("tasks", "diff", "gone.json", str(lock)).err


def test_lint_says_what_to_look_at_and_ends_with_1(place: Place) -> None:
    folder = place.folder / "my_tasks"
    task_of(folder, [*QUESTIONS, {**QUESTIONS[0], "id": 1}], "twice", **CHOICES)

    told = place("tasks", "lint", str(folder / "twice.yaml"))
    assert told.code == 1
    assert "look duplicate_items: 2 of 41 items stand more than once" in told.out
    assert "ok   gold_position: the right choice stands at place 0 and 1 in " in told.out
    (findings,) = place("tasks", "lint", str(folder / "twice.yaml"), "--json").json.values()
    (duplicates,) = [one for one in findings if one["wrong"]]
    assert (duplicates["rule"], len(duplicates["examples"])) == ("duplicate_items", 2)
    assert "has no tokenizer" in place("tasks", "lint", str(folder / "twice.yaml"), "--tokenizer", str(folder)).err
