"""Clean evaluations to plant faults into: real tasks, scored by the real scoring, with answers drawn from a seed."""

import math
import random
from dataclasses import asdict
from typing import Any

import pyarrow as pa

from eval_platform import scoring
from eval_platform.identity import content_id, ordered_id
from eval_platform.tasks import Task
from eval_platform.tasks.schema import TaskFile
from eval_platform.values import Check, Document, Generation, Item, Response, make_request

Record = dict[str, Any]
N_ITEMS = 24

_SOURCE = {"documents": {"file": "documents.jsonl"}, "doc_to_text": "question", "doc_to_target": "answer"}
_FILES: dict[str, dict[str, Any]] = {
    "multiple_choice": {"doc_to_choice": ["a", "b", "c"], "chance": 1 / 3},
    "generate_until": {
        "primary_metric": "exact_match,number",
        "filter_list": [{"name": "number", "filter": [{"function": "regex", "regex_pattern": "(-?[0-9]+)"}]}],
        "chance": 0.0,
    },
    "loglikelihood_rolling": {},
}


def definition(output_type: str, **more: Any) -> TaskFile:
    """A task file of that output type, as it would be read."""
    said = {"task": f"{output_type}_task", "output_type": output_type, **_SOURCE, **_FILES[output_type], **more}
    return TaskFile.model_validate(said)


def evaluate(
    output_type: str = "multiple_choice", *, seed: int = 0, n: int = N_ITEMS, skill: float = 0.9, **more: Any
) -> tuple[Record, pa.Table, TaskFile]:
    """(commit record, samples, definition) of an evaluation by a model that is right with probability `skill`."""
    task_file = definition(output_type, **more)
    task = Task(
        name=task_file.task,
        definition=task_file,
        task_id=content_id([output_type, sorted(more)]),
        ask_id=content_id(output_type),
        dataset_id=content_id("dataset"),
        fewshot_dataset_id=None,
        documents=(),
        shots=(),
        chance=task_file.chance,
    )
    draw = random.Random(seed)
    items = [_item(output_type, n, position) for position in range(n)]
    answers = {}
    for repeat in range(task.repeats):
        for item in items:
            for response in _answers(item, repeat, draw, skill):
                answers[response.request_id, response.repeat] = response
    rows = [row for item in items for row in scoring.score_item(task, item, answers)]
    return record(task, items, rows), pa.Table.from_pylist(rows, schema=scoring.SAMPLE_SCHEMA), task_file


def record(task: Task, items: list[Item], rows: list[dict[str, Any]], attempt: int = 1) -> Record:
    """The commit, with the fields that the gate reads."""
    scores = [asdict(score) for score in scoring.aggregate(task, rows)]
    primary = next(s for s in scores if s["metric"] == task.primary_metric and s["subset"] == "")
    return {
        "evaluation_id": content_id(["evaluation", task.name]),
        "attempt": attempt,
        "try": "t",
        "checkpoint_id": content_id("checkpoint"),
        "weights_id": content_id("weights"),
        "tokenizer_id": content_id("tokenizer"),
        "settings_id": content_id("settings"),
        "answers_id": content_id("answers"),
        "prompts_id": content_id("prompts"),
        "task": task.name,
        "task_id": task.task_id,
        "ask_id": task.ask_id,
        "key": "root/run/step_10",
        "arrival": 1,
        "dtype": "float32",
        "planned": {
            "items": len(items),
            "samples": len(rows),
            "sample_ids": ordered_id(item.document.sample_id for item in items),
        },
        "answers_digest": content_id("digest"),
        "scores": scores,
        "primary": {
            "metric": task.primary_metric,
            "value": primary["value"],
            "higher_is_better": task.higher_is_better,
            "chance": task.chance,
        },
    }


def failed(checks: list[Check]) -> set[str]:
    """Names of the checks that did not pass."""
    return {check.name for check in checks if not check.passed}


def edited(samples: pa.Table, row: int, **columns: Any) -> pa.Table:
    """The samples with some columns of one row replaced."""
    rows = samples.to_pylist()
    rows[row] |= columns
    return pa.Table.from_pylist(rows, schema=samples.schema)


def with_log_likelihood(samples: pa.Table, row: int, choice: int, value: float | None) -> pa.Table:
    """The samples with one choice's log-likelihood replaced."""
    choices = samples["choices"][row].as_py()
    choices[choice]["log_likelihood"] = value
    return edited(samples, row, choices=choices)


def _item(output_type: str, n: int, position: int) -> Item:
    document = Document(content_id(["document", position]), position, {"question": f"q{position}"}, "ab"[position % 2])
    prompt = f"What is item {position} of {n}? "
    if output_type == "multiple_choice":
        requests = tuple(make_request("choice", prompt, choice) for choice in "abc")
        return Item(document, requests, ("a", "b", "c"), position % 3, prompt)
    if output_type == "generate_until":
        requests = (make_request("generate", prompt, settings=Generation(8)),)
        return Item(document, requests, (), str(position), prompt)
    return Item(document, (make_request("rolling", prompt),), (), prompt, prompt)


def _answers(item: Item, repeat: int, draw: random.Random, skill: float) -> list[Response]:
    right = draw.random() < skill
    first = item.requests[0]
    if first.kind == "choice":
        wrong = [n for n in range(3) if n != item.target]
        best = item.target if right else draw.choice(wrong)
        values = [draw.uniform(-3, -1) if n == best else draw.uniform(-9, -4) for n in range(3)]
        return [
            Response(r.request_id, repeat, v, n == best, None, 1)
            for n, (r, v) in enumerate(zip(item.requests, values, strict=True))
        ]
    if first.kind == "generate":
        text = f"It is {item.target if right else draw.randrange(1000, 9999)}."
        return [Response(first.request_id, repeat, text=text, n_tokens=3, finish_reason="stop")]
    words = first.context.split()
    return [Response(first.request_id, repeat, -math.fsum(draw.uniform(1, 5) for _ in words), False, None, len(words))]
