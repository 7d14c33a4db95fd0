"""`eval-platform tasks new`: a commented task file from a file of documents, its fields guessed from their names and
values. A guess is a beginning: the first prompt is shown, and the file says what was guessed."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from eval_platform.errors import TaskError
from eval_platform.tasks.building import build_task
from eval_platform.tasks.documents import read_file_rows

_QUESTION = ("question", "query", "prompt", "input", "problem", "instruction", "sentence", "goal", "ctx", "context")
_CHOICES = ("choices", "options", "endings", "answers", "candidates", "cities")
_ANSWER = ("answer", "answerkey", "label", "gold", "target", "correct", "right", "solution", "output", "response")
_TEXT = ("text", "document", "passage", "content", "story")
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Guess(NamedTuple):
    """What a file's fields were taken for. The keys are a task file's; why: a comment each."""

    output_type: str
    doc_to_text: str | None
    doc_to_choice: str | None
    doc_to_target: str
    why: Mapping[str, str]


def new_task_file(documents: Path, name: str | None = None) -> Path:
    """Write `<name>.yaml` beside `documents` and return its path; the file is a task that can be asked.

    name: the task's, default: the file's own. Raises TaskError, and leaves nothing behind, when there is such a file
    already, when no question or answer can be made out, or when what was guessed does not work.
    """
    name = name or documents.name.split(".")[0].replace(" ", "_")
    target = documents.parent / f"{name}.yaml"
    rows = read_file_rows(documents.name, documents.parent, None)
    text = task_text(name, documents.name, guess_fields(rows, documents), len(rows))
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise TaskError(f"{target} is there already", remedy="give another name: --task NAME") from error
    except OSError as error:
        remedy = "copy the documents to a folder of your own"
        raise TaskError(f"{target} cannot be written: {error.strerror}", remedy=remedy) from error
    try:
        build_task(target)
    except TaskError:
        target.unlink()
        raise
    return target


def guess_fields(rows: Sequence[Mapping[str, Any]], file: Path) -> Guess:
    """Which field is what, from names and the values of all rows. Raises TaskError when nothing fits."""
    fields = [field for field in rows[0] if all(field in row for row in rows)]
    choices, choice_template = _choices(rows, fields)
    used = {choices} if choices else set()
    answer = _named(_ANSWER, [field for field in fields if field not in used])
    question = _named(_QUESTION, [field for field in fields if field not in {*used, answer} and _is_text(rows, field)])
    if choice_template is not None and answer is not None:
        lists = [_choice_list(row, choices) for row in rows] if choices else [_lettered(row) for row in rows]
        target, why = _right(rows, answer, lists)
        if question is None:
            question = _longest(rows, [field for field in fields if field not in {*used, answer}])
        if question is not None and target is not None:
            return Guess(
                "multiple_choice",
                _asked(question),
                choice_template,
                target,
                {
                    "doc_to_text": f"the field {question!r}",
                    "doc_to_choice": "the wrong and right answers",
                    "doc_to_target": why,
                },
            )
        if target is None and (choices is None or choices.lower() in _CHOICES):
            n = _misfit(rows, answer, lists)
            raise TaskError(
                f"{file}, document {n}: {answer!r} is {rows[n][answer]!r}, which names none of its choices in the way "
                "of the others",
                remedy="say everywhere the text of the right choice, or its letter, or its number from 0 or from 1; "
                "or write the task file by hand: docs/task_files.md",
            )
    if question is not None and answer is not None:
        return Guess(
            "generate_until",
            _asked(question),
            None,
            answer,
            {"doc_to_text": f"the field {question!r}", "doc_to_target": f"the field {answer!r}, as the one right text"},
        )
    text = _named(_TEXT, [field for field in fields if _is_text(rows, field)])
    if text is None and len(fields) == 1 and _is_text(rows, fields[0]):
        text = fields[0]
    if text is not None:
        return Guess(
            "loglikelihood_rolling",
            None,
            None,
            text,
            {"doc_to_target": f"the field {text!r}: how well the model foresees it, in bits per byte"},
        )
    for known in (_QUESTION, _ANSWER):
        field = _named(known, list(rows[0]))
        n = next((n for n, row in enumerate(rows) if field is not None and row.get(field) is None), None)
        if n is not None:
            raise TaskError(f"{file}, document {n} has no {field!r}", remedy="fill it in, or take the document out")
    raise TaskError(
        f"{file}: no question and answer can be made out of the fields {', '.join(rows[0])}",
        remedy=f"call them {_QUESTION[0]!r} and {_ANSWER[0]!r} (and {_CHOICES[0]!r}), or write the task file by hand: "
        "docs/task_files.md",
    )


def task_text(name: str, file: str, guess: Guess, n: int) -> str:
    """The task file: what was guessed, and what one would change next, as comments."""
    lines = [
        f"# Made by `eval-platform tasks new` from {file} ({n} documents). What is guessed says so: look at the prompt",
        f"# with `eval-platform tasks show {name} -k 0`. Every key: docs/task_files.md",
        f"task: {name}",
        "# For people:",
        f"title: {json.dumps(name)}",
        'about: ""  # one sentence: what does it ask?',
        'source: ""  # where the documents are from',
        'licence: ""',
        "documents:",
        f"  file: {json.dumps(file)}",
        "  # subset: topic  # scores also for each value of a field",
        f"output_type: {guess.output_type}",
    ]
    if guess.doc_to_text is not None:
        lines.append(_guessed("doc_to_text", guess.doc_to_text, guess))
    if guess.doc_to_choice is not None:
        lines.append(_guessed("doc_to_choice", guess.doc_to_choice, guess))
    lines.append(_guessed("doc_to_target", guess.doc_to_target, guess))
    if guess.output_type != "loglikelihood_rolling":
        lines += [
            "num_fewshot: 0  # examples before each question, drawn from the other documents",
            "fewshot_config: {sampler: first_n}  # the same for every question, so cheap",
        ]
    if guess.output_type == "generate_until":
        lines += [
            "generation_kwargs:",
            '  until: ["\\n"]  # an answer ends here',
            "  max_gen_toks: 64",
            "metric_list:",
            "  - metric: exact_match",
            "    ignore_case: true",
            "chance: 0.0",
        ]
    elif guess.output_type == "multiple_choice":
        lines += ["metric_list:", "  - metric: acc", "  - metric: acc_norm  # by the length of the choice"]
    else:
        lines.append("primary_metric: bits_per_byte")
    return "\n".join(lines) + "\n"


def _guessed(key: str, value: str, guess: Guess) -> str:
    return f"{key}: {json.dumps(value, ensure_ascii=False)}  # guessed: {guess.why[key]}"


def _asked(field: str) -> str:
    """The usual wording around a field; the bare field where its name cannot stand in a template."""
    return "Question: {{" + field + "}}\nAnswer:" if field.isidentifier() else field


def _named(names: Sequence[str], fields: Sequence[str]) -> str | None:
    """The field whose name is the first of `names`, in whatever case."""
    lower = {field.lower(): field for field in reversed(fields)}
    return next((lower[name] for name in names if name in lower), None)


def _is_text(rows: Sequence[Mapping[str, Any]], field: str) -> bool:
    return all(isinstance(row[field], str) for row in rows)


def _longest(rows: Sequence[Mapping[str, Any]], fields: Sequence[str]) -> str | None:
    texts = [field for field in fields if _is_text(rows, field)]
    return max(texts, key=lambda field: sum(len(row[field]) for row in rows), default=None)


def _choices(rows: Sequence[Mapping[str, Any]], fields: Sequence[str]) -> tuple[str | None, str | None]:
    """(field, doc_to_choice): a list of texts, ARC's {text, label}, or fields A, B, C, …; (None, None) without any."""
    lists = [field for field in fields if all(_is_list_of_texts(row[field]) for row in rows)]
    field = _named(_CHOICES, lists) or (lists[0] if lists else None)
    if field is not None:
        return field, field
    for field in fields:
        if all(isinstance(row[field], Mapping) and _is_list_of_texts(row[field].get("text")) for row in rows):
            return field, "{{" + field + ".text}}"
    letters = [letter for letter in _LETTERS if letter in fields]
    if len(letters) >= 2 and all(_is_text(rows, letter) for letter in letters):
        return None, "{{[" + ", ".join(letters) + "]}}"
    return None, None


def _is_list_of_texts(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(isinstance(one, str) and one for one in value)


def _choice_list(row: Mapping[str, Any], field: str) -> list[str]:
    value = row[field]
    return value["text"] if isinstance(value, Mapping) else value


def _lettered(row: Mapping[str, Any]) -> list[str]:
    return [row[letter] for letter in _LETTERS if letter in row]


# How an answer may name the right one of several choices: the text, the letter, the number from 0, from 1.
_WAYS: tuple[Callable[[Any, Sequence[str]], bool], ...] = (
    lambda value, among: isinstance(value, str) and value in among,
    lambda value, among: isinstance(value, str) and len(value) == 1 and value in _LETTERS[: len(among)],
    lambda value, among: (number := _number(value)) is not None and 0 <= number < len(among),
    lambda value, among: (number := _number(value)) is not None and 1 <= number <= len(among),
)


def _number(value: Any) -> int | None:
    if isinstance(value, str) and value.isascii() and value.isdigit():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _right(rows: Sequence[Mapping[str, Any]], answer: str, choices: Sequence[Sequence[str]]) -> tuple[str | None, str]:
    """(doc_to_target, why) where the answers all name a choice in one of the ways; (None, "") else."""
    both = [(row[answer], among) for row, among in zip(rows, choices, strict=True)]
    said = (
        (answer, f"the field {answer!r}, the text of the right choice"),
        ("{{'" + _LETTERS + "'.index(" + answer + ")}}", f"the letter in {answer!r}: A is the first choice"),
        ("{{" + answer + "}}", f"the number in {answer!r}, taken as counted from 0"),
        ("{{" + answer + "|int - 1}}", f"the number in {answer!r}, counted from 1 there"),
    )
    fitting = (one for one, way in zip(said, _WAYS, strict=True) if all(way(*pair) for pair in both))
    return next(fitting, (None, ""))


def _misfit(rows: Sequence[Mapping[str, Any]], answer: str, choices: Sequence[Sequence[str]]) -> int:
    """The first document whose answer does not name a choice in the way in which most do."""
    fits = [[way(row[answer], among) for row, among in zip(rows, choices, strict=True)] for way in _WAYS]
    return max(fits, key=sum).index(False)
