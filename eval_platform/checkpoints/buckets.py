"""Is there a whole checkpoint in this part of a bucket? By its listing and a few kilobytes, by the rules of a folder.

A sketch of it is made on local disk: the small files that say what the model is, each weights file with its header and
a hole where the tensors are. What judges folders (`inspection`, `description`) then judges the sketch, so that a
checkpoint in a bucket and its copy in a folder are whole, refused and described alike.
"""

import errno
import tempfile
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice, takewhile
from pathlib import Path
from typing import Protocol

from eval_platform.checkpoints.description import DESCRIBING, Description, describe
from eval_platform.checkpoints.files import MAX_JSON_BYTES, TEMPLATES_FOLDER, FileState, Listing, belongs, role
from eval_platform.checkpoints.headers import MAX_HEADER_BYTES
from eval_platform.checkpoints.inspection import Inspection, inspect
from eval_platform.errors import StoreError
from eval_platform.identity import content_id
from eval_platform.store.base import Entry
from eval_platform.store.s3 import PAGE_KEYS, S3Store

# What inspection reads, beside an index; of the rest it is enough to know that it is there.
_READ = ("config.json", "tokenizer_config.json", "adapter_config.json")
_HEADER_GUESS_BYTES = 1 << 16  # holds the headers of most shards, so that one request a file is enough
_READS_AT_ONCE = 8
_LIST_WHOLE = 4  # folders of ten files each, side by side: one request for a hundred of them instead of a hundred
_PASSED_OVER = 10  # known folders of ten files each, between two others, that are listed again to save a request
_FOLDERS_A_PAGE = 4  # a page of a thousand objects costs ten times one of a hundred folders: it must show some of them


class Source(Protocol):
    """What of a store is asked here: listings level by level, and ranges of the very objects that were listed."""

    @property
    def uri(self) -> str: ...

    def list(self, prefix: str, delimiter: str | None = None) -> Iterator[Entry]: ...

    def read_listed(self, entry: Entry, start: int = 0, end: int | None = None) -> bytes: ...


@dataclass(frozen=True)
class BucketListing(Listing):
    """The objects of one save. Nothing but size and ETag tells two versions of an object apart (contract section 1)."""

    entries: Mapping[str, Entry] = field(default_factory=dict)  # by name, relative to the checkpoint

    @cached_property
    def fingerprint(self) -> str:
        """Id over (name, size, ETag) of what defines the model."""
        return self._id_over(self.defining)

    @cached_property
    def activity(self) -> str:
        """Id that changes whenever any object of the save does."""
        return self._id_over(sorted(self.entries))[:16]

    def _id_over(self, names: Iterable[str]) -> str:
        return content_id([[name, self.entries[name].size, self.entries[name].etag] for name in names])


def bucket_listing(store: Source, prefix: str, entries: Iterable[Entry] | None = None) -> BucketListing:
    """The save below `prefix`, which is "" or ends in a slash. entries: what listing it with a delimiter has given.

    No objects below it is an empty listing. Raises StoreError.
    """
    found: dict[str, Entry] = {}
    for entry in store.list(prefix, delimiter="/") if entries is None else entries:
        if entry.key == f"{prefix}{TEMPLATES_FOLDER}/":
            found |= {inner.key.removeprefix(prefix): inner for inner in store.list(entry.key, delimiter="/")}
        else:
            found[entry.key.removeprefix(prefix)] = entry
    kept = {name: entry for name, entry in found.items() if not name.endswith("/") and belongs(name)}
    # An object appears at once: its time is that of its content and of its name.
    states = {name: FileState(one.size, one.modified_ns, one.modified_ns) for name, one in kept.items()}
    return BucketListing(states, kept)


@dataclass(frozen=True)
class BucketPlace:
    """Where a checkpoint may lie in a bucket; `prefix` is "" or ends in a slash. The face that discovery looks at."""

    store: Source
    prefix: str
    scanned: tuple[Entry, ...] | None = None  # what the walk saw here

    @property
    def uri(self) -> str:
        return f"{self.store.uri}/{self.prefix}".rstrip("/")

    def listing(self) -> BucketListing:
        """Raises FileNotFoundError when nothing is there any more, StoreError."""
        listing = bucket_listing(self.store, self.prefix, self.scanned)
        if not listing.files:
            raise FileNotFoundError(errno.ENOENT, "no objects", self.uri)
        return listing

    def inspect(self, listing: BucketListing) -> Inspection:
        return inspect_bucket(self.store, listing, self.uri)

    def describe(self, listing: BucketListing, root_name: str, relative: str, pattern: str | None) -> Description:
        """As `description.describe`; also FileNotFoundError when an object is no longer what was listed."""
        told = {name: listing.files[name] for name in DESCRIBING if name in listing.files}
        try:
            entries = {name: listing.entries[name] for name in told}
            with sketch(self.store, BucketListing(told, entries), DESCRIBING) as folder:
                return describe(folder, root_name, relative, pattern)
        except KeyError as error:
            raise FileNotFoundError(errno.ENOENT, "deleted or replaced", f"{self.uri}/{error.args[0]}") from None


class BucketTree:
    """The folders of a bucket as the walk asks for them: each on its own, or many from one listing.

    Small ones that lie side by side (new checkpoints, what the sweep looks at again) come a thousand objects a request;
    large ones (runs, most of whose checkpoints are known) level by level, several at once, since a request to a service
    far away is mostly waiting.
    """

    def __init__(self, store: S3Store) -> None:
        self.store = store
        self._read: dict[str, list[Entry] | StoreError] = {}  # prefix -> its objects and folders, of what was read
        self._stretches: dict[str, list[str]] = {}  # prefix -> small folders side by side, it among them
        self._seconds = 0.0  # what a request took lately, of several at once its share

    def has(self, prefix: str) -> bool:
        """Whether `level` needs no request."""
        return prefix in self._read

    def level(self, prefix: str) -> list[Entry]:
        """Objects, and folders as keys that end in a slash, directly below `prefix`. Raises StoreError."""
        if prefix not in self._read:
            self._read_singly([prefix])
        found = self._read.pop(prefix)
        if isinstance(found, StoreError):
            raise found
        return found

    def expect(self, folders: Iterable[str], beside: Collection[str]) -> None:
        """Small folders (prefixes) that the walk is about to ask for, most likely in this order.

        beside: all folders that lie there, those among them.
        """
        for stretch in _stretches(folders, beside):
            if len(stretch) >= _LIST_WHOLE:
                self._stretches |= dict.fromkeys(stretch, stretch)

    def read(self, prefix: str, then: Iterable[str], until: float | None = None) -> None:
        """Have the level of `prefix` ready, and of some that the walk will ask for next: more of its stretch, page by
        page until the time `until` (of `time.monotonic`); or as many of `then`, all at once, as would be read by then
        if they took turns.
        """
        stretch = self._stretches.get(prefix)
        if stretch is not None:
            unread = [*takewhile(self._stretches.__contains__, stretch[stretch.index(prefix) :])]
            found = self._whole(unread, until) if len(unread) >= _LIST_WHOLE else None
            for one in unread if found is None else found:
                self._stretches.pop(one, None)
            if found is not None:
                self._read |= found
                return
        at_most = None
        if until is not None:
            fitting = (until - time.monotonic()) / max(self._seconds, 1e-3)
            at_most = max(0, min(_READS_AT_ONCE, int(fitting)) - 1)
        singly = (one for one in then if one not in self._read and one not in self._stretches)
        self._read_singly([prefix, *islice(singly, at_most)])

    def _read_singly(self, folders: Sequence[str]) -> None:
        began = time.monotonic()
        if len(folders) == 1:
            self._read[folders[0]] = self._list(folders[0])
        else:
            with ThreadPoolExecutor(_READS_AT_ONCE) as pool:
                self._read |= zip(folders, pool.map(self._list, folders), strict=True)
        self._seconds = (time.monotonic() - began) / len(folders)

    def _list(self, prefix: str) -> list[Entry] | StoreError:
        try:
            return list(self.store.list(prefix, delimiter="/"))
        except StoreError as error:  # for `level`: it stops none of those that were read with it
            return error

    def _whole(self, folders: list[str], until: float | None) -> dict[str, list[Entry] | StoreError] | None:
        """All levels from the first of `folders` to the last, or to the one that was reached by `until`; None where a
        request for each folder costs less, or where they cannot be listed together.
        """
        tree: dict[str, dict[str, Entry]] = {folder: {} for folder in folders}
        first, last, at = folders[0], folders[-1], 0
        around = _folder_of(first[:-1])
        while not last.startswith(around):
            around = _folder_of(around[:-1])
        try:
            for n, entry in enumerate(self.store.list(around, after=first), 1):
                if entry.key > last and not entry.key.startswith(last):
                    break
                while at + 1 < len(folders) and folders[at + 1] < entry.key:
                    at += 1
                if entry.key.startswith(folders[at]):
                    parent = _folder_of(entry.key)
                    tree.setdefault(parent, {})[entry.key] = entry
                    while len(parent) > len(folders[at]):
                        folder, parent = parent, _folder_of(parent[:-1])
                        tree.setdefault(parent, {}).setdefault(folder, Entry(folder, 0, ""))
                pages, left = divmod(n, PAGE_KEYS)
                if left:
                    continue
                if pages > (at + 1) / _FOLDERS_A_PAGE:
                    return None
                if at and until is not None and time.monotonic() > until:
                    # The last one that the page shows may go on behind it.
                    tree = {one: level for one, level in tree.items() if one < folders[at]}
                    break
        except StoreError:  # each is listed on its own then, and says so
            return None
        return {folder: list(entries.values()) for folder, entries in tree.items()}


def _folder_of(key: str) -> str:
    return key[: key.rfind("/") + 1]


def _stretches(folders: Iterable[str], beside: Collection[str]) -> list[list[str]]:
    """`folders`, parted where many others lie between two of them, where a listing would have to go back, and where one
    lies in the other.
    """
    places = {folder: place for place, folder in enumerate(sorted(beside))}
    stretches: list[list[str]] = []
    for folder in folders:
        before = stretches[-1][-1] if stretches else None
        is_near = before is not None and 0 < places[folder] - places[before] <= _PASSED_OVER
        if before is None or not is_near or folder.startswith(before):
            stretches.append([])
        stretches[-1].append(folder)
    return stretches


def inspect_bucket(store: Source, listing: BucketListing, uri: str) -> Inspection:
    """What the objects at `uri` prove, no weights downloaded. Raises StoreError."""
    try:
        with sketch(store, listing) as folder:
            return inspect(folder, listing, uri)
    except KeyError as error:
        name = str(error.args[0]).rpartition("/")[2]
        kind = "transformers" if "config.json" in listing.files else "adapter"
        return Inspection(listing, kind, f"{name} was deleted or replaced while it was looked at")


@contextmanager
def sketch(store: Source, listing: BucketListing, read: Collection[str] = _READ) -> Iterator[Path]:
    """A folder that looks like the checkpoint to whoever reads no tensor, and of the other files those named in `read`
    and indices. KeyError: an object is not the listed one.
    """
    with tempfile.TemporaryDirectory(prefix="eval-platform-") as made, ThreadPoolExecutor(_READS_AT_ONCE) as pool:
        folder = Path(made)
        (folder / TEMPLATES_FOLDER).mkdir()
        for _ in pool.map(lambda name: _draw(store, listing.entries[name], folder / name, read), listing.files):
            pass
        yield folder


def _draw(store: Source, entry: Entry, path: Path, read: Collection[str]) -> None:
    # A longer one is refused by its size.
    if (path.name in read or role(path.name) == "index") and entry.size <= MAX_JSON_BYTES:
        path.write_bytes(store.read_listed(entry))
        return
    with path.open("wb") as file:
        if role(path.name) == "weights":
            file.write(_header(store, entry))
        file.truncate(entry.size)


def _header(store: Source, entry: Entry) -> bytes:
    """The first bytes of a safetensors object: its header, or enough of it to see that there is none."""
    first = store.read_listed(entry, 0, min(entry.size, _HEADER_GUESS_BYTES)) if entry.size else b""
    end = 8 + int.from_bytes(first[:8], "little")
    if len(first) < 8 or end <= len(first) or end > min(entry.size, MAX_HEADER_BYTES):
        return first
    return first + store.read_listed(entry, len(first), end)
