"""What is wrong with the data of a task: every rule finds what is planted for it, and nothing else."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eval_platform.config import Tasks
from eval_platform.quality import check_items
from eval_platform.store import LocalStore, layout, read_record
from eval_platform.tasks import SyncReport, bundled_tasks, sync_tasks
from eval_platform.tasks.building import build_task_and_items
from eval_platform.tasks.facts import ItemFacts, item_facts
from eval_platform.values import Check

ROWS = [{"q": f"question {n}", "choices": ["yes", "no", f"{n}"], "right": n % 3} for n in range(30)]
CHOICES: dict[str, Any] = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{q}}",
    "doc_to_choice": "choices",
    "doc_to_target": "right",
}


def facts_of(folder: Path, rows: list[dict[str, Any]], **keys: Any) -> ItemFacts:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "t.yaml").write_text(json.dumps({"task": "t", "documents": {"file": "rows.jsonl"}, **CHOICES, **keys}))
    return item_facts(*build_task_and_items(folder / "t.yaml"))


def failed(facts: ItemFacts) -> dict[str, str]:
    """Rule -> its reason, of what failed."""
    return {check.name: check.reason for check in check_items({"t": facts})["t"] if not check.passed}


def test_good_data_passes_every_rule(tmp_path: Path) -> None:
    found = check_items({"a": facts_of(tmp_path, ROWS), "b": facts_of(tmp_path, ROWS)})  # two tasks may share an item

    assert [check.passed for check in found["a"]] == [True] * 7
    assert {check.name: check.severity for check in found["b"]} == {
        "empty_item": "error",
        "one_choice": "error",
        "gold_in_range": "error",
        "licence_present": "error",
        "unique_items": "warning",
        "number_of_choices": "warning",
        "shots_apart": "warning",
    }


@pytest.mark.parametrize(
    ("row", "rule", "told"),
    [
        ({**ROWS[0], "q": " "}, "empty_item", "1 of 31 items ask nothing"),
        ({**ROWS[0], "q": "new", "choices": ["yes"]}, "one_choice", "1 of 31 items have one choice"),
        ({**ROWS[0], "q": "new", "choices": ["yes", "no"]}, "number_of_choices", "1 of 31 items have another number"),
        ({**ROWS[4], "right": 0, "more": 1}, "unique_items", "2 of 31 items stand more than once"),
    ],
)
def test_what_is_planted_is_found_and_named(row: dict[str, Any], rule: str, told: str, tmp_path: Path) -> None:
    facts = facts_of(tmp_path, [*ROWS, row])

    found = failed(facts)

    assert rule in found
    assert set(found) <= {rule, "number_of_choices"}
    assert found[rule].startswith(told)
    assert facts.sample_ids[30] in found[rule]  # the example names the sample


def test_a_bad_task_does_not_speak_for_the_good_one_beside_it(tmp_path: Path) -> None:
    bad, good = facts_of(tmp_path, [*ROWS, {**ROWS[0], "q": " "}]), facts_of(tmp_path, ROWS)

    both = check_items({"bad": bad, "good": good})

    assert [check.name for check in both["bad"] if not check.passed] == ["empty_item"]
    assert all(check.passed for check in both["good"])


def test_gold_out_of_range_and_a_missing_licence_are_errors(tmp_path: Path) -> None:
    """Rendering refuses such gold already; the rule stands for whatever makes items by another way."""
    facts = facts_of(tmp_path, ROWS)

    assert set(failed(replace(facts, gold=((3,), *facts.gold[1:])))) == {"gold_in_range"}
    assert set(failed(replace(facts, gold=((0, -1), *facts.gold[1:])))) == {"gold_in_range"}
    assert set(failed(replace(facts, licence=""))) == {"licence_present"}
    assert failed(replace(facts, licence="MIT")) == {}


def test_shots_that_are_asked_too_are_found_where_they_come_from_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "shots.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (*ROWS[:2], *ROWS[7:9])))
    shots = {"file": "rows.jsonl", "fewshot": {"file": "shots.jsonl"}}
    drawn = facts_of(tmp_path, ROWS, documents=shots, num_fewshot=2)
    first = facts_of(tmp_path, ROWS, documents=shots, num_fewshot=2, fewshot_config={"sampler": "first_n"})
    own = facts_of(tmp_path, ROWS, num_fewshot=2)  # never the asked one
    # Shots of the item's own kind: question 0 is shown to items of kind 1 only, and so not to itself.
    (tmp_path / "shots.jsonl").write_text("".join(json.dumps({**ROWS[n], "kind": 1}) + "\n" for n in (0, 1)))
    kinds = [{**row, "kind": min(n, 1)} for n, row in enumerate(ROWS[:2])]
    (tmp_path / "zero.jsonl").write_text(json.dumps({**ROWS[9], "kind": 0}) + "\n")
    matching = {"file": "rows.jsonl", "fewshot": {"files": ["shots.jsonl", "zero.jsonl"], "match": "kind"}}
    of_kind = facts_of(tmp_path, kinds, documents=matching, num_fewshot=1)

    assert [n for n, one in enumerate(drawn.among_shots) if one] == [0, 1, 7, 8]
    assert [n for n, one in enumerate(first.among_shots) if one] == [0, 1]  # the others never stand in a prompt
    assert not any(own.among_shots)
    assert of_kind.among_shots == (False, True)
    assert failed(drawn)["shots_apart"].startswith("4 of 30 items are among the shots")


def test_choices_that_are_whole_texts_need_no_question(tmp_path: Path) -> None:
    assert failed(facts_of(tmp_path, ROWS, doc_to_text="")) == {}


def test_numbers_of_choices_that_vary_by_design_are_no_slip(tmp_path: Path) -> None:
    rows = [{**row, "choices": [*row["choices"], "more"][: 3 + n % 2]} for n, row in enumerate(ROWS)]

    assert failed(facts_of(tmp_path, rows)) == {}


def test_sync_refuses_errors_keeps_warnings_beside_the_snapshot_and_looks_once(tmp_path: Path) -> None:
    store, lock = LocalStore(tmp_path / "results"), tmp_path / "lock.json"
    looked: list[str] = []

    def noting(tasks: Mapping[str, ItemFacts]) -> Mapping[str, Sequence[Check]]:
        looked.extend(tasks)
        return check_items(tasks)

    def sync() -> SyncReport:
        return sync_tasks(Tasks(folders=(str(tmp_path),)), store, lock, check=noting)

    facts_of(tmp_path, [*ROWS, {**ROWS[4], "more": 1}])
    first = sync()
    locked = first.lock.tasks["t"]
    assert first.errors == ()
    assert [check.name for check in first.warnings["t"]] == ["unique_items"]
    record = read_record(store, layout.dataset_checks(locked.dataset_id, locked.ask_id))
    assert {one["name"]: one["passed"] for one in record["checks"]}["unique_items"] is False
    assert (sync().warnings, looked) == ({}, ["t"])

    facts_of(tmp_path, [*ROWS, {**ROWS[0], "q": " "}])
    broken = sync()
    assert "t: its data cannot be asked: 1 of 31 items ask nothing" in str(broken.errors[0])
    assert broken.lock.tasks["t"] == locked  # the name goes on standing for what it stood for
    assert broken.changed == ()
    assert looked == ["t", "t"]


def test_no_data_of_a_bundled_task_is_refused(tmp_path: Path) -> None:
    report = sync_tasks(Tasks(), LocalStore(tmp_path / "results"), tmp_path / "lock.json", check=check_items)

    assert report.errors == ()
    assert set(report.lock.tasks) == set(bundled_tasks())
    assert report.warnings == {}


def test_a_choice_among_contexts_is_known_by_what_follows_them_too(tmp_path: Path) -> None:
    """Winogrande's twins: the same two sentences to choose from, ended in two ways."""
    rows = [{"options": ["A did", "B did"], "right": n % 2, "end": f"end {n // 2 * 2}"} for n in range(2)]
    contexts = {"doc_to_text": "right", "doc_to_choice": "options", "doc_to_target": "end"}

    assert "unique_items" in failed(facts_of(tmp_path, rows, **contexts))
    rows[1]["end"] = "another end"
    assert failed(facts_of(tmp_path, rows, **contexts)) == {}
