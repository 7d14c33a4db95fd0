"""SHA-256 of large files, each read once per machine while it does not change."""

import hashlib
import os
import re
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from eval_platform.errors import CheckpointChanged

Progress = Callable[[int, int], None]  # bytes done, bytes in all

_BLOCK = 8 << 20
_WORTH_CACHING = 1 << 20  # below this, reading the file costs less than keeping another
# A file may be written twice within one tick of the file system's clock and look unchanged (git calls it racy); an
# entry is only kept once the file is older than any such tick. Includes FAT's and old NFS's 2 s.
_RACY_NS = 2_000_000_000
_DIGEST = re.compile(rb"[0-9a-f]{64}")


class Meter:
    """Counts bytes for a Progress callback over several files. total: bytes in all."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0
        self._turn = threading.Lock()  # several files may be read at once
        progress(0, total)

    def advance(self, count: int) -> None:
        with self._turn:
            self.done += count
            self.progress(self.done, self.total)


def hash_file(path: Path, cache: Path, meter: Meter) -> str:
    """SHA-256 of `path`, 64 hex digits; from the cache when (device, inode, size, mtime_ns) is as it was.

    Not ctime: our own hard links and the trainer's deletion change it. Many processes may do this at once: an entry
    is written aside and renamed. Raises CheckpointChanged when the file changes while it is read, OSError.
    """
    state = path.stat()
    entry = _entry(cache, state)
    with suppress(FileNotFoundError):
        digest = entry.read_bytes()
        if _DIGEST.fullmatch(digest):  # else torn by a power cut: hash again and replace it
            meter.advance(state.st_size)
            return digest.decode()
    digest, state = read_through(path, meter)
    if state.st_size >= _WORTH_CACHING and time.time_ns() - state.st_mtime_ns > _RACY_NS:
        _keep(_entry(cache, state), digest)
    return digest


def remember(path: Path, digest: str, cache: Path) -> None:
    """Keep the SHA-256 of `path`, which was just computed, for `hash_file`. Raises OSError."""
    state = path.stat()
    if state.st_size >= _WORTH_CACHING and time.time_ns() - state.st_mtime_ns > _RACY_NS:
        _keep(_entry(cache, state), digest)


def read_through(path: Path, meter: Meter, sink: BinaryIO | None = None) -> tuple[str, os.stat_result]:
    """Read `path` once: its SHA-256 and its state, which was the same before and after; copies it to `sink` if given.

    Raises CheckpointChanged when it changed meanwhile, OSError.
    """
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        before = os.fstat(file.fileno())
        while block := file.read(_BLOCK):
            digest.update(block)
            if sink is not None:
                sink.write(block)
            meter.advance(len(block))
        after = os.fstat(file.fileno())
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise CheckpointChanged(f"{path} changed while it was read", remedy="it is looked at again once it is quiet")
    return digest.hexdigest(), after


def _entry(cache: Path, state: os.stat_result) -> Path:
    name = f"{state.st_dev:x}-{state.st_ino:x}-{state.st_size:x}-{state.st_mtime_ns:x}"
    return cache / "hashes" / f"{state.st_ino & 0xFF:02x}" / name


def _keep(entry: Path, digest: str) -> None:
    entry.parent.mkdir(parents=True, exist_ok=True)
    aside = entry.with_name(f".{uuid.uuid4().hex}")
    try:
        aside.write_bytes(digest.encode())
        os.replace(aside, entry)
    finally:
        aside.unlink(missing_ok=True)
