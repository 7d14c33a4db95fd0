"""How is a worker's folder filled whose worker does not see it? From a prefix of a bucket, of the folder's own name.

The other end is `outbox.py`, which says what lies there. In the folder stands, besides what `folders.py` says:

inbox.json    where the prefix is, and how far it is read

Several drivers may follow one worker, on one machine or on many; each writes the same bytes at the same place. What was
removed from the bucket before it was read is passed over, and said in the worker's log.
"""

import json
import logging
import math
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from eval_platform.config import S3
from eval_platform.errors import StoreError
from eval_platform.launching import folders
from eval_platform.outbox import PRINTED, number_of, object_name
from eval_platform.store import Store

log = logging.getLogger(__name__)

# Seconds: between two looks at a bucket that answers, and at one that does not; how long one look may take.
LOOK_SECONDS = 1.0
AWAY_SECONDS = 5.0
_TAKE_SECONDS = 0.5
# How long an object may not come until those behind it are looked for.
GAP_SECONDS = 30.0
# How long a bucket may be silent before we stop waiting for it. The job goes on, and is found by whoever comes next.
SILENT_SECONDS = 600.0


class Silent(StoreError):
    """The bucket has not answered for SILENT_SECONDS. The worker may be well, and work on."""


@dataclass
class Inbox:
    """Fills `folder` from its prefix. number: of the next object; said, printed: bytes that are in the folder."""

    store: Store
    folder: Path
    number: int = 1
    said: int = 0
    printed: int = 0
    _look_at: float = 0.0
    _heard: float = field(default_factory=time.monotonic)
    _away: float | None = None  # since when it has not answered

    def fetch(self, *, is_all: bool = False) -> bool:
        """Write what came since the last look. True when all that is there is read: at once where `is_all`, else after
        a short while.

        Raises Silent.
        """
        began = time.monotonic()
        if began < self._look_at and not is_all:
            return False
        until = math.inf if is_all else began + _TAKE_SECONDS
        try:
            is_read = self._take(until)
            while is_read and (is_all or began - self._heard > GAP_SECONDS) and self._passes_over_a_gap():
                is_read = self._take(until)
        except StoreError as error:
            self._away = began if self._away is None else self._away
            if began - self._away > SILENT_SECONDS:
                away = f"{(began - self._away) / 60:.0f} minutes"
                raise Silent(
                    f"the worker in {self.folder} was not heard for {away}; it may work on: {error}"
                ) from error
            log.warning("what the worker in %s says cannot be read now: %s", self.folder, error)
            self._look_at = time.monotonic() + AWAY_SECONDS
            return False
        self._away = None
        self._look_at = time.monotonic() + (LOOK_SECONDS if is_read else 0.0)
        return is_read

    def _take(self, until: float) -> bool:
        """Whether the next object is not there yet."""
        while time.monotonic() < until:
            try:
                body = self.store.read(object_name(self.number))
            except KeyError:
                return True
            self._write(*split(body))
        return False

    def _write(self, said: bytes, printed: bytes) -> None:
        self.said = _write_at(self.folder / "messages.jsonl", self.said, said)
        self.printed = _write_at(self.folder / "worker.log", self.printed, printed)
        self.number += 1
        self._heard = time.monotonic()
        self.remember()

    def remember(self) -> None:
        read = {"number": self.number, "said": self.said, "printed": self.printed}
        folders.write_whole(self.folder / "inbox.json", json.dumps({"address": self.store.uri, **read}))

    def _passes_over_a_gap(self) -> bool:
        """Whether there are objects although the next is not."""
        self._heard = time.monotonic()  # looked for again after as long
        numbers = (number_of(entry.key) for entry in self.store.list(""))
        first = min((number for number in numbers if number is not None and number >= self.number), default=None)
        if first is None:
            return False
        if first > self.number:
            gone = f"[{first - self.number} of the objects in which the worker spoke are gone from {self.store.uri}]\n"
            log.warning("%s", gone.strip())
            self.printed = _write_at(self.folder / "worker.log", self.printed, gone.encode())
            self.number = first
        return True


def inbox_of(folder: Path, s3: S3) -> Inbox | None:
    """None for a folder that its worker sees."""
    try:
        known = json.loads((folder / "inbox.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    # One try: what fails is asked again at the next look, and others are followed meanwhile.
    return Inbox(_store(known.pop("address"), s3, deadline_s=0.0), folder, **known)


def address_of(folder: Path) -> str | None:
    """The prefix from which this folder is filled; None for a folder that its worker sees."""
    try:
        return json.loads((folder / "inbox.json").read_text(encoding="utf-8"))["address"]
    except FileNotFoundError:
        return None


def send_plan(folder: Path, exchange: str, s3: S3) -> None:
    """From now on this folder's worker finds its plan, and the folder is filled. Raises StoreError."""
    store = _store(f"{exchange}/{folder.name}", s3)
    store.put("plan.json", folder / "plan.json")
    Inbox(store, folder).remember()


def take_up(address: str, folder: Path, s3: S3) -> None:
    """Make the folder, where a driver on another machine had it, with those of the shards made with it.

    Nothing is made where there is no plan: it is not from here, or was forgotten. Raises StoreError.
    """
    if (folder / "plan.json").exists():
        return
    exchange = _store(address.removesuffix(f"/{folder.name}"), s3)
    names = [folder.name]
    if folders.is_shard(folder):
        made_with = f"{folder.name.rpartition('-')[0]}-"
        names = [entry.key.removesuffix("/") for entry in exchange.list(made_with, delimiter="/")]
        # Last, so that whoever finds it here finds the others too, though this driver be killed between two.
        names.sort(key=folder.name.__eq__)
    for own in map(folder.with_name, names):
        try:
            plan = exchange.read(f"{own.name}/plan.json").decode()
        except KeyError:
            continue
        own.mkdir(parents=True, exist_ok=True)
        (own / "messages.jsonl").touch()
        Inbox(_store(f"{exchange.uri}/{own.name}", s3), own).remember()
        folders.write_whole(own / "plan.json", plan)


def forget(names: Sequence[str], exchange: str, s3: S3) -> None:
    """Remove the prefixes of folders that were forgotten; what cannot be removed now stays, which is said."""
    store = _store(exchange, s3)
    try:
        with ThreadPoolExecutor(store.requests_at_once) as pool:
            for name in names:
                list(pool.map(store.delete, [entry.key for entry in store.list(f"{name}/")]))
    except StoreError as error:
        log.warning("messages of workers that are forgotten stay in the bucket: %s", error)


def _store(address: str, s3: S3, **options: float) -> Store:
    from eval_platform.store.s3 import S3Store  # botocore is a third of a second that others need not pay

    return S3Store(address, s3, **options)


def split(body: bytes) -> tuple[bytes, bytes]:
    """(the worker's messages, what it printed) of an object's lines. A line that was cut off is passed over."""
    said, printed = b"", b""
    for line in body.splitlines():
        try:
            one = json.loads(line)
            if one["method"] == PRINTED:
                printed += one["params"]["text"].encode()
            elif one["params"]["payload"]["type"]:
                said += line + b"\n"
        except (ValueError, KeyError, TypeError, AttributeError):
            log.warning("passed over what is no message: %r", line[:80])
    return said, printed


def _write_at(file: Path, start: int, text: bytes) -> int:
    """Where the text ends."""
    if text:
        opened = os.open(file, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            os.pwrite(opened, text, start)
        finally:
            os.close(opened)
    return start + len(text)
