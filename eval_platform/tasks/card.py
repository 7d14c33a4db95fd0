"""`docs/tasks.md`: every task shipped, with source, licence, citation, what it was verified against, and an example.

    python -m eval_platform.tasks.card docs/tasks.md

The page is made of the task files and the catalogue alone, without data, and a test holds it to be what this writes.
"""

import sys
from pathlib import Path

from eval_platform.errors import TaskError
from eval_platform.tasks import catalogue
from eval_platform.tasks.building import task_of_rows
from eval_platform.tasks.documents import read_documents
from eval_platform.tasks.examples import EXAMPLES
from eval_platform.tasks.reading import read_task_file
from eval_platform.tasks.render import render
from eval_platform.tasks.schema import TaskFile
from eval_platform.tasks.selection import LIBRARY, library_tasks
from eval_platform.tasks.show import show_item
from eval_platform.tasks.sources import DatasetSource
from eval_platform.tasks.suite import find_suite, shipped_suites

BY_DEFINITION = "by definition only"
_LONGEST = 900  # characters of an example
_HEAD = """# The tasks shipped

Made by `python -m eval_platform.tasks.card docs/tasks.md`: do not edit this page, but the task files in
`eval_platform/tasks/library/`. [Every key of a task file](task_files.md).

*Verified* says against what the prompts and scores of a task were compared; *by definition only*: they follow the
published definition, and nothing was at hand to compare with. Tasks with their data *with the package* need nothing
else. The others find theirs in the folder that `EVAL_PLATFORM_DATA` names, or on the Hugging Face hub; where neither
has it the task is skipped, and listed as skipped.

Examples of those are made up by us in the form of their data, and shown without their shots.

"""


def page() -> str:
    """The whole page."""
    definitions = {name: read_task_file(LIBRARY / f"{name}.yaml") for name in library_tasks()}
    lines = ["| task | asks | shots | primary score | data | verified |", "|---|---|---|---|---|---|"]
    for name, said in definitions.items():
        cells = (f"[{name}](#{name})", said.output_type, str(said.shots), f"`{said.primary_metric}`", _data(said))
        lines.append(f"| {' | '.join(cells)} | {'verified' if verified(said) else BY_DEFINITION} |")
    suites = [_suite(name) for name in shipped_suites()]
    return _HEAD + "\n".join(lines) + "\n\n" + "".join(suites) + "\n".join(map(section, definitions.values()))


def section(said: TaskFile) -> str:
    """What the page says of one task."""
    source = _dataset(said)
    lines = [f"## {said.task}", f"**{_plain(said.title)}**. {_plain(said.about)}", ""]
    lines.append(f"- source: {_plain(said.source)}")
    if source is not None:
        card = catalogue.card(source.name)
        where = [f"`{file}`" for file in card.files]
        if card.hub is not None:
            where.append(f"{card.hub} on the hub" + (f", revision {card.revision}" if card.revision else ""))
        lines.append(f"- data: {source.name}, {card.homepage}; looked for in {', then '.join(where)}")
    lines.append(f"- licence: {_plain(said.licence)}")
    if said.citation:
        lines.append(f"- citation: {_plain(said.citation)}")
    checked = verified(said)
    lines.append(f"- verified: {checked}" if checked else f"- {BY_DEFINITION}")
    return "\n".join([*lines, "", "````text", example(said), "````", ""])


def verified(said: TaskFile) -> str | None:
    """Against what a task was verified (`metadata: {verified: ...}`), None when it was not."""
    told = (said.metadata or {}).get("verified")
    return _plain(str(told)) if told else None


def example(said: TaskFile) -> str:
    """One item as `tasks show` shows it, without its shots: the first where the items are shipped, else one made up.

    Raises TaskError when a dataset has no example, or the example is not of the form that the task asks for.
    """
    source = _dataset(said)
    if source is None:
        rows = read_documents(said, LIBRARY)[0][:1]
    elif source.name in EXAMPLES:
        rows = [EXAMPLES[source.name]]
    else:
        raise TaskError(
            f"dataset {source.name} has no example", remedy="make one up in eval_platform/tasks/examples.py"
        )
    bare = said.model_copy(update={"num_fewshot": None})
    (item,) = render(task_of_rows(bare, rows))
    shown = show_item(item)
    return shown if len(shown) <= _LONGEST else f"{shown[: _LONGEST // 2]}\n[…]\n{shown[-_LONGEST // 2 :]}"


def _dataset(said: TaskFile) -> DatasetSource | None:
    return said.documents.dataset if said.documents is not None else None


def _data(said: TaskFile) -> str:
    source = _dataset(said)
    return "with the package" if source is None else source.name


def _suite(name: str) -> str:
    suite = find_suite(name, {})
    return f"Suite **{name}** ({_plain(suite.title)}): {', '.join(f'[{task}](#{task})' for task in suite.tasks)}.\n\n"


def _plain(text: str) -> str:
    """One line."""
    return " ".join(text.split()).rstrip(".") if text else "not said"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
