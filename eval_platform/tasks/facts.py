"""What is true of a task's items, in plain columns: what checks of the data and `tasks lint` look at."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eval_platform.identity import content_id
from eval_platform.tasks.documents import row_text
from eval_platform.tasks.render import bare_items
from eval_platform.tasks.task import Task
from eval_platform.values import Item


@dataclass(frozen=True, slots=True)
class ItemFacts:
    """One entry an item in every column, in the order of the documents.

    questions: an item's own text, without description and shots. keys: what makes two items the same (question and
    choices). choices: how many there are; gold: the numbers of the right ones; both empty where the answer is a text.
    among_shots: whether the item is also one of the examples that stand before other items.
    licence: what the task file says, None for a task of the user's own, which need not say it.
    """

    sample_ids: tuple[str, ...]
    questions: tuple[str, ...]
    keys: tuple[str, ...]
    choices: tuple[int, ...]
    gold: tuple[tuple[int, ...], ...]
    among_shots: tuple[bool, ...]
    licence: str | None


def item_facts(task: Task, items: Sequence[Item], *, shipped: bool = False) -> ItemFacts:
    """The facts of a task from all its rendered items."""
    asked = list(bare_items(task, [document.fields for document in task.documents]))
    return ItemFacts(
        sample_ids=tuple(item.document.sample_id for item in items),
        questions=tuple(question for question, _ in asked),
        keys=tuple(content_id(one) for one in asked),
        choices=tuple(len(item.choices) if item.choices else 0 for item in items),
        gold=tuple(_gold(item) for item in items),
        among_shots=tuple(_among_shots(task, asked)),
        licence=task.definition.licence if shipped else None,
    )


def _gold(item: Item) -> tuple[int, ...]:
    if isinstance(item.target, int):
        return (item.target,)
    if isinstance(item.target, tuple):
        return tuple(index for index in item.target if isinstance(index, int))
    return ()


def _among_shots(task: Task, asked: Sequence[tuple[str, tuple[str, ...]]]) -> list[bool]:
    """Per item: is it one of its own shots? Not where shots are drawn from the asked items, which leaves it out."""
    definition = task.definition
    if not task.shots or definition.excludes_asked:
        return [False] * len(asked)
    pool, rows = used_shots(task), [document.fields for document in task.documents]
    shown: Sequence[Any] = list(map(row_text, pool))
    items: Sequence[Any] = list(map(row_text, rows))
    own = definition.fewshot_config
    if own.doc_to_text is None and own.doc_to_choice is None:  # else worded otherwise: then equal fields are equal
        shown, items = list(bare_items(task, pool)), asked
    match = definition.shots_match  # a shot stands only before items of its own kind
    before = {(row[match] if match else None, one) for row, one in zip(pool, shown, strict=True)}
    return [(row[match] if match else None, one) in before for row, one in zip(rows, items, strict=True)]


def used_shots(task: Task) -> Sequence[Mapping[str, Any]]:
    """Those documents of the shots' source that can come to stand in a prompt."""
    definition = task.definition
    fixed = definition.fewshot_config.sampler == "first_n" and definition.shots_match is None
    return task.shots[: definition.shots] if fixed else task.shots
