"""From samples to scores: every metric of a task, for all of it and for each subset."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from eval_platform.scoring.likelihood import WEIGHTS, surprise
from eval_platform.scoring.sums import terms_estimate
from eval_platform.statistics import Estimate, macro_estimate, mean_estimate, ratio_estimate
from eval_platform.tasks.metrics import METRICS
from eval_platform.tasks.scoring_keys import score_name
from eval_platform.tasks.task import Task
from eval_platform.values import Score

Row = Mapping[str, Any]


def aggregate(task: Task, samples: Sequence[Row]) -> list[Score]:
    """The scores of `samples`, rows as `score_item` made them or as read from Parquet, in any order.

    First every score of the whole task (subset ""), then of each subset by name: the values of the first subset field
    as they are, of further ones as `<field>=<value>`. n counts items: repeats of one item are averaged first, since
    they are not independent. A metric with `aggregation: macro_mean` is the mean over the subsets (of the first
    field) that the items are in. Definitions are lm-evaluation-harness's (`api/metrics.py`):
    the mean; exp of the mean negative log-likelihood (perplexity); exp of summed negative log-likelihood over summed
    words or bytes (word_perplexity, byte_perplexity); that exponent in bits (bits_per_byte). Scores that are made of
    sums of the items' terms: `sums`. Intervals: `statistics`.
    A value is None when that of any item is.
    """
    items: dict[str, list[Row]] = {}
    for row in sorted(samples, key=lambda row: (row["position"], row["repeat"])):
        items.setdefault(row["sample_id"], []).append(row)
    further = _further_subsets(task)
    by_subset: dict[str, list[list[Row]]] = {"": list(items.values())}
    for sample_id, rows in items.items():
        for subset in (rows[0]["subset"], *further.get(sample_id, ())):
            if subset:
                by_subset.setdefault(subset, []).append(rows)
    return [
        _as_score(task, name, subset, estimate(by_subset[subset]))
        for subset in sorted(by_subset)
        for name, estimate in _scores(task)
    ]


def _further_subsets(task: Task) -> dict[str, list[str]]:
    """sample_id -> `<field>=<value>` of every subset field but the first, which samples carry themselves."""
    fields = task.definition.documents.subset_fields[1:] if task.definition.documents else ()
    if not fields:
        return {}
    return {d.sample_id: [f"{field}={d.fields[field]}" for field in fields] for d in task.documents}


def _scores(task: Task) -> list[tuple[str, Callable[[Sequence[Sequence[Row]]], Estimate]]]:
    """(score's name, what makes it of the items' rows) of every score of the task."""
    if task.definition.harness is not None:
        # Imported here: few tasks are scored by lm-evaluation-harness.
        from eval_platform.scoring.harness import harness_estimate

        return [(name, partial(harness_estimate, task, name)) for name in task.definition.score_names]
    return [
        (name, partial(_macro if entry.is_macro else _estimate, entry.metric, name))
        for pipeline in task.definition.filter_list
        for entry in task.definition.metric_list
        for name in [score_name(entry.metric, pipeline.name)]
    ]


def _as_score(task: Task, name: str, subset: str, estimate: Estimate) -> Score:
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


def _macro(metric: str, name: str, items: Sequence[Sequence[Row]]) -> Estimate:
    by_subset: dict[str, list[Sequence[Row]]] = {}
    for rows in items:
        by_subset.setdefault(rows[0]["subset"], []).append(rows)
    parts = [_estimate(metric, name, rows) for rows in by_subset.values()]
    return macro_estimate(parts, proportion=_within_one(metric))


def _within_one(metric: str) -> bool:
    """Whether values lie within [0, 1], 0 or 1 or not: then so does their interval."""
    return (METRICS[metric].low, METRICS[metric].high) == (0.0, 1.0)


def _estimate(metric: str, name: str, items: Sequence[Sequence[Row]]) -> Estimate:
    clusters = [rows[0]["cluster"] for rows in items]
    known = METRICS[metric]
    if known.aggregation == "mean":
        values = [_mean([dict(row["metrics"]).get(name) for row in _scored(rows, name)]) for rows in items]
        return mean_estimate(values, clusters, proportion=_within_one(metric))
    if known.aggregation in ("ratio", "bleu", "chrf"):
        return terms_estimate(metric, name, items)
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
