"""What is changed in a worker of the soak: an engine in place of the model, and a word where it is in its life.

All else is the platform's own program. `obey` is called before the worker's modules are imported, in the process that
forks workers (`machine`) or, under Dagster, in every fresh interpreter (`sitecustomize`). Files in `control`:

    births.jsonl     one line a worker: its name (that of its folder), its process, its machine
    asked.jsonl      one line a request, written before it is answered: worker, weights, request_id, repeat
    phase/<worker>   what it does now; stays as it was when it is killed
    aim              whom the killer waits for: the first worker that enters this phase takes the file and dies
    deaths.jsonl     one line a kill, written before it
"""

import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.soak import truth

CONTROL = "EVAL_PLATFORM_SOAK_CONTROL"  # the folder, for a fresh interpreter

PHASES = (
    "starting",
    "staging",
    "taking a lease",
    "asking",
    "uploading a journal segment",
    "scoring",
    "uploading samples",
    "between samples and commit",
    "between log entry and commit",
    "after the commit",
)
STARTING, STAGING, LEASING, ASKING, JOURNALLING, SCORING, SAMPLES, BEFORE_COMMIT, LOGGED, COMMITTED = PHASES
_SECONDS_A_REQUEST = 0.003


def append(file: Path, record: dict[str, Any]) -> None:
    """One line, whole: a single write to the end of the file."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.write(descriptor, f"{json.dumps(record)}\n".encode())
    os.close(descriptor)


def lines(file: Path) -> list[dict[str, Any]]:
    """What `append` wrote so far; not the line that is being written."""
    text = file.read_text() if file.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


class _Life:
    """This worker, once it has begun: where it is, and whether it is to die there."""

    def __init__(self, control: Path) -> None:
        self.control = control
        self.worker = ""
        self.phase = STARTING
        self._file = -1

    def begin(self, folder: Path) -> None:
        from eval_platform.store.process import this_process

        self.worker = folder.name
        (self.control / "phase").mkdir(exist_ok=True)
        self._file = os.open(self.control / "phase" / self.worker, os.O_WRONLY | os.O_CREAT)
        append(self.control / "births.jsonl", {"worker": self.worker, "process": this_process(), "folder": str(folder)})
        self.enter(STARTING)

    def enter(self, phase: str) -> None:
        self.phase = phase
        if self._file < 0:  # not a worker, or not yet
            return
        os.pwrite(self._file, f"{phase:<40}".encode(), 0)
        try:
            aim = json.loads((self.control / "aim").read_text())
            if aim["phase"] != phase or random.random() > aim["chance"]:
                return
            (self.control / "aim").rename(self.control / f"aimed-{self.worker}")
        except FileNotFoundError:  # nobody is aimed at, or another was quicker
            return
        threading.Thread(target=self._die, args=(aim["delay"],), daemon=True).start()

    @contextmanager
    def within(self, phase: str, after: str | None = None) -> Iterator[None]:
        before = self.phase
        self.enter(phase)
        yield
        self.enter(before if after is None else after)

    def _die(self, delay: float) -> None:
        time.sleep(delay)
        append(self.control / "deaths.jsonl", {"worker": self.worker, "phase": self.phase, "how": "aimed"})
        os.kill(os.getpid(), signal.SIGKILL)


def obey(control: Path) -> None:
    """Make the workers of this process, or of its forks, obey; see the module's text."""
    control.mkdir(parents=True, exist_ok=True)
    life = _Life(control)
    from eval_platform import engine, plan

    engine.load = lambda path, settings: Stub(life, path)  # type: ignore[assignment]
    read_plan = plan.read_plan

    def begin_then_read(path: Path) -> Any:
        life.begin(path.parent)
        return read_plan(path)

    plan.read_plan = begin_then_read

    from eval_platform import checkpoints, scoring
    from eval_platform.store import commits, journal, leases, log

    def wrap(owner: Any, name: str, phase: str, after: str | None = None) -> None:
        real: Callable[..., Any] = getattr(owner, name)

        def wrapped(*args: Any, **keys: Any) -> Any:
            with life.within(phase, after):
                return real(*args, **keys)

        setattr(owner, name, wrapped)

    wrap(checkpoints, "stage", STAGING, LEASING)
    wrap(leases.LeaseWatch, "acquire", LEASING)
    wrap(journal.Journal, "append", JOURNALLING)
    wrap(scoring, "score_items", SCORING)
    wrap(commits, "write_samples", SAMPLES, BEFORE_COMMIT)
    wrap(commits, "commit", BEFORE_COMMIT, COMMITTED)
    write = log.write

    def write_entry(store: Any, kind: Any, **fields: Any) -> str:
        key = write(store, kind, **fields)
        if kind == "evaluation":
            life.enter(LOGGED)
        return key

    log.write = write_entry


class Stub:
    """In place of a model: answers by `truth` from the staged weights, and notes what it is asked."""

    def __init__(self, life: _Life, path: Path) -> None:
        from eval_platform.engine import EngineInfo

        self.life = life
        self.weights = truth.weights_digest(path)
        self.info = EngineInfo("cpu", "float32", 256, "plain", 1, 1, {}, "Stub", 512)

    def answer(self, requests: Sequence[Any]) -> Iterator[Any]:
        from eval_platform.values import Response

        self.life.enter(ASKING)
        for one in requests:
            record = {"worker": self.life.worker, "weights": self.weights, "asked": [one.request_id, one.repeat]}
            append(self.life.control / "asked.jsonl", record)
            time.sleep(_SECONDS_A_REQUEST)
            if one.kind == "generate":
                text = truth.completion(self.weights, one.context)
                yield Response(one.request_id, one.repeat, None, None, text, 1, "stop", 0)
            else:
                value = truth.log_likelihood(self.weights, one.context, one.continuation)
                yield Response(one.request_id, one.repeat, value, False, None, 1, "scored", 0)
