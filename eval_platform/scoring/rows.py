"""One row per sample: everything that was answered and what it scored, enough to score it again without the model."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import pyarrow as pa

from eval_platform.identity import content_id
from eval_platform.sandbox import Mode, Program, Verdict, run_programs
from eval_platform.scoring.bias import BBQ, bbq, likelihood_diff, prefers_stereotype
from eval_platform.scoring.choices import choice_metric, chosen
from eval_platform.scoring.code import pass_columns, program_of, shown, verdict_of
from eval_platform.scoring.drop import drop_em, drop_f1
from eval_platform.scoring.filters import Extracted, extract, selects
from eval_platform.scoring.ifeval import SCORES, ifeval
from eval_platform.scoring.likelihood import WEIGHTS, count_bytes, count_words, own_value
from eval_platform.scoring.mathematics import math_equal
from eval_platform.scoring.overlap import overlap, rouge
from eval_platform.scoring.refusal import refused, refused_rightly
from eval_platform.scoring.terms import Terms, entries
from eval_platform.scoring.text import exact_match, is_answered, prefix_match, token_f1
from eval_platform.scoring.truthful import SIMILARITIES, mass_on_true, similarity
from eval_platform.tasks.scoring_keys import FilterPipeline, FilterStep, MetricEntry, score_name
from eval_platform.tasks.task import Task
from eval_platform.values import Item, Request, Response, known_sum

_CHOICE = pa.struct(
    [
        ("text", pa.string()),
        ("log_likelihood", pa.float64()),
        ("is_greedy", pa.bool_()),
        ("n_tokens", pa.int64()),
        ("n_bytes", pa.int64()),
        ("n_chars", pa.int64()),
        ("truncated_left_tokens", pa.int64()),
        ("unconditional_log_likelihood", pa.float64()),
        ("unconditional_is_greedy", pa.bool_()),
        ("unconditional_n_tokens", pa.int64()),
    ]
)

# One row per item and repeat. A NaN log-likelihood stays NaN; null means that there is none.
SAMPLE_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("position", pa.int64()),
        ("repeat", pa.int64()),
        ("subset", pa.string()),
        ("cluster", pa.string()),
        ("prompt_hash", pa.string()),
        ("response", pa.string()),  # the completion
        ("choices", pa.list_(_CHOICE)),
        ("chosen", pa.int64()),  # index of the likeliest choice, null when a log-likelihood is not finite
        ("log_likelihood", pa.float64()),  # of the text or target, in nats
        ("is_greedy", pa.bool_()),
        ("n_tokens", pa.int64()),  # answered or scored; of choices the sum
        ("n_bytes", pa.int64()),  # of the scored text
        ("n_words", pa.int64()),
        ("finish_reason", pa.string()),
        ("truncated_left_tokens", pa.int64()),  # of choices the most
        ("shots_used", pa.int64()),
        # filter -> answer, null when none was found; of programs also `verdict` (`verdict,<filter>`): what came of it
        ("extracted", pa.map_(pa.string(), pa.string())),
        ("target", pa.string()),  # index or text; several as a JSON list
        ("metrics", pa.map_(pa.string(), pa.float64())),  # score -> value, null when it cannot be computed; and `terms`
        ("variant", pa.string()),
        ("subject", pa.string()),
    ]
)


def score_items(
    task: Task, items: Sequence[Item], responses: Mapping[tuple[str, int], Response], mode: Mode = "cold"
) -> list[dict[str, Any]]:
    """The rows of all items, in order; programs of a task with `code` run several at a time, in the sandbox `mode`.

    Raises SandboxError when no program can be run here, else as `score_item` does.
    """
    verdicts = None
    if task.definition.code is not None:
        programs = list(dict.fromkeys(program for item in items for program in _programs(task, item, responses)))
        verdicts = dict(zip(programs, run_programs(programs, mode), strict=True))
    rows = [score_item(task, item, responses, verdicts) for item in items]
    if task.definition.harness is not None:
        # Imported here: few tasks need it, and it is the harness that some filters show all items at once.
        from eval_platform.scoring.harness import add_harness_values

        add_harness_values(task, items, [_answered(task, item, responses) for item in items], rows)
    return [row for of_item in rows for row in of_item]


def score_item(
    task: Task,
    item: Item,
    responses: Mapping[tuple[str, int], Response],
    verdicts: Mapping[Program, Verdict] | None = None,
) -> list[dict[str, Any]]:
    """The rows of one item, one per repeat, with the columns of SAMPLE_SCHEMA.

    responses: by (request_id, repeat); must hold every request of the item in every repeat of the task.
    `metrics` has one entry per score that this sample has a value for, null where a log-likelihood is missing or not
    finite. No entry: the score has no value for this sample alone, though its item or task has one. That is so for
    the later repeats where a filter takes one answer of all, and for a perplexity that is too large for a float.
    Perplexities and bits per byte are those of this one text. verdicts: on the programs of a task with `code`.
    Raises ValueError when a response or a verdict is missing.
    """
    answered = _answered(task, item, responses)
    base = {
        "sample_id": item.document.sample_id,
        "position": item.document.position,
        "subset": item.document.subset,
        "cluster": item.document.cluster,
        "prompt_hash": prompt_hash(item),
        "shots_used": item.shots_used,
        "target": item.target if isinstance(item.target, str) else json.dumps(item.target, ensure_ascii=False),
    }
    if task.definition.output_type == "multiple_choice":
        columns = [_choice_columns(task, item, row) for row in answered]
    elif task.definition.output_type == "generate_until":
        columns = _completion_columns(task, item, [row[0] for row in answered], verdicts)
    else:
        columns = [_likelihood_columns(task, item, row[0]) for row in answered]
    empty = dict.fromkeys(SAMPLE_SCHEMA.names)
    return [
        {
            **empty,
            **base,
            "repeat": n,
            "finish_reason": row[0].finish_reason,
            "truncated_left_tokens": max(response.truncated_left_tokens for response in row),
            **columns[n],
        }
        for n, row in enumerate(answered)
    ]


def responses_from_sample(task: Task, item: Item, row: Mapping[str, Any]) -> list[Response]:
    """The responses that `row` was made of, in the order of the item's requests: what `score_item` takes.

    row: as `score_item` made it or as read from Parquet; `item` must be asked as it was then (the same ask_id).
    Raises ValueError when the item's requests are others than the row's.
    """
    if prompt_hash(item) != row["prompt_hash"]:
        raise ValueError(f"sample {row['sample_id']} of {task.name}: the stored answer is to another prompt")
    repeat = row["repeat"]
    if task.definition.output_type != "multiple_choice":
        request = item.requests[0]
        return [
            Response(
                request.request_id,
                repeat,
                log_likelihood=row["log_likelihood"],
                is_greedy=row["is_greedy"],
                text=row["response"],
                n_tokens=row["n_tokens"],
                finish_reason=row["finish_reason"],
                truncated_left_tokens=row["truncated_left_tokens"],
            )
        ]
    k, choices = len(item.choices), row["choices"]
    asked = [
        Response(
            request.request_id,
            repeat,
            log_likelihood=choice["log_likelihood"],
            is_greedy=choice["is_greedy"],
            n_tokens=choice["n_tokens"],
            finish_reason=row["finish_reason"],
            truncated_left_tokens=choice["truncated_left_tokens"],
        )
        for request, choice in zip(item.requests[:k], choices, strict=True)
    ]
    unconditional = [
        Response(
            request.request_id,
            repeat,
            log_likelihood=choice["unconditional_log_likelihood"],
            is_greedy=choice["unconditional_is_greedy"],
            n_tokens=choice["unconditional_n_tokens"],
            finish_reason=row["finish_reason"],
        )
        for request, choice in zip(item.requests[k:], choices, strict=False)
    ]
    return asked + unconditional


def prompt_hash(item: Item) -> str:
    """The id of what the item asks: its requests in order, so contexts, continuations and generation settings."""
    return content_id([request.request_id for request in item.requests])


def _answered(task: Task, item: Item, responses: Mapping[tuple[str, int], Response]) -> list[list[Response]]:
    """Of each repeat, the answers to each of the item's requests."""
    return [[_response(responses, item, request, n) for request in item.requests] for n in range(task.repeats)]


def _response(responses: Mapping[tuple[str, int], Response], item: Item, request: Request, repeat: int) -> Response:
    try:
        return responses[request.request_id, repeat]
    except KeyError:
        raise ValueError(
            f"sample {item.document.sample_id}: no response to request {request.request_id}, repeat {repeat}"
        ) from None


def _choice_columns(task: Task, item: Item, answered: Sequence[Response]) -> dict[str, Any]:
    k = len(item.choices)
    asked, unconditional = answered[:k], answered[k:]
    log_likelihoods = [response.log_likelihood for response in asked]
    right = (item.target,) if isinstance(item.target, int) else item.target
    structs = []
    for index, (text, response) in enumerate(zip(item.choices, asked, strict=True)):
        alone = unconditional[index] if unconditional else None
        structs.append(
            {
                "text": text,
                "log_likelihood": response.log_likelihood,
                "is_greedy": response.is_greedy,
                "n_tokens": response.n_tokens,
                "n_bytes": count_bytes(text),
                "n_chars": len(text),
                "truncated_left_tokens": response.truncated_left_tokens,
                "unconditional_log_likelihood": alone.log_likelihood if alone else None,
                "unconditional_is_greedy": alone.is_greedy if alone else None,
                "unconditional_n_tokens": alone.n_tokens if alone else None,
            }
        )
    return {
        "choices": structs,
        "chosen": chosen(log_likelihoods, both_orders=task.definition.doc_to_text_reversed is not None),
        "n_tokens": known_sum(response.n_tokens for response in asked),
        "metrics": _all_entries(
            {
                entry.metric: _choice_metric(
                    entry.metric,
                    item,
                    log_likelihoods,
                    [response.log_likelihood for response in unconditional],
                    [index for index in right if isinstance(index, int)],
                )
                for entry in task.definition.metric_list
            }
        ),
    }


def _all_entries(results: Mapping[str, float | Terms | None]) -> dict[str, float | None]:
    return {name: value for score, result in results.items() for name, value in entries(score, result).items()}


def _choice_metric(
    metric: str,
    item: Item,
    log_likelihoods: Sequence[float | None],
    unconditional: Sequence[float | None],
    right: Sequence[int],
) -> float | Terms | None:
    """None when the metric needs a log-likelihood that is missing or not finite."""
    of_likelihoods = _LIKELIHOOD_METRICS.get(metric)
    if of_likelihoods is None and metric not in BBQ:
        return choice_metric(metric, item.choices, log_likelihoods, unconditional, right)
    preferred = chosen(log_likelihoods)
    if preferred is None:
        return None
    if of_likelihoods is None:
        return bbq(metric, preferred, right, item.document.fields)
    return of_likelihoods([value for value in log_likelihoods if value is not None], right)  # none is, as one is chosen


# metric -> what computes it from (log-likelihoods of the choices, the numbers of those that are right).
_LIKELIHOOD_METRICS: Mapping[str, Callable[[Sequence[float], Sequence[int]], float]] = {
    "mc2": mass_on_true,
    "likelihood_diff": likelihood_diff,
    "pct_stereotype": prefers_stereotype,
}


def _completion_columns(
    task: Task, item: Item, answered: Sequence[Response], verdicts: Mapping[Program, Verdict] | None
) -> list[dict[str, Any]]:
    """Of all repeats at once, as a filter may take one answer of them all: it stands in the first row.

    What a model said before its logits ceased to be finite is kept, but it is no answer.
    """
    columns: list[dict[str, Any]] = [
        {"response": response.text, "n_tokens": response.n_tokens, "extracted": {}, "metrics": {}}
        for response in answered
    ]
    references = _references(item)
    for pipeline in task.definition.filter_list:
        answers = _answers(pipeline, answered)
        if task.definition.code is not None:
            _add_verdicts(columns, task, item, pipeline, answers, verdicts)
            continue
        for n in range(1 if selects(_steps(pipeline)) else len(answered)):
            answer = answers[n] if answers else None
            columns[n]["extracted"][pipeline.name] = answer.text if answer and answer.found else None
            for entry in task.definition.metric_list:
                result = _text_metric(entry, answer.text, references, item.document.fields) if answer else None
                columns[n]["metrics"] |= entries(score_name(entry.metric, pipeline.name), result)
    return columns


def _answers(pipeline: FilterPipeline, answered: Sequence[Response]) -> list[Extracted]:
    """What the pipeline finds in an item's completions; nothing when one of them is no answer.

    Without an answer there is nothing to score, and no vote among the others may hide that.
    """
    completions = [r.text for r in answered if r.text is not None and r.finish_reason != "non_finite"]
    return extract(_steps(pipeline), completions) if len(completions) == len(answered) else []


def _programs(task: Task, item: Item, responses: Mapping[tuple[str, int], Response]) -> list[Program]:
    """The programs of an item's completions, through every filter."""
    answered = [row[0] for row in _answered(task, item, responses)]
    return [
        program_of(task, item, answer.text or "")
        for pipeline in task.definition.filter_list
        for answer in _answers(pipeline, answered)
    ]


def _add_verdicts(
    columns: Sequence[dict[str, Any]],
    task: Task,
    item: Item,
    pipeline: FilterPipeline,
    answers: Sequence[Extracted],
    verdicts: Mapping[Program, Verdict] | None,
) -> None:
    """Into each completion's columns: its answer, what came of its program, and pass@k."""
    metrics = task.definition.metrics
    found = [verdict_of(verdicts, program_of(task, item, answer.text or "")) for answer in answers]
    values = pass_columns(metrics, found) if found else [dict.fromkeys(metrics) for _ in columns]
    for n, column in enumerate(columns):
        answer = answers[n] if answers else None
        column["extracted"][pipeline.name] = answer.text if answer and answer.found else None
        column["extracted"][score_name("verdict", pipeline.name)] = shown(found[n]) if found else None
        column["metrics"] |= {score_name(metric, pipeline.name): value for metric, value in values[n].items()}


def _steps(pipeline: FilterPipeline) -> Sequence[FilterStep]:
    """The pipeline's filters; none for the one that stands for an absent filter_list.

    That one is [take_first], as in lm-evaluation-harness, where all repeats but the first are asked for nothing. Here
    every repeat is scored and the item's score is their mean: the same quantity, measured better. A pipeline of
    another name that says take_first takes the first.
    """
    default = pipeline.name == "none" and [step.function for step in pipeline.filter] == ["take_first"]
    return () if default else pipeline.filter


def _text_metric(
    entry: MetricEntry, answer: str | None, references: Sequence[str], fields: Mapping[str, Any]
) -> float | Terms:
    of_document = _DOCUMENT_METRICS.get(entry.metric)
    if of_document is not None:
        return of_document(answer, fields)
    return _TEXT_METRICS[entry.metric](answer, references, **entry.arguments)


# metric -> what computes it from (answer, references); keyword arguments are METRIC_ARGUMENTS of tasks/metrics.py.
_TEXT_METRICS: Mapping[str, Callable[..., float | Terms]] = {
    "exact_match": exact_match,
    "f1": token_f1,
    "prefix_match": prefix_match,
    "drop_em": drop_em,
    "drop_f1": drop_f1,
    "answered": is_answered,
    "math_verify": math_equal,
    **{name: partial(overlap, name) for name in ("bleu", "chrf")},
    **{name: partial(rouge, name) for name in ("rouge1", "rouge2", "rougeL")},
}

# metric -> what computes it from (answer, the document's fields).
_DOCUMENT_METRICS: Mapping[str, Callable[..., float | Terms]] = {
    "refused": refused,
    "refused_rightly": refused_rightly,
    **{name: partial(ifeval, name) for name in SCORES},
    **{name: partial(similarity, name) for name in SIMILARITIES},
}


def _references(item: Item) -> Sequence[str]:
    """The right answers, as texts: what a generate_until item's target is."""
    return cast("tuple[str, ...]", item.target if isinstance(item.target, tuple) else (item.target,))


def _likelihood_columns(task: Task, item: Item, response: Response) -> dict[str, Any]:
    request = item.requests[0]
    text = request.context if request.kind == "rolling" else (request.continuation or "")
    weights = {"items": 1, "words": count_words(text), "bytes": count_bytes(text)}
    value = response.log_likelihood
    metrics: dict[str, float | None] = {}
    for metric in task.definition.metrics:
        if value is None or not math.isfinite(value):
            metrics[metric] = None
        elif metric == "acc":
            metrics[metric] = None if response.is_greedy is None else float(response.is_greedy)
        elif (own := own_value(metric, value, weights[WEIGHTS[metric]])) is not None:
            metrics[metric] = own
    return {
        "log_likelihood": value,
        "is_greedy": response.is_greedy,
        "n_tokens": response.n_tokens,
        "n_bytes": weights["bytes"],
        "n_words": weights["words"],
        "metrics": metrics,
    }
