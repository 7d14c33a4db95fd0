"""Who runs when? lm-eval and our engine in turn, each in a process of its own, the machine's rates between."""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.engine.models import model_folder
from benchmarks.engine.workloads import Row
from eval_platform.bench import floor
from eval_platform.bench.agreement import Agreement, compare, read_answers
from eval_platform.bench.machine import processor_name
from eval_platform.bench.processes import Job, Measured, Rates, best_batch, measure_rates, run_side
from eval_platform.bench.report import bytes_per_weight, drawn_tokens, read_work
from eval_platform.bench.requests import write_requests
from eval_platform.engine import resolve_settings
from eval_platform.values import RunSettings

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Pair:
    """lm-eval, ours, and the rates just before ours. fraction: floor over our seconds."""

    theirs: Measured
    ours: Measured
    rates: Rates
    fraction: float

    @property
    def ratio(self) -> float:
        """How many times faster ours was, by wall time."""
        return self.theirs.seconds / self.ours.seconds


@dataclass(frozen=True, slots=True)
class RowResult:
    """What a row's pairs gave. The agreement is the last pair's.

    their_own: lm-eval's with itself at another batch size, where the dtype is so coarse that two correct runs differ.
    """

    name: str
    row: Row
    requests: int
    work: floor.Work
    decoding: floor.Decoding
    pairs: list[Pair]
    agreement: Agreement
    their_own: Agreement | None


@dataclass(frozen=True, slots=True)
class Setup:
    """What all rows of a run share. work: the folder for models, requests, answers, batch sizes and runs.jsonl."""

    model: str
    dtype: str
    threads: int
    path: str
    pairs: int
    work: Path


def measure_row(name: str, row: Row, size: int, setup: Setup, say: Say) -> RowResult:
    """Time `setup.pairs` pairs on the row's requests about `size` documents."""
    checkpoint = model_folder(setup.model, setup.work)
    asked = RunSettings(dtype=setup.dtype, device="cpu", max_length=row.max_length, engine_path=setup.path)
    settings = resolve_settings(asked, checkpoint)
    requests = row.requests(size, setup.work)
    folder = setup.work / "rows" / f"{setup.model}-{setup.dtype}-{name}"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "requests.jsonl"
    write_requests(file, requests)
    matrices, work = read_work(checkpoint, requests, settings)
    say(
        f"{name}: {len(requests)} requests, {work.input_tokens:,} tokens, {work.unique_tokens:,} unique, "
        f"{work.head_rows:,} rows of the head"
    )
    ours = Job("ours", str(checkpoint), str(file), str(folder / "ours.jsonl"), asdict(settings), setup.threads)
    theirs = replace(ours, side="lm-eval", answers=str(folder / "theirs.jsonl"))
    theirs = replace(theirs, batch_size=_known_batch(name, theirs, setup, say))
    pairs: list[Pair] = []
    decoding = floor.Decoding(0, 0)
    for number in range(1, setup.pairs + 1):
        a = _timed(theirs)
        # Between the two: a shared machine's rate drifts within minutes.
        rates = measure_rates(checkpoint, ours.settings, setup.threads)
        b = _timed(ours)
        decoding = floor.decoding_of(drawn_tokens(requests, read_answers(Path(ours.answers))))
        least = sum(
            floor.floor_seconds(
                work,
                decoding,
                matrices,
                matrix_rate=rates.matrix,
                memory_rate=rates.memory,
                bytes_per_weight=bytes_per_weight(setup.dtype),
            )
        )
        pair = Pair(a, b, rates, least / b.seconds)
        pairs.append(pair)
        _keep(setup, name, size, number, pair)
        say(
            f"{name} {number}/{setup.pairs}: lm-eval (batch {a.batch_size}) {a.seconds:.2f} s, "
            f"ours ({b.engine_path}) {b.seconds:.2f} s, ratio {pair.ratio:.2f}; {pair.fraction:.0%} of the floor at "
            f"{rates.matrix / 1e9:.0f} GFLOP/s; memory {a.extra_bytes / 2**20:.0f} and {b.extra_bytes / 2**20:.0f} MB"
            + "".join(f"; {counter} {count:,}" for counter, count in b.counters.items())
        )
    mine, others = read_answers(Path(ours.answers)), read_answers(Path(theirs.answers))
    their_own = None
    if setup.dtype != "float32":
        again = replace(theirs, batch_size=2 if theirs.batch_size == 1 else 1, answers=str(folder / "again.jsonl"))
        say(f"{name}: lm-eval again at batch size {again.batch_size}, to compare it with itself")
        _timed(again)
        # lm-eval doesn't say how many tokens it scored, which the tolerance needs.
        counted = [{**answer, "n_tokens": one["n_tokens"]} for one, answer in zip(mine, others, strict=True)]
        their_own = compare(requests, counted, read_answers(Path(again.answers)))
    return RowResult(name, row, len(requests), work, decoding, pairs, compare(requests, mine, others), their_own)


def _timed(job: Job) -> Measured:
    measured = run_side(job)
    assert measured is not None  # no limit was set
    return measured


def _known_batch(name: str, job: Job, setup: Setup, say: Say) -> int:
    """lm-eval's best batch size for exactly these requests on this machine: tried once, then kept."""
    file = setup.work / "batches.json"
    known: dict[str, int] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    asked = hashlib.sha256(Path(job.requests).read_bytes()).hexdigest()[:12]
    key = " | ".join((processor_name(), f"{setup.threads} threads", setup.model, setup.dtype, name, asked))
    if key not in known:

        def tried(size: int, measured: Measured | None) -> None:
            took = "cut short" if measured is None else f"{measured.seconds:.2f} s"
            say(f"{name}: lm-eval, batch size {size}: {took}")

        known[key] = best_batch(job, tried=tried)
        file.write_text(json.dumps(known, indent=1), encoding="utf-8")
    return known[key]


def _keep(setup: Setup, name: str, size: int, number: int, pair: Pair) -> None:
    """One line of runs.jsonl: all that was measured of a pair."""
    record: dict[str, Any] = {
        "time": time.time(),
        "processor": processor_name(),
        "row": name,
        "size": size,
        "pair": number,
        **{field: value for field, value in asdict(setup).items() if field != "work"},
        **asdict(pair),
        "ratio": pair.ratio,
    }
    with (setup.work / "runs.jsonl").open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(record) + "\n")
