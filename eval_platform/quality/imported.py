"""What of the gate applies to results that another program computed? (`keeping/harness.py` brings them.)

What was asked is not known here as a task, so nothing is compared with a plan, with chance or with other models. Looked
at are the numbers that came over, and whether the samples, where there are any, give them.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from eval_platform.quality import reproducibility, suites
from eval_platform.values import Check

# Metrics that mean there what they mean here. Of any other (its f1 may be a percentage) no range is known.
_SAME = frozenset(
    {
        *("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match"),
        *("perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte"),
    }
)
# A mean of samples may be added up in another order.
_ROUNDING = 1e-6


def check_imported(
    evaluation: Mapping[str, Any],
    samples: pa.Table,
    definition: Mapping[str, Any],
    others: Sequence[Mapping[str, Any]],
) -> list[Check]:
    """Every check of one imported evaluation.

    Args:
        evaluation: the commit; `imported` says where it comes from.
        samples: its samples, none where no log came with it.
        definition: the record of its task; says how it was asked.
        others: the commits of the same model's and task's other attempts that stand published.
    """
    source = evaluation["imported"]
    checks = suites.check_scores([{**score, "metric": _ranged(score["metric"])} for score in evaluation["scores"]])
    looked_at = "its scores alone: no sample log came with it"
    if samples.num_rows:
        metrics = [score["metric"] for score in evaluation["scores"] if _ranged(score["metric"]) == score["metric"]]
        logged = {name for row in samples["metrics"].to_pylist() for name, _ in row or ()}
        checks += suites.check_samples(
            samples, evaluation["planned"]["samples"], definition["output_type"], [m for m in metrics if m in logged]
        )
        checks.append(samples_agree(evaluation, samples))
        looked_at = f"its scores and {samples.num_rows} samples"
    told = f"taken over from {source['file']} ({source['source']} {source['version'] or 'of unknown version'})"
    checks.append(
        Check("imported", passed=True, severity="warning", reason=f"{told}; looked at are {looked_at}", observed=source)
    )
    repeated = same_scores(evaluation, others)
    return checks if repeated is None else [*checks, repeated]


def samples_agree(evaluation: Mapping[str, Any], samples: pa.Table) -> Check:
    """The log is of these results: as many items, and means that are the scores."""
    firsts = [dict(row or ()) for row, n in zip(*_columns(samples, "metrics", "repeat"), strict=True) if n == 0]
    wrong = []
    for score in evaluation["scores"]:
        values = [row[score["metric"]] for row in firsts if score["metric"] in row]
        if score["n"] is not None and score["n"] != len(firsts):
            wrong.append(f"{len(firsts)} items are logged, {score['n']} were scored")
            break
        if _ranged(score["metric"]) != score["metric"] or score["value"] is None or not values or None in values:
            continue
        mean = math.fsum(values) / len(values)
        if len(values) != len(firsts) or abs(mean - score["value"]) > _ROUNDING * max(1.0, abs(mean)):
            wrong.append(f"{score['metric']} of the samples is {mean:.6g}, of the results {score['value']:.6g}")
    if not wrong:
        return Check("samples_agree", passed=True, severity="error")
    reason = f"the sample log is not of these results: {'; '.join(wrong)}"
    return Check("samples_agree", passed=False, severity="error", reason=reason, observed={"wrong": wrong})


def same_scores(evaluation: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> Check | None:
    """Other results of the same model, task and settings say the same, up to a standard error.

    The items are the same, so what another batch size may change is a fraction of it; more is another model under the
    same name (a folder that was overwritten). None where there are no others.
    """
    if not others:
        return None
    told, contradicted = [], []
    for other in others:
        values = {score["metric"]: score["value"] for score in other["scores"]}
        for score in evaluation["scores"]:
            before, now = values.get(score["metric"]), score["value"]
            if before is None or now is None:
                continue
            if abs(now - before) > max(_ROUNDING * max(1.0, abs(now)), score["standard_error"] or 0.0):
                told.append(
                    f"attempt {other['attempt']} ({other['imported']['file']}) has {score['metric']} {before:.6g}"
                )
                contradicted.append(other["attempt"])
                break
    if not told:
        observed = {"attempts": [other["attempt"] for other in others]}
        return Check(reproducibility.NAME, passed=True, severity="error", observed=observed)
    reason = (
        f"the same model, task and settings gave other scores before: {'; '.join(told)}; if another model stood under "
        "the name, import each file with the --step that tells them apart"
    )
    return Check(
        reproducibility.NAME, passed=False, severity="error", reason=reason, observed={"attempts": contradicted}
    )


def _ranged(metric: str) -> str:
    """The metric's own name where its range is known, else one that no range is known of."""
    return metric if metric.partition(",")[0] in _SAME else f"lm-eval:{metric}"


def _columns(samples: pa.Table, *names: str) -> list[list[Any]]:
    return [samples[name].to_pylist() for name in names]
