"""A worker that is a job of a cluster's: what is the same whichever cluster it is.

The job is named after what its plan asks (`plan.launch_id`). A driver that comes again finds a living job of that name
and reads its messages from the beginning, instead of submitting another. What the worker says of its own end is
believed first; what the cluster says counts where it ended without a word, or where its last word may be that of an
earlier life: a job that is queued again runs the same program in the same folder once more, and goes on in the same
files.

The worker's folder lies on a file system that driver and nodes share, or is filled from a bucket (`inbox.py`). In it
stand beside what `folders.py` says:

job.json     the job's name or number at its cluster
ended.json   why nobody waits for it any more
"""

import json
import logging
import os
import shlex
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from eval_platform.config import S3, Config
from eval_platform.errors import EvalPlatformError, StoreError
from eval_platform.launching import folders
from eval_platform.launching.inbox import Inbox, address_of, send_plan, take_up
from eval_platform.plan import OtherRelease, Plan, launch_id, read_plan
from eval_platform.store.process import this_process

log = logging.getLogger(__name__)

# A worker leaves within 10 s after SIGTERM (docs/launchers.md): less a second for the cluster to notice.
STOP_SECONDS = 9.0
# How long a cluster may be silent before we stop waiting for it. The job goes on, and is found by whoever comes next.
SILENT_SECONDS = 600.0
# Between two questions: often while something happens, seldom while a job works for hours.
ASK_SECONDS = (1.0, 10.0)
LOOK_SECONDS = 0.1

# What a worker that was stopped leaves with; `worker.EXIT_TRY_AGAIN`, whose module no driver should have to import.
_TRY_AGAIN = os.EX_TEMPFAIL


class ClusterError(EvalPlatformError):
    """A cluster cannot be asked, or does not answer."""

    class_ = "infrastructure"


@dataclass(frozen=True)
class Told:
    """A job as its cluster tells of it: state and reason in the cluster's own words, and where it runs."""

    state: str
    reason: str = ""
    node: str = ""


ToldT = TypeVar("ToldT", bound=Told)


@dataclass
class JobHandle(ABC, Generic[ToldT]):
    """A worker that is a job, or will be; see `face.Handle`.

    told: the cluster's last answer. inbox: what fills the folder where the worker does not see it.
    """

    cluster: ClassVar[str]  # in job.json and as the type of messages: "slurm"
    waiting: ClassVar[frozenset[str]]  # states
    ended: ClassVar[frozenset[str]]
    by_itself: ClassVar[frozenset[str]]  # of those ended the ones that are the worker's own doing

    job: str
    folder: Path
    told: ToldT = field(kw_only=True)
    was_found: bool = False
    inbox: Inbox | None = field(default=None, kw_only=True)
    _changed: float = field(default_factory=time.monotonic)  # when that answer became another
    _answered: float = field(default_factory=time.monotonic)
    _ask_at: float = 0.0
    _offset: int = 0
    _unread: list[dict[str, Any]] = field(default_factory=list)
    _was_heard: bool = False
    _end: int | None = None  # what the worker of the present life said of its end
    _code: int | None = None
    _stopped: bool = False

    @abstractmethod
    def _look_up(self) -> ToldT:
        """What the cluster says of it now. Raises ClusterError when it says nothing."""

    @abstractmethod
    def _end_it(self) -> None:
        """As `stop`, of a job that may still be there."""

    @abstractmethod
    def _in_words(self) -> tuple[str, str]:
        """(what happened, what can be done) where it did not end by its worker's own word."""

    def _unsent(self) -> str:
        """Where a person finds what a worker printed that never reached its bucket."""
        return "its cluster's own log"

    def _never(self) -> tuple[str, str] | None:
        """(why, what can be done) of a job that would wait for ever; None for any other."""
        return None

    def poll(self) -> int | None:
        """The worker's own exit code; 1 where it ended without a word; None while it waits or runs.

        Raises ClusterError when the cluster has not answered for SILENT_SECONDS, Silent when the bucket has not.
        """
        if self._code is None:
            self._read()
            if self._end not in (None, _TRY_AGAIN):
                self._has_ended("its worker said so")
            elif time.monotonic() >= self._ask_at:
                self._ask()
                # With what was written between the last look and the end.
                if self.told.state in self.ended and self._read(is_all=True):
                    self._has_ended(self.told.state)
        return self._code

    def messages(self) -> Iterator[list[dict[str, Any]]]:
        """What the worker said and printed, and at each change what the cluster says: a message of its own type, or
        `slot` while the job waits.

        Where the cluster ended it, or it ended without a word, a last `failed` says why and what can be done.
        """
        yield [self._says("found again: its driver had ended" if self.was_found else "submitted")]
        shown: ToldT | None = None
        printed = 0
        ends = False
        while not ends:
            ends = self.poll() is not None
            news: list[dict[str, Any]] = []
            if self.told != shown and not ends:
                shown = self.told
                news.append(self._waits() if shown.state in self.waiting else self._says(shown.state.lower()))
            words, printed = folders.log_from(self.folder, printed, is_all=ends)
            news += [*words, *self._unread]
            self._unread = []
            if not ends and shown is not None and (never := self._never()) is not None:
                self.stop()
                news.append(_failed(*never))
                ends = True
            elif ends and self._ended_without_a_word():
                news.append(_failed(*self._why()))
            yield news
            if not ends:
                time.sleep(LOOK_SECONDS)

    def stop(self) -> None:
        """A job that waits is cancelled; a worker that runs is asked to leave, and killed when it does not.

        Raises ClusterError when the cluster does not do so: the job may then go on, and is found again. Where the
        worker speaks through a bucket that is away it is stopped all the same, and its last words are not heard.
        """
        try:
            if self.poll() is not None:
                return
        except StoreError as error:
            log.warning("job %s: %s", self.job, error)
        self._stopped = True
        why = "stopped by its driver"
        let_go(self.folder, self.job, why)  # before the end, so that nobody takes up what is being stopped
        try:
            self._ask()
            self._end_it()
        except BaseException:
            (self.folder / "ended.json").unlink(missing_ok=True)
            raise
        try:
            self._read(is_all=True)
        except StoreError as error:
            log.warning("job %s: %s", self.job, error)
        self._has_ended(why)

    def last_words(self, n: int = 20) -> str:
        return folders.last_words(self.folder, n)

    def ends_within(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while True:
            is_last = time.monotonic() > deadline  # before asking: a machine that stood still in between asks once more
            self._ask()
            if self.told.state in self.ended:
                return True
            if is_last:
                return False
            time.sleep(2 * LOOK_SECONDS)

    def _read(self, *, is_all: bool = False) -> bool:
        """What was said since the last look. is_all: no more comes; False where it cannot be had yet."""
        is_there = True
        if self.inbox is not None and (is_all or self.told.state not in self.waiting):  # who waits says nothing
            is_there = self.inbox.fetch(is_all=is_all)
        new, self._offset = folders.messages_from(self.folder, self._offset)
        for message in new:
            if message["type"] == "hello":  # a new life: what was said of an end was of the one before
                self._end = None
                self._was_heard = True
                if self._fills_folder():
                    processes = {"worker": {"pid": message["pid"]}, "driver": this_process()}
                    folders.write_whole(self.folder / "process.json", json.dumps(processes))
            elif message["type"] == "end":
                self._end = message["code"]
        self._unread += new
        return is_there

    def _fills_folder(self) -> bool:
        """Whether its worker, which does not see the folder, cannot say there who it is."""
        return self.inbox is not None

    def _why(self) -> tuple[str, str]:
        what, remedy = self._in_words()
        if self.inbox is not None and not self._was_heard:
            where = self.inbox.store.uri
            remedy += (
                f"; it has never written to {where}, and {self._unsent()} may say why: can the node reach the bucket?"
            )
        return what, remedy

    def _ask(self) -> None:
        now = time.monotonic()
        try:
            told = self._look_up()
        except ClusterError as error:
            if now - self._answered > SILENT_SECONDS:
                raise
            log.warning("job %s: %s", self.job, error)
            told = self.told
        else:
            self._answered = now
        if told.state != self.told.state:
            self._changed = now
        self.told = told
        shortest, longest = ASK_SECONDS
        self._ask_at = time.monotonic() + min(longest, max(shortest, (now - self._changed) / 30))

    def _has_ended(self, why: str) -> None:
        self._code = 1 if self._end is None else self._end
        let_go(self.folder, self.job, why)

    def _ended_without_a_word(self) -> bool:
        """Whether the cluster has something to say of its end that its worker has not said."""
        if self._stopped or self._end not in (None, _TRY_AGAIN):
            return False
        return self._end is None or self.told.state not in self.by_itself

    def _says(self, what: str) -> dict[str, Any]:
        where = {"node": self.told.node} if self.told.node else {}
        return {"type": self.cluster, "job": self.job, "state": what, **where, "time": time.time()}

    def _waits(self) -> dict[str, Any]:
        because = f": {self.told.reason}" if self.told.reason else ""
        reason = f"job {self.job} waits in {self.cluster.capitalize()}'s queue{because}"
        return {"type": "slot", "waiting": True, "reason": reason, "time": time.time()}


def _failed(what: str, remedy: str) -> dict[str, Any]:
    reason = str(ClusterError(what, remedy=remedy))
    return {"type": "failed", "task": None, "class": "infrastructure", "reason": reason, "time": time.time()}


def name_of(plan: Plan) -> str:
    """What the jobs of a plan are called, the same whoever submits them."""
    return f"eval-platform-{launch_id(plan)}"


def worker_command(place: str, s3: S3) -> str:
    """The worker's program for a shell of the node, where this installation must be too. place: as `place_of` says."""
    settings = s3.model_dump(exclude_defaults=True) if place.startswith("s3://") else {}
    said = ["--s3", json.dumps(settings)] if settings else []
    return shlex.join([sys.executable, "-m", "eval_platform.worker", *said, place])


def prepare(made: Sequence[Path], config: Config) -> None:
    """Ready for their workers: on the file system, or in the bucket of [worker] exchange. Raises StoreError."""
    for folder in made:
        # Made here, so that no client of a network file system remembers for a while that it is not there.
        (folder / "messages.jsonl").touch()
        if config.worker.exchange is not None:
            send_plan(folder, config.worker.exchange, config.s3)


def place_of(folder: Path) -> str:
    """Where its worker finds its plan: the folder itself, or the address from which the folder is filled."""
    return address_of(folder) or str(folder)


def folder_at(place: str, config: Config) -> Path:
    """The folder here of a job that was submitted with this one; made anew from the bucket where another machine had
    it. Raises StoreError."""
    is_there = not place.startswith("s3://") and Path(place).exists()
    if config.worker.exchange is None or is_there:
        return Path(place)
    name = place.rpartition("/")[2]
    folder = folders.workers(config) / name
    take_up(f"{config.worker.exchange}/{name}", folder, config.s3)
    return folder


def remember(folder: Path, cluster: str, job: str) -> None:
    (folder / "job.json").write_text(json.dumps({cluster: job}), encoding="utf-8")


def let_go(folder: Path, job: str, why: str) -> None:
    """From now on a job of this folder is nobody's to wait for."""
    (folder / "ended.json").write_text(json.dumps({"job": job, "why": why}), encoding="utf-8")


def submitted(config: Config, cluster: str) -> Iterator[tuple[Path, str]]:
    """Workers' folders, and their jobs at this cluster, of which no end was seen."""
    for file in folders.workers(config).glob("*/job.json"):
        with suppress(FileNotFoundError, ValueError):  # being forgotten; being written
            job = json.loads(file.read_text(encoding="utf-8")).get(cluster)
            if job is not None and not (file.parent / "ended.json").exists():
                yield file.parent, job


def may_be_waited_for(folder: Path) -> bool:
    """Whether this is a folder of ours here whose job nobody has let go of."""
    return (folder / "plan.json").exists() and not (folder / "ended.json").exists()


def is_of_another_release(folder: Path) -> bool:
    """Whether its worker would refuse the plan when its turn comes."""
    try:
        read_plan(folder / "plan.json").refuse_other_release()
    except OtherRelease:
        return True
    return False
