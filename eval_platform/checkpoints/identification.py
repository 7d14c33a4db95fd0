"""Which model is it? Content ids over the files that define it (contract section 1)."""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from eval_platform.checkpoints.files import list_folder, role
from eval_platform.checkpoints.hashing import Meter, Progress, hash_file, read_through
from eval_platform.checkpoints.inspection import inspect
from eval_platform.config import S3
from eval_platform.errors import CheckpointError, CheckpointGone
from eval_platform.identity import content_id


@dataclass(frozen=True, slots=True)
class Identity:
    """The model's content, wherever it lies and whatever it is called."""

    checkpoint_id: str
    weights_id: str


def identity_of(digests: Mapping[str, str], base: Identity | None = None) -> Identity:
    """The ids of a model from the SHA-256 of each defining file (name -> 64 hex digits).

    A full model's is the id of the sorted [name, SHA-256] pairs; an adapter's that of {"base": the base model's id,
    "files": the same pairs}.
    """

    def over(names: Iterable[str], base_id: str | None) -> str:
        pairs = [[name, digests[name]] for name in sorted(names)]
        return content_id(pairs if base_id is None else {"base": base_id, "files": pairs})

    return Identity(
        over(digests, base and base.checkpoint_id),
        over((name for name in digests if role(name) == "weights"), base and base.weights_id),
    )


def identify(folder: Path, cache: Path, progress: Progress, s3: S3 | None = None, at: str | None = None) -> Identity:
    """The ids of the whole checkpoint in `folder`, read where it lies (and, for an adapter, of its base model).

    at: its own address, where `folder` is a copy of it. A base in a bucket or on the hub is downloaded into the cache.
    Raises CheckpointError when the folder cannot be evaluated, CheckpointChanged, CheckpointGone, StoreError.
    """
    try:
        found = inspect(folder, at=at)
        if not found.complete:
            raise CheckpointError(f"{at or folder} cannot be identified: {found.reason}")
        with _base_folder(found.base, at or str(folder), cache, s3) as base_folder:
            below = list_folder(base_folder).size if base_folder else 0
            meter = Meter(progress, found.listing.size + below)
            base = identify_files(base_folder, cache, meter) if base_folder else None
            return identify_files(folder, cache, meter, base)
    except FileNotFoundError as error:
        raise CheckpointGone(f"{error.filename} was deleted while {folder} was identified") from error


@contextmanager
def _base_folder(base: str | None, adapter: str, cache: Path, s3: S3 | None) -> Iterator[Path | None]:
    if base is None or "://" not in base:
        yield Path(base) if base else None
        return
    from eval_platform.checkpoints.downloads import fetch_base

    folder, descriptor = fetch_base(base, adapter, cache, s3 or S3(), lambda total: Meter(lambda *_: None, total))
    try:
        yield folder
    finally:
        os.close(descriptor)


def identify_files(folder: Path, cache: Path, meter: Meter, base: Identity | None = None) -> Identity:
    """The ids of the whole checkpoint in `folder`, whose base has the ids `base`. Raises CheckpointChanged, OSError."""
    return identity_of({name: hash_file(folder / name, cache, meter) for name in list_folder(folder).defining}, base)


def tokenizer_id(path: Path) -> str:
    """Id over the tokenizer files and chat templates in `path`: two checkpoints that share it see the same tokens.

    An adapter without a tokenizer of its own has its base model's. Raises CheckpointError when there is none, OSError.
    """
    names = [name for name in list_folder(path).defining if role(name) == "tokenizer"]
    if not names:
        base = inspect(path).base
        if base is None or "://" in base:
            raise CheckpointError(f"{path} has no tokenizer", remedy="tokenizer.save_pretrained(folder)")
        return tokenizer_id(Path(base))
    meter = Meter(lambda done, total: None, 0)
    return content_id([[name, read_through(path / name, meter)[0]] for name in names])
