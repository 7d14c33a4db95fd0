"""How does a build from nothing read a bucket in few requests? What it lists, it lists once for many subjects."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence

from eval_platform.store import Entry, Store, layout
from eval_platform.store.base import ReadOnly
from eval_platform.store.bundles import Bundles
from eval_platform.warehouse.rows import Subject

# Where the records of a kind of subject lie, each in folders of the subject's name.
_FOLDERS = {
    "evaluation": ("evaluations/", "decisions/", "tries/evaluations/"),
    "arrival": (layout.ARRIVALS, "tries/arrivals/"),
}


def bundles_of(store: Store) -> Bundles | None:
    """The bundled records, which `listed_for` reads instead of one by one; None where that saves nothing (a folder)."""
    return None if store.requests_at_once == 1 else Bundles(store)


def listed_for(store: Store, subjects: Sequence[Subject], bundles: Bundles | None) -> Store:
    """`store` as its listings show it now around `subjects`, which should lie close together; itself where that saves
    nothing. What is created afterwards may be missing in it. Raises StoreError.
    """
    return store if bundles is None else _Listed(store, subjects, bundles)


class _Listed(ReadOnly):
    """The store's face for reading; bundled bodies are taken as they are, since no record ever changes."""

    def __init__(self, store: Store, subjects: Sequence[Subject], bundles: Bundles) -> None:
        super().__init__(store)
        self._ranges: list[tuple[str, str]] = []  # folders, first and last, between which everything was listed
        self._entries: dict[str, Entry] = {}
        self._bodies: dict[str, bytes] = {}
        for kind, tops in _FOLDERS.items():
            folders = [f"{name}/" for of, name in subjects if of == kind]
            for top in tops if folders else ():  # without a name there is nothing to list
                first, last = f"{top}{min(folders)}", f"{top}{max(folders)}"
                self._ranges.append((first, last))
                for entry in store.list(top, after=first):
                    if _is_after(entry.key, last):
                        break
                    self._entries[entry.key] = entry
                for key, body in bundles.between(first, last):
                    if key in self._entries:
                        self._bodies[key] = body
        self._keys = sorted(self._entries)

    def list(self, prefix: str, delimiter: str | None = None, after: str | None = None) -> Iterator[Entry]:
        if not self._knows(prefix):
            yield from self.store.list(prefix, delimiter, after)
            return
        shown = None
        at = bisect_left(self._keys, prefix) if after is None else bisect_right(self._keys, max(prefix, after))
        for key in self._keys[at:]:
            if not key.startswith(prefix):
                return
            folder, found, _ = key[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
            if not found:
                yield self._entries[key]
            elif folder != shown:
                shown = folder
                yield Entry(f"{prefix}{folder}{delimiter}", 0, "")

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        if self._knows(key) and key not in self._entries:
            raise KeyError(key)
        if start or end is not None:
            return self.store.read(key, start, end)
        return self._bodies[key] if key in self._bodies else self.store.read(key)

    def _knows(self, key: str) -> bool:
        return any(first <= key and not _is_after(key, last) for first, last in self._ranges)


def _is_after(key: str, last: str) -> bool:
    """Whether `key` stands after everything in the folder `last`."""
    return key > last and not key.startswith(last)
