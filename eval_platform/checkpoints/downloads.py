"""How does a checkpoint come from a bucket or the hub to this machine? Once for all workers, into a bounded cache.

In the cache folder (one per machine):
    downloads/<id of address and fingerprint>/   its files; one that is under way is <name>.<boot>.part, and goes on
                                                 where it stopped, after a kill too
    downloads/<the same>.lock                    held together by all who use the folder, alone by who fills or
                                                 removes it

What is longest unused goes first when room is needed, and never what a living process uses.
"""

import errno
import fcntl
import os
import random
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from eval_platform.checkpoints.buckets import BucketListing, Source, bucket_listing, inspect_bucket
from eval_platform.checkpoints.hashing import Meter, remember
from eval_platform.checkpoints.hub import HubFolder
from eval_platform.checkpoints.remote import source_at, unfit
from eval_platform.config import S3
from eval_platform.errors import CheckpointChanged, CheckpointError, CheckpointGone
from eval_platform.identity import content_id
from eval_platform.store.base import Entry
from eval_platform.values import Arrival

CHUNK_BYTES = 16 << 20
_FILES_AT_ONCE = 4


def fetch(arrival: Arrival, cache: Path, settings: S3, metered: Callable[[int], Meter]) -> tuple[Path, int]:
    """(a folder with the arrival's model-defining files, a descriptor): the files stay until it is closed.

    metered: bytes in all -> the Meter that is told of them. Every range is of the very object that was listed, of the
    length that was asked for; what comes from the hub has the hash that the hub tells. Raises CheckpointError when it
    is not whole or may not be read, CheckpointGone, CheckpointChanged when the bucket no longer holds what arrived,
    StoreError when it cannot be read, OSError when the cache cannot be written.
    """
    source = source_at(arrival.uri, settings)
    listing = bucket_listing(source, "")
    if not listing.defining:
        raise CheckpointGone(
            f"{arrival.uri} was deleted before it was evaluated", remedy="keep checkpoints longer in the bucket"
        )
    changed = CheckpointChanged(
        f"{arrival.uri} is no longer what arrived as {arrival.key}@{arrival.n}",
        remedy="it is looked at again and, if it differs, evaluated as a new arrival",
    )
    # The address of an arrival from the hub names a commit, which cannot change.
    if not isinstance(source, HubFolder) and listing.fingerprint != arrival.fingerprint:
        raise changed
    return _fetch(source, listing, arrival.uri, cache, settings, metered, changed, "")


def fetch_base(uri: str, adapter: str, cache: Path, settings: S3, metered: Callable[[int], Meter]) -> tuple[Path, int]:
    """As `fetch`, of the base model at `uri` as it is now. CheckpointError: none is there for `adapter`."""
    told = f"{adapter}: adapter_config.json: "
    source = source_at(uri, settings)
    listing = bucket_listing(source, "")
    if not listing.defining:
        raise CheckpointError(
            f"{told}there is no base model at {uri}", remedy="bring it there, or name another place in that file"
        )
    changed = CheckpointChanged(
        f"{told}the base model {uri} changed while it was downloaded", remedy="it is downloaded again by itself"
    )
    return _fetch(source, listing, uri, cache, settings, metered, changed, told)


def _fetch(
    source: Source,
    listing: BucketListing,
    uri: str,
    cache: Path,
    settings: S3,
    metered: Callable[[int], Meter],
    changed: CheckpointChanged,
    base_of: str,
) -> tuple[Path, int]:
    downloads = cache / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    folder = downloads / content_id([source.content_of if isinstance(source, HubFolder) else uri, listing.fingerprint])
    meter = metered(listing.size)
    descriptor = os.open(_lock_of(folder), os.O_CREAT | os.O_RDWR, 0o644)
    try:
        while True:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if _is_whole(folder, listing):
                break
            # Changing the lock lets go of it for a moment, either way: another may fill or remove the folder. Nobody
            # waits to have it alone: who has filled it shares it for as long as its worker works.
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                fcntl.flock(descriptor, fcntl.LOCK_UN)
                time.sleep(random.uniform(0.05, 0.15))  # in step, two could keep each other from it for ever
                continue
            found = inspect_bucket(source, listing, uri)
            reason = unfit(uri, found) if base_of else found.reason and f"{uri} cannot be evaluated: {found.reason}"
            if reason:  # it was whole when it was found: what waiting may mend has changed since
                if found.refused:
                    raise CheckpointError(f"{base_of}{reason}")
                raise CheckpointChanged(f"{base_of}{reason}", remedy="it is looked at again by itself")
            folder.mkdir(exist_ok=True)
            _make_room(downloads, folder, listing.size, round(settings.cache_gb * 1e9))
            _download(source, listing, folder, cache, meter, changed)
        meter.advance(max(0, listing.size - meter.done))
        os.utime(folder)  # used now
    except BaseException:
        os.close(descriptor)
        raise
    return folder, descriptor


def _download(
    source: Source, listing: BucketListing, folder: Path, cache: Path, meter: Meter, changed: CheckpointChanged
) -> None:
    boot = Path("/proc/sys/kernel/random/boot_id")
    # What a power cut left of a part is not to be trusted; a kill leaves what was written.
    part = f".{boot.read_text()[:8] if boot.exists() else 'unknown'}.part"
    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        under_way = [
            pool.submit(_bring, source, listing.entries[name], folder / name, part, cache, meter)
            for name in listing.defining
        ]
        try:
            for one in under_way:
                one.result()
        except KeyError:
            raise changed from None
        finally:
            for one in under_way:
                one.cancel()


def _bring(source: Source, entry: Entry, path: Path, suffix: str, cache: Path, meter: Meter) -> None:
    """Raises KeyError when the object is no longer the listed one."""
    if path.is_file():
        meter.advance(entry.size)
        return
    path.parent.mkdir(exist_ok=True)
    part = path.with_name(f"{path.name}{suffix}")
    try:
        with part.open("ab") as file:
            done = file.tell()
            meter.advance(done)
            while done < entry.size:
                chunk = source.read_listed(entry, done, min(done + CHUNK_BYTES, entry.size))
                file.write(chunk)
                done += len(chunk)
                meter.advance(len(chunk))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = error.filename or str(part)  # a full disk names no file
        raise
    digest = source.check(entry, part) if isinstance(source, HubFolder) else None
    # An old file's hash may be kept (hashing.py), and its time is the object's.
    os.utime(part, ns=(entry.modified_ns, entry.modified_ns))
    if digest is not None:
        remember(part, digest, cache)
    os.rename(part, path)


def _is_whole(folder: Path, listing: BucketListing) -> bool:
    return all((folder / name).is_file() for name in listing.defining)


def _make_room(downloads: Path, ours: Path, needed: int, limit: int) -> None:
    """Remove what is longest unused until `needed` bytes more are within `limit`, or nothing is left to remove.

    Others may be filling folders or making room at the same time: what is gone since it was seen counts nothing.
    Raises OSError where an empty disk would not hold them: sizes are what others say, and nobody's files go for that.
    """
    disk = shutil.disk_usage(downloads).total
    if needed > disk:
        raise OSError(errno.ENOSPC, f"no disk for {needed:,} bytes, it has {disk:,}", str(ours))
    others = [one for one in downloads.iterdir() if one.is_dir() and one != ours]
    sizes = {one: _bytes_in(one) for one in others}
    total = sum(sizes.values())
    for one in sorted(others, key=_used_last):
        if total + needed <= limit:
            return
        descriptor = os.open(_lock_of(one), os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                shutil.rmtree(one)
            total -= sizes[one]
        except BlockingIOError:  # in use
            continue
        finally:
            os.close(descriptor)


def _bytes_in(folder: Path) -> int:
    total = 0
    for inner, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += os.stat(os.path.join(inner, name)).st_size
    return total


def _used_last(folder: Path) -> int:
    try:
        return folder.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")
