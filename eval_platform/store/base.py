"""The store's face: a flat space of keys, most of them created once and never changed."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Entry:
    """One listed object, or (with a delimiter) one common prefix ending in the delimiter, size 0 and etag "".

    modified_ns: when it was last written, nanoseconds since the epoch, by the clock of whoever stores it (in a bucket
    whole seconds; of an upload in parts the time it began).
    """

    key: str
    size: int
    etag: str
    modified_ns: int = 0


class Store(Protocol):
    """Every method raises StoreError, naming key and remedy, when the storage fails; KeyError when a key is absent."""

    uri: str
    requests_at_once: int  # more would wait for each other; 1 where there is nothing to wait for

    def list(self, prefix: str, delimiter: str | None = None, after: str | None = None) -> Iterator[Entry]:
        """Entries whose key begins with `prefix`, in the order of their keys, those greater than `after` only."""
        ...

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        """The object's bytes, or the range [start, end)."""
        ...

    def put(self, key: str, body: bytes | Path) -> None:
        """Write or replace, atomically: a reader sees the old body or the new one."""
        ...

    def create(self, key: str, body: bytes | Path) -> bool:
        """Write if absent, atomically; False, and nothing changed, when the key exists."""
        ...

    def delete(self, key: str) -> None:
        """Remove; absent already is no error."""
        ...


class ReadOnly:
    """A view of `store` that answers from what it remembers; `list` and `read` are its own.

    It has the rest of the face so that every reader takes it, and refuses it by design: what was written through a view
    it would not show. To call it is a programmer's mistake.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.uri = store.uri
        self.requests_at_once = store.requests_at_once

    def put(self, key: str, body: bytes | Path) -> None:
        raise NotImplementedError("it is for reading")

    def create(self, key: str, body: bytes | Path) -> bool:
        raise NotImplementedError("it is for reading")

    def delete(self, key: str) -> None:
        raise NotImplementedError("it is for reading")


def check_key(key: str) -> None:
    """Raises ValueError for what is no key: empty, from the root, or leading out of the store."""
    if not key or key.startswith("/") or ".." in key.split("/"):
        raise ValueError(f"not a store key: {key!r}")


def check_prefix(prefix: str) -> None:
    """Raises ValueError for what no key can begin with."""
    if prefix.startswith("/") or ".." in prefix.split("/")[:-1]:
        raise ValueError(f"not a prefix of store keys: {prefix!r}")
