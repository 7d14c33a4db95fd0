"""A sample as a person reads it: the exact prompt, and what is asked of it."""

from eval_platform.errors import TaskError
from eval_platform.tasks.chat import Chat
from eval_platform.tasks.render import render
from eval_platform.tasks.task import Task
from eval_platform.values import Item


def show_prompt(task: Task, k: int, chat: Chat | None = None) -> str:
    """The prompt of the sample at position `k`, character for character, then each request and the right answer.

    chat: as a conversation, through its template.

    Raises TaskError when the task has no such sample.
    """
    if not 0 <= k < len(task.documents):
        raise TaskError(
            f"task {task.name} has no sample {k}", remedy=f"give a number from 0 to {len(task.documents) - 1}"
        )
    item = next(render(task, [task.documents[k]], chat=chat))
    return f"--- {task.name}, sample {k}, {item.document.sample_id}, {item.shots_used} shots: prompt\n{show_item(item)}"


def show_item(item: Item) -> str:
    """The prompt, then each request and the right answer."""
    right = set(item.target) if isinstance(item.target, tuple) else {item.target}
    lines = [item.prompt]
    contexts = {request.context for request in item.requests}
    for index, request in enumerate(item.requests):
        if request.kind == "generate":
            assert request.settings is not None
            lines.append(
                f"--- up to {request.settings.max_new_tokens} tokens, stopping at {list(request.settings.stop)}"
            )
        elif request.kind == "rolling":
            lines.append("--- every token of it is scored")
        else:
            mark = "  <- right" if index in right else ""
            context = f" after {request.context!r}" if len(contexts) > 1 else ""
            lines.append(f"--- scored: {request.continuation!r}{context}{mark}")
    if not item.choices and item.requests[0].kind == "generate":
        lines.append(f"--- right: {item.target!r}")
    return "\n".join(lines)
