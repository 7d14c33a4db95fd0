"""What does a sample log of lm-evaluation-harness say? `samples_<task>_<time>.jsonl`, as rows and items of ours.

The log has a line for each document and filter. It says nothing of tokens, of why a completion ended, or of what did
not fit the window: there the columns are null.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval_platform.errors import SchemaError
from eval_platform.keeping.harness_results import HarnessTask
from eval_platform.scoring import SAMPLE_SCHEMA, prompt_hash
from eval_platform.scoring.choices import chosen
from eval_platform.scoring.likelihood import count_bytes, count_words
from eval_platform.tasks.documents import as_documents
from eval_platform.tasks.metrics import METRICS, OUTPUT_TYPES
from eval_platform.tasks.scoring_keys import score_name
from eval_platform.values import Document, Generation, Item, Request, make_request

_REMEDY = "restore the log, or move it away: then the scores alone are taken over"
_DEFAULT_DELIMITER = " "


@dataclass(frozen=True, slots=True)
class HarnessSamples:
    """rows: of `scoring.SAMPLE_SCHEMA`, in the order of the documents; items: what was asked, one a document."""

    rows: tuple[dict[str, Any], ...]
    items: tuple[Item, ...]
    n_requests: int
    sha256: str | None  # of the log; None where there is none


def read_samples(file: Path, task: HarnessTask) -> HarnessSamples:
    """Raises SchemaError naming the file, the line and the field when the log is not one of this task's."""
    kind = task.config.get("output_type")
    if kind not in OUTPUT_TYPES:
        raise SchemaError(
            f"{file}: how {task.name} was asked is not known: its results file has no field "
            f"configs.{task.name}.output_type",
            remedy=_REMEDY,
        )
    by_document, sha256 = _lines(file)
    lines = [by_document[number] for number in sorted(by_document)]
    try:
        documents = as_documents([_row_of(first[0][1]["doc"]) for first in lines])
    except (TypeError, ValueError) as error:
        raise SchemaError(f"{file}: a field doc is no plain JSON: {error}", remedy=_REMEDY) from error
    rows: list[dict[str, Any]] = []
    items: list[Item] = []
    for document, own in zip(documents, lines, strict=True):
        number, first = own[0]
        try:
            item = _item(kind, document, first, task)
            rows += _rows(kind, item, [line for _, line in own], task)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            said = f"there is no field {error}" if isinstance(error, KeyError) else str(error)
            raise SchemaError(f"{file}: line {number} is no sample of {kind}: {said}", remedy=_REMEDY) from error
        items.append(item)
    return HarnessSamples(tuple(rows), tuple(items), sum(len(item.requests) for item in items), sha256)


def _lines(file: Path) -> tuple[dict[int, list[tuple[int, dict[str, Any]]]], str]:
    """(doc_id -> (number from 1, line) of each of its filters, the file's SHA-256)."""
    found: dict[int, list[tuple[int, dict[str, Any]]]] = {}
    digest = hashlib.sha256()
    try:
        with file.open("rb") as opened:
            for number, text in enumerate(opened, 1):
                digest.update(text)
                line = json.loads(text)
                if not isinstance(line, dict) or not isinstance(line.get("doc_id"), int) or "doc" not in line:
                    raise ValueError(f"line {number} is no sample: it has no doc_id or no doc")
                found.setdefault(line["doc_id"], []).append((number, line))
    except (OSError, ValueError, RecursionError) as error:
        raise SchemaError(f"{file} cannot be read: {error}", remedy=_REMEDY) from error
    return found, digest.hexdigest()


def _row_of(doc: Any) -> Mapping[str, Any]:
    return doc if isinstance(doc, dict) else {"text": doc}


def _asked(line: Mapping[str, Any]) -> list[list[Any]]:
    """The arguments of each request: gen_args_<i> with arg_<j>, or (to 0.4.2) lists in lists."""
    arguments = line["arguments"]
    if isinstance(arguments, dict):
        return [[one[f"arg_{j}"] for j in range(len(one))] for one in _in_order(arguments, "gen_args_")]
    return [list(one) for one in arguments]


def _in_order(arguments: Mapping[str, Any], prefix: str) -> list[Any]:
    return [arguments[f"{prefix}{i}"] for i in range(len(arguments))]


def _item(kind: str, document: Document, line: Mapping[str, Any], task: HarnessTask) -> Item:
    asked = _asked(line)
    requests = tuple(_request(kind, one) for one in asked)
    choices: tuple[str, ...] = ()
    target = line["target"]
    if kind == "multiple_choice":
        k = len(asked) // 2 if "acc_mutual_info" in line else len(asked)
        delimiter = task.config.get("target_delimiter", _DEFAULT_DELIMITER) or ""
        endings = [str(one[1]) for one in asked[:k]]
        # Where the choices are the contexts (Winogrande), all end alike.
        same = k > 1 and len(set(endings)) == 1
        beginnings = [str(one[0]) for one in asked[:k]]
        choices = tuple(beginnings if same else (ending.removeprefix(delimiter) for ending in endings))
        if isinstance(target, str) and target.isdigit():
            target = int(target)
    if isinstance(target, list):
        target = tuple(target)
    elif not isinstance(target, int | str) or isinstance(target, bool):
        target = str(target)
    return Item(document, requests, choices, target, str(asked[0][0]), task.num_fewshot)


def _request(kind: str, asked: Sequence[Any]) -> Request:
    if kind == "generate_until":
        said = asked[1]
        until = said.get("until") or ()
        settings = Generation(
            max_new_tokens=int(said.get("max_gen_toks") or 0),  # 0: its back end's own
            stop=(until,) if isinstance(until, str) else tuple(until),
            temperature=float(said.get("temperature") or 0.0) if said.get("do_sample") else 0.0,
        )
        return make_request("generate", str(asked[0]), settings=settings)
    if kind == "loglikelihood_rolling":
        return make_request("rolling", str(asked[0]))
    return make_request("choice", str(asked[0]), str(asked[1]))


def _rows(kind: str, item: Item, lines: Sequence[Mapping[str, Any]], task: HarnessTask) -> list[dict[str, Any]]:
    """One row a repeat. A filter's metrics are of all repeats together, and stand in the first."""
    responses = lines[0]["resps"]
    base = {
        **dict.fromkeys(SAMPLE_SCHEMA.names),
        "sample_id": item.document.sample_id,
        "position": item.document.position,
        "repeat": 0,
        "subset": "",
        "prompt_hash": prompt_hash(item),
        "finish_reason": "scored",
        "shots_used": item.shots_used,
        "target": item.target if isinstance(item.target, str) else json.dumps(item.target, ensure_ascii=False),
        "extracted": {},
        "metrics": _metrics(lines, task),
    }
    if kind == "generate_until":
        base |= {"finish_reason": "unknown", "extracted": _extracted(lines, task)}
        later = {"extracted": {}, "metrics": {}}
        texts = [str(text) for text in responses[0]]
        return [base | ({} if n == 0 else later) | {"repeat": n, "response": text} for n, text in enumerate(texts)]
    if kind == "multiple_choice":
        return [base | _choices(item, responses)]
    text = item.prompt if kind == "loglikelihood_rolling" else item.requests[0].continuation or ""
    log_likelihood, is_greedy = _answer(responses[0][0])
    weights = {"n_bytes": count_bytes(text), "n_words": count_words(text)}
    return [base | {"log_likelihood": log_likelihood, "is_greedy": is_greedy, **weights}]


def _choices(item: Item, responses: Sequence[Any]) -> dict[str, Any]:
    answers = [_answer(one[0]) for one in responses]
    k = len(item.choices)
    if len(answers) != len(item.requests):
        raise ValueError(f"resps has {len(answers)} answers to {len(item.requests)} arguments")
    structs = []
    for n, text in enumerate(item.choices):
        alone = answers[k + n] if len(answers) > k else (None, None)
        structs.append(
            {
                "text": text,
                "log_likelihood": answers[n][0],
                "is_greedy": answers[n][1],
                "n_bytes": count_bytes(text),
                "n_chars": len(text),
                "unconditional_log_likelihood": alone[0],
                "unconditional_is_greedy": alone[1],
            }
        )
    return {"choices": structs, "chosen": chosen([value for value, _ in answers[:k]])}


def _answer(said: Any) -> tuple[float, bool | None]:
    """(log-likelihood, whether greedy decoding would say it); numbers are texts since 0.4.3, rolling has only one."""
    if not isinstance(said, list):
        return float(said), None
    greedy = str(said[1]).lower() if len(said) > 1 else None
    return float(said[0]), None if greedy is None else greedy in ("true", "1")


def _filters(lines: Sequence[Mapping[str, Any]], task: HarnessTask) -> list[str]:
    """Of each line its filter; to 0.4.2 they stand in the order of the scores and are not named."""
    known = list(dict.fromkeys(score.metric.partition(",")[2] or "none" for score in task.scores))
    return [str(line.get("filter", known[n] if n < len(known) else n)) for n, line in enumerate(lines)]


def _metrics(lines: Sequence[Mapping[str, Any]], task: HarnessTask) -> dict[str, float | None]:
    """The samples' values of scores that are means over them; a value that is not finite is null, as ours are."""
    reported = {score.metric for score in task.scores}
    found: dict[str, float | None] = {}
    for filter_name, line in zip(_filters(lines, task), lines, strict=True):
        for metric, value in line.items():
            name = score_name(metric, filter_name)
            known = METRICS.get(metric)
            # A perplexity's raw value there is a log-likelihood, which has a column of its own here.
            if name in reported and isinstance(value, int | float) and (known is None or known.aggregation == "mean"):
                found[name] = float(value) if math.isfinite(value) else None
    return found


def _extracted(lines: Sequence[Mapping[str, Any]], task: HarnessTask) -> dict[str, str | None]:
    """filter -> what it found."""
    found = {}
    for filter_name, line in zip(_filters(lines, task), lines, strict=True):
        answer = line["filtered_resps"][0]
        if isinstance(answer, list):  # a filter that takes no single answer
            answer = answer[0] if len(answer) == 1 else json.dumps(answer, ensure_ascii=False)
        found[filter_name] = None if answer is None else str(answer)
    return found
