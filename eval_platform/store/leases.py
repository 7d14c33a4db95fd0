"""Who is at work on this? A lease is held by the highest generation `<g>.json` under its name.

Only the holder rewrites `<g>.beat`. Whoever sees a beat unchanged for the ttl, by its own monotonic clock, may create
g+1; at once when the holder released it or is known dead on this machine. No wall clock is compared with anything.

A lease spares work, it does not guard the result: a holder that sleeps through a takeover may wake and go on until it
next asks `held()`. What makes one result is the commit, a file created once.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from eval_platform.errors import StoreError
from eval_platform.store import layout
from eval_platform.store.base import Store
from eval_platform.store.process import known_dead, this_process
from eval_platform.store.records import create_record, encode, find_record, read_record, utc_now

BEATS_PER_TTL = 4


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a lease: the generation, its process (see `process.this_process`), and how far it says it is."""

    generation: int
    process: Mapping[str, Any]
    since: str  # ISO 8601, UTC; for people
    beat: int
    progress: Mapping[str, Any]


class Lease:
    """A lease that this process took. `progress` (JSON values) goes out with every beat."""

    def __init__(self, store: Store, name: str, generation: int, ttl_s: float) -> None:
        self.store = store
        self.name = name
        self.generation = generation
        self.ttl_s = ttl_s
        self.progress: Mapping[str, Any] = {}
        self._count = 0
        self._beating = threading.Lock()

    def beat(self, progress: Mapping[str, Any] | None = None) -> None:
        """Show that the holder lives. Raises StoreError when it cannot be written."""
        with self._beating:
            if progress is not None:
                self.progress = progress
            self._count += 1
            body = encode({"count": self._count, "progress": dict(self.progress)})
            self.store.put(layout.lease_beat(self.name, self.generation), body)

    def held(self) -> bool:
        """Whether this generation is still the highest and not released. Looks at the store every time."""
        files = _files(self.store, self.name)
        return files.generation == self.generation and not files.released

    def release(self) -> None:
        """Let the next one in without waiting; releasing again, or after a takeover, changes nothing."""
        create_record(self.store, layout.lease_released(self.name, self.generation), {"time": utc_now()})

    @contextmanager
    def keep(self, interval_s: float | None = None) -> Iterator[None]:
        """Beat from a thread (every quarter of the ttl unless told otherwise) until the block ends, then release.

        A beat that cannot be written is tried again at the next interval: if it never succeeds others take over, which
        `held()` tells, and what made it fail (a full disk) fails the journal and the commit by name. Nor is the last
        act an error: a release that cannot be written only makes others wait, and must not hide how the work ended.
        """
        interval = self.ttl_s / BEATS_PER_TTL if interval_s is None else interval_s
        ended = threading.Event()

        def beat_until_ended() -> None:
            while not ended.wait(interval):
                try:
                    self.beat()
                except StoreError:
                    continue  # the docstring says why

        thread = threading.Thread(target=beat_until_ended, name=f"lease {self.name}", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            with suppress(StoreError):
                self.release()


class LeaseWatch:
    """What this process has seen of one lease, and since when. Look at it again and again to judge the holder."""

    def __init__(self, store: Store, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.store = store
        self.name = name
        self.beats_seen = 0  # different beats, of whichever holder
        self._clock = clock
        self._last: tuple[int, bytes] | None = None
        self._since = 0.0

    def may_take_over(self, ttl_s: float) -> bool:
        """Look once: whether the lease is free, released, its holder known dead, or silent for `ttl_s` seconds."""
        return self._free_generation(ttl_s) is not None

    def acquire(self, ttl_s: float) -> Lease | None:
        """Look once and take the lease if that is allowed; None while another holds it or was quicker."""
        generation = self._free_generation(ttl_s)
        if generation is None:
            return None
        record = {"process": this_process(), "time": utc_now()}
        if not create_record(self.store, layout.lease(self.name, generation), record):
            return None
        return Lease(self.store, self.name, generation, ttl_s)

    def _free_generation(self, ttl_s: float) -> int | None:
        """The generation that may be created now, or None."""
        files = _files(self.store, self.name)
        if files.generation == 0 or files.released:
            return files.generation + 1
        # Silence lasts from after the first reading of a beat to before the last: never longer than it truly was.
        now = self._clock()
        beat = _read_or_empty(self.store, layout.lease_beat(self.name, files.generation))
        if self._last != (files.generation, beat):
            self._last, self._since = (files.generation, beat), self._clock()
            self.beats_seen += 1
        process = read_record(self.store, layout.lease(self.name, files.generation))["process"]
        silent = now - self._since >= ttl_s
        return files.generation + 1 if silent or known_dead(process) else None


def acquire(store: Store, name: str, ttl_s: float) -> Lease | None:
    """Take the lease if it is free, released or its holder known dead on this machine; None otherwise.

    One look cannot tell silence: to take over from a holder elsewhere keep a `LeaseWatch` and let it acquire.
    """
    return LeaseWatch(store, name).acquire(ttl_s)


def holder(store: Store, name: str) -> Holder | None:
    """Who holds the lease now, alive or not; None when nobody took it or it was released."""
    files = _files(store, name)
    if files.generation == 0 or files.released:
        return None
    record = read_record(store, layout.lease(name, files.generation))
    beat = find_record(store, layout.lease_beat(name, files.generation)) or {"count": 0, "progress": {}}
    return Holder(files.generation, record["process"], record["time"], beat["count"], beat["progress"])


@dataclass(frozen=True, slots=True)
class _Files:
    generation: int  # 0: nobody ever took it
    released: bool


def _files(store: Store, name: str) -> _Files:
    folder = layout.lease_folder(name)
    found = [numbered for entry in store.list(folder, delimiter="/") if (numbered := layout.numbered(entry.key))]
    generation = max((g for g, suffix in found if suffix == ".json"), default=0)
    return _Files(generation, (generation, ".released") in found)


def _read_or_empty(store: Store, key: str) -> bytes:
    try:
        return store.read(key)
    except KeyError:
        return b""
