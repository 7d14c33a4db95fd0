"""From samples to scores: every metric of a task, for all of it and for each subset."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from eval_platform.scoring.likelihood import WEIGHTS, surprise
from eval_platform.statistics import Estimate, mean_estimate, ratio_estimate
from eval_platform.tasks.metrics import METRICS
from eval_platform.tasks.schema import score_name
from eval_platform.tasks.task import Task
from eval_platform.values import Score

Row = Mapping[str, Any]


def aggregate(task: Task, samples: Sequence[Row]) -> list[Score]:
    """The scores of `samples`, rows as `score_item` made them or as read from Parquet, in any order.

    First every score of the whole task (subset ""), then of each subset by name. n counts items: repeats of one item
    are averaged first, since they are not independent. Definitions are lm-evaluation-harness's (`api/metrics.py`):
    the mean; exp of the mean negative log-likelihood (perplexity); exp of summed negative log-likelihood over summed
    words or bytes (word_perplexity, byte_perplexity); that exponent in bits (bits_per_byte). Intervals: `statistics`.
    A value is None when that of any item is.
    """
    items: dict[str, list[Row]] = {}
    for row in sorted(samples, key=lambda row: (row["position"], row["repeat"])):
        items.setdefault(row["sample_id"], []).append(row)
    by_subset: dict[str, list[list[Row]]] = {"": list(items.values())}
    for rows in items.values():
        if rows[0]["subset"]:
            by_subset.setdefault(rows[0]["subset"], []).append(rows)
    return [
        _score(task, metric, name, subset, by_subset[subset])
        for subset in sorted(by_subset)
        for metric, name in _scores(task)
    ]


def _scores(task: Task) -> list[tuple[str, str]]:
    """(metric, score's name) of every score of the task."""
    return [
        (metric, score_name(metric, pipeline.name))
        for pipeline in task.definition.filter_list
        for metric in task.definition.metrics
    ]


def _score(task: Task, metric: str, name: str, subset: str, items: Sequence[Sequence[Row]]) -> Score:
    estimate = _estimate(metric, name, items)
    return Score(
        task=task.name,
        metric=name,
        value=estimate.value,
        standard_error=estimate.standard_error,
        ci_low=estimate.ci_low,
        ci_high=estimate.ci_high,
        interval_method=estimate.method,
        n=estimate.n,
        n_clusters=estimate.n_clusters,
        subset=subset,
    )


def _estimate(metric: str, name: str, items: Sequence[Sequence[Row]]) -> Estimate:
    clusters = [rows[0]["cluster"] for rows in items]
    known = METRICS[metric]
    if known.aggregation == "mean":
        values = [_mean([dict(row["metrics"]).get(name) for row in _scored(rows, name)]) for rows in items]
        # Values within [0, 1], 0 or 1 or not, have an interval within it.
        return mean_estimate(values, clusters, proportion=(known.low, known.high) == (0.0, 1.0))
    weight = _WEIGHT_OF_ROW[WEIGHTS[metric]]
    return ratio_estimate(
        [_mean([_surprise(metric, row["log_likelihood"]) for row in rows]) for rows in items],
        [_mean([weight(row) for row in rows]) for rows in items],
        clusters,
        transform="identity" if known.aggregation == "bits_per_byte" else "exp",
    )


_WEIGHT_OF_ROW: Mapping[str, Callable[[Row], float]] = {
    "items": lambda row: 1,
    "words": lambda row: row["n_words"],
    "bytes": lambda row: row["n_bytes"],
}


def _scored(rows: Sequence[Row], name: str) -> list[Row]:
    """The rows with an entry for this score: all repeats, or the first where a filter took one answer of all."""
    return [row for row in rows if name in dict(row["metrics"])]


def _surprise(metric: str, log_likelihood: float | None) -> float | None:
    return None if log_likelihood is None else surprise(metric, log_likelihood)


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean over repeats; None when one is missing, or all are."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
