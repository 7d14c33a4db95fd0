"""Checkpoints on the Hugging Face hub: which revisions has a repository, and what lies in one of them?

A branch or tag is where a checkpoint arrives, the commit that it points at is what arrives: a commit never changes, so
that it is whole by nature and a branch that moves is another arrival. The files of a commit are looked at as the
objects of a bucket are (`buckets`, `downloads`).

Requests go through huggingface_hub's session: its endpoint (HF_ENDPOINT), its token (HF_TOKEN, or what `hf auth login`
has kept), its refusal to go online (HF_HUB_OFFLINE). No token and no signed address is ever part of a message.
"""

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import quote

from eval_platform.checkpoints.buckets import BucketListing, BucketPlace
from eval_platform.checkpoints.inspection import Inspection
from eval_platform.config import hub_address
from eval_platform.errors import CheckpointError, CheckpointGone, EvalPlatformError, StoreError
from eval_platform.identity import content_id
from eval_platform.store.base import Entry

TRIES = 5
FIRST_WAIT_S = 0.5
_TIMEOUT_S = 30.0
_REMEMBER_S = 30.0  # a sensor looks every second; the hub counts requests
_COMMIT_DIGITS = 40


@dataclass(frozen=True, slots=True)
class Revision:
    """A branch or tag, and the commit that it points at."""

    name: str
    commit: str


@dataclass(frozen=True)
class HubFolder:
    """The files of one commit, behind the face that listings and downloads ask (`buckets.Source`)."""

    repository: str
    commit: str

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
        for found in _pages(self.repository, self.commit, where):
            name = found["path"].removeprefix(prefix)
            # Neither is possible in git; whoever answers in the hub's place could say so all the same.
            if "/" in name or name in ("", ".", ".."):
                continue
            if found["type"] == "directory":
                yield Entry(f"{prefix}{name}/", 0, "")
            elif found["type"] == "file":
                lfs = found.get("lfs")
                digest = lfs["oid"] if lfs else found["oid"]
                yield Entry(prefix + name, lfs["size"] if lfs else found["size"], digest, _time_of(digest))

    def read_listed(self, entry: Entry, start: int = 0, end: int | None = None) -> bytes:
        """The range [start, end) of a listed file. KeyError: the hub no longer gives it. Raises as `commit_of`."""
        end = entry.size if end is None else end
        if end <= start:
            return b""
        headers = {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        path = f"{self.repository}/resolve/{self.commit}/{quote(entry.key)}"
        answer = _ask(self.repository, self.commit, path, headers)
        told = (answer.history[0] if answer.history else answer).headers.get("X-Repo-Commit", self.commit)
        if told != self.commit:
            raise KeyError(entry.key)
        # A server may give all of a file where a part was asked for.
        body = answer.content[start:end] if answer.status_code == 200 else answer.content
        if len(body) != end - start:
            raise StoreError(
                f"{self.uri}: {entry.key}: {len(body):,} bytes came of {end - start:,}",
                remedy="it is asked again by itself; look at proxies between here and the hub if it stays so",
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


def commit_of(repository: str, revision: str) -> str:
    """The commit of a branch, tag or commit.

    Raises CheckpointError where asking again will not help (no such repository, no right to it, HF_HUB_OFFLINE),
    CheckpointGone when the repository has no such revision, StoreError when the hub cannot be asked now.
    """
    if len(revision) == _COMMIT_DIGITS and set(revision) <= set("0123456789abcdef"):
        return revision
    path = f"api/models/{repository}/revision/{quote(revision, safe='')}"
    return _commit(_json(_ask(repository, revision, path), repository).get("sha"), repository)


def is_wanted(revision: str, patterns: tuple[str, ...]) -> bool:
    """Whether the name matches one of `patterns`; every name does where there are none."""
    return not patterns or any(fnmatchcase(revision, pattern) for pattern in patterns)


def revisions(repository: str, patterns: tuple[str, ...]) -> list[Revision]:
    """Branches and tags whose name is wanted, a branch before a tag of its name. As `commit_of`."""
    answer = _json(_ask(repository, None, f"api/models/{repository}/refs"), repository)
    found: dict[str, Revision] = {}
    for kind in ("tags", "branches"):
        for ref in answer.get(kind, ()):
            if is_wanted(ref["name"], patterns):
                found[ref["name"]] = Revision(ref["name"], _commit(ref["targetCommit"], repository))
    return list(found.values())


_seen: dict[tuple[str, str, tuple[str, ...]], tuple[float, list[Revision] | EvalPlatformError]] = {}


def recent_revisions(repository: str, revision: str | None, patterns: tuple[str, ...]) -> list[Revision]:
    """`revisions`, or the one named, as the hub told them within the last half minute; its errors too."""
    key = (_endpoint(), repository, (revision,) if revision is not None else (*patterns, ""))
    when, outcome = _seen.get(key, (-_REMEMBER_S, []))
    if time.monotonic() - when >= _REMEMBER_S:
        try:
            if revision is not None:
                outcome = [Revision(revision, commit_of(repository, revision))]
            else:
                outcome = revisions(repository, patterns)
        except EvalPlatformError as error:
            outcome = error
        _seen[key] = time.monotonic(), outcome
    if isinstance(outcome, EvalPlatformError):
        raise outcome
    return outcome


def fingerprint(repository: str, commit: str) -> str:
    """What an arrival from the hub is told apart by: its commit."""
    return content_id(["hub", repository, commit])


def place(repository: str, commit: str) -> BucketPlace:
    """Where discovery looks, as for a folder in a bucket."""
    return BucketPlace(HubFolder(repository, commit), "")


def is_judged(repository: str, commit: str) -> bool:
    """Whether `judge` answers without a request."""
    return (_endpoint(), repository, commit) in _judged


_judged: dict[tuple[str, str, str], tuple[BucketListing, Inspection]] = {}


def judge(repository: str, commit: str) -> tuple[BucketListing, Inspection]:
    """What the commit proves, no weights downloaded; asked once a process, since a commit does not change."""
    key = (_endpoint(), repository, commit)
    if key not in _judged:
        where = place(repository, commit)
        listing = where.listing()
        _judged[key] = listing, where.inspect(listing)
    return _judged[key]


def _commit(value: Any, repository: str) -> str:
    if not isinstance(value, str) or len(value) != _COMMIT_DIGITS or not set(value) <= set("0123456789abcdef"):
        raise StoreError(f"hf://{repository}: the hub names {value!r} as a commit", remedy="look at HF_ENDPOINT")
    return value


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


def _pages(repository: str, commit: str, where: str) -> Iterator[dict[str, Any]]:
    path: str | None = f"api/models/{repository}/{where}"
    while path is not None:
        answer = _ask(repository, commit, path)
        yield from _json(answer, repository)
        # A mirror may tell the hub's own address: the next page is asked where the first was.
        _, found, rest = answer.links.get("next", {}).get("url", "").partition("/api/models/")
        path = f"api/models/{rest}" if found else None


def _json(answer: Any, repository: str) -> Any:
    try:
        return answer.json()
    except ValueError as error:  # the page of a proxy, with status 200
        raise StoreError(
            f"hf://{repository}: what answers at {_endpoint()} is no hub", remedy="look at HF_ENDPOINT and at proxies"
        ) from error


def _ask(repository: str, revision: str | None, path: str, headers: dict[str, str] | None = None) -> Any:
    """The hub's answer (httpx's) for a path below its endpoint, asked several times where that may help."""
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage] -- of the httpx it uses
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

    try:
        answer = http_backoff(
            "GET",
            f"{_endpoint()}/{path}",
            headers={**build_hf_headers(library_name="eval-platform"), **(headers or {})},
            timeout=_TIMEOUT_S,
            max_retries=TRIES,
            base_wait_time=FIRST_WAIT_S,
        )
        hf_raise_for_status(answer)
    except (OSError, HTTPError) as error:
        raise _told(error, repository, revision) from None  # its text may hold a signed address
    return answer


def _told(error: Exception, repository: str, revision: str | None) -> EvalPlatformError:
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = f"hf://{repository}" + (f"@{revision}" if revision else "")
    page = f"{_endpoint()}/{repository}"
    token = "set HF_TOKEN (or run `hf auth login`)"
    if isinstance(error, OfflineModeIsEnabled):
        return CheckpointError(
            f"{where} cannot be looked at: HF_HUB_OFFLINE is set",
            remedy="unset HF_HUB_OFFLINE where the hub can be reached, or download the model into a watched folder",
        )
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, GatedRepoError):
        return CheckpointError(
            f"{where} is gated, and this user may not read it", remedy=f"accept its licence at {page}, then {token}"
        )
    if isinstance(error, RevisionNotFoundError):
        return CheckpointGone(f"{where}: there is no such revision", remedy=f"see its branches and tags at {page}")
    if isinstance(error, RepositoryNotFoundError):
        return CheckpointError(
            f"{where}: there is no such repository, or it is private",
            remedy=f"mend its name; for a private one {token} of a user who may read it",
        )
    if status in (401, 403):
        return CheckpointError(f"{where}: the hub refuses this user ({status})", remedy=f"{token} that may read it")
    if status == 404:
        return CheckpointGone(f"{where}: the hub no longer has it", remedy=f"look at {page}")
    return StoreError(
        f"{where}: the hub at {_endpoint()} does not answer ({status or type(error).__name__})",
        remedy="it is asked again by itself; look at the network, and at HF_ENDPOINT",
    )
