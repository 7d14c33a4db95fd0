"""Which slots of this machine does a worker take, and who comes first?

A slot is a locked file, and so is its part of each device: the worker inherits the locks, so the kernel frees them when
the worker ends, however it ends, and not before. Devices have locks of their own because a slot may own others after
the configuration was changed: a part of one is a range of its file's bytes, so that thirds and halves of it never
overlap, whoever of them was there first.

Whoever finds too little room stands in line, and only the first in line takes slots, all that it needs at once: nobody
holds some while waiting for more, and a large model's turn comes although small ones come all the time. In
<state>/slots:

<n>, device-<name>   the locks of slots and devices
line/<time>-<pid>    those who want slots, each file locked by its owner
"""

import fcntl
import os
import struct
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import IO, NamedTuple
from urllib.parse import quote

from eval_platform.config import Config, Worker
from eval_platform.devices import own_bytes
from eval_platform.engine.placement import has_room

_POLL_SECONDS = 0.5
# Who has not looked for so long is stopped (Ctrl-Z) and keeps nobody waiting; it has its place again when it looks.
_ASLEEP_SECONDS = 10.0
_DEVICE_BYTES = 1 << 40  # of a device's file, all parts together


class Bundle(NamedTuple):
    """Slots that own whole devices between them, each the same part. memory: of these devices, in bytes."""

    slots: tuple[int, ...]
    memory: int


@dataclass(frozen=True)
class Taken:
    """Slots that are this process's until `locks` is closed, for one worker. share: of each of the devices."""

    locks: ExitStack
    descriptors: tuple[int, ...]
    devices: tuple[str, ...]
    share: float


def take(
    config: Config,
    weights: int,
    memory: Mapping[str, int],
    waiting: Callable[[str], None] = lambda reason: None,
    *,
    others: int = 0,
) -> list[Taken]:
    """The slots of one worker, and of as many more as [worker] shards allows and are free when it has its own.

    weights: bytes of the model's, which all devices together hold (`devices_needed`). memory: bytes of each device;
    empty: nobody knows, and one slot must do. others: so many other checkpoints want a worker, each is left a slot, and
    so is each that stands in line. Nothing is returned while there is no room: `waiting` is told why, now and then.
    """
    folder = config.state_dir / "slots"
    folder.mkdir(parents=True, exist_ok=True)
    everything = bundles(config.worker, memory)
    with _in_line(folder / "line") as place:
        while True:
            if _is_first(place):
                taken = _take_free(config, weights, everything, others, behind=_behind(place))
                if taken:
                    return taken
            os.utime(place)
            waiting(_why(weights, everything))
            time.sleep(_POLL_SECONDS)


def bundles(worker: Worker, memory: Mapping[str, int]) -> list[Bundle]:
    """The slots by the devices that they own. memory: bytes of each device; one that is not there has none."""
    by_devices: dict[tuple[str, ...], list[int]] = {}
    for slot in range(worker.slots):
        by_devices.setdefault(worker.devices_of(slot), []).append(slot)
    return [Bundle(tuple(slots), sum(memory.get(name, 0) for name in devices)) for devices, slots in by_devices.items()]


def choose(weights: int, free: Collection[int], everything: Sequence[Bundle]) -> tuple[int, ...] | None:
    """The fewest free slots whose devices have room for a model: parts of one bundle, or several whole ones.

    Of bundles with equal room the one with most free slots, so that models share a device last. None: there is no room
    now. A model that nothing but all devices together holds takes all slots. weights: bytes; 0 needs one slot.
    """
    free_of = {one: [slot for slot in one.slots if slot in free] for one in everything}
    for parts in range(1, max(len(one.slots) for one in everything) + 1):
        able = [one for one in everything if len(free_of[one]) >= parts and _has_room(weights, one, parts)]
        if able:
            best = max(able, key=lambda one: len(free_of[one]))
            return tuple(free_of[best][:parts])
    if not has_room(weights, sum(one.memory for one in everything)):
        slots = tuple(slot for one in everything for slot in one.slots)
        return slots if len(slots) == len(free) else None
    whole = [one for one in everything if len(free_of[one]) == len(one.slots)]
    whole.sort(key=lambda one: -one.memory)
    for count, room in enumerate(accumulate(one.memory for one in whole), 1):
        if has_room(weights, room):
            return tuple(slot for one in whole[:count] for slot in one.slots)
    return None


def _has_room(weights: int, one: Bundle, parts: int) -> bool:
    return has_room(weights, own_bytes(one.memory, parts / len(one.slots)))


def _why(weights: int, everything: Sequence[Bundle]) -> str:
    """What a run's page says while there is no room."""
    slots = [slot for one in everything for slot in one.slots]
    needed = len(choose(weights, slots, everything) or slots)
    if needed == 1:
        return "waiting for a free device slot"
    return f"waiting for {needed} free device slots at once: the model's weights take {weights / 1e9:.1f} GB"


# -------------------------------------------------------------------------------------------------------------- locks


@dataclass(frozen=True)
class _Locked:
    locks: ExitStack
    descriptors: tuple[int, ...]


def _take_free(config: Config, weights: int, everything: Sequence[Bundle], others: int, *, behind: int) -> list[Taken]:
    free: dict[int, _Locked] = {}
    taken: list[Taken] = []
    try:
        for slot in range(config.worker.slots):
            locked = _locked(config.worker, slot, config.state_dir / "slots")
            if locked is not None:
                free[slot] = locked
        # Others may work already, and count all slots as theirs; who stands in line wants one of those that are free.
        room = min(config.worker.slots - others, len(free) - behind)
        while chosen := choose(weights, free, everything):
            taken.append(_together(config.worker, sorted(chosen), [free.pop(slot) for slot in chosen]))
            if len(taken) >= min(config.worker.shards, room // len(chosen)):
                break
    finally:
        for locked in free.values():
            locked.locks.close()
    return taken


def _together(worker: Worker, slots: Sequence[int], locked: Sequence[_Locked]) -> Taken:
    locks = ExitStack()
    for one in locked:
        locks.enter_context(one.locks)
    devices = dict.fromkeys(name for slot in slots for name in worker.devices_of(slot))
    return Taken(
        locks,
        tuple(descriptor for one in locked for descriptor in one.descriptors),
        tuple(devices),
        min(1.0, len(slots) / worker.slots_a_device),
    )


def _locked(worker: Worker, slot: int, folder: Path) -> _Locked | None:
    """The slot with its part of its devices; None while a living worker has any of it."""
    with ExitStack() as taken:
        files = [taken.enter_context((folder / str(slot)).open("ab"))]
        try:
            fcntl.flock(files[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
            for name in worker.devices_of(slot):
                files.append(taken.enter_context((folder / f"device-{quote(name, safe='')}").open("ab")))
                lock_part(
                    files[-1], slot // len(worker.devices) if worker.slots_a_device > 1 else 0, worker.slots_a_device
                )
        except BlockingIOError:
            return None
        return _Locked(taken.pop_all(), tuple(file.fileno() for file in files))


def lock_part(device: IO[bytes], part: int, parts: int) -> None:
    """Lock one of the equal parts of a device's file for as long as a copy of the descriptor is open anywhere.

    Raises BlockingIOError while somebody else has any of it.
    """
    start, end = (_DEVICE_BYTES * edge // parts for edge in (part, part + 1))
    # Linux's struct flock: type, whence, start, length, pid, which must be 0 (fcntl_locking(2), open file description)
    wanted = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, start, end - start, 0)
    fcntl.fcntl(device, fcntl.F_OFD_SETLK, wanted)


@contextmanager
def _in_line(line: Path) -> Iterator[Path]:
    """A place behind all who came before."""
    line.mkdir(exist_ok=True)
    place = line / f"{time.time_ns():020}-{os.getpid()}"
    while True:
        with place.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not place.exists():  # somebody looked before it was locked
                continue
            try:
                yield place
            finally:
                place.unlink()
            return


def _is_first(place: Path) -> bool:
    """Whether nobody waits who came before."""
    return not any(_waits(other) for other in sorted(place.parent.iterdir()) if other.name < place.name)


def _behind(place: Path) -> int:
    """How many wait who came later."""
    return sum(_waits(other) for other in place.parent.iterdir() if other.name > place.name)


def _waits(other: Path) -> bool:
    """Whether the owner of a place lives and looks now and then. A dead one's place is removed."""
    with suppress(FileNotFoundError), other.open("rb") as file:  # it has left the line
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return time.time() - other.stat().st_mtime < _ASLEEP_SECONDS
        other.unlink()
    return False
