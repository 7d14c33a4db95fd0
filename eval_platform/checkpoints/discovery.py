"""What has arrived? Walks the roots, skips what is known, and asks each new folder whether it is whole."""

import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from eval_platform.checkpoints.description import Description, compile_pattern, describe
from eval_platform.checkpoints.files import (
    CONVERTED,
    SUCCESS,
    Listing,
    evidence,
    is_trainer_state,
    is_unfinished,
    list_folder,
    unconverted,
)
from eval_platform.checkpoints.hashing import Progress
from eval_platform.checkpoints.identification import identify
from eval_platform.checkpoints.inspection import Inspection, inspect
from eval_platform.checkpoints.turns import up_from
from eval_platform.checkpoints.watch import Watch
from eval_platform.config import S3, Root, hub_address
from eval_platform.errors import CheckpointError, StoreError
from eval_platform.identity import escape_key
from eval_platform.values import Incomplete, Served

_LONGEST_PART = 255  # of a file's name, on every file system that holds results


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


@dataclass(frozen=True)
class LocalPlace:
    """A folder that may hold a checkpoint."""

    folder: Path

    @property
    def uri(self) -> str:
        return str(self.folder)

    def listing(self) -> Listing:
        return list_folder(self.folder)

    def inspect(self, listing: Listing) -> Inspection:
        return inspect(self.folder, listing)

    def describe(self, listing: Listing, root_name: str, relative: str, pattern: str | None) -> Description:
        return describe(self.folder, root_name, relative, pattern)


@dataclass(frozen=True, slots=True)
class _Candidate:
    key: str
    root: Root
    relative: str
    place: Any  # LocalPlace or buckets.BucketPlace
    changed_ns: int


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

    patience: seconds after which no more folders of a bucket are listed; None: all are, however long it takes. What is
    left comes first the next time, after what is in `look` and where something was new lately (`Watch.turns`).
    Raises ConfigError for a root's malformed `pattern`.
    """
    for root in roots:
        if root.pattern:
            compile_pattern(root.pattern)
    look = {*sweep, *(key for key in known if key in watch)}
    candidates: list[_Candidate] = []
    left: set[str] = set()
    for root in roots:
        if root.path.startswith("hf://"):
            yield from _revisions().look(root, known, look, s3 or S3())
            continue
        for seen in _walk(root, known, look, s3, watch, patience, left):
            if isinstance(seen, Incomplete):
                yield seen
            else:
                candidates.append(seen)
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


def _judge(candidate: _Candidate, known: str | None, watch: Watch, s3: S3) -> Found | Incomplete | None:
    """None when the folder is as known, or gone."""
    key, root, place = candidate.key, candidate.root, candidate.place
    try:
        return _judge_place(key, root, place, candidate.relative, known, watch, s3)
    except FileNotFoundError:  # deleted since the walk
        watch.forget(key)
        return None
    except (OSError, StoreError) as error:
        return _unlisted(key, place.uri, error)


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


def _unlisted(key: str, uri: str, error: OSError | StoreError) -> Incomplete:
    if isinstance(error, StoreError):
        return Incomplete(key, uri, str(error))
    return Incomplete(key, uri, f"{uri} cannot be read: {error.strerror}; check its rights and its mount")


def make_key(root_name: str, relative: str) -> str:
    """`<root name>/<relative path>`, escaped; the root's name alone for the root's own folder.

    Raises UnicodeEncodeError when the path is not UTF-8.
    """
    return f"{root_name}/{escape_key(relative)}" if relative else root_name


def too_long(key: str) -> str:
    """Why nothing can be recorded under `key` where results are in a folder; "" when it can."""
    longest = max(key.split("/"), key=len)
    if len(longest) <= _LONGEST_PART:
        return ""
    return (
        f"its name is too long for a key: {longest[:40]}... has {len(longest)} characters (three for each byte that is "
        f"no letter, digit, '.', '_' or '-'), {_LONGEST_PART} are possible; rename it"
    )


@dataclass(frozen=True, slots=True)
class _Seen:
    """One folder as the walk sees it: its place, names of its files and of the folders worth entering."""

    place: Any
    names: list[str]
    folders: list[str]
    changed_ns: int


# Relative path -> what is there; and what the walk calls before it enters folders: where, which ones, all there are.
# It says which of them can be entered now.
_Scan = Callable[[str], _Seen]
_WillEnter = Callable[[str, Sequence[str], Collection[str]], Collection[str]]


def _scan_folders(root: Root) -> tuple[_Scan, _WillEnter]:
    top = Path(root.path)

    def scan(relative: str) -> _Seen:
        folder = top / relative
        with os.scandir(folder) as entries:
            names, folders = _split(entries)
        return _Seen(LocalPlace(folder), names, folders, folder.stat().st_mtime_ns)

    return scan, lambda relative, folders, beside: folders


def _scan_bucket(root: Root, s3: S3 | None, patience: float | None) -> tuple[_Scan, _WillEnter]:
    from eval_platform.checkpoints.buckets import BucketPlace, BucketTree  # botocore, only where a root is in a bucket
    from eval_platform.store.s3 import S3Store

    store = S3Store(root.path, s3)
    tree = BucketTree(store)
    until = None if patience is None else time.monotonic() + patience

    def scan(relative: str) -> _Seen:
        prefix = f"{relative}/" if relative else ""
        entries = tree.level(prefix)
        names = [entry.key.removeprefix(prefix) for entry in entries]
        # "/": of a key with two slashes in a row, which is no folder that anybody made.
        shown = [name for name in names if name.strip("/") and not name.startswith(".")]
        return _Seen(
            BucketPlace(store, prefix, tuple(entries)),
            [name for name in shown if not name.endswith("/")],
            [name.rstrip("/") for name in shown if name.endswith("/")],
            max((entry.modified_ns for entry in entries), default=0),
        )

    def will_enter(relative: str, folders: Sequence[str], beside: Collection[str]) -> Collection[str]:
        prefix = f"{relative}/" if relative else ""
        all_there = [f"{prefix}{name}/" for name in beside]
        try:
            entered = tree.will_enter(prefix, [f"{folder}/" for folder in folders], all_there, until)
        except StoreError:  # each folder is listed on its own then, and says so
            return folders
        return {folder.rstrip("/") for folder in entered}

    return scan, will_enter


def _walk(
    root: Root,
    known: Mapping[str, str],
    look: Collection[str],
    s3: S3 | None,
    watch: Watch,
    patience: float | None,
    left: set[str],
) -> Iterator[_Candidate | Incomplete]:
    """Candidates below `root`, without entering known folders (unless in `look`). `left` gets the keys of the folders
    for which `patience` did not suffice.
    """
    scan, will_enter = _scan_bucket(root, s3, patience) if root.path.startswith("s3://") else _scan_folders(root)
    towards = {above for key in look for above in up_from(key)}
    stack = [("", False)]  # relative path, lies inside a checkpoint
    above: set[str] = set()  # folders that have a checkpoint below them
    converted: set[str] = set()  # folders whose `hf` is a checkpoint
    distributed: list[str] = []
    config_only: list[_Candidate] = []

    def is_one(checkpoint: str) -> None:
        above.update(_ancestors(checkpoint))
        parent, _, name = checkpoint.rpartition("/")
        if name == CONVERTED:
            converted.add(parent)

    while stack:
        relative, inside = stack.pop()
        uri = f"{root.path}/{relative}" if relative else root.path
        try:
            seen = scan(relative)
        except (FileNotFoundError, NotADirectoryError) as error:
            if not relative:
                reason = f"root {root.name}: {uri} is no folder; create it, or mend `path` in [[checkpoints]]"
                yield Incomplete(root.name, uri, f"{reason} ({error.strerror})")
            continue  # below the top: deleted while we walked
        except (OSError, StoreError) as error:
            yield _unlisted(_reported_key(root.name, relative), uri, error)
            continue

        key = make_key(root.name, relative)
        signs = evidence(seen.names) if key not in known or key in look else None
        candidate = _Candidate(key, root, relative, seen.place, seen.changed_ns)
        if signs == "weights" and key not in known and _is_unfinished(relative):
            yield Incomplete(key, uri, "its name says that it is not whole yet: who writes it renames it then")
        elif signs == "weights" and (reason := too_long(key)):
            yield Incomplete(key, uri, reason, refused=True)
        elif signs == "weights":
            is_one(relative)
            yield candidate
        elif signs == "distributed" and not inside:
            distributed.append(relative)
        elif signs == "config" and not inside:
            config_only.append(candidate)

        entered: dict[str, str] = {}  # key -> relative path
        for name in seen.folders:
            child = f"{relative}/{name}" if relative else name
            try:
                child_key = make_key(root.name, child)
            except UnicodeEncodeError:
                reason = "the folder's name is not UTF-8; rename it"
                yield Incomplete(_reported_key(root.name, child), ascii(f"{root.path}/{child}"), reason, refused=True)
                continue
            if child_key in known and child_key not in look:
                is_one(child)
            else:
                entered[child_key] = child
        wanted, others = watch.turns.order(key, entered, towards)
        groups = [wanted + others] if patience is None else [wanted, others]  # so that neither takes all of the time
        now = {
            child for group in groups for child in will_enter(relative, [entered[one] for one in group], seen.folders)
        }
        watch.turns.looked(key, others, {one for one in others if entered[one] in now})
        for one in wanted + others:
            if entered[one] in now:
                stack.append((entered[one], inside or signs == "weights"))
            else:
                left.add(one)
                above.update(_ancestors(entered[one]))  # there may be a checkpoint below it
    for relative in distributed:
        parent, _, name = relative.rpartition("/")
        # transformers with FSDP keeps the shards of the model in a folder of the checkpoint, and those of the optimizer
        # in another.
        if relative not in above and parent not in converted and not is_trainer_state(name):
            uri = f"{root.path}/{relative}" if relative else root.path
            yield Incomplete(make_key(root.name, relative), uri, unconverted(uri))
            above.update(_ancestors(relative))
    # A config.json above checkpoints is most often the training's own configuration: nothing to wait for.
    yield from (candidate for candidate in config_only if candidate.relative not in above)


def _is_unfinished(relative: str) -> bool:
    above, _, name = relative.rpartition("/")
    return is_unfinished(above.rpartition("/")[2] if name == CONVERTED else name)


def _split(entries: Iterator[os.DirEntry[str]]) -> tuple[list[str], list[str]]:
    """Names of the files, and of the folders worth entering."""
    names: list[str] = []
    folders: list[str] = []
    for entry in entries:
        if entry.name.startswith("."):
            continue
        (folders if entry.is_dir(follow_symlinks=False) else names).append(entry.name)
    return names, folders


def _ancestors(relative: str) -> Iterator[str]:
    """The folders above it, the root's own (an empty path) last."""
    return (one.rpartition("/")[0] for one in up_from(relative))


def _reported_key(root_name: str, relative: str) -> str:
    """A key for telling about a folder whose name may not be UTF-8; never one to register."""
    return make_key(root_name, os.fsencode(relative).decode("utf-8", "backslashreplace"))


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
