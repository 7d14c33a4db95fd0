"""Scores by lm-evaluation-harness's own functions, for its tasks whose metrics or filters are Python or not ours.

Its filters, `process_results` and aggregations are called as its evaluator calls them (`evaluator.py:evaluate`), over
the answers that our engine gave. What an item gets under a metric is kept in its first row: a number in `metrics`;
what is no number, or is not averaged, as JSON in `extracted` under `value,<score>`, so that a score can be made
again from stored rows.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from eval_platform.errors import TaskError
from eval_platform.statistics import Estimate, bootstrap_estimate, mean_estimate
from eval_platform.statistics import estimate as why
from eval_platform.statistics.estimate import without_interval
from eval_platform.tasks.harness_task import frozen_task
from eval_platform.tasks.metrics import UNPARSED
from eval_platform.tasks.scoring_keys import Harness, score_name
from eval_platform.tasks.task import Task
from eval_platform.values import Item, Response

Row = Mapping[str, Any]

# An aggregation of theirs may take seconds over a whole task (TER of a thousand sentences).
REPLICATES = 200
MOST_SECONDS = 60.0
_VALUE = "value"


def add_harness_values(
    task: Task,
    items: Sequence[Item],
    answers: Sequence[Sequence[Sequence[Response]]],
    rows: Sequence[Sequence[dict[str, Any]]],
) -> None:
    """Into the rows of each item: what the harness's filters found and what its metrics say.

    answers: of each item, repeat and request, in that order. rows: of each item and repeat, changed in place. An item
    with an answer that is missing or not finite has null in every metric: their functions would make a number of it.
    Raises TaskError when the harness is not the one that the task was synced with, or a function of it fails.
    """
    harness = task.definition.harness
    assert harness is not None  # whoever calls this has looked
    theirs = frozen_task(harness, _documents(task))
    whole = [n for n, repeats in enumerate(answers) if all(map(_is_whole, (r for one in repeats for r in one)))]
    by_item: list[list[Any]] = []
    for n in whole:
        by_item.append(_instances(theirs, items[n], answers[n]))
    theirs._instances = [instance for instances in by_item for instance in instances]
    if whole:
        _calling(harness, "its filters", theirs.apply_filters)
    found = dict(zip(whole, by_item, strict=True))
    for n, item in enumerate(items):
        for row in rows[n]:
            row["extracted"] = None if row["extracted"] is None else {}
        first = rows[n][0]
        for filter_ in harness.filters:
            values: Mapping[str, Any] = {}
            if n in found:
                results = [instance.filtered_resps[filter_] for instance in found[n]]
                document = item.document.fields["doc"]
                values = _calling(
                    harness,
                    f"process_results, document {item.document.position},",
                    theirs.process_results,
                    _document(document),
                    results,
                )
                if task.definition.output_type == "generate_until":
                    first["extracted"][filter_] = _shown(results[0])
            for metric in harness.metrics:
                score = score_name(metric.name, filter_)
                if n not in found:
                    first["metrics"][score] = None
                elif metric.name in values:
                    _keep(first, score, values[metric.name], is_averaged=metric.aggregation == "mean")


def harness_estimate(task: Task, score: str, items: Sequence[Sequence[Row]]) -> Estimate:
    """The score of `items`, each the rows of its repeats: the mean, or what the harness's own function makes of all.

    Items that the harness gives no value are left out, as there; the value is None when an item's is null. Intervals
    of its own functions are a bootstrap's over items, or none where resampling would take longer than MOST_SECONDS.
    """
    harness = task.definition.harness
    assert harness is not None
    metric = score.partition(",")[0]
    own = next(one for one in harness.metrics if one.name == metric)
    said = [dict(rows[0]["metrics"]) for rows in items]
    if own.aggregation == "mean":
        values = [one[score] for one in said if score in one]
        within = all(value is not None and 0 <= value <= 1 for value in values)
        return mean_estimate(values, None, proportion=within)
    kept = [dict(rows[0]["extracted"] or ()).get(f"{_VALUE},{score}") for rows in items]
    if any(text is None and score in one for text, one in zip(kept, said, strict=True)):
        return without_interval(why.MISSING, len(items), None)
    values = [json.loads(text) for text in kept if text is not None]
    if not values:
        return without_interval(why.NO_ITEMS, 0, None)
    aggregate = frozen_task(harness, _documents(task)).aggregation()[metric]

    started = time.monotonic()
    value = _number(_calling(harness, f"aggregation of {metric}", aggregate, values))
    if (seconds := time.monotonic() - started) * REPLICATES > MOST_SECONDS:
        finite = value if math.isfinite(value) else None
        return without_interval(f"resampling takes {seconds:.1g} s each time", len(values), None, value=finite)

    def statistic(counts: np.ndarray) -> np.ndarray:
        drawn = ([value for value, n in zip(values, row, strict=True) for _ in range(n)] for row in counts.tolist())
        return np.array([_number(_calling(harness, f"aggregation of {metric}", aggregate, one)) for one in drawn])

    return bootstrap_estimate(statistic, len(values), None, interval="percentile", replicates=REPLICATES)


def _documents(task: Task) -> list[Any]:
    return [_document(document.fields["doc"]) for document in task.documents]


def _document(fields: Any) -> Any:
    """A copy, as the harness's functions may write into what they are given."""
    return json.loads(json.dumps(fields))


def _instances(theirs: Any, item: Item, repeats: Sequence[Sequence[Response]]) -> list[Any]:
    """The item's requests as the harness has them, with every repeat's answer."""
    from lm_eval.api.instance import Instance

    document = _document(item.document.fields["doc"])
    kind = theirs.OUTPUT_TYPE
    instances = []
    for index, request in enumerate(item.requests):
        instance = Instance(
            "loglikelihood" if kind == "multiple_choice" else kind,
            document,
            (request.context,) if request.continuation is None else (request.context, request.continuation),
            index,
            (theirs.config.task, item.document.position, len(repeats)),
        )
        instance.resps = [_answer(kind, responses[index]) for responses in repeats]
        instances.append(instance)
    return instances


def _answer(kind: str, response: Response) -> Any:
    if kind == "generate_until":
        return response.text
    return response.log_likelihood if kind == "loglikelihood_rolling" else (response.log_likelihood, response.is_greedy)


def _is_whole(response: Response) -> bool:
    if response.finish_reason == "non_finite":
        return False
    if response.finish_reason == "scored":
        return response.log_likelihood is not None and math.isfinite(response.log_likelihood)
    return response.text is not None


def _shown(result: Any) -> str | None:
    """What a filter found, as text; None where it is the mark for nothing."""
    text = result if isinstance(result, str) else json.dumps(_plain(result), ensure_ascii=False)
    return None if text == UNPARSED else text


def _keep(row: dict[str, Any], score: str, value: Any, *, is_averaged: bool) -> None:
    plain = _plain(value)
    is_number = isinstance(plain, bool | int | float)
    if is_number:
        row["metrics"][score] = float(plain) if math.isfinite(plain) else None
    if not is_averaged:
        row["extracted"] = (row["extracted"] or {}) | {f"{_VALUE},{score}": json.dumps(plain, ensure_ascii=False)}
    elif not is_number:
        raise TaskError(
            f"lm-eval's metric {score} gives {plain!r}, which has no mean", remedy="remove the metric by overriding it"
        )


def _plain(value: Any) -> Any:
    """As JSON values, tuples and arrays as lists. Raises TaskError for what has no such form."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(part) for part in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TaskError(
        f"lm-eval's function gives a {type(value).__name__}, which cannot be kept", remedy="override the metric"
    )


def _number(value: Any) -> float:
    return float(np.asarray(value, dtype=float))


def _calling(harness: Harness, what: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result; whatever it raises is a TaskError that names it."""
    try:
        return function(*arguments)
    except Exception as error:
        raise TaskError(
            f"lm-eval's {harness.task}: {what} raised {type(error).__name__}: {error}",
            remedy="install what it needs; or override the metric in a task file with `lm_eval:`",
        ) from error
