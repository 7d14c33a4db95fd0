"""How is something timed on its own? In a fresh process, under the same environment whoever is timed."""

import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from eval_platform.errors import EvalPlatformError
from eval_platform.launching import WORKER_ENV

Side = Literal["ours", "lm-eval"]
Progress = Callable[[int, int], None]
BATCH_SIZES = (4, 8, 16, 2, 1, 32)  # the likely ones first: what is twice as slow as the best so far is cut short
_LEAST_SECONDS = 60.0  # a process that only starts, imports and loads may take so long beside others

# What a worker runs with. Both sides get the same; what the user has set wins.
_ENVIRONMENT = {**WORKER_ENV, "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True, slots=True)
class Job:
    """One side's turn. requests: a file of `requests.write_requests`; answers: the file it writes, in their order.

    settings: fields of RunSettings, resolved. batch_size is lm-eval's.
    """

    side: Side
    checkpoint: str
    requests: str
    answers: str
    settings: Mapping[str, Any]
    threads: int
    batch_size: int | None = None


@dataclass(frozen=True, slots=True)
class Measured:
    """One side's turn, after model load. seconds is wall time, cpu_seconds that of all its threads.

    extra_bytes: the most that was resident (or, on a GPU, allocated) while it answered, less what was before the
    model was loaded and less weight_bytes, the bytes of the model's weights: repacked weights count.
    """

    seconds: float
    cpu_seconds: float
    load_seconds: float
    extra_bytes: int
    weight_bytes: int
    engine_path: str
    batch_size: int | None
    versions: Mapping[str, str]
    counters: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rates:
    """matrix: FLOP/s of the best kernel over the model's own shapes. memory: bytes/s read, of the weights' size.

    kernels: which was best, by shape ("outputs x inputs").
    """

    matrix: float
    memory: float
    kernels: Mapping[str, str]


def lm_eval_installed() -> bool:
    return importlib.util.find_spec("lm_eval") is not None


def run_side(job: Job, *, progress: Progress | None = None, timeout: float | None = None) -> Measured | None:
    """Time one side. None when it took longer than `timeout` seconds, its start included.

    Raises EvalPlatformError with its last words when it fails.
    """
    found = _run("eval_platform.bench.side", asdict(job), job.threads, progress, timeout)
    return None if found is None else Measured(**found)


def measure_rates(checkpoint: Path | None, settings: Mapping[str, Any], threads: int) -> Rates:
    """The machine's rates at the shapes of the model in `checkpoint`, or, without one, of a model of usual shape."""
    job = {"checkpoint": checkpoint and str(checkpoint), "settings": dict(settings), "threads": threads}
    found = _run("eval_platform.bench.rate", job, threads)
    assert found is not None
    return Rates(**found)


def best_batch(
    job: Job, sizes: Sequence[int] = BATCH_SIZES, tried: Callable[[int, Measured | None], None] = lambda *_: None
) -> int:
    """lm-eval's fastest batch size for `job`, each of `sizes` run once; of one alone there is nothing to find."""
    if len(sizes) == 1:
        return sizes[0]
    best: tuple[float, int] | None = None
    for size in sizes:
        timeout = None if best is None else 2 * best[0] + _LEAST_SECONDS
        measured = run_side(replace(job, batch_size=size), timeout=timeout)
        tried(size, measured)
        if measured is not None and (best is None or measured.seconds < best[0]):
            best = (measured.seconds, size)
    assert best is not None
    return best[1]


def _run(
    program: str, job: Mapping[str, Any], threads: int, progress: Progress | None = None, timeout: float | None = None
) -> dict[str, Any] | None:
    """Run `python -m program` on a job. It prints [done, total] lines while it goes on, and an object at its end."""
    process = subprocess.Popen(
        [sys.executable, "-m", program, json.dumps(job)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env=_environment(threads),
    )
    assert process.stdout is not None
    assert process.stderr is not None
    # Read beside, so that a full pipe of warnings can't stop the program.
    errors: list[str] = []
    reader = threading.Thread(target=lambda stream: errors.extend(stream), args=(process.stderr,), daemon=True)
    reader.start()
    late = threading.Event()

    def end() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(timeout, end) if timeout is not None else None
    if timer is not None:
        timer.start()
    result: dict[str, Any] | None = None
    try:
        for line in process.stdout:
            if not line.startswith(("[", "{")):
                continue  # a library's own words
            try:
                told = json.loads(line)
            except ValueError:
                continue
            if isinstance(told, dict):
                result = told
            elif progress is not None:
                progress(*told)
        process.wait()
    finally:
        if timer is not None:
            timer.cancel()
        if process.poll() is None:
            process.kill()
            process.wait()
        reader.join()
    if result is not None and process.returncode == 0:
        return result
    if late.is_set():
        return None
    raise EvalPlatformError(
        f"{program} ended with {process.returncode}: {''.join(errors[-15:]).strip()}",
        remedy="see its last words; `eval-platform doctor` looks over the installation",
    )


def _environment(threads: int) -> dict[str, str]:
    counts = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    return {**_ENVIRONMENT, **os.environ, **counts}
