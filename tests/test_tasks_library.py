"""The tasks shipped: they run offline, say where they are from, and are what their sources say."""

import csv
import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest

from eval_platform.config import Tasks
from eval_platform.store import LocalStore
from eval_platform.tasks import Task, build_task, bundled_tasks, catalogue, library_tasks, read_lock, render, sync_tasks
from eval_platform.tasks.reading import read_task_file
from eval_platform.tasks.sync import LIBRARY
from tests.data import REPOSITORY, originals


@pytest.fixture(scope="module")
def tasks() -> dict[str, Task]:
    """Those that ship with their items; what needs data from elsewhere has tests of its own."""
    return {name: build_task(LIBRARY / f"{name}.yaml") for name in bundled_tasks()}


def test_every_bundled_task_is_synced_without_a_configuration(tmp_path: Path, tasks: dict[str, Task]) -> None:
    report = sync_tasks(Tasks(), LocalStore(tmp_path / "results"), tmp_path / "lock.json")

    assert report.errors == ()
    assert report.lock.skipped == {}
    assert set(report.lock.tasks) == set(tasks)
    assert len(tasks) >= 8


def test_bundled_tasks_are_what_they_were(tasks: dict[str, Task]) -> None:
    """A new key or metric must not change what is known by an id: the demo's lock is committed."""
    lock = read_lock(REPOSITORY / "demo" / "eval_platform.lock.json")

    assert set(lock.tasks) <= set(tasks)
    for name, locked in lock.tasks.items():
        assert (tasks[name].ask_id, tasks[name].task_id) == (locked.ask_id, locked.task_id), name


@pytest.mark.parametrize("name", library_tasks())
def test_every_shipped_task_says_what_it_is(name: str) -> None:
    said = read_task_file(LIBRARY / f"{name}.yaml")
    assert said.task == name  # a file's name is its task's, so that includes need not open every file
    assert said.title
    assert said.about
    assert said.source
    assert said.licence
    assert said.citation
    sources = [source for source in (said.documents, said.documents and said.documents.fewshot) if source]
    for source in sources:
        if source.dataset is not None:
            assert catalogue.card(source.dataset.name).licence
        if source.file is not None:  # what is shipped has its licence beside it
            licence = LIBRARY / said.licence.partition("(")[2].rstrip(")")
            assert "Permission is hereby granted" in licence.read_text()


def test_chance_is_known_of_every_bundled_task(tasks: dict[str, Task]) -> None:
    assert [name for name, task in tasks.items() if task.higher_is_better and task.chance is None] == []


def test_shots_of_shipped_tasks_are_a_shared_prefix(tasks: dict[str, Task]) -> None:
    for task in tasks.values():
        if task.definition.shots:
            prompts = [item.prompt for item in render(task)]
            examples = prompts[0].split(task.definition.fewshot_delimiter)[: task.definition.shots]
            assert all(prompt.startswith(task.definition.fewshot_delimiter.join(examples)) for prompt in prompts)


def test_right_answers_of_generated_choices_are_balanced(tasks: dict[str, Task]) -> None:
    for task in tasks.values():
        if task.definition.output_type == "multiple_choice" and task.definition.tag == "generated":
            targets = [item.target for item in render(task)]
            shares = [targets.count(label) / len(targets) for label in set(targets)]
            assert max(shares) <= task.chance + 0.02  # type: ignore[operator]


def test_mmlu_items_are_the_originals(tasks: dict[str, Task]) -> None:
    folder = originals("mmlu")
    task = tasks["mmlu_abstract_algebra"]
    for split, ours in (("test", [d.fields for d in task.documents]), ("dev", task.shots)):
        with (folder / split / f"abstract_algebra_{split}.csv").open(encoding="utf-8", newline="") as file:
            published = list(csv.DictReader(file))
        assert [(r["question"], r["choices"], r["answer"]) for r in ours] == [
            (r["question"], [r[f"choice{k}"] for k in range(4)], int(r["answer"])) for r in published
        ]


def test_gsm8k_items_are_the_originals(tasks: dict[str, Task]) -> None:
    folder = originals("gsm8k")
    task = tasks["gsm8k_50"]
    for split, ours in (("test", [d.fields for d in task.documents]), ("train", task.shots)):
        with gzip.open(folder / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
            published = [json.loads(line) for line in file]
        assert list(ours) == published[: len(ours)]
    assert (len(task.documents), len(task.shots)) == (50, 5)


def test_reading_a_lock_imports_neither_torch_nor_pandas() -> None:
    """Dagster's definitions read the lock; they must load in a moment."""
    code = "import sys, eval_platform.tasks; print([m for m in ('torch', 'transformers', 'pandas', 'datasets') "
    code += "if m in sys.modules])"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)

    assert done.stdout.strip() == "[]"
