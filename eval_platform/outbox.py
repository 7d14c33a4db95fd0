"""A worker that shares no folder with its driver: its plan comes from a prefix of a bucket, and its words go there.

    <prefix>/plan.json         what is asked, written by the driver before the worker begins
    <prefix>/1.json, 2.json    what was said and printed meanwhile: lines in Dagster Pipes' envelope, an object a second
                               at most, numbered as dagster-pipes' own writer for S3 does it (PipesS3MessageWriter)

The worker is a fork of this process and works in a folder of its machine as any other does. So its words arrive also
while it is inside a call that lets none of its threads run, and after it was killed. dagster-pipes' writer is not used:
it gives up at the first request that fails, begins at 1 again in a job's second life, and no worker has that package.

Each object is created once. A job that is queued again runs this program once more on the same prefix: the new life
goes on behind the last number. A number that is taken tells the old one, cut off on a node that was given up, that it
is no longer listened to.
"""

import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from eval_platform.config import S3
from eval_platform.errors import StoreError
from eval_platform.sandbox.processes import die_with_parent
from eval_platform.store import Store

log = logging.getLogger(__name__)

PRINTED = "log_external_stream"  # Dagster Pipes' method for what a process prints
SEND_SECONDS = 1.0
# Of what was printed since the last object so much goes over, the newest.
MOST_PRINTED_BYTES = 2**18
# All tries of one request: then what has come meanwhile is looked at.
_TRY_SECONDS = 5.0
# How long a bucket that does not answer is waited for when the worker has ended; and when it was told to leave.
_LAST_SECONDS = 300.0
_LEAVE_SECONDS = 9.0


def object_name(number: int) -> str:
    return f"{number}.json"


def number_of(name: str) -> int | None:
    """None where it is no object of words."""
    stem, dot, kind = name.partition(".")
    return int(stem) if (dot, kind) == (".", "json") and stem.isdecimal() else None


@dataclass
class Outbox:
    """What lies in the worker's folder and is not in the bucket yet. said, printed: bytes that are."""

    store: Store
    folder: Path
    said: int = 0
    printed: int = 0
    is_superseded: bool = False
    _number: int | None = None  # of the next object
    _is_first: bool = True
    _unsure: bytes = b""  # an object that may have been written, its answer lost

    def send(self, *, is_all: bool = False) -> None:
        """Everything new as one object. is_all: no more comes, so that the last line need not be whole.

        Raises StoreError where the bucket does not answer: the next call tries again.
        """
        if self._unsure:
            self._write()
        if not self.is_superseded:
            self._unsure = self._new(is_all=is_all)
            if self._unsure:
                self._write()

    def _new(self, *, is_all: bool) -> bytes:
        said = _read(self.folder / "messages.jsonl", self.said)
        said = said[: said.rfind(b"\n") + 1]
        file = self.folder / "worker.log"
        left_out = max(0, file.stat().st_size - self.printed - MOST_PRINTED_BYTES)
        printed = _read(file, self.printed + left_out, MOST_PRINTED_BYTES)
        if not is_all and len(printed) < MOST_PRINTED_BYTES:
            printed = printed[: printed.rfind(b"\n") + 1]
        self.said += len(said)
        self.printed += left_out + len(printed)
        text = printed.decode(errors="replace")
        if left_out:
            text = f"[{left_out:,} bytes are left out here]\n{text}"
        return (printed_line(text) if text else b"") + said

    def _write(self) -> None:
        if self._number is None:
            names = (number_of(entry.key) for entry in self.store.list(""))
            self._number = 1 + max((number for number in names if number is not None), default=0)
        while not self.is_superseded and not self._is_there(self._number, self._unsure):
            if self._is_first:  # an earlier life was at it a moment ago
                self._number += 1
            else:
                self.is_superseded = True
                log.warning("a later life of this job speaks in %s: nothing more is sent", self.store.uri)
        self._number += 1
        self._is_first = False
        self._unsure = b""

    def _is_there(self, number: int, body: bytes) -> bool:
        """Whether the object of this number is now this one, by this request or by an earlier one."""
        name = object_name(number)
        if self.store.create(name, body):
            return True
        try:
            return self.store.read(name) == body
        except KeyError:  # removed this moment
            return False


def printed_line(text: str) -> bytes:
    """What a worker printed, in Dagster Pipes' envelope."""
    params = {"stream": "stderr", "text": text, "extras": {}}
    envelope = {"__dagster_pipes_version": "0.1", "method": PRINTED, "params": params}
    return json.dumps(envelope).encode() + b"\n"


def _read(file: Path, start: int, most: int = -1) -> bytes:
    try:
        with file.open("rb") as opened:
            opened.seek(start)
            return opened.read(most)
    except FileNotFoundError:
        return b""


def carry(address: str, s3: S3, work: Callable[[Path], NoReturn]) -> NoReturn:
    """Fetch the plan, let `work` do it in a fork and in a folder of this machine, bring its words over, end as it ends.

    SIGTERM goes on to the worker, and what it says then is brought over within 10 s of it. Raises StoreError where
    there is no plan, or no bucket.
    """
    from eval_platform.store.s3 import S3Store

    folder = Path(tempfile.mkdtemp(prefix="eval-platform-worker-"))
    try:
        _fetch_plan(S3Store(address, s3), folder)
        outbox = Outbox(S3Store(address, s3, deadline_s=_TRY_SECONDS), folder)
        code = _follow(_start(folder, work), outbox)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if code < 0:  # as the worker, so that whoever looks on is told the signal
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.stderr.flush()
    os._exit(code)


def _fetch_plan(store: Store, folder: Path) -> None:
    try:
        plan: dict[str, Any] = json.loads(store.read("plan.json"))
    except KeyError as error:
        raise StoreError(
            f"{store.uri}/plan.json is not there: it was removed, or the address is wrong",
            remedy="let the platform start it again; a bucket that removes old objects by itself must wait longer",
        ) from error
    # A folder of the driver's machine means nothing here.
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    plan["cache"] = str(Path(caches).expanduser() / "eval_platform")
    (folder / "plan.json").write_text(json.dumps(plan), encoding="utf-8")


class _TooLate(BaseException):
    """The time to leave after SIGTERM is over, whatever this process is in the middle of."""


def _start(folder: Path, work: Callable[[Path], NoReturn]) -> int:
    """The worker, which ends when this process does, however that ends. From now on SIGTERM goes on to it, and raises
    _TooLate after _LEAVE_SECONDS."""
    output = os.open(folder / "worker.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    # Held back until each has a handler of its own.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    worker = os.fork()
    if worker == 0:
        die_with_parent()
        os.dup2(output, 1)
        os.dup2(output, 2)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # it may be ignored where this was started
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        try:
            work(folder)
        except BaseException:  # noqa: BLE001 -- it must never go on as its parent would
            traceback.print_exc()
        os._exit(os.EX_SOFTWARE)
    os.close(output)

    def tell(_number: int, _frame: FrameType | None) -> None:
        os.kill(worker, signal.SIGTERM)  # its number is its own until `_follow` has waited for it
        if signal.getitimer(signal.ITIMER_REAL)[0] == 0:
            signal.setitimer(signal.ITIMER_REAL, _LEAVE_SECONDS)

    def leave(_number: int, _frame: FrameType | None) -> None:
        raise _TooLate

    signal.signal(signal.SIGALRM, leave)
    signal.signal(signal.SIGTERM, tell)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    return worker


def _follow(worker: int, outbox: Outbox) -> int:
    """Bring everything over until the worker has ended and all is there; its exit code, or less 0 the signal."""
    is_answering = True
    try:
        while not _ends_within(SEND_SECONDS, worker):
            is_answering = _sent(outbox, was_answering=is_answering)
        deadline = time.monotonic() + _LAST_SECONDS
        while not (is_answering := _sent(outbox, was_answering=is_answering, is_all=True)):
            if time.monotonic() > deadline:
                raise _TooLate
            time.sleep(SEND_SECONDS)
        _hear_no_more()
    except _TooLate:
        _hear_no_more()
        log.error("the worker's last words are not in %s: it does not answer", outbox.store.uri)
    return os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])


def _hear_no_more() -> None:
    for number in (signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)


def _ends_within(seconds: float, worker: int) -> bool:
    """Whether it has ended; its exit code is still there to be asked for."""
    deadline = time.monotonic() + seconds
    while os.waitid(os.P_PID, worker, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _sent(outbox: Outbox, *, was_answering: bool, is_all: bool = False) -> bool:
    """Whether the bucket answered; says so where it does no longer."""
    try:
        outbox.send(is_all=is_all)
    except StoreError as error:
        if was_answering:
            log.warning("what the worker says waits here: %s", error)
        return False
    return True
