"""The speed table on a GPU: `python -m benchmarks.engine.gpu --model llama1b`, in bfloat16.

Here lm-evaluation-harness and our engine hold the model in one process and answer in turn, since a model of gigabytes
takes longer to load than to ask; lm-eval's batch size is the best of those tried on the row itself. The floor is the
row's unique tokens at the chip's measured rate for the model's own matrices (`eval_platform.bench`).
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine.models import MODELS, model_folder
from benchmarks.engine.workloads import ROWS
from eval_platform.bench import floor
from eval_platform.bench.agreement import compare, equal_answers
from eval_platform.bench.processes import Job
from eval_platform.bench.rate import matrix_rate, memory_rate
from eval_platform.bench.report import drawn_tokens, read_work
from eval_platform.bench.side import LmEval, Ours
from eval_platform.engine import resolve_settings
from eval_platform.values import Request, RunSettings

# Documents of a row: many more than on a CPU, so that a row takes seconds.
SIZES = {
    "mmlu": 152,
    "endings": 1000,
    "bbh": 250,
    "gsm8k": 256,
    "ten_shots": 120,
    "perplexity": 100,
    "one_token": 1000,
}
BATCHES = (16, 64, 256)
DTYPE = "bfloat16"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine.gpu", description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="llama1b")
    parser.add_argument("--rows", default=",".join(SIZES))
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)), help="that lm-eval tries")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "eval_platform_engine_benchmark")
    parser.add_argument("--out", type=Path, help="file for all that was measured, one JSON line a row")
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    checkpoint = model_folder(arguments.model, work)
    asked = RunSettings(dtype=DTYPE, device="cuda", engine_path="auto")
    settings = resolve_settings(asked, checkpoint)
    job = Job("ours", str(checkpoint), "", "", asdict(settings), 2)
    begun = time.perf_counter()
    ours = Ours(job)
    print(f"ours: {ours.path}, loaded in {time.perf_counter() - begun:.1f} s, {ours.versions}", flush=True)
    theirs = LmEval(replace(job, side="lm-eval", batch_size=1))
    gc.freeze()  # the models and all that was imported: no collection has to walk them again
    batches = [int(size) for size in arguments.batches.split(",")]
    header = "workload (requests)", "lm-eval s (batch)", "ours s", "ratio", "of the floor", "unique tokens/s"
    print(f"| {' | '.join((*header, 'agreement', 'of lm-eval with itself'))} |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for name in arguments.rows.split(","):
        requests = ROWS[name].requests(max(1, round(SIZES[name] * arguments.scale)), work)
        found = _measure(requests, ours, theirs, batches, arguments.pairs, checkpoint, settings)
        if arguments.out:
            with arguments.out.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps({"row": name, "model": arguments.model, **found}) + "\n")
        print(
            f"| {ROWS[name].title} ({len(requests)}) | {found['theirs']:.2f} ({found['batch']}) | {found['ours']:.2f} "
            f"| {found['ratio']:.1f} ({found['lowest']:.1f}-{found['highest']:.1f}) | {found['fraction']:.0%} "
            f"| {found['unique_tokens_per_second']:,.0f} | {found['agreement']} | {found['their_own']} |",
            flush=True,
        )
    return 0


def _measure(
    requests: list[Request],
    ours: Ours,
    theirs: LmEval,
    batches: list[int],
    pairs: int,
    checkpoint: Path,
    settings: RunSettings,
) -> dict[str, Any]:
    tried = {size: _lm_eval(theirs, requests, size) for size in batches}
    batch = min(tried, key=lambda size: tried[size][0])
    _timed(lambda: ours.answer(requests))  # as theirs has run before
    ratios, mine, others = [], [], []
    answers: Any = None
    expected: Any = None
    before = torch.cuda.memory_allocated()
    for _ in range(pairs):
        seconds, expected = _lm_eval(theirs, requests, batch)
        others.append(seconds)
        torch.cuda.reset_peak_memory_stats()
        seconds, answers = _timed(lambda: ours.answer(requests))
        mine.append(seconds)
        ratios.append(others[-1] / seconds)
    matrices, work = read_work(checkpoint, requests, settings)
    device, dtype = torch.device("cuda"), torch.bfloat16
    decoding = floor.decoding_of(drawn_tokens(requests, answers))
    least = floor.floor_seconds(
        work,
        decoding,
        matrices,
        matrix_rate=matrix_rate(matrices, dtype, device)[0],
        memory_rate=memory_rate(matrices.layer_weights + matrices.head_weights, dtype, device),
        bytes_per_weight=2,
    )
    seconds = statistics.median(mine)
    return {
        "requests": len(requests),
        "tried": {size: seconds for size, (seconds, _) in tried.items()},
        "batch": batch,
        "theirs": statistics.median(others),
        "ours": seconds,
        "ratio": statistics.median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "floor": least,
        "fraction": sum(least) / seconds,
        "unique_tokens_per_second": (work.unique_tokens + decoding.tokens) / seconds,
        "extra_bytes": torch.cuda.max_memory_allocated() - before,
        "agreement": _agreement(requests, answers, expected),
        "their_own": _with_itself(requests, answers, tried, batch),
        "counters": ours.counters,
    }


def _with_itself(requests: list[Request], ours: Any, tried: dict[int, Any], batch: int) -> str:
    """lm-eval's agreement with itself at another batch size; "" when it tried no other that fits."""
    other = next((size for size, (_, answers) in tried.items() if size != batch and answers is not None), None)
    if other is None:
        return ""
    # lm-eval doesn't say how many tokens it scored.
    counted = [{**answer, "n_tokens": mine["n_tokens"]} for mine, answer in zip(ours, tried[batch][1], strict=True)]
    return _agreement(requests, counted, tried[other][1])


def _lm_eval(theirs: LmEval, requests: list[Request], batch: int) -> tuple[float, Any]:
    """Infinite seconds where the batch does not fit."""
    theirs.set_batch_size(batch)
    try:
        return _timed(lambda: theirs.answer(requests))
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return float("inf"), None


def _timed(run: Any) -> tuple[float, Any]:
    torch.cuda.synchronize()
    begun = time.perf_counter()
    answers = run()
    torch.cuda.synchronize()
    return time.perf_counter() - begun, answers


def _agreement(requests: list[Request], ours: Any, theirs: Any) -> str:
    found = compare(requests, ours, theirs)
    nats = [] if found.largest is None else [f"{found.largest:.2g} nats"]
    return ", ".join([*nats, *equal_answers(found)])


if __name__ == "__main__":
    sys.exit(main())
