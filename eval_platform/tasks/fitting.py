"""Prompts that are too long lose shots until they fit: INSTRUCTEVAL's rule, which needs the model's tokenizer."""

from collections.abc import Callable, Sequence

from eval_platform.tasks.chat import Chat
from eval_platform.tasks.render import render
from eval_platform.tasks.task import Task
from eval_platform.values import Item

# How many tokens each text has for a model.
CountTokens = Callable[[Sequence[str]], Sequence[int]]


def fit_shots(
    task: Task, items: Sequence[Item], count_tokens: CountTokens, most_tokens: int, chat: Chat | None = None
) -> list[Item]:
    """`items` (the task's, rendered so, with all their shots), those of more than `most_tokens` with fewer.

    The shots that remain are the first ones, as many as fit; a prompt without shots stays as long as it is. The
    items' shots_used says how many each has.
    """
    fitted = list(items)
    places = list(range(len(fitted)))
    asked = task.definition if chat is None else task.definition.in_chat
    for shots in range(asked.shots - 1, -1, -1):
        lengths = count_tokens([fitted[place].prompt for place in places])
        places = [place for place, length in zip(places, lengths, strict=True) if length > most_tokens]
        if not places:
            break
        shorter = render(task, [fitted[place].document for place in places], most_shots=shots, chat=chat)
        for place, item in zip(places, shorter, strict=True):
            fitted[place] = item
    return fitted
