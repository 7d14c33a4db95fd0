"""A worker's folder: what it is given, what it says of its work, and who it is.

plan.json        what is asked, written before the worker starts
messages.jsonl   what the worker says, a line each, in Dagster Pipes' envelope
worker.log       all else that it and its libraries print
process.json     its process and its driver's (`store/process.py`), written by the worker when it begins
job.json         of a cluster's job only: its number there
ended.json       of a cluster's job only: why nobody waits for it any more
inbox.json       where its worker does not see the folder: from where it is filled (`inbox.py`)
"""

import json
import logging
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval_platform.config import Config
from eval_platform.plan import Plan
from eval_platform.store.process import known_dead, same_machine

log = logging.getLogger(__name__)

KEPT_WORKERS = 200
_POLL_SECONDS = 0.1


def workers(config: Config) -> Path:
    """The folder of all workers' folders, whose names sort by when they were made."""
    return config.state_dir / "workers"


def make_folder(plan: Plan, config: Config) -> Path:
    """A new worker's folder with its plan."""
    return make_folders([plan], config)[0]


def make_folders(plans: Sequence[Plan], config: Config) -> list[Path]:
    """As `make_folder`, of the shards of one checkpoint: where there are several, one name with -0, -1 and so on."""
    name = f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"
    made = [workers(config) / (name if len(plans) == 1 else f"{name}-{i}") for i in range(len(plans))]
    for folder, plan in zip(made, plans, strict=True):
        folder.mkdir(parents=True)
        (folder / "plan.json").write_text(plan.to_json(), encoding="utf-8")
    return made


def write_whole(file: Path, text: str) -> None:
    """Whoever looks sees it whole, or as it was before."""
    aside = file.with_name(f"{file.name}.{uuid.uuid4().hex}")  # others may be writing the same
    aside.write_text(text, encoding="utf-8")
    aside.replace(file)


def shards(folder: Path) -> list[Path]:
    """All that were made with this one, itself among them, in their order."""
    if not is_shard(folder):
        return [folder]
    made = folder.name.rpartition("-")[0]
    return sorted(folder.parent.glob(f"{made}-*"), key=lambda one: int(one.name.rpartition("-")[2]))


def is_shard(folder: Path) -> bool:
    """Whether it was made with others, though it may be the last that is left of them."""
    return "-" in folder.name.rpartition("-")[0]


def read_messages(folder: Path) -> list[dict[str, Any]]:
    """What was said so far. Raises FileNotFoundError when the worker has not begun."""
    said = (folder / "messages.jsonl").read_bytes()
    return _payloads(said[: said.rfind(b"\n") + 1])


def follow(folder: Path, has_ended: Callable[[], bool]) -> Iterator[list[dict[str, Any]]]:
    """What was said since the last look, often nothing; ends when the worker has ended and all is read.

    What was printed in the meantime comes before it (`log_from`).
    """
    said = printed = 0
    while True:
        ended = has_ended()  # looked at before reading, so that the last lines are not missed
        words, printed = log_from(folder, printed, is_all=ended)
        messages, said = messages_from(folder, said)
        yield [*words, *messages]
        if ended:
            return
        time.sleep(_POLL_SECONDS)


def messages_from(folder: Path, offset: int) -> tuple[list[dict[str, Any]], int]:
    """What was said in whole lines from byte `offset` on, and where to read on; nothing where nothing was said yet."""
    lines = _whole_lines(folder / "messages.jsonl", offset)
    return _payloads(lines), offset + len(lines)


def _payloads(lines: bytes) -> list[dict[str, Any]]:
    """The messages of whole lines. What a worker was in the middle of when its machine failed is none: the next life of
    a cluster's job goes on in the same file, on a line of its own."""
    found = []
    for line in lines.splitlines():
        try:
            found.append(json.loads(line)["params"]["payload"])
        except ValueError:
            log.warning("passed over what is no message: %r", line[:80])
    return found


def log_from(folder: Path, offset: int, *, is_all: bool) -> tuple[list[dict[str, Any]], int]:
    """What was printed in whole lines from byte `offset` on, as at most one message `{"type": "log", "text": ...}`, and
    where to read on. is_all: no more comes, so that the last line need not be whole."""
    text = _whole_lines(folder / "worker.log", offset, is_all=is_all)
    return [{"type": "log", "text": text.decode(errors="replace")}] if text else [], offset + len(text)


def _whole_lines(path: Path, offset: int, *, is_all: bool = False) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            new = file.read()
    except FileNotFoundError:
        return b""
    return new if is_all else new[: new.rfind(b"\n") + 1]


def last_words(folder: Path, n: int = 20) -> str:
    """The last `n` lines of the worker's log; empty when there is none."""
    log = folder / "worker.log"
    if not log.exists():
        return ""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-n:])


def job(folder: Path) -> str | None:
    """A cluster's job as "slurm 71": no process for this machine to judge or to signal. None where it is none."""
    try:
        text = (folder / "job.json").read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    if not text:  # it is being written
        return "a job being submitted"
    return " ".join(f"{cluster} {number}" for cluster, number in json.loads(text).items())


def may_live(folder: Path, worker: Mapping[str, Any]) -> bool:
    """Whether the worker of this folder, with this process, may be at work still. A job is until its end was seen; a
    process of this machine is not after a restart of the machine, and else until it is known dead."""
    if job(folder) is not None:
        return not (folder / "ended.json").exists()
    return same_machine(worker) and not known_dead(worker)


def forget_old(workers: Path) -> list[str]:
    """Keep the folders (plan, messages, log) of the last workers for people to look at, not of all that ever ran.

    Returns the names of those that are gone now.
    """
    forgotten = []
    for folder in sorted(workers.glob("*"))[:-KEPT_WORKERS]:
        try:
            processes = json.loads((folder / "process.json").read_text(encoding="utf-8"))
            if may_live(folder, processes["worker"]):
                continue  # one long evaluation beside many short ones
        except FileNotFoundError:  # it never began
            if job(folder) is not None and not (folder / "ended.json").exists():
                continue  # it waits in its cluster's queue
        shutil.rmtree(folder, ignore_errors=True)  # another may be forgetting the same
        forgotten.append(folder.name)
    return forgotten
