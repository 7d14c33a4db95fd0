"""Which folders of a root may hold a checkpoint? Walks it, a folder or a part of a bucket, and skips what is known."""

import os
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval_platform.checkpoints.description import Description, describe
from eval_platform.checkpoints.files import (
    CONVERTED,
    Listing,
    evidence,
    is_trainer_state,
    is_unfinished,
    list_folder,
    unconverted,
)
from eval_platform.checkpoints.inspection import Inspection, inspect
from eval_platform.checkpoints.turns import Turns, as_prefix, in_turn, up_from
from eval_platform.config import S3, Root
from eval_platform.errors import StoreError
from eval_platform.identity import escape_key, unescape_key
from eval_platform.values import Incomplete

_LONGEST_PART = 255  # of a file's name, on every file system that holds results
_FEW = 25  # checkpoints known below a folder: with ten files each, four such folders fill a page of a listing


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
class Candidate:
    """A folder whose files say that it is, or will be, a checkpoint; or one that is to be looked at again."""

    key: str
    root: Root
    relative: str
    place: Any  # LocalPlace or buckets.BucketPlace
    changed_ns: int


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


def unlisted(key: str, uri: str, error: OSError | StoreError) -> Incomplete:
    if isinstance(error, StoreError):
        return Incomplete(key, uri, str(error))
    return Incomplete(key, uri, f"{uri} cannot be read: {error.strerror}; check its rights and its mount")


@dataclass(frozen=True, slots=True)
class _Seen:
    """One folder: its place, names of its files and of the folders worth entering."""

    place: Any
    names: list[str]
    folders: list[str]
    changed_ns: int


class Walk:
    """The folders of one root, as far as a look has come: each is visited once, however often it is asked for.

    Known folders are not entered unless their key is in `look`. `left` gets the keys of those for which there was no
    time.
    """

    def __init__(
        self, root: Root, known: Mapping[str, str], look: Collection[str], left: set[str], s3: S3 | None
    ) -> None:
        self._root, self._known, self._look, self._left = root, known, look, left
        # A buckets.BucketTree; None for a folder, of which nothing is read ahead.
        self._tree: Any = _tree(root, s3) if root.path.startswith("s3://") else None
        self._in_order = sorted(known) if self._tree is not None else []
        self._below: dict[str, list[str]] = {}  # path of a folder that was visited -> those in it worth entering
        self._with_weights: set[str] = set()
        self._above: set[str] = set()  # folders that have a checkpoint below them, or may have one
        self._converted: set[str] = set()  # folders whose `hf` is a checkpoint
        self._distributed: list[str] = []
        self._config_only: list[Candidate] = []

    def all(self) -> Iterator[Candidate | Incomplete]:
        """What is in the root."""
        yield from self._go([""])
        yield from self._at_last()

    def some(
        self, turns: Turns, changing: Iterable[str], sweep: Iterable[str], seconds: float
    ) -> Iterator[Candidate | Incomplete]:
        """What is in a bucket, as much of it as can be seen in so many seconds, and at least one folder of each:

        where something was new lately, and the keys `changing`; those of `sweep`, in their order; and the round.
        """
        now, name = time.monotonic(), self._root.name
        yield from self._visit("")
        if self._below[""]:  # else it has nothing to enter, or cannot be listed
            lively = [key for key in turns.lively if not self._is_below_known(key)]
            yield from self._go(self._paths([*lively, *changing]), now + seconds / 2)
            swept = [key for key in sweep if key in self._known and key.startswith(f"{name}/")]
            self._expect_sweep(swept)
            yield from self._go(self._paths(swept), now + seconds * 3 / 4, is_whole=True)
            yield from self._go([""], now + seconds, turns.last(name), lambda path: turns.done(name, path))
        yield from self._at_last()

    def _go(
        self,
        starts: Sequence[str],
        until: float | None = None,
        last: str = "",
        done: Callable[[str], None] | None = None,
        *,
        is_whole: bool = False,
    ) -> Iterator[Candidate | Incomplete]:
        """What is at and below the folders `starts`, each with all below it before its neighbour.

        until: of `time.monotonic`. What is not read by then is left, but one path is gone to its end; with `is_whole`,
        none of `starts` is left half. last: path of the folder behind which it begins; what is before that comes at the
        end. done: told the path of each folder that it is done with, up to the first that is left.
        """
        tops = frozenset(starts)
        stack = [(start, False) for start in reversed(starts)]  # path; whether all below it was visited
        before: list[str] = []
        has_come_to_an_end = is_cut = False
        while stack or before:
            if not stack:
                stack, before, last = [(one, False) for one in reversed(before)], [], ""
            folder, is_done = stack.pop()
            if is_done:
                if done is not None and not is_cut:
                    done(folder)
                continue
            if not self._is_at_hand(folder):
                is_late = has_come_to_an_end and until is not None and time.monotonic() > until
                if is_late and not (is_whole and folder not in tops):
                    self._left.add(make_key(self._root.name, folder))
                    self._above.update(_ancestors(folder))  # there may be a checkpoint below it
                    is_cut = True
                    continue
                self._tree.read(as_prefix(folder), map(as_prefix, self._next_to(folder, stack)), until)
            level, at_hand = _depth(folder), [(folder, False)]
            # With it the others on its level that are at hand, so that what lies in them can be read at once.
            while stack and (stack[-1][1] or (_depth(stack[-1][0]) == level and self._is_at_hand(stack[-1][0]))):
                at_hand.append(stack.pop())
            following: list[tuple[str, bool]] = []
            for one, is_done in at_hand:
                if not is_done:
                    if one not in self._below:
                        yield from self._visit(one)
                        has_come_to_an_end |= not self._below[one]
                    now, earlier = in_turn(self._below[one], last)
                    before += earlier
                    following += ((child, False) for child in now)
                following.append((one, True))
            stack += reversed(following)

    def _is_at_hand(self, folder: str) -> bool:
        return self._tree is None or folder in self._below or self._tree.has(as_prefix(folder))

    def _next_to(self, folder: str, stack: Sequence[tuple[str, bool]]) -> Iterator[str]:
        """Those that will be visited after `folder` on its level."""
        for one, is_done in reversed(stack):
            if not is_done:
                if _depth(one) != _depth(folder):
                    return
                if one not in self._below:
                    yield one

    def _visit(self, relative: str) -> Iterator[Candidate | Incomplete]:
        root, known, look = self._root, self._known, self._look
        uri = f"{root.path}/{relative}" if relative else root.path
        entered = self._below[relative] = list[str]()
        try:
            seen = _scan_folder(root, relative) if self._tree is None else _scan_bucket(self._tree, relative)
        except (FileNotFoundError, NotADirectoryError) as error:
            if not relative:
                reason = f"root {root.name}: {uri} is no folder; create it, or mend `path` in [[checkpoints]]"
                yield Incomplete(root.name, uri, f"{reason} ({error.strerror})")
            return  # below the top: deleted while we walked
        except (OSError, StoreError) as error:
            yield unlisted(_reported_key(root.name, relative), uri, error)
            return

        key = make_key(root.name, relative)
        self._left.discard(key)
        signs = evidence(seen.names) if key not in known or key in look else None
        is_inside = not self._with_weights.isdisjoint(_ancestors(relative))
        candidate = Candidate(key, root, relative, seen.place, seen.changed_ns)
        if signs == "weights":
            self._with_weights.add(relative)
        if signs == "weights" and key not in known and _is_unfinished(relative):
            yield Incomplete(key, uri, "its name says that it is not whole yet: who writes it renames it then")
        elif signs == "weights" and (reason := too_long(key)):
            yield Incomplete(key, uri, reason, refused=True)
        elif signs == "weights":
            self._is_one(relative)
            yield candidate
        elif signs == "distributed" and not is_inside:
            self._distributed.append(relative)
        elif signs == "config" and not is_inside:
            self._config_only.append(candidate)

        for name in seen.folders:
            child = f"{relative}/{name}" if relative else name
            try:
                child_key = make_key(root.name, child)
            except UnicodeEncodeError:
                reason = "the folder's name is not UTF-8; rename it"
                yield Incomplete(_reported_key(root.name, child), ascii(f"{root.path}/{child}"), reason, refused=True)
                continue
            if child_key in known and child_key not in look:
                self._is_one(child)
            else:
                entered.append(child)
        if self._tree is not None and entered:
            small = [as_prefix(child) for child in entered if self._known_below(child) <= _FEW]
            self._tree.expect(sorted(small), [f"{as_prefix(relative)}{name}/" for name in seen.folders])

    def _is_one(self, checkpoint: str) -> None:
        self._above.update(_ancestors(checkpoint))
        parent, _, name = checkpoint.rpartition("/")
        if name == CONVERTED:
            self._converted.add(parent)

    def _at_last(self) -> Iterator[Candidate | Incomplete]:
        """What can be told of once it is known what lies below."""
        root = self._root
        for relative in self._distributed:
            parent, _, name = relative.rpartition("/")
            # transformers with FSDP keeps the shards of the model in a folder of the checkpoint, and those of the
            # optimizer in another.
            if relative not in self._above and parent not in self._converted and not is_trainer_state(name):
                uri = f"{root.path}/{relative}" if relative else root.path
                yield Incomplete(make_key(root.name, relative), uri, unconverted(uri))
                self._above.update(_ancestors(relative))
        # A config.json above checkpoints is most often the training's own configuration: nothing to wait for.
        yield from (candidate for candidate in self._config_only if candidate.relative not in self._above)

    def _paths(self, keys: Iterable[str]) -> list[str]:
        """Of those of `keys` that lie below the root. Not of one made by hand that no folder can have."""
        head, paths = f"{self._root.name}/", list[str]()
        for key in keys:
            if key.startswith(head):
                with suppress(UnicodeDecodeError):
                    path = unescape_key(key.removeprefix(head))
                    if not any(part.startswith(".") or not part for part in path.split("/")):
                        paths.append(path)
        return paths

    def _is_below_known(self, key: str) -> bool:
        return any(up in self._known and up not in self._look for up in up_from(key) if up != self._root.name)

    def _known_below(self, folder: str) -> int:
        key = make_key(self._root.name, folder)
        after = chr(ord("/") + 1)
        return bisect_left(self._in_order, f"{key}{after}") - bisect_left(self._in_order, f"{key}/")

    def _expect_sweep(self, keys: Sequence[str]) -> None:
        """What is swept lies side by side among what is known, whichever run it is in."""
        if keys:
            beside = self._in_order[bisect_left(self._in_order, keys[0]) : bisect_right(self._in_order, keys[-1])]
            self._tree.expect(map(as_prefix, self._paths(keys)), [*map(as_prefix, self._paths(beside))])


def _scan_folder(root: Root, relative: str) -> _Seen:
    folder = Path(root.path) / relative
    with os.scandir(folder) as entries:
        names, folders = _split(entries)
    return _Seen(LocalPlace(folder), names, folders, folder.stat().st_mtime_ns)


def _scan_bucket(tree: Any, relative: str) -> _Seen:
    from eval_platform.checkpoints.buckets import BucketPlace

    prefix = as_prefix(relative)
    entries = tree.level(prefix)
    names = [entry.key.removeprefix(prefix) for entry in entries]
    # "/": of a key with two slashes in a row, which is no folder that anybody made.
    shown = [name for name in names if name.strip("/") and not name.startswith(".")]
    return _Seen(
        BucketPlace(tree.store, prefix, tuple(entries)),
        [name for name in shown if not name.endswith("/")],
        [name.rstrip("/") for name in shown if name.endswith("/")],
        max((entry.modified_ns for entry in entries), default=0),
    )


def _tree(root: Root, s3: S3 | None) -> Any:
    from eval_platform.checkpoints.buckets import BucketTree  # botocore, only where a root is in a bucket
    from eval_platform.store.s3 import S3Store

    return BucketTree(S3Store(root.path, s3))


def _split(entries: Iterator[os.DirEntry[str]]) -> tuple[list[str], list[str]]:
    """Names of the files, and of the folders worth entering."""
    names: list[str] = []
    folders: list[str] = []
    for entry in entries:
        if entry.name.startswith("."):
            continue
        (folders if entry.is_dir(follow_symlinks=False) else names).append(entry.name)
    return names, folders


def _is_unfinished(relative: str) -> bool:
    above, _, name = relative.rpartition("/")
    return is_unfinished(above.rpartition("/")[2] if name == CONVERTED else name)


def _ancestors(relative: str) -> Iterator[str]:
    """The folders above it, the root's own (an empty path) last."""
    return (one.rpartition("/")[0] for one in up_from(relative))


def _depth(relative: str) -> int:
    return as_prefix(relative).count("/")


def _reported_key(root_name: str, relative: str) -> str:
    """A key for telling about a folder whose name may not be UTF-8; never one to register."""
    return make_key(root_name, os.fsencode(relative).decode("utf-8", "backslashreplace"))
