"""How long does one engine take for these requests? A program: `python -m eval_platform.bench.side JOB`.

It loads the model, answers, writes the answers and prints what was measured, in JSON; `processes.run_side` starts it.
"""

import gc
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eval_platform.bench.processes import Job, Measured
from eval_platform.bench.requests import read_requests
from eval_platform.importing import collector_paused
from eval_platform.values import Request, RunSettings

SAMPLES_PER_SECOND = 20
_TELL_SECONDS = 0.5

Answers = list[dict[str, Any]]


class Ours:
    """Our engine."""

    def __init__(self, job: Job) -> None:
        from eval_platform.engine import load

        self._engine = load(Path(job.checkpoint), RunSettings(**job.settings))
        self.path = self._engine.info.engine_path
        self.versions = dict(self._engine.info.versions)
        self.weight_bytes = self._engine.info.n_parameters * _itemsize(self._engine.info.dtype)

    def answer(self, requests: Sequence[Request]) -> Answers:
        answers: dict[tuple[str, int], dict[str, Any]] = {}
        told = time.monotonic()
        for response in self._engine.answer(requests):
            answers[response.request_id, response.repeat] = {
                "log_likelihood": response.log_likelihood,
                "is_greedy": response.is_greedy,
                "text": response.text,
                "n_tokens": response.n_tokens,
            }
            if time.monotonic() - told > _TELL_SECONDS:
                told = time.monotonic()
                print(json.dumps([len(answers), len(requests)]), flush=True)
        return [answers[request.request_id, request.repeat] for request in requests]

    @property
    def counters(self) -> dict[str, int]:
        """What the engine counted, where it does: an engine path need not."""
        return {name: int(count) for name, count in getattr(self._engine, "counters", {}).items()}


class LmEval:
    """lm-evaluation-harness's HFLM."""

    path = "lm-eval"
    counters: Mapping[str, int] = {}

    def __init__(self, job: Job) -> None:
        import lm_eval
        from lm_eval.models.huggingface import HFLM

        # Their registry's decorator hides the class's own signature.
        hflm: Any = HFLM
        self._lm = hflm(
            pretrained=job.checkpoint,
            backend="causal",
            device=job.settings["device"],
            dtype=job.settings["dtype"],
            max_length=job.settings["max_length"],
            batch_size=job.batch_size,
            trust_remote_code=job.settings["trust_remote_code"],
        )
        self.versions = {"lm_eval": lm_eval.__version__}
        self.weight_bytes = sum(p.nbytes for p in self._lm.model.parameters())

    def set_batch_size(self, size: int) -> None:
        self._lm.batch_size_per_gpu = size

    def answer(self, requests: Sequence[Request]) -> Answers:
        from lm_eval.api.instance import Instance

        answers: Answers = [{} for _ in requests]
        for kind, call in _CALLS.items():
            places = [i for i, request in enumerate(requests) if request.kind == kind]
            instances = [
                Instance(request_type=call, doc={}, arguments=_arguments(requests[i]), idx=0, metadata=("bench", i, 1))
                for i in places
            ]
            if instances:
                for i, answer in zip(places, getattr(self._lm, call)(instances, disable_tqdm=True), strict=True):
                    answers[i] = _answered(kind, answer)
        return answers


_CALLS: dict[str, Any] = {
    "choice": "loglikelihood",
    "rolling": "loglikelihood_rolling",
    "generate": "generate_until",
}


def _arguments(request: Request) -> tuple[Any, ...]:
    if request.kind == "choice":
        return (request.context, request.continuation)
    if request.kind == "rolling":
        return (request.context,)
    settings = request.settings
    assert settings is not None
    how: dict[str, Any] = {"until": list(settings.stop), "max_gen_toks": settings.max_new_tokens}
    if settings.temperature:
        how |= {
            "do_sample": True,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": settings.top_k,
        }
    else:
        how |= {"do_sample": False, "temperature": 0.0}
    return (request.context, how)


def _answered(kind: str, answer: Any) -> dict[str, Any]:
    if kind == "choice":
        return {"log_likelihood": answer[0], "is_greedy": bool(answer[1])}
    return {"log_likelihood": answer} if kind == "rolling" else {"text": answer}


def main(job: Job) -> None:
    requests = read_requests(Path(job.requests))
    with collector_paused():
        import torch

        _import_model_code(job)
    torch.set_num_threads(job.threads)
    on_gpu = job.settings["device"].startswith("cuda")
    before = 0 if on_gpu else _resident()
    begun = time.perf_counter()
    side = Ours(job) if job.side == "ours" else LmEval(job)
    gc.freeze()  # as the worker does
    loaded = time.perf_counter()
    cpu = time.process_time()
    with _peak_resident() as peak:
        answers = side.answer(requests)
    seconds, cpu = time.perf_counter() - loaded, time.process_time() - cpu
    most = torch.cuda.max_memory_allocated() if on_gpu else peak[0]
    with Path(job.answers).open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(answer) + "\n" for answer in answers)
    measured = Measured(
        seconds=seconds,
        cpu_seconds=cpu,
        load_seconds=loaded - begun,
        extra_bytes=most - before - side.weight_bytes,
        weight_bytes=side.weight_bytes,
        engine_path=side.path,
        batch_size=job.batch_size,
        versions={"torch": torch.__version__, **side.versions},
        counters=dict(side.counters),
    )
    print(json.dumps(asdict(measured)), flush=True)


def _import_model_code(job: Job) -> None:
    """Import what either side imports anyway, so that no package's own size counts as the model's memory."""
    import transformers
    import transformers.modeling_utils

    config = transformers.AutoConfig.from_pretrained(
        job.checkpoint, local_files_only=True, trust_remote_code=job.settings["trust_remote_code"]
    )
    if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if job.side == "lm-eval":
        import lm_eval.models.huggingface  # noqa: F401
    else:
        import eval_platform.engine.plain  # noqa: F401


@contextmanager
def _peak_resident() -> Iterator[list[int]]:
    """Within, the one number in the list is the most bytes that this process had resident so far."""
    peak, done = [_resident()], threading.Event()

    def watch() -> None:
        while not done.wait(1 / SAMPLES_PER_SECOND):
            peak[0] = max(peak[0], _resident())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()
        peak[0] = max(peak[0], _resident())


def _resident() -> int:
    """Bytes of this process in memory (proc(5), statm, second field)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _itemsize(dtype: str) -> int:
    import torch

    return getattr(torch, dtype).itemsize


if __name__ == "__main__":
    main(Job(**json.loads(sys.argv[1])))
