"""What stands in docs/performance.md? A Markdown table of medians, and where it comes from."""

import datetime
import statistics
from collections.abc import Sequence

from benchmarks.engine.runners import Pair, RowResult, Setup
from eval_platform.bench.agreement import Agreement, equal_answers
from eval_platform.bench.machine import processor_name

_HEADER = (
    "workload (requests)",
    "lm-eval s (batch)",
    "ours s",
    "ratio, median (range)",
    "least / goal",
    "of the floor",
    "least / goal",
    "tokens and head rows, ours : least",
    "memory MB, ours : lm-eval",
    "agreement",
    "path",
)


def markdown(setup: Setup, results: Sequence[RowResult]) -> str:
    """The table of `results`, with the machine and the versions under it."""
    rows = [_HEADER, ("---",) * len(_HEADER), *(_cells(result, setup) for result in results)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    versions = {name: text for result in results for name, text in _versions(result.pairs[-1]).items()}
    told = ", ".join(f"{name} {text}" for name, text in sorted(versions.items()))
    rates = [pair.rates for result in results for pair in result.pairs]
    matrix = statistics.median(rate.matrix for rate in rates) / 1e9
    memory = statistics.median(rate.memory for rate in rates) / 1e9
    return (
        f"{table}\n\n{setup.model}, {setup.dtype}: {processor_name()}, {setup.threads} threads, {setup.pairs} pairs, "
        f"{datetime.date.today()}; median rates {matrix:.0f} GFLOP/s and {memory:.1f} GB/s. {told}.\n"
    )


def _cells(result: RowResult, setup: Setup) -> tuple[str, ...]:
    pairs, row = result.pairs, result.row
    ratios = [pair.ratio for pair in pairs]
    batch = pairs[-1].theirs.batch_size
    theirs = statistics.median(pair.theirs.extra_bytes for pair in pairs) / 2**20
    ours = statistics.median(pair.ours.extra_bytes for pair in pairs) / 2**20
    share = f"{ours / theirs:.2f}" if theirs > 0 else "?"
    wanted, wanted_floor = "", ""
    # The ratios and fractions are for one model and dtype.
    if (setup.model, setup.dtype) == ("llama24m", "float32"):
        wanted = f"{row.least:g} / {row.goal:g}"
        wanted_floor = "report"
        if row.floor_least is not None and row.floor_goal is not None:
            wanted_floor = f"{row.floor_least:.0%} / {row.floor_goal:.0%}"
    return (
        f"{row.title} ({result.requests})",
        f"{statistics.median(pair.theirs.seconds for pair in pairs):.2f} ({batch})",
        f"{statistics.median(pair.ours.seconds for pair in pairs):.2f}",
        f"**{statistics.median(ratios):.1f}** ({min(ratios):.1f}-{max(ratios):.1f})",
        wanted,
        f"{statistics.median(pair.fraction for pair in pairs):.0%}",
        wanted_floor,
        _counted(result),
        f"{ours:.0f} : {theirs:.0f} = {share} (at most {row.memory_limit:.2g})",
        _agreement(result.agreement, setup)
        + (f"; lm-eval with itself: {_agreement(result.their_own, setup)}" if result.their_own else ""),
        pairs[-1].ours.engine_path,
    )


def _counted(result: RowResult) -> str:
    """The engine's own counts beside those of the floor. What it does not count is left out."""
    counters, drawn = result.pairs[-1].ours.counters, result.decoding.tokens
    parts = []
    if "forward_tokens" in counters:
        parts.append(f"{counters['forward_tokens']:,} : {result.work.unique_tokens + drawn:,}")
    if "head_rows" in counters and not drawn:  # counted for log-likelihoods only
        parts.append(f"{counters['head_rows']:,} : {result.work.head_rows:,}")
    return ", ".join(parts)


def _agreement(found: Agreement, setup: Setup) -> str:
    parts = []
    if found.worst is not None:
        # The tolerance is one of float32.
        units = f" ({found.worst:.2f} of the tolerance)" if setup.dtype == "float32" else ""
        parts.append(f"{found.largest:.1e}{units}")
    return ", ".join([*parts, *equal_answers(found)])


def _versions(pair: Pair) -> dict[str, str]:
    return {**pair.ours.versions, **pair.theirs.versions}
