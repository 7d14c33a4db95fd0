"""Samples and scores as flat pandas frames: what the expectations of `suites` look at.

Whatever an expectation cannot compare by itself is a column here: how far a value lies outside its metric's range
(`outside`), and how far outside its own interval (`outside_interval`); both are 0 where all is well, and infinite
where a number is missing that must be there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from eval_platform.tasks.metrics import METRICS

if TYPE_CHECKING:  # pandas takes a second to import and the CLI's --help does not need it
    import pandas as pd

# A log-likelihood may exceed 0 by 1e-6 (`suites.POSITIVE_ROUNDING`), which is 1.5e-6 bits below 0 and as much below a
# perplexity of 1; and floats of one value reached by two formulas (a mean, the end of its interval) differ by less.
ROUNDING = 2e-6


def log_likelihoods(samples: pa.Table, output_type: str) -> pd.DataFrame | None:
    """Every log-likelihood that must be there: sample_id, repeat, part, log_likelihood (NaN where null).

    part: "choice 0", "choice 0 unconditional" or "target". A row of a multiple-choice task without any choice counts
    as one missing log-likelihood. None for tasks whose answers are texts.
    """
    import pandas as pd

    ids, repeats = samples["sample_id"].to_numpy(), samples["repeat"].to_numpy()
    if output_type == "generate_until":
        return None
    if output_type != "multiple_choice":
        values = _floats(samples["log_likelihood"])
        return pd.DataFrame({"sample_id": ids, "repeat": repeats, "part": "target", "log_likelihood": values})

    choices = samples["choices"].combine_chunks()
    parents = choices.value_parent_indices().to_numpy(zero_copy_only=False).astype(np.int64)
    flat = choices.flatten()
    counts = pc.fill_null(choices.value_lengths(), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64)
    number = np.arange(len(flat)) - starts[parents] if len(flat) else np.zeros(0, np.int64)
    frames = [_choice_frame(ids, repeats, parents, number, flat.field("log_likelihood"), "")]
    unconditional = flat.field("unconditional_log_likelihood")
    if unconditional.null_count < len(unconditional):  # asked for one, so asked for all
        frames.append(_choice_frame(ids, repeats, parents, number, unconditional, " unconditional"))
    bare = np.flatnonzero(counts == 0)
    if len(bare):
        frames.append(
            pd.DataFrame(
                {"sample_id": ids[bare], "repeat": repeats[bare], "part": "choice 0", "log_likelihood": math.nan}
            )
        )
    return pd.concat(frames, ignore_index=True)


def _choice_frame(
    ids: np.ndarray, repeats: np.ndarray, parents: np.ndarray, number: np.ndarray, values: pa.Array, suffix: str
) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(
        {
            "sample_id": ids[parents],
            "repeat": repeats[parents],
            "part": [f"choice {n}{suffix}" for n in number],
            "log_likelihood": _floats(values),
        }
    )


def sample_metrics(samples: pa.Table, metrics: Sequence[str]) -> pd.DataFrame:
    """Every metric value of every sample: sample_id, repeat, metric, value (NaN where null), outside.

    metrics: the task's score names ("exact_match,strict-match" for one filter). Null means that the value cannot be
    computed, no entry that there is none for this sample alone (`scoring.score_item`); which no metric that is a mean
    over items may say of an item's first repeat, so there it counts as null.
    """
    import pandas as pd

    found = []
    columns = (samples[name].to_pylist() for name in ("sample_id", "repeat", "metrics"))
    for sample_id, repeat, row in zip(*columns, strict=True):
        values = dict(row or ())
        for metric in metrics:
            if metric in values or (repeat == 0 and _is_mean(metric)):
                found.append((sample_id, repeat, metric, _float(values.get(metric))))
    frame = pd.DataFrame(found, columns=["sample_id", "repeat", "metric", "value"]).astype({"value": float})
    ranges = {metric: metric_range(metric) for metric in metrics}
    low = np.array([ranges[metric][0] for metric in frame["metric"]])
    high = np.array([ranges[metric][1] for metric in frame["metric"]])
    frame["outside"] = _outside(frame["value"].to_numpy(), low, high)
    return frame


def scores(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """The commit's scores: subset, metric, value, ci_low, ci_high (NaN where null), outside, standard_error,
    outside_interval (infinite where a number is missing).

    A standard error may be absent only where it cannot be estimated (fewer than two items or clusters), an interval
    only where `interval_method` says why ("none: <reason>"). Where the value itself is missing nothing more is said
    of the row: that is one fault, not four.
    """
    import pandas as pd

    ranges = [metric_range(record["metric"]) for record in records]
    values = np.array([_float(record["value"]) for record in records])
    low, high = (np.array([end[side] for end in ranges]) for side in (0, 1))
    return pd.DataFrame(
        {
            "subset": [record["subset"] for record in records],
            "metric": [record["metric"] for record in records],
            "value": values,
            "outside": _outside(values, low, high),
            "standard_error": [_standard_error(record) for record in records],
            "ci_low": [_float(record["ci_low"]) for record in records],
            "ci_high": [_float(record["ci_high"]) for record in records],
            "outside_interval": [_outside_interval(record) for record in records],
        }
    )


def metric_range(metric: str) -> tuple[float, float]:
    """Lowest and highest aggregated value of a metric, named with or without its filter; all numbers if unknown."""
    known = METRICS.get(metric.split(",")[0])
    return (known.low, known.high) if known else (-math.inf, math.inf)


def _is_mean(metric: str) -> bool:
    known = METRICS.get(metric.split(",")[0])
    return known is not None and known.aggregation == "mean"


def _standard_error(record: Mapping[str, Any]) -> float:
    error = _float(record["standard_error"])
    if not math.isnan(error):
        return error
    clusters = record.get("n_clusters")
    # What was imported says why first: how many items there were may not be known.
    estimable = not _says_why(record) and record["n"] >= 2 and (clusters is None or clusters >= 2)
    return math.inf if estimable and math.isfinite(_float(record["value"])) else 0.0


def _outside_interval(record: Mapping[str, Any]) -> float:
    value, low, high = (_float(record[name]) for name in ("value", "ci_low", "ci_high"))
    if not math.isfinite(value):
        return 0.0
    if math.isnan(low) and math.isnan(high) and _says_why(record):
        return 0.0
    if math.isnan(low) or math.isnan(high):
        return math.inf
    excess = max(low - value, value - high, low - high, 0.0)
    return excess if excess > ROUNDING * max(1.0, abs(value)) else 0.0


def _says_why(record: Mapping[str, Any]) -> bool:
    """Whether the score itself states why there is no interval (`statistics.Estimate.method`)."""
    return record["interval_method"].startswith("none: ")


def _outside(values: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Distance of every value to [low, high]: infinite for infinities, NaN for NaN, 0 within rounding."""
    with np.errstate(invalid="ignore"):
        excess = np.maximum(np.maximum(low - values, values - high), 0.0)
        excess = np.where(excess <= ROUNDING * np.maximum(1.0, np.abs(values)), 0.0, excess)
    excess = np.where(np.isinf(values), math.inf, excess)
    return np.where(np.isnan(values), math.nan, excess)


def _float(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _floats(values: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Null becomes NaN; both mean that no number is there."""
    array = values.combine_chunks() if isinstance(values, pa.ChunkedArray) else values
    return pc.cast(array, pa.float64()).to_numpy(zero_copy_only=False)
