"""Checkpoints on the Hugging Face hub: which revisions has a repository, and what lies in one of them?

A branch or tag is where a checkpoint arrives, the commit that it points at is what arrives: a commit never changes, so
that it is whole by nature and a branch that moves is another arrival. The files of a commit are looked at as the
objects of a bucket are (`buckets`, `downloads`).

Whoever answers in the hub's place may be a mirror, or worse: every field is checked before it becomes a name, a size or
a hash here.
"""

import hashlib
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, TypeVar
from urllib.parse import quote

from pydantic import BaseModel, Field, TypeAdapter

from eval_platform.checkpoints.buckets import BucketListing, BucketPlace, bucket_listing
from eval_platform.checkpoints.description import DESCRIBING
from eval_platform.checkpoints.hub_requests import ask, endpoint, read
from eval_platform.checkpoints.inspection import Inspection
from eval_platform.config import hub_address
from eval_platform.errors import CheckpointError, EvalPlatformError, StoreError
from eval_platform.identity import content_id
from eval_platform.store.base import Entry

_REMEMBER_S = 30.0  # a sensor looks every second; the hub counts requests
_MOST_FILES = 100_000  # side by side
_LONGEST_NAME = 250  # git keeps a branch in a file

_T = TypeVar("_T")
_Commit = Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
_Size = Annotated[int, Field(ge=0, le=1 << 43)]  # the longest file that ext4 holds is twice as long


class _Ref(BaseModel):
    name: str
    commit: _Commit = Field(alias="targetCommit")


class _Refs(BaseModel):
    branches: list[_Ref] = []
    tags: list[_Ref] = []


class _AtRevision(BaseModel):
    sha: _Commit


class _Lfs(BaseModel):
    oid: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    size: _Size


class _File(BaseModel):
    type: str
    path: str
    oid: _Commit
    size: _Size
    lfs: _Lfs | None = None


_FILES = TypeAdapter(list[_File])
_REFS = TypeAdapter(_Refs)
_AT_REVISION = TypeAdapter(_AtRevision)


@dataclass(frozen=True, slots=True)
class Revision:
    """A branch or tag, and the commit that it points at."""

    name: str
    commit: str


@dataclass(frozen=True)
class HubFolder:
    """The files of one commit, behind the face that listings and downloads ask (`buckets.Source`).

    watching: whoever asks looks again soon, and is to wait no longer than LOOK_S.
    """

    repository: str
    commit: str
    watching: bool = False

    @property
    def uri(self) -> str:
        return f"hf://{self.repository}@{self.commit}"

    @property
    def content_of(self) -> str:
        """What a download of the same files is kept under: other commits with the same files share it."""
        return f"hf://{self.repository}"

    def list(self, prefix: str, delimiter: str | None = None) -> Iterator[Entry]:
        """What lies directly below `prefix`, folders as keys that end in a slash. Raises as `commit_of`."""
        assert delimiter == "/", "a commit is listed level by level"
        where = f"tree/{self.commit}/{quote(prefix.rstrip('/'))}".rstrip("/")
        for found in self._pages(where):
            name = found.path.removeprefix(prefix)
            # Neither is possible in git; whoever answers in the hub's place could say so all the same.
            if "/" in name or name in ("", ".", ".."):
                continue
            if found.type == "directory":
                yield Entry(f"{prefix}{name}/", 0, "")
            elif found.type == "file":
                told = found.lfs or found
                yield Entry(prefix + name, told.size, told.oid, _time_of(told.oid))

    def _pages(self, where: str) -> Iterator[_File]:
        path, count = f"api/models/{self.repository}/{where}", 0
        while path:
            body, answer = ask(self.repository, self.commit, path, watching=self.watching)
            page = read(body, _FILES, self.repository)
            yield from page
            # A mirror may tell the hub's own address: the next page is asked where the first was.
            _, found, rest = answer.links.get("next", {}).get("url", "").partition("/api/models/")
            path = f"api/models/{rest}" if found else ""
            count += len(page)
            if path and (not page or count >= _MOST_FILES):
                raise StoreError(
                    f"{self.uri}: a folder of it has no end ({count:,} files)", remedy="look at HF_ENDPOINT"
                )

    def read_listed(self, entry: Entry, start: int = 0, end: int | None = None) -> bytes:
        """The range [start, end) of a listed file. KeyError: the hub no longer gives it. Raises as `commit_of`."""
        end = entry.size if end is None else end
        if end <= start:
            return b""
        headers = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        path = f"{self.repository}/resolve/{self.commit}/{quote(entry.key)}"
        body, answer = ask(
            self.repository, self.commit, path, watching=self.watching, headers=headers, most=end - start
        )
        told = (answer.history[0] if answer.history else answer).headers.get("X-Repo-Commit", self.commit)
        if told != self.commit:
            raise KeyError(entry.key)
        # A server that knows no ranges gives the file from its beginning.
        if (start and answer.status_code == 200) or len(body) != end - start:
            raise StoreError(
                f"{self.uri}: {entry.key}: what came are not the {end - start:,} bytes from {start:,} on",
                remedy="it is asked again by itself; if it stays so, look at the proxies between here and the hub: "
                "they must give parts of files",
            )
        return body

    def check(self, entry: Entry, path: Path) -> str | None:
        """SHA-256 of the downloaded file `path` where the hub has told one. Raises StoreError when it is another file.

        The hub tells the SHA-256 of what is in LFS or Xet, and git's own SHA-1 ("blob <size>\\0" before the content)
        of the small files.
        """
        is_lfs = len(entry.etag) == 64
        digest = hashlib.sha256() if is_lfs else hashlib.sha1(f"blob {entry.size}\0".encode(), usedforsecurity=False)
        with path.open("rb", buffering=0) as file:
            while block := file.read(8 << 20):
                digest.update(block)
        if digest.hexdigest() != entry.etag:
            path.unlink()
            raise StoreError(
                f"{self.uri}: {entry.key}: what came has another hash than the hub tells ({entry.etag})",
                remedy="it is downloaded again by itself; look at proxies between here and the hub if it stays so",
            )
        return entry.etag if is_lfs else None


def _time_of(digest: str) -> int:
    """Nanoseconds: a time for a file of which only its content is known; another for every content, and long ago.

    Digests of files are kept by inode, size and time (`hashing`): two contents must not share a time.
    """
    return int(digest[:7], 16) * 10**9 + int(digest[7:14], 16)


def folder_at(uri: str) -> HubFolder:
    """The commit that hf://org/model@revision means now. Raises as `commit_of`, CheckpointError for no such address."""
    address = hub_address(uri)
    if address is None:
        raise CheckpointError(f"{uri} is no address on the hub", remedy="write hf://org/model@revision")
    repository, revision = address
    return HubFolder(repository, commit_of(repository, revision or "main"))


def commit_of(repository: str, revision: str, *, watching: bool = False) -> str:
    """The commit of a branch, tag or commit.

    Raises CheckpointError where asking again will not help (no such repository, no right to it, HF_HUB_OFFLINE),
    CheckpointGone when the repository has no such revision, StoreError when the hub cannot be asked now.
    """
    if re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    path = f"api/models/{repository}/revision/{quote(revision, safe='')}"
    body, _ = ask(repository, revision, path, watching=watching)
    return read(body, _AT_REVISION, repository).sha


def is_wanted(revision: str, patterns: tuple[str, ...]) -> bool:
    """Whether the name matches one of `patterns`; every name does where there are none."""
    return not patterns or any(fnmatchcase(revision, pattern) for pattern in patterns)


def revisions(repository: str, patterns: tuple[str, ...]) -> list[Revision]:
    """Branches and tags whose name is wanted, a branch before a tag of its name. As `commit_of`, for a watcher."""
    body, _ = ask(repository, None, f"api/models/{repository}/refs", watching=True)
    refs = read(body, _REFS, repository)
    named = {ref.name: Revision(ref.name, ref.commit) for ref in (*refs.tags, *refs.branches)}
    return [one for one in named.values() if is_wanted(one.name, patterns) and _is_possible(one.name)]


def _is_possible(name: str) -> bool:
    """Whether git knows such a name for a branch; of another no key can be made that stays below its root's."""
    return len(name.encode()) <= _LONGEST_NAME and not {"", ".", ".."}.intersection(name.split("/"))


# What was told, or the error: when, and what.
_seen: dict[tuple[str, ...], tuple[float, Any]] = {}
_judged: dict[tuple[str, ...], tuple[float, Any]] = {}


def recent_revisions(repository: str, revision: str | None, patterns: tuple[str, ...]) -> list[Revision]:
    """`revisions`, or the one named, as the hub told them within the last half minute; its errors too."""

    def told() -> list[Revision]:
        if revision is None:
            return revisions(repository, patterns)
        return [Revision(revision, commit_of(repository, revision, watching=True))]

    key = (endpoint(), repository, "one" if revision is not None else "all", revision or "", *patterns)
    return _remembered(_seen, key, told)


def fingerprint(repository: str, commit: str) -> str:
    """What an arrival from the hub is told apart by: its commit."""
    return content_id(["hub", repository, commit])


def place(repository: str, commit: str) -> BucketPlace:
    """Where discovery looks, as for a folder in a bucket."""
    return BucketPlace(HubFolder(repository, commit, watching=True), "")


def is_judged(repository: str, commit: str) -> bool:
    """Whether `judge` answers without a request."""
    return _is_fresh(_judged.get((endpoint(), repository, commit)), for_ever=True)


def judge(repository: str, commit: str) -> tuple[BucketListing, Inspection]:
    """(the files that describe the commit, what it proves), no weights downloaded.

    Asked once a process, since a commit does not change; an error is remembered for half a minute. Raises as
    `commit_of`, OSError when there is no room for a sketch of it.
    """

    def told() -> tuple[BucketListing, Inspection]:
        where = place(repository, commit)
        whole = bucket_listing(where.store, "")
        if whole.files:
            found = where.inspect(whole)
        else:
            found = Inspection(whole, "transformers", "no files of a model", refused=True)
        # Not all of the listing: a watcher may see many commits in its life.
        kept = {name: whole.entries[name] for name in DESCRIBING if name in whole.entries}
        listing = BucketListing({name: whole.files[name] for name in kept}, kept)
        return listing, replace(found, listing=listing)

    return _remembered(_judged, (endpoint(), repository, commit), told, for_ever=True)


def _is_fresh(seen: tuple[float, Any] | None, *, for_ever: bool) -> bool:
    if seen is None:
        return False
    when, outcome = seen
    return (for_ever and not isinstance(outcome, EvalPlatformError)) or time.monotonic() - when < _REMEMBER_S


def _remembered(
    memory: dict[tuple[str, ...], tuple[float, Any]],
    key: tuple[str, ...],
    told: Callable[[], _T],
    *,
    for_ever: bool = False,
) -> _T:
    """What `told()` gave or raised within the last half minute. for_ever: what it gave never ages."""
    if not _is_fresh(memory.get(key), for_ever=for_ever):
        try:
            outcome: Any = told()
        except EvalPlatformError as error:
            outcome = error
        memory[key] = time.monotonic(), outcome
    _, outcome = memory[key]
    if isinstance(outcome, EvalPlatformError):
        raise outcome.with_traceback(None)
    return outcome
