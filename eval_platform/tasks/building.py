"""From a task file to a Task that is known to work: every document is read and every prompt rendered once."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from eval_platform.errors import SchemaError, TaskError
from eval_platform.store import Store, layout, read_record
from eval_platform.tasks.documents import as_documents, read_documents
from eval_platform.tasks.harness import check_requests, leaf_of_file, read_harness
from eval_platform.tasks.harness_files import Leaf
from eval_platform.tasks.metrics import METRICS
from eval_platform.tasks.programs import program_text
from eval_platform.tasks.reading import harness_keys, read_task_file
from eval_platform.tasks.render import render
from eval_platform.tasks.requirements import check_requirements
from eval_platform.tasks.schema import TaskFile
from eval_platform.tasks.snapshots import dataset_id, frozen_rows
from eval_platform.tasks.task import Task, ask_id, task_id
from eval_platform.tasks.templates import inside
from eval_platform.values import Item


def build_task(path: Path) -> Task:
    """The task of a file, its documents as they are now. Nothing is written.

    Raises TaskError naming file, key, document and remedy.
    """
    return build_task_and_items(path)[0]


def build_task_and_items(path: Path) -> tuple[Task, list[Item]]:
    """As `build_task`, with every item it asks."""
    return prove_task(open_task(path), path)


def open_task(path: Path | Leaf) -> Task:
    """The task of a file as far as it is known before anything is rendered: without chance and task_id.

    Or the task of lm-evaluation-harness that a file names, or that `[tasks] lm_eval` led to.
    """
    if isinstance(path, Leaf):
        return _open_harness(path, {}, str(path))
    named = harness_keys(path)
    if named is not None:
        try:
            leaf, own = leaf_of_file(named)
        except TaskError as error:
            raise inside(f"{path}: ", error) from error
        return _open_harness(leaf, own, str(path))
    definition = read_task_file(path)
    try:
        rows, shots = read_documents(definition, path.resolve().parent)
        check_requirements(definition, rows)
        return _assemble(definition, rows, shots, chance=None, identity="")
    except TaskError as error:
        raise inside(f"{path}: ", error) from error


def _open_harness(leaf: Leaf, own: Mapping[str, Any], where: str) -> Task:
    try:
        definition, rows, asked = read_harness(leaf, own)
        task = _assemble(definition, rows, [], chance=None, identity="")
        check_requests(list(render(task)), asked)
    except TaskError as error:
        raise inside(f"{where}: ", error) from error
    return task


def prove_task(task: Task, path: Path | Leaf) -> tuple[Task, list[Item]]:
    """An opened task with chance and task_id, and every item it asks.

    Every document is rendered here, so that what is wrong shows now and not when a checkpoint waits.
    """
    chance = task.definition.chance
    try:
        items = list(render(task))
        if task.definition.code is not None:
            for item in items:
                program_text(task, item.document, "")
        if chance is None:
            chance = _chance(task.definition, items)
    except TaskError as error:
        raise inside(f"{path}: ", error) from error
    return with_chance(task, chance), items


def with_chance(task: Task, chance: float | None) -> Task:
    """An opened task with the task_id that it has with this chance."""
    return replace(task, chance=chance, task_id=task_id(task.definition, task.ask_id, chance))


def validate_file(path: Path) -> None:
    """Raises TaskError naming file, key, document and remedy when the file is no task that can be asked."""
    build_task(path)


def task_of_rows(definition: TaskFile, rows: Sequence[Mapping[str, Any]]) -> Task:
    """The task as it would be with these documents and no shots; for looking at, it has no task_id."""
    return _assemble(definition, rows, [], chance=None, identity="")


def definition_record(task: Task) -> dict[str, Any]:
    """What tasks/<task_id>.json says: the whole definition, and the snapshots of its documents."""
    return {
        "task_id": task.task_id,
        "ask_id": task.ask_id,
        "name": task.name,
        "dataset_id": task.dataset_id,
        "fewshot_dataset_id": task.fewshot_dataset_id,
        "n_documents": len(task.documents),
        "chance": task.chance,
        "definition": task.definition.model_dump(mode="json", by_alias=True),
    }


def load_task(store: Store, identity: str) -> Task:
    """The task with this task_id, from its frozen definition and documents alone.

    Raises TaskError when it was never synced to this store, SchemaError when what is stored was altered.
    """
    try:
        record = read_record(store, layout.task(identity))
        rows = frozen_rows(store, record["dataset_id"])
        shots_id = record["fewshot_dataset_id"]
        shots = [] if shots_id is None else frozen_rows(store, shots_id)
    except KeyError as error:
        raise TaskError(
            f"task {identity} is not in {store.uri} ({error} is missing)", remedy="run `eval-platform tasks sync`"
        ) from error
    try:
        definition = TaskFile.model_validate(record["definition"])
    except ValueError as error:
        raise SchemaError(f"{layout.task(identity)}: {error}", remedy="restore it from a copy") from error
    return _assemble(definition, rows, shots, chance=record["chance"], identity=identity)


def _assemble(
    definition: TaskFile,
    rows: Sequence[Mapping[str, Any]],
    shots: Sequence[Mapping[str, Any]],
    *,
    chance: float | None,
    identity: str,
) -> Task:
    ours = definition.documents
    documents = as_documents(rows, subset=ours.subset_fields if ours else (), cluster=ours.cluster if ours else None)
    snapshot = dataset_id(rows)
    shots_snapshot = dataset_id(shots) if definition.shots else None
    return Task(
        name=definition.task,
        definition=definition,
        task_id=identity,
        ask_id=ask_id(definition, snapshot, shots_snapshot),
        dataset_id=snapshot,
        fewshot_dataset_id=shots_snapshot,
        documents=tuple(documents),
        shots=tuple(shots),
        chance=chance,
    )


def _chance(definition: TaskFile, items: Sequence[Item]) -> float | None:
    """The expected score of picking choices at random; None for what is not picked."""
    metric = METRICS.get(definition.primary_metric.partition(",")[0])  # lm-evaluation-harness has others
    if definition.output_type != "multiple_choice" or metric is None or not metric.proportion:
        return None
    right = [len(set(item.target)) if isinstance(item.target, tuple) else 1 for item in items]
    return sum(r / len(item.choices) for r, item in zip(right, items, strict=True)) / len(items)
