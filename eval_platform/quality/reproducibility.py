"""Does a rerun say what the standing attempt says? Two attempts of one evaluation, compared answer by answer."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from eval_platform.quality import frames
from eval_platform.values import Check

NAME = "reproducible"

# Largest difference of two log-likelihoods of one request, in nats: a floor and a part that grows with its tokens.
# float32: the tolerance within which engine and reference must agree. Half precision: one unit in the last place of a
# logit between 16 and 32 for every token, which another batch size may cost.
_TOLERANCES: Mapping[str, tuple[float, float]] = {
    "float32": (1e-4, 1e-5),
    "float16": (2.0**-6, 2.0**-6),
    "bfloat16": (2.0**-3, 2.0**-3),
}
# Share of completions that may differ (but always one): a tie between the two best tokens may fall either way, and
# in half precision more ties are near. Judgement, not measurement.
_TEXT_SHARES: Mapping[str, float] = {"float32": 0.01, "float16": 0.05, "bfloat16": 0.05}


def reproducible(
    evaluation: Mapping[str, Any],
    samples: pa.Table,
    others: Sequence[tuple[int, pa.Table]],
    output_type: str,
) -> Check | None:
    """An error where this attempt's answers differ from those of another by more than the tolerance of its dtype.

    others: (attempt, samples) of the evaluation's other attempts that stand published; None where there are none.
    """
    if not others:
        return None
    contradicted = {}
    for attempt, other in others:
        difference = _difference(samples, other, output_type, evaluation["dtype"])
        if difference is not None:
            contradicted[attempt] = difference
    if not contradicted:
        return Check(NAME, passed=True, severity="error", observed={"attempts": [attempt for attempt, _ in others]})
    told = "; ".join(f"attempt {attempt}: {difference}" for attempt, difference in contradicted.items())
    reason = f"the same evaluation gave other answers before ({told}): engine or machine are not to be relied on"
    return Check(NAME, passed=False, severity="error", reason=reason, observed={"attempts": list(contradicted)})


def contradiction(reported: Check, attempt: int) -> Check:
    """The same failure, as the check of the attempt that `attempt` contradicts."""
    reason = f"attempt {attempt}, a rerun, gave other answers: {reported.reason}"
    return Check(NAME, passed=False, severity="error", reason=reason, observed={"attempts": [attempt]})


def _difference(samples: pa.Table, other: pa.Table, output_type: str, dtype: str) -> str | None:
    """What differs by more than the tolerance, in words; None where nothing does."""
    if output_type == "generate_until":
        return _text_difference(samples, other, _TEXT_SHARES.get(dtype, 0.0))
    mine, theirs = (_likelihoods(table, output_type) for table in (samples, other))
    if mine.keys() != theirs.keys():
        return f"{len(mine.keys() ^ theirs.keys())} requests are in only one of the two"
    floor, per_token = _TOLERANCES.get(dtype, (0.0, 0.0))
    apart = []
    for key, (value, tokens) in mine.items():
        difference = abs(value - theirs[key][0])
        if math.isnan(difference) or difference > max(floor, per_token * tokens):
            apart.append((difference, key))
    if not apart:
        return None
    worst, (sample_id, repeat, part) = max(apart, key=lambda pair: math.inf if math.isnan(pair[0]) else pair[0])
    return (
        f"{len(apart)} of {len(mine)} log-likelihoods differ beyond the tolerance of {dtype}, most by {worst:.3g} nats "
        f"(sample_id {sample_id}, repeat {repeat}, {part})"
    )


def _likelihoods(samples: pa.Table, output_type: str) -> dict[tuple[str, int, str], tuple[float, int]]:
    """(sample_id, repeat, part) -> log-likelihood, tokens of the row's longest target (0 where not known)."""
    frame = frames.log_likelihoods(samples, output_type)
    if frame is None:
        return {}
    tokens = _tokens(samples, output_type)
    return {
        (sample_id, int(repeat), part): (float(value), tokens[sample_id, int(repeat)])
        for sample_id, repeat, part, value in zip(
            frame["sample_id"], frame["repeat"], frame["part"], frame["log_likelihood"], strict=True
        )
    }


def _tokens(samples: pa.Table, output_type: str) -> dict[tuple[str, int], int]:
    if output_type == "multiple_choice":
        counts = [max((c["n_tokens"] or 0 for c in row or ()), default=0) for row in samples["choices"].to_pylist()]
    else:
        counts = [n or 0 for n in samples["n_tokens"].to_pylist()]
    keys = zip(samples["sample_id"].to_pylist(), samples["repeat"].to_pylist(), strict=True)
    return dict(zip(keys, counts, strict=True))


def _text_difference(samples: pa.Table, other: pa.Table, share: float) -> str | None:
    mine, theirs = (
        dict(
            zip(
                zip(table["sample_id"].to_pylist(), table["repeat"].to_pylist(), strict=True),
                table["response"].to_pylist(),
                strict=True,
            )
        )
        for table in (samples, other)
    )
    if mine.keys() != theirs.keys():
        return f"{len(mine.keys() ^ theirs.keys())} requests are in only one of the two"
    differing = sum(text != theirs[key] for key, text in mine.items())
    if differing <= max(1, int(share * len(mine))):
        return None
    return f"{differing} of {len(mine)} completions differ"
