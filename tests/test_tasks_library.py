"""The tasks shipped: they run offline, say where they are from, and are what their sources say."""

import csv
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from eval_platform.config import Tasks
from eval_platform.store import LocalStore
from eval_platform.tasks import Task, build_task, library_tasks, render, sync_tasks
from eval_platform.tasks.sync import LIBRARY

REPOSITORY = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("EVAL_PLATFORM_DATA") or REPOSITORY.parent / "shared" / "data")


@pytest.fixture(scope="module")
def tasks() -> dict[str, Task]:
    return {name: build_task(LIBRARY / f"{name}.yaml") for name in library_tasks()}


def test_every_shipped_task_is_synced_without_a_configuration(tmp_path: Path, tasks: dict[str, Task]) -> None:
    report = sync_tasks(Tasks(), LocalStore(tmp_path / "results"), tmp_path / "lock.json")

    assert report.errors == ()
    assert set(report.lock.tasks) == set(tasks)
    assert len(tasks) >= 8


def test_every_shipped_task_says_what_it_is(tasks: dict[str, Task]) -> None:
    for name, task in tasks.items():
        said = task.definition
        assert task.name == name  # a file's name is its task's, so that includes need not open every file
        assert said.title
        assert said.about
        assert said.source
        assert said.licence
        assert task.chance is not None or not task.higher_is_better
        if said.documents is not None and said.documents.generator is None:
            assert said.citation
            licence = LIBRARY / said.licence.partition("(")[2].rstrip(")")
            assert "Permission is hereby granted" in licence.read_text()


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


def originals_of(name: str) -> Path:
    """The benchmark as it was published: it lies beside the project where it is developed, not in a clone of it."""
    if not (DATA / name).is_dir():
        pytest.skip(f"the shipped items cannot be compared: no {name} below {DATA} (set EVAL_PLATFORM_DATA)")
    return DATA / name


def test_mmlu_items_are_the_originals(tasks: dict[str, Task]) -> None:
    folder = originals_of("mmlu")
    task = tasks["mmlu_abstract_algebra"]
    for split, ours in (("test", [d.fields for d in task.documents]), ("dev", task.shots)):
        with (folder / split / f"abstract_algebra_{split}.csv").open(encoding="utf-8", newline="") as file:
            originals = list(csv.DictReader(file))
        assert [(r["question"], r["choices"], r["answer"]) for r in ours] == [
            (r["question"], [r[f"choice{k}"] for k in range(4)], int(r["answer"])) for r in originals
        ]


def test_gsm8k_items_are_the_originals(tasks: dict[str, Task]) -> None:
    folder = originals_of("gsm8k")
    task = tasks["gsm8k_50"]
    for split, ours in (("test", [d.fields for d in task.documents]), ("train", task.shots)):
        with gzip.open(folder / f"{split}.jsonl.gz", "rt", encoding="utf-8") as file:
            originals = [json.loads(line) for line in file]
        assert list(ours) == originals[: len(ours)]
    assert (len(task.documents), len(task.shots)) == (50, 5)


def test_reading_a_lock_imports_neither_torch_nor_pandas() -> None:
    """Dagster's definitions read the lock; they must load in a moment."""
    code = "import sys, eval_platform.tasks; print([m for m in ('torch', 'transformers', 'pandas', 'datasets') "
    code += "if m in sys.modules])"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)

    assert done.stdout.strip() == "[]"
