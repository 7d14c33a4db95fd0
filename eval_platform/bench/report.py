"""How near to its floor is a checkpoint's work here, and how does lm-evaluation-harness do beside? One of each, timed.

For a figure to publish, repeat it: `benchmarks/engine` measures pairs in turn and takes medians.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from eval_platform.bench import floor
from eval_platform.bench.agreement import Agreement, compare, read_answers
from eval_platform.bench.machine import processor_name, usable_threads
from eval_platform.bench.processes import (
    Job,
    Measured,
    Progress,
    Rates,
    best_batch,
    lm_eval_installed,
    measure_rates,
    run_side,
)
from eval_platform.bench.requests import write_requests
from eval_platform.engine import resolve_settings
from eval_platform.engine.placement import resolve_device
from eval_platform.errors import ConfigError
from eval_platform.store import Store
from eval_platform.tasks import TaskLock, load_task, render
from eval_platform.values import Request, RunSettings

TRIED_BATCHES = (4, 16, 1)
TRIED_REQUESTS = 64


@dataclass(frozen=True, slots=True)
class Report:
    """One checkpoint's work. Seconds are wall time after model load.

    floor_prefill and floor_decode: what prompts and scoring, and what drawing must take. fraction: of the floor's
    rate that our engine reached, floor over seconds. theirs and agreement are None when lm-eval is not installed.
    """

    checkpoint: str
    processor: str
    threads: int
    dtype: str
    device: str
    requests: int
    rates: Rates
    layer_weights: int
    head_weights: int
    work: floor.Work
    decoding: floor.Decoding
    floor_prefill: float
    floor_decode: float
    ours: Measured
    fraction: float
    theirs: Measured | None
    agreement: Agreement | None


@dataclass(frozen=True, slots=True)
class MachineReport:
    """The machine alone: its rates at the layer shapes of a usual model, by dtype."""

    processor: str
    threads: int
    device: str
    rates: dict[str, Rates]


def bench_machine(device: str, step: Callable[[str], None] = lambda text: None) -> MachineReport:
    """Measure matrix and memory rates in float32 and bfloat16. `step` is told what comes next."""
    device = resolve_device(device)
    rates = {}
    for dtype in ("float32", "bfloat16"):
        step(f"the machine's rates in {dtype}")
        settings = asdict(RunSettings(dtype=dtype, device=device))
        rates[dtype] = measure_rates(None, settings, usable_threads())
    return MachineReport(processor_name(), usable_threads(), device, rates)


def bench_checkpoint(
    checkpoint: Path,
    requests: Sequence[Request],
    settings: RunSettings,
    *,
    step: Callable[[str], None] = lambda text: None,
    progress: Progress | None = None,
) -> Report:
    """Time our engine, and lm-eval where it is installed, on `requests`; `settings` need not be resolved.

    lm-eval gets the best of TRIED_BATCHES, found on the first TRIED_REQUESTS requests. `step` is told what comes
    next, `progress` how many of our answers are there. Raises as the engine does, and EvalPlatformError when a side
    ends with an error.
    """
    settings = resolve_settings(settings, checkpoint)
    described = {**asdict(settings), "device": resolve_device(settings.device)}
    threads = usable_threads()
    matrices, work = read_work(checkpoint, requests, settings)
    with tempfile.TemporaryDirectory() as folder:
        asked = Path(folder) / "requests.jsonl"
        write_requests(asked, requests)
        job = Job("ours", str(checkpoint), str(asked), str(Path(folder) / "ours.jsonl"), described, threads)
        step("the machine's rates at this model's shapes")
        rates = measure_rates(checkpoint, described, threads)
        step("our engine")
        ours = run_side(job, progress=progress)
        assert ours is not None
        answers = read_answers(Path(job.answers))
        decoding = floor.decoding_of(drawn_tokens(requests, answers))
        prefill, decode = floor.floor_seconds(
            work,
            decoding,
            matrices,
            matrix_rate=rates.matrix,
            memory_rate=rates.memory,
            bytes_per_weight=bytes_per_weight(settings.dtype),
        )
        theirs, compared = None, None
        if lm_eval_installed():
            theirs, their_answers = _lm_eval(job, requests, Path(folder), step)
            compared = compare(requests, answers, their_answers)
    return Report(
        checkpoint=str(checkpoint),
        processor=processor_name(),
        threads=threads,
        dtype=settings.dtype,
        device=described["device"],
        requests=len(requests),
        rates=rates,
        layer_weights=matrices.layer_weights,
        head_weights=matrices.head_weights,
        work=work,
        decoding=decoding,
        floor_prefill=prefill,
        floor_decode=decode,
        ours=ours,
        fraction=(prefill + decode) / ours.seconds,
        theirs=theirs,
        agreement=compared,
    )


def _lm_eval(
    job: Job, requests: Sequence[Request], folder: Path, step: Callable[[str], None]
) -> tuple[Measured, list[dict[str, Any]]]:
    few, answers = folder / "few.jsonl", folder / "theirs.jsonl"
    write_requests(few, requests[:TRIED_REQUESTS])
    step("lm-eval's best batch size")
    full = replace(job, side="lm-eval", answers=str(answers))
    # A batch that holds all there is is the same as a larger one.
    sizes = list(dict.fromkeys(min(size, len(requests)) for size in TRIED_BATCHES))
    size = best_batch(replace(full, requests=str(few)), sizes)
    step(f"lm-eval, batch size {size}")
    theirs = run_side(replace(full, batch_size=size))
    assert theirs is not None
    return theirs, read_answers(answers)


def task_requests(store: Store, lock: TaskLock, names: Sequence[str] | None, limit: int | None) -> list[Request]:
    """The distinct requests of the lock's tasks (default: all), of the first `limit` items each.

    Raises ConfigError for a task that the lock has not.
    """
    wanted = list(names or lock.tasks)
    for name in wanted:
        if name not in lock.tasks:
            raise ConfigError(
                f"no task named {name}; there are {', '.join(lock.tasks) or 'none'}",
                remedy="name one of them, or add it to [tasks] and run `eval-platform tasks sync`",
            )
    if not wanted:
        raise ConfigError("there is nothing to ask: no task is configured", remedy="see `eval-platform tasks sync`")
    found: dict[str, Request] = {}
    for name in wanted:
        for item in render(load_task(store, lock.tasks[name].task_id), limit=limit):
            found.update((request.request_id, request) for request in item.requests)
    return list(found.values())


def read_work(
    checkpoint: Path, requests: Sequence[Request], settings: RunSettings
) -> tuple[floor.Matrices, floor.Work]:
    """The model's matrices and what `requests` make of it in the window of `settings`, which are resolved."""
    from transformers import AutoTokenizer

    from eval_platform.bench.rate import read_matrices

    if settings.max_length is None:
        raise ValueError("settings must be resolved (max_length) before work can be counted")
    trusted = settings.trust_remote_code
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=trusted)
    work = floor.count_work(floor.inputs_of(requests, tokenizer, settings.max_length))
    return read_matrices(checkpoint, trusted), work


def drawn_tokens(requests: Sequence[Request], ours: Sequence[dict[str, Any]]) -> list[int]:
    """How many tokens each completion has, by our engine's count."""
    pairs = zip(requests, ours, strict=True)
    return [answer["n_tokens"] for request, answer in pairs if request.kind == "generate"]


def bytes_per_weight(dtype: str) -> int:
    return {"float32": 4, "bfloat16": 2, "float16": 2}[dtype]
