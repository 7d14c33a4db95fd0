"""Multiple-choice sets as LLM-Adapters has them: question and choices written into one instruction, taken apart again.

github.com/AGI-Edgerunners/LLM-Adapters; `commonsense_mc/<set>.test.json` below $EVAL_PLATFORM_DATA. The original fields
can be read off, since every mark ("Answer2:") stands there once; an instruction of which that is not so is an error.
"""

import re
from typing import Any

from eval_platform.errors import TaskError
from eval_platform.tasks.catalogue.data import Data

# What stands before the first choice, between choices and after the last, by the word that choices are called.
_FORMS = {
    "answer": ("Please choose the correct answer to the question: ", " ", "\n\n"),
    "solution": ("Please choose the correct solution to the question: ", "\n\n", "\n\n"),
    "option": ("Please choose the correct answer to fill in the blank to complete the given sentence: ", " ", " "),
}


def file_of(name: str) -> str:
    """Where the set `name` lies below $EVAL_PLATFORM_DATA."""
    return f"commonsense_mc/{name}.test.json"


def instructions(data: Data, name: str) -> list[dict[str, Any]] | None:
    """A set's rows as `question`, `choices` and `answer` (the index of the right one), None when there is no file.

    Texts are as they stand there, white space at their ends included.
    """
    found = data.json(file_of(name))
    if found is None:
        return None
    return [_taken_apart(f"{file_of(name)}, item {n}", row) for n, row in enumerate(found)]


def _taken_apart(where: str, row: dict[str, str]) -> dict[str, Any]:
    called = row["answer"].rstrip("0123456789")
    start, between, end = _FORMS[called]
    parts = re.split(rf"{called.capitalize()}(\d+): ", row["instruction"])
    question, numbers, choices = parts[0], parts[1::2], parts[2::2]
    # Each part but the last ends with what stands before the next mark, the last with what stands before the tail.
    last, tail, _ = choices[-1].rpartition(f"{end}Answer format: ") if choices else ("", "", "")
    texts = [choice.removesuffix(between) for choice in choices[:-1]] + [last]
    whole = (
        start
        + question.removeprefix(start).removesuffix("\n\n")
        + "\n\n"
        + between.join(f"{called.capitalize()}{k}: {text}" for k, text in enumerate(texts, start=1))
        + f"{end}Answer format: "
    )
    right = int(row["answer"].removeprefix(called)) - 1
    in_order = numbers == [str(k) for k in range(1, len(texts) + 1)]
    if not (tail and in_order and row["instruction"].startswith(whole) and right < len(texts)):
        raise TaskError(f"{where} cannot be taken apart: {row['instruction'][:120]!r}", remedy="copy the file anew")
    return {"question": question.removeprefix(start).removesuffix("\n\n"), "choices": texts, "answer": right}
