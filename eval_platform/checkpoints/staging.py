"""Bring an arrival to local disk, so that neither its trainer's rotation nor an overwrite can spoil an evaluation.

In the cache folder (one per machine):
    downloads/                    see downloads.py
    held/<id of key and n>/       hard links made when the arrival was registered, while it waits
    staged/<random>/<checkpoint_id>/   the model as the worker loads it; beside it manifest.json and a lock, which
                                       lives as long as the process: what a killed worker left is removed by the next.
                                       Of an adapter: its base model's files with the adapter's own tokenizer over
                                       them, and the adapter itself in .adapter/
    hashes/                       see hashing.py
"""

import errno
import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from eval_platform.checkpoints.files import Listing, list_folder, role
from eval_platform.checkpoints.hashing import Meter, Progress, hash_file, read_through
from eval_platform.checkpoints.identification import identity_of
from eval_platform.checkpoints.inspection import has_vocabulary, inspect
from eval_platform.checkpoints.served import as_checkpoint
from eval_platform.config import S3
from eval_platform.errors import CheckpointChanged, CheckpointError, CheckpointGone, StoreError
from eval_platform.identity import content_id
from eval_platform.values import ADAPTER_FOLDER, Arrival, Checkpoint

# The file system will not link: another device, another owner (protected_hardlinks), too many links, not supported.
_NO_LINK = {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_MANIFEST = "manifest.json"
_BASE_FOLDER = "base"  # of a staged adapter, beside ADAPTER_FOLDER
_AGAIN = "the folder is looked at again and, if it differs, evaluated as a new arrival"

# Open lock files of this process: staged/<random> -> descriptor. The kernel lets go of them when the process ends.
_locks: dict[Path, int] = {}
# What was downloaded stays in its cache as long as its staged files are used: staged/<random> -> descriptor.
_downloads: dict[Path, list[int]] = {}


def hold(arrival: Arrival, cache: Path) -> bool:
    """Keep the arrival's model-defining files by hard links, so that it may be deleted while it waits for a worker.

    True when they are held. False where the file system will not link, or when the folder is gone or no longer what
    arrived: `stage` will then say which. Costs no bytes, but keeps the trainer's deletion from freeing any until
    `release_hold`. Raises StoreError when the cache cannot be written.
    """
    final = held_folder(arrival, cache)
    if final.is_dir():
        return True
    if "://" in arrival.uri:  # nothing to link
        return False
    source = _source(arrival)
    aside = final.with_name(f".{uuid.uuid4().hex}")
    try:
        listing = list_folder(source)
        aside.mkdir(parents=True)
        for name in listing.defining:
            if not _link(source / name, aside / name):
                return False
        # Links show what was there when they were made, which need not be what was listed.
        if list_folder(aside).fingerprint != arrival.fingerprint:
            return False
        try:
            os.rename(aside, final)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # else another process held it first
                raise
    except FileNotFoundError:
        return False
    except OSError as error:
        raise _cache_error(error, cache) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return True


def release_hold(arrival: Arrival, cache: Path) -> None:
    """Let go of what `hold` kept; nothing held is no error."""
    with _cache_errors(cache):
        _remove(held_folder(arrival, cache))


def held(cache: Path) -> frozenset[str]:
    """Names of the holds there are now, for `release_other_holds`."""
    folder = cache / "held"
    if not folder.is_dir():
        return frozenset()
    return frozenset(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))


def release_other_holds(cache: Path, among: Collection[str], wanted: Iterable[tuple[str, int]]) -> None:
    """Let go of every hold in `among` but those of the wanted arrivals (key, n).

    `among` is what `held` said before it was asked what is wanted, so that a hold made since is left alone.
    """
    with _cache_errors(cache):
        for name in set(among) - {_hold_name(key, n) for key, n in wanted}:
            _remove(cache / "held" / name)


def stage(
    arrival: Arrival,
    cache: Path,
    progress: Progress,
    *,
    trust_remote_code: bool = False,
    s3: S3 | None = None,
    holds: Path | None = None,
) -> Checkpoint:
    """The arrival's model on local disk, with its content ids: from the hold if there is one, else from its folder.

    holds: the cache of whoever holds it; None: this one.

    Hard links where the file system allows, else copies. Every byte is hashed unless this machine has read the file
    before. `progress` is told bytes done and in all. Give it back with `release`. From the hub, or a bucket which `s3`
    says how to reach, it is downloaded first, unless it is in the cache; an adapter's base model too.

    Raises CheckpointGone when the folder was deleted; CheckpointChanged when it no longer is what arrived, or changes
    while it is read; CheckpointError when it cannot be evaluated (pickle only, no tokenizer, its own Python code
    without `trust_remote_code`); StoreError when the cache cannot be written.
    """
    if arrival.served is not None:
        return as_checkpoint(arrival.served)
    s3 = s3 or S3()
    if arrival.uri.startswith(("s3://", "hf://")):
        return _stage_download(arrival, cache, progress, trust_remote_code, s3)
    held = held_folder(arrival, holds or cache)
    source = held if held.is_dir() else _source(arrival)
    return _stage_folder(arrival, source, arrival.fingerprint, cache, progress, trust_remote_code, s3)


def _stage_download(arrival: Arrival, cache: Path, progress: Progress, trust_remote_code: bool, s3: S3) -> Checkpoint:
    from eval_platform.checkpoints.downloads import fetch  # botocore, only for what lies elsewhere

    size = 0

    def metered(total: int) -> Meter:
        nonlocal size
        size = total
        return Meter(lambda done, total: progress(done, 2 * total), total)  # then every byte is read once more

    with _cache_errors(cache, arrival.uri):
        folder, descriptor = fetch(arrival, cache, s3, metered)
    try:
        as_downloaded = list_folder(folder).fingerprint
        checkpoint = _stage_folder(
            arrival,
            folder,
            as_downloaded,
            cache,
            lambda done, total: progress(size + done, size + total),
            trust_remote_code,
            s3,
        )
    except BaseException:
        os.close(descriptor)
        raise
    assert checkpoint.path is not None
    _downloads.setdefault(checkpoint.path.parent, []).append(descriptor)
    return checkpoint


def _stage_folder(
    arrival: Arrival, source: Path, fingerprint: str, cache: Path, progress: Progress, trust_remote_code: bool, s3: S3
) -> Checkpoint:
    """As `stage`, of the files in `source`, which must have this fingerprint from beginning to end."""
    try:
        listing = list_folder(source)
        _must_be(arrival, fingerprint, listing, source)
        found = inspect(source, listing, arrival.uri)
        if not found.complete and not found.refused:  # it was whole when it was found
            raise CheckpointChanged(f"{arrival.uri}: {found.reason}", remedy=_AGAIN)
        if not found.complete:
            raise CheckpointError(f"{arrival.uri} cannot be evaluated: {found.reason}")
        _must_run_without_its_own_code(source, arrival.uri, trust_remote_code)
    except FileNotFoundError as error:
        raise _gone(arrival, error) from error

    with _cache_errors(cache):
        place = _reserve(cache / "staged")
    try:
        downloaded = 0
        base_folder = Path(found.base) if found.base and "://" not in found.base else None
        if found.base and base_folder is None:
            base_folder, downloaded = _bring_base(found.base, arrival, place, cache, listing.size, progress, s3)
        if base_folder is not None:
            _must_run_without_its_own_code(base_folder, found.base or "", trust_remote_code)
        base_files = list_folder(base_folder) if base_folder else Listing({})
        meter = Meter(
            lambda done, total: progress(downloaded + done, downloaded + total), listing.size + base_files.size
        )
        incoming = place / "incoming"
        own, below = (incoming / ADAPTER_FOLDER, incoming / _BASE_FOLDER) if base_folder else (incoming, None)
        with _cache_errors(cache):
            own.mkdir(parents=True)
        # All links first: hashing takes long, and the trainer may delete the folder meanwhile. The states are taken
        # before the files are hashed, so that a change at any moment after shows in `verify_unchanged`.
        copied = {name: _bring(source / name, own / name, cache, meter) for name in listing.defining}
        states = _states(incoming, own, listing)
        base = None
        if base_folder is not None and below is not None:
            with _cache_errors(cache):
                below.mkdir()
                for name in base_files.defining:
                    _point(base_folder / name, below / name)
            states |= _states(incoming, below, base_files)
            base = identity_of({name: hash_file(below / name, cache, meter) for name in base_files.defining})
        digests = {name: digest or hash_file(own / name, cache, meter) for name, digest in copied.items()}
        _must_be(arrival, fingerprint, list_folder(own), source)
        identity = identity_of(digests, base)
        path = place / identity.checkpoint_id
        with _cache_errors(cache):
            if below is not None:
                _lay_over(incoming, below, base_files, own, listing)
            os.rename(incoming, path)
            (place / _MANIFEST).write_text(json.dumps({str(path / name): state for name, state in states.items()}))
    except FileNotFoundError as error:
        _discard(place)
        raise _gone(arrival, error) from error
    except BaseException:
        _discard(place)
        raise
    return Checkpoint(identity.checkpoint_id, identity.weights_id, path, found.kind)


def _bring_base(
    uri: str, arrival: Arrival, place: Path, cache: Path, own_size: int, progress: Progress, s3: S3
) -> tuple[Path, int]:
    """(the folder with the base model at `uri`, bytes downloaded), which stays until `place` is discarded."""
    from eval_platform.checkpoints.downloads import fetch_base

    size = 0

    def metered(total: int) -> Meter:
        nonlocal size
        size = total
        return Meter(lambda done, total: progress(done, 2 * total + own_size), total)  # all is hashed afterwards

    with _cache_errors(cache):
        folder, descriptor = fetch_base(uri, arrival.uri, cache, s3, metered)
    _downloads.setdefault(place, []).append(descriptor)
    return folder, size


def _lay_over(incoming: Path, below: Path, base: Listing, own: Path, adapter: Listing) -> None:
    """Make `incoming` the model that the adapter changes: the base's files, and what the adapter says anew.

    Where the adapter brings a tokenizer the base's is left out whole: two may have files of different names.
    """
    said_anew = [name for name in adapter.defining if role(name) not in ("weights", "index")]
    said_anew.remove("adapter_config.json")
    has_tokenizer = has_vocabulary(said_anew)
    for name in base.defining:
        if name not in said_anew and not (has_tokenizer and role(name) == "tokenizer"):
            _point(below / name, incoming / name)
    for name in said_anew:
        _point(own / name, incoming / name)


def verify_unchanged(checkpoint: Checkpoint) -> None:
    """Raises CheckpointChanged when a staged file (or one of an adapter's base) is no longer the one that was hashed.

    Compares device, inode, size and mtime: an overwrite in place shows through a hard link, a replacement does not.
    """
    if checkpoint.path is None:
        return
    try:
        files = json.loads((checkpoint.path.parent / _MANIFEST).read_bytes())
        for file, state in files.items():
            if _state(Path(file)) != state:
                raise CheckpointChanged(f"{Path(file).name} was overwritten during the evaluation", remedy=_AGAIN)
    except FileNotFoundError as error:
        raise CheckpointChanged(f"{error.filename} was deleted during the evaluation", remedy=_AGAIN) from error


def release(checkpoint: Checkpoint) -> None:
    """Remove what `stage` made; a second time is no error. A process that ends without leaves it to the next stage."""
    if checkpoint.path is not None:
        _discard(checkpoint.path.parent)


def held_folder(arrival: Arrival, cache: Path) -> Path:
    """Where `hold` keeps the arrival's files, if it does."""
    return cache / "held" / _hold_name(arrival.key, arrival.n)


def _hold_name(key: str, n: int) -> str:
    return content_id([key, n])


def _source(arrival: Arrival) -> Path:
    if "://" in arrival.uri:
        raise CheckpointError(f"{arrival.uri}: checkpoints are staged from folders, s3:// and hf:// only")
    return Path(arrival.uri)


def _must_be(arrival: Arrival, fingerprint: str, listing: Listing, source: Path) -> None:
    if listing.fingerprint == fingerprint:
        return
    if not listing.files:  # the trainer's deletion is under way: files first, then the folder
        raise FileNotFoundError(errno.ENOENT, "no files left", str(source))
    raise CheckpointChanged(f"{arrival.uri} is no longer what arrived as {arrival.key}@{arrival.n}", remedy=_AGAIN)


def _gone(arrival: Arrival, error: FileNotFoundError) -> CheckpointGone | CheckpointChanged:
    source = Path(arrival.uri)
    # What was downloaded stays while it is used: then it is a base in a folder that went.
    if "://" not in arrival.uri and (not source.is_dir() or not list_folder(source).files):
        return CheckpointGone(
            f"{arrival.uri} was deleted before it was evaluated",
            remedy="keep checkpoints longer (save_total_limit), or put the state folder on the checkpoints' file "
            "system, where hard links hold them",
        )
    return CheckpointChanged(f"{error.filename} disappeared while {arrival.uri} was staged", remedy=_AGAIN)


def _must_run_without_its_own_code(source: Path, uri: str, trust_remote_code: bool) -> None:
    """A model type that transformers does not know, defined by Python files of its own, needs a person's word."""
    if trust_remote_code or not (source / "config.json").is_file():
        return
    config = json.loads((source / "config.json").read_bytes())
    if "auto_map" not in config:
        return
    # Heavy, and needed for the few checkpoints that bring code.
    from transformers.models.auto.auto_mappings import CONFIG_MAPPING_NAMES

    if config.get("model_type") not in CONFIG_MAPPING_NAMES:
        raise CheckpointError(
            f"{uri}: config.json field auto_map: the model runs Python code of its own",
            remedy="read that code; then set trust_remote_code = true under [engine], or give --trust-remote-code",
        )


def _bring(source: Path, target: Path, cache: Path, meter: Meter) -> str | None:
    """Link one file (None), or copy it and give its SHA-256. A copy keeps the mtime: it is part of the fingerprint."""
    with _cache_errors(cache):
        if _link(source, target):
            return None
        with target.open("wb") as sink:
            digest, state = read_through(source, meter, sink)
        os.utime(target, ns=(state.st_mtime_ns, state.st_mtime_ns))
    return digest


def _link(source: Path, target: Path) -> bool:
    """False where the file system will not. Links what a symbolic link points at, never the symbolic link."""
    target.parent.mkdir(exist_ok=True)
    try:
        os.link(os.path.realpath(source), target)
    except OSError as error:
        if error.errno in _NO_LINK:
            return False
        raise
    return True


def _point(source: Path, target: Path) -> None:
    """Link a file, in the one way or the other: a base model is shared by many adapters, and none is worth a copy.

    A symbolic link is relative: what is staged gets its last name when all of it is there.
    """
    if not _link(source, target):
        target.symlink_to(os.path.relpath(os.path.realpath(source), os.path.realpath(target.parent)))


def _state(file: Path) -> list[int]:
    state = file.stat()
    return [state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns]


def _states(top: Path, folder: Path, listing: Listing) -> dict[str, list[int]]:
    """Path below `top` -> state, of the files of `listing` in `folder`."""
    return {(folder / name).relative_to(top).as_posix(): _state(folder / name) for name in listing.defining}


def _reserve(staged: Path) -> Path:
    """A new folder below `staged`, locked by this process; removes the folders of processes that are no more."""
    staged.mkdir(parents=True, exist_ok=True)
    # Making a folder with its lock, and looking for unlocked ones, must not meet.
    with (staged / ".lock").open("w") as gate:
        fcntl.flock(gate, fcntl.LOCK_EX)
        for left in staged.iterdir():
            if left.is_dir() and not _is_locked(left):
                _remove(left)
        place = staged / uuid.uuid4().hex
        place.mkdir()
        descriptor = os.open(place / "lock", os.O_CREAT | os.O_RDWR, 0o644)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _locks[place] = descriptor
    return place


def _is_locked(place: Path) -> bool:
    try:
        descriptor = os.open(place / "lock", os.O_RDWR)
    except FileNotFoundError:  # its process died between making the folder and the lock
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _discard(place: Path) -> None:
    _remove(place)
    for descriptor in (*_downloads.pop(place, ()), *([_locks.pop(place)] if place in _locks else ())):
        os.close(descriptor)


def _remove(folder: Path) -> None:
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:  # removed already, or by another process at the same time
        return


@contextmanager
def _cache_errors(cache: Path, what: str = "") -> Iterator[None]:
    """A full disk or a missing right under the cache is told as that; a missing source stays FileNotFoundError.

    what: the address of what is staged, where the file's name does not say it.
    """
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise _cache_error(error, cache, what) from error


def _cache_error(error: OSError, cache: Path, what: str = "") -> StoreError:
    where = error.filename or "no file named"
    return StoreError(
        f"cannot stage {what or 'a checkpoint'} under {cache}: {error.strerror or error} ({where})",
        remedy="free space there and give this user the right to write, or set `state` to another disk",
    )
