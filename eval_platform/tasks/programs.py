"""From a completion to the program that shows whether it is right: the `code` key of a task file."""

from eval_platform.errors import TaskError
from eval_platform.tasks.task import Task
from eval_platform.tasks.templates import inside, render_template
from eval_platform.values import Document

COMPLETION = "completion"  # the name under which the template finds it, beside the document's fields


def program_text(task: Task, document: Document, completion: str) -> str:
    """The program of one completion (as the filters left it), tests included; the task must have `code`.

    Raises TaskError naming the document when the template cannot be filled in, or would hide a field of the
    document's.
    """
    code = task.definition.code
    assert code is not None
    where = f"code.program, document {document.position} "
    if COMPLETION in document.fields:
        raise TaskError(
            f"{where}has a field {COMPLETION!r}, which is the model's answer there",
            remedy="give the field another name",
        )
    try:
        return render_template(code.program, {**document.fields, COMPLETION: completion})
    except TaskError as error:
        raise inside(where, error) from error
