"""What has arrived? Walks the roots, skips what is known, and asks each new folder whether it is whole."""

import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from eval_platform.checkpoints.description import compile_pattern, describe
from eval_platform.checkpoints.files import (
    CONVERTED,
    SUCCESS,
    evidence,
    list_folder,
    unconverted,
)
from eval_platform.checkpoints.hashing import Progress
from eval_platform.checkpoints.identification import identify
from eval_platform.checkpoints.inspection import Inspection, inspect
from eval_platform.checkpoints.walk import Candidate, LocalPlace, Walk, make_key, unlisted
from eval_platform.checkpoints.watch import Watch
from eval_platform.config import S3, Root, hub_address
from eval_platform.errors import CheckpointError, StoreError
from eval_platform.values import Incomplete, Served


@dataclass(frozen=True, slots=True)
class Found:
    """A whole checkpoint, not yet numbered as an arrival."""

    key: str
    uri: str
    fingerprint: str
    run: str
    step: int | None = None
    tokens_seen: int | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    served: Served | None = None


def discover(
    roots: Sequence[Root],
    known: Mapping[str, str],
    watch: Watch,
    sweep: Collection[str] = (),
    s3: S3 | None = None,
    patience: float | None = None,
) -> Iterator[Found | Incomplete]:
    """Folders under `roots` that are new or differ from what is known, those changed last first.

    known: key -> fingerprint last registered. A known folder is neither listed nor read unless its key is in `sweep`
    or it is being watched because it changed; a checkpoint that appears below a known one is so found by the sweep.
    A folder counts as complete when its files prove it and nothing of the save changed for the root's `quiet_seconds`,
    or at once when `_SUCCESS` was its last file. `watch` is brought up to date; give it again the next time. What was
    Found is found again, with no more waiting, until `known` has its fingerprint.

    Folders that cannot be listed, a missing root among them, are Incomplete and stop nothing else. Hidden folders and
    links to folders are passed over. A root s3://bucket/prefix is looked at alike, with the settings `s3`. Of a root
    hf://org/model every branch and tag is such a folder, its commit the fingerprint: whole, with no quiet period.

    patience: seconds for listing buckets, all of them together; None: as long as it takes. Looked at is first where
    something was new lately, then `sweep`, then what else there is in turn (`Walk.some`), of each a folder at least.
    `watch.left` then has the keys of those that there was no time for.
    Raises ConfigError for a root's malformed `pattern`.
    """
    for root in roots:
        if root.pattern:
            compile_pattern(root.pattern)
    changing = [key for key in known if key in watch]
    look = {*sweep, *changing}
    candidates: list[Candidate] = []
    left: set[str] = set()
    buckets, seconds = sum(root.path.startswith("s3://") for root in roots), patience or 0.0
    for root in roots:
        if root.path.startswith("hf://"):
            yield from _revisions().look(root, known, look, s3 or S3())
            continue
        walk = Walk(root, known, look, left, s3)
        is_timed = patience is not None and root.path.startswith("s3://")
        began = time.monotonic()
        for seen in walk.some(watch.turns, changing, sweep, seconds / buckets) if is_timed else walk.all():
            if isinstance(seen, Incomplete):
                yield seen
            else:
                candidates.append(seen)
        if is_timed:  # what one does not need is for those after it
            buckets, seconds = buckets - 1, max(0.0, seconds - (time.monotonic() - began))
    watch.keep({candidate.key for candidate in candidates}, left)
    candidates.sort(key=lambda candidate: (-candidate.changed_ns, candidate.key))
    for candidate in candidates:
        judged = _judge(candidate, known.get(candidate.key), watch, s3 or S3())
        if judged is not None:
            # What stays broken or half written is no sign that its neighbours are worth a look.
            is_lively = isinstance(judged, Found) or candidate.key in watch
            if patience is not None and is_lively and candidate.key not in known:
                watch.turns.was_new(candidate.key)
            yield judged


def _judge(candidate: Candidate, known: str | None, watch: Watch, s3: S3) -> Found | Incomplete | None:
    """None when the folder is as known, or gone."""
    key, root, place = candidate.key, candidate.root, candidate.place
    try:
        return _judge_place(key, root, place, candidate.relative, known, watch, s3)
    except FileNotFoundError:  # deleted since the walk
        watch.forget(key)
        return None
    except (OSError, StoreError) as error:
        return unlisted(key, place.uri, error)


def _judge_place(
    key: str, root: Root, place: Any, relative: str, known: str | None, watch: Watch, s3: S3
) -> Found | Incomplete | None:
    listing = place.listing()
    if listing.fingerprint == known:
        watch.forget(key)
        return None
    if isinstance(place, LocalPlace):
        listing = list_folder(place.folder, opened=True)
    if root.require_success and SUCCESS not in listing.files:
        watch.forget(key)
        return Incomplete(key, place.uri, f"no {SUCCESS} yet, which root {root.name} requires")
    if not listing.sealed and watch.full and key not in watch:
        return Incomplete(key, place.uri, "waits its turn behind other new folders")
    if listing.sealed or not watch.unchanged(key, listing.activity):
        found = with_base(place.inspect(listing), s3)
        if not found.complete:
            watch.forget(key)
            # While a save is under way a missing tokenizer is no fault yet; only this word depends on file times.
            idle = watch.clock() - listing.last_change_ns / 1e9
            settled = listing.sealed or idle >= root.quiet_seconds
            return Incomplete(key, place.uri, found.reason, refused=found.refused and settled)
    if not listing.sealed:
        quiet = watch.note(key, listing.activity)
        if quiet < root.quiet_seconds:
            reason = f"whole, and unchanged for {quiet:.0f} of the {root.quiet_seconds:g} s that root {root.name} asks"
            return Incomplete(key, place.uri, reason)
    try:
        about = place.describe(listing, root.name, relative, root.pattern)
    except CheckpointError as error:
        return Incomplete(key, place.uri, str(error), refused=True)
    return Found(key, place.uri, listing.fingerprint, about.run, about.step, about.tokens_seen, about.tags)


def with_base(found: Inspection, s3: S3) -> Inspection:
    """As `remote.look_at_base`, which loads botocore, for what has a base elsewhere only."""
    if found.base is None or "://" not in found.base:
        return found
    from eval_platform.checkpoints.remote import look_at_base

    return look_at_base(found, s3)


def locate(named: Path | str, roots: Sequence[Root], cache: Path, progress: Progress, s3: S3 | None = None) -> Found:
    """The checkpoint that a person named: no quiet period is waited for.

    named: a folder, s3://bucket/path, hf://org/model@revision, or org/model@revision where no folder is called so. Its
    key is that of the innermost root around it; what is outside of all has the key
    `adhoc/<folder name>-<checkpoint_id, 8 digits>`, for which its files are hashed here (and downloaded from the hub).
    Raises CheckpointError when there is no whole checkpoint, or one in a bucket is in no root, StoreError.
    """
    if is_on_hub(str(named)):
        return _revisions().locate_revision(str(named), roots, cache, progress, s3 or S3())
    if isinstance(named, str) and named.startswith("s3://"):
        return _locate_in_bucket(named.rstrip("/"), roots, s3)
    folder = Path(named).resolve()
    try:
        folder = Path(_converted(str(folder), os.listdir(folder)))
        found = with_base(inspect(folder), s3 or S3())
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be read: {error.strerror}",
            remedy="give the folder that holds config.json and the weights",
        ) from error
    if not found.complete:
        raise CheckpointError(f"{folder} is no checkpoint to evaluate: {found.reason}")
    tops = {Path(root.path).resolve(): root for root in roots}
    around = [top for top in tops if folder.is_relative_to(top)]
    if around:
        top = max(around, key=lambda path: len(path.parts))
        root = tops[top]
        relative = "" if folder == top else folder.relative_to(top).as_posix()
        key = make_key(root.name, relative)
        about = describe(folder, root.name, relative, root.pattern)
    else:
        key = make_key("adhoc", f"{folder.name}-{identify(folder, cache, progress, s3).checkpoint_id[:8]}")
        about = describe(folder, "adhoc", f"{folder.parent.name}/{folder.name}".lstrip("/"))
    return Found(key, str(folder), found.listing.fingerprint, about.run, about.step, about.tokens_seen, about.tags)


def is_on_hub(named: str) -> bool:
    """Whether a person means the hub: hf://..., or org/model@revision where no folder is called so."""
    if named.startswith("hf://"):
        return True
    return "@" in named and hub_address(f"hf://{named}") is not None and not Path(named).exists()


def _revisions() -> ModuleType:
    from eval_platform.checkpoints import revisions  # botocore and more, only where a repository is meant

    return revisions


def _converted(uri: str, names: Collection[str]) -> str:
    """What is meant by a folder with these files and folders in it: of a torch distributed checkpoint, its copy."""
    if evidence(names) != "distributed":
        return uri
    if CONVERTED not in names:
        raise CheckpointError(f"{uri} is no checkpoint to evaluate: {unconverted(uri)}")
    return f"{uri}/{CONVERTED}"


def _locate_in_bucket(uri: str, roots: Sequence[Root], s3: S3 | None) -> Found:
    from eval_platform.checkpoints.buckets import BucketPlace
    from eval_platform.store.s3 import S3Store

    around = [root for root in roots if f"{uri}/".startswith(f"{root.path.rstrip('/')}/")]
    if not around:
        # Its content, of which a key would be made, is known only once all of it is downloaded.
        raise CheckpointError(f"{uri} is in no root of [[checkpoints]]", remedy="add one with the path of its bucket")
    root = max(around, key=lambda root: len(root.path))
    store = S3Store(root.path, s3)
    there = [entry.key.rstrip("/").rpartition("/")[2] for entry in S3Store(uri, s3).list("", delimiter="/")]
    relative = _converted(uri, there).removeprefix(root.path.rstrip("/")).strip("/")
    place = BucketPlace(store, f"{relative}/" if relative else "")
    try:
        listing = place.listing()
        found = with_base(place.inspect(listing), s3 or S3())
        if not found.complete:
            raise CheckpointError(f"{uri} is no checkpoint to evaluate: {found.reason}")
        about = place.describe(listing, root.name, relative, root.pattern)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{error.filename}: {error.strerror}", remedy="give the address that holds config.json and the weights"
        ) from error
    key = make_key(root.name, relative)
    return Found(key, place.uri, listing.fingerprint, about.run, about.step, about.tokens_seen, about.tags)
