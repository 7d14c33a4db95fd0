"""Starts a worker process on a free device slot and reads its messages as they come.

A slot is a locked file: the worker inherits the lock, so the kernel frees the slot when the worker ends, however it
ends, and not before. A worker whose parent was killed goes on and commits; the next one finds its work done.
"""

import fcntl
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from eval_platform.config import Config
from eval_platform.nursery import Child, fork_worker
from eval_platform.plan import Plan, read_plan
from eval_platform.store.process import known_dead

log = logging.getLogger(__name__)

STOP_SECONDS = 10.0
KEPT_WORKERS = 200
# Threads that wait for each other asleep, not spinning: beside a training run (or anything else) on the same cores a
# spinning pair answered MMLU in 141 s instead of 35 s (docs/log.md). What the user has set wins.
WORKER_ENV = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "true",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # huge pages: fewer page faults in every forward
}
_POLL_SECONDS = 0.1


@dataclass
class Handle:
    """A running worker. `folder` holds plan.json, messages.jsonl and worker.log."""

    process: subprocess.Popen[bytes] | Child
    folder: Path

    @property
    def log_path(self) -> Path:
        return self.folder / "worker.log"

    def poll(self) -> int | None:
        """The exit code (negative: the signal), or None while it runs."""
        return self.process.poll()

    def messages(self) -> Iterator[list[dict[str, Any]]]:
        """What was written since the last look, never empty; ends when the worker has ended and all is read."""
        path = self.folder / "messages.jsonl"
        rest, offset = b"", 0
        while True:
            ended = self.poll() is not None  # looked at before reading, so that the last lines are not missed
            if path.exists():
                with path.open("rb") as file:
                    file.seek(offset)
                    new = file.read()
                offset += len(new)
                *lines, rest = (rest + new).split(b"\n")
                if lines:
                    yield [json.loads(line)["params"]["payload"] for line in lines]
            if ended:
                return
            time.sleep(_POLL_SECONDS)

    def stop(self) -> None:
        """Ask the worker to flush and leave; end it after STOP_SECONDS. Harmless when it has ended."""
        if self.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                log.warning("worker %s did not leave in %s s: killed", self.process.pid, STOP_SECONDS)
                self.process.kill()
                self.process.wait()

    def last_words(self, n: int = 20) -> str:
        """The end of the worker's log, for an error message."""
        if not self.log_path.exists():
            return ""
        return "\n".join(self.log_path.read_text(encoding="utf-8", errors="replace").splitlines()[-n:])


def launch(plan: Plan, config: Config, waiting: Callable[[], None] = lambda: None) -> Handle:
    """Wait for a free slot (calling `waiting` now and then), then start a worker on it."""
    workers = config.state_dir / "workers"
    folder = workers / f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"
    folder.mkdir(parents=True)
    _forget_old(workers)
    (folder / "plan.json").write_text(plan.to_json(), encoding="utf-8")
    slot = _free_slot(config, waiting)
    try:
        env = {**WORKER_ENV, **os.environ}
        process = fork_worker(config.state_dir, folder, slot.fileno(), env) or _start(folder, slot, env)
    finally:
        slot.close()  # the worker has its own copy of the lock
    return Handle(process, folder)


def _start(folder: Path, slot: IO[bytes], env: dict[str, str]) -> subprocess.Popen[bytes]:
    """A worker from nothing: the ordinary way, where no nursery runs."""
    with (folder / "worker.log").open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "eval_platform.worker", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=(slot.fileno(),),
            # A group of its own: a Ctrl-C meant for the parent reaches the worker as our orderly stop.
            start_new_session=True,
            env=env,
        )


@dataclass(frozen=True)
class Running:
    """A worker at work on this machine, as its folder tells it."""

    plan: Plan
    messages: tuple[dict[str, Any], ...]
    pid: int
    is_orphan: bool  # its driver was killed; it works on all the same


def running(config: Config) -> list[Running]:
    """The workers that live now on this machine."""
    found = []
    for folder in sorted((config.state_dir / "workers").glob("*")):
        try:
            processes = json.loads((folder / "process.json").read_text(encoding="utf-8"))
            if known_dead(processes["worker"]):
                continue
            plan = read_plan(folder / "plan.json")
            lines = (folder / "messages.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        except FileNotFoundError:  # not begun yet, or being forgotten
            continue
        messages = tuple(json.loads(line)["params"]["payload"] for line in lines if line.endswith("\n"))
        if not any(message["type"] == "end" for message in messages):
            found.append(Running(plan, messages, processes["worker"]["pid"], known_dead(processes["driver"])))
    return found


def stop_orphans(config: Config) -> int:
    """Ask the workers whose driver has ended to flush and leave; returns how many. What they did is not lost."""
    orphans = [one for one in running(config) if one.is_orphan]
    for one in orphans:
        with suppress(ProcessLookupError):  # it has ended since
            os.kill(one.pid, signal.SIGTERM)
    return len(orphans)


def _forget_old(workers: Path) -> None:
    """Keep the folders (plan, messages, log) of the last workers for people to look at, not of all that ever ran."""
    for folder in sorted(workers.glob("*"))[:-KEPT_WORKERS]:
        try:
            processes = json.loads((folder / "process.json").read_text(encoding="utf-8"))
            if not known_dead(processes["worker"]):
                continue  # one long evaluation beside many short ones
        except FileNotFoundError:
            pass  # it never began
        shutil.rmtree(folder, ignore_errors=True)  # another may be forgetting the same


def _free_slot(config: Config, waiting: Callable[[], None]) -> IO[bytes]:
    folder = config.state_dir / "slots"
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        for index in range(config.worker.slots):
            file = (folder / str(index)).open("ab")
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                continue
            return file
        waiting()
        time.sleep(5 * _POLL_SECONDS)
