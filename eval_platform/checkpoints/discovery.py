"""What has arrived? Walks the roots, skips what is known, and asks each new folder whether it is whole."""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from eval_platform.checkpoints.description import compile_pattern, describe
from eval_platform.checkpoints.files import SUCCESS, evidence, list_folder
from eval_platform.checkpoints.hashing import Progress
from eval_platform.checkpoints.identification import identify
from eval_platform.checkpoints.inspection import inspect
from eval_platform.checkpoints.watch import Watch
from eval_platform.config import Root
from eval_platform.errors import CheckpointError
from eval_platform.identity import escape_key
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


@dataclass(frozen=True, slots=True)
class _Candidate:
    key: str
    root: Root
    relative: str
    folder: Path
    changed_ns: int


def discover(
    roots: Sequence[Root], known: Mapping[str, str], watch: Watch, sweep: Collection[str] = ()
) -> Iterator[Found | Incomplete]:
    """Folders under `roots` that are new or differ from what is known, those changed last first.

    known: key -> fingerprint last registered. A known folder is neither listed nor read unless its key is in `sweep`
    or it is being watched because it changed; a checkpoint that appears below a known one is so found by the sweep.
    A folder counts as complete when its files prove it and nothing of the save changed for the root's `quiet_seconds`,
    or at once when `_SUCCESS` was its last file. `watch` is brought up to date; give it again the next time. What was
    Found is found again, with no more waiting, until `known` has its fingerprint.

    Folders that cannot be listed, a missing root among them, are Incomplete and stop nothing else. Hidden folders and
    links to folders are passed over. Raises ConfigError for a root's malformed `pattern`.
    """
    for root in roots:
        if root.pattern:
            compile_pattern(root.pattern)
    look = {*sweep, *(key for key in known if key in watch)}
    candidates: list[_Candidate] = []
    for root in roots:
        for seen in _walk(root, known, look):
            if isinstance(seen, Incomplete):
                yield seen
            else:
                candidates.append(seen)
    watch.keep({candidate.key for candidate in candidates})
    candidates.sort(key=lambda candidate: (-candidate.changed_ns, candidate.key))
    for candidate in candidates:
        judged = _judge(candidate, known.get(candidate.key), watch)
        if judged is not None:
            yield judged


def _judge(candidate: _Candidate, known: str | None, watch: Watch) -> Found | Incomplete | None:
    """None when the folder is as known, or gone."""
    key, root, folder = candidate.key, candidate.root, candidate.folder
    try:
        listing = list_folder(folder)
    except FileNotFoundError:  # deleted since the walk
        watch.forget(key)
        return None
    except OSError as error:
        return _unlisted(key, folder, error)
    if listing.fingerprint == known:
        watch.forget(key)
        return None
    if root.require_success and SUCCESS not in listing.files:
        watch.forget(key)
        return Incomplete(key, str(folder), f"no {SUCCESS} yet, which root {root.name} requires")
    if not listing.sealed and watch.full and key not in watch:
        return Incomplete(key, str(folder), "waits its turn behind other new folders")
    if listing.sealed or not watch.unchanged(key, listing.activity):
        found = inspect(folder, listing)
        if not found.complete:
            watch.forget(key)
            # While a save is under way a missing tokenizer is no fault yet; only this word depends on file times.
            idle = watch.clock() - listing.last_change_ns / 1e9
            settled = listing.sealed or idle >= root.quiet_seconds
            return Incomplete(key, str(folder), found.reason, refused=found.refused and settled)
    if not listing.sealed:
        quiet = watch.note(key, listing.activity)
        if quiet < root.quiet_seconds:
            reason = f"whole, and unchanged for {quiet:.0f} of the {root.quiet_seconds:g} s that root {root.name} asks"
            return Incomplete(key, str(folder), reason)
    try:
        about = describe(folder, root.name, candidate.relative, root.pattern)
    except CheckpointError as error:
        return Incomplete(key, str(folder), str(error), refused=True)
    except OSError as error:
        return _unlisted(key, folder, error)
    return Found(key, str(folder), listing.fingerprint, about.run, about.step, about.tokens_seen, about.tags)


def _unlisted(key: str, folder: Path, error: OSError) -> Incomplete:
    return Incomplete(key, str(folder), f"{folder} cannot be read: {error.strerror}; check its rights and its mount")


def make_key(root_name: str, relative: str) -> str:
    """`<root name>/<relative path>`, escaped; the root's name alone for the root's own folder.

    Raises UnicodeEncodeError when the path is not UTF-8.
    """
    return f"{root_name}/{escape_key(relative)}" if relative else root_name


def _walk(root: Root, known: Mapping[str, str], look: Collection[str]) -> Iterator[_Candidate | Incomplete]:
    """Candidates below `root`, without entering known folders (unless in `look`)."""
    top = Path(root.path)
    stack = [("", False)]  # relative path, lies inside a checkpoint
    above: set[str] = set()  # folders that have a checkpoint below them
    config_only: list[_Candidate] = []
    while stack:
        relative, inside = stack.pop()
        folder = top / relative
        try:
            with os.scandir(folder) as entries:
                names, folders = _split(entries)
            changed_ns = folder.stat().st_mtime_ns
        except (FileNotFoundError, NotADirectoryError) as error:
            if not relative:
                reason = f"root {root.name}: {folder} is no folder; create it, or mend `path` in [[checkpoints]]"
                yield Incomplete(root.name, str(folder), f"{reason} ({error.strerror})")
            continue  # below the top: deleted while we walked
        except OSError as error:
            yield _unlisted(_reported_key(root.name, relative), folder, error)
            continue

        key = make_key(root.name, relative)
        signs = evidence(names) if key not in known or key in look else None
        candidate = _Candidate(key, root, relative, folder, changed_ns)
        if signs == "weights":
            above.update(_ancestors(relative))
            yield candidate
        elif signs == "config" and not inside:
            config_only.append(candidate)

        for name in folders:
            child = f"{relative}/{name}" if relative else name
            try:
                child_key = make_key(root.name, child)
            except UnicodeEncodeError:
                reason = "the folder's name is not UTF-8; rename it"
                yield Incomplete(_reported_key(root.name, child), ascii(str(top / child)), reason, refused=True)
                continue
            if child_key in known and child_key not in look:
                above.update(_ancestors(child))
            else:
                stack.append((child, inside or signs == "weights"))
    # A config.json above checkpoints is most often the training's own configuration: nothing to wait for.
    yield from (candidate for candidate in config_only if candidate.relative not in above)


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
    while relative:
        relative = relative.rpartition("/")[0]
        yield relative


def _reported_key(root_name: str, relative: str) -> str:
    """A key for telling about a folder whose name may not be UTF-8; never one to register."""
    return make_key(root_name, os.fsencode(relative).decode("utf-8", "backslashreplace"))


def locate(folder: Path, roots: Sequence[Root], cache: Path, progress: Progress) -> Found:
    """The checkpoint in `folder`, which a person named: no quiet period, and it may lie outside every root.

    Its key is that of the innermost root around it; outside of all, `adhoc/<folder name>-<checkpoint_id, 8 digits>`,
    for which its files are hashed here. Raises CheckpointError when there is no whole checkpoint.
    """
    folder = folder.resolve()
    try:
        found = inspect(folder)
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
        key = make_key("adhoc", f"{folder.name}-{identify(folder, cache, progress).checkpoint_id[:8]}")
        about = describe(folder, "adhoc", f"{folder.parent.name}/{folder.name}".lstrip("/"))
    return Found(key, str(folder), found.listing.fingerprint, about.run, about.step, about.tokens_seen, about.tags)
