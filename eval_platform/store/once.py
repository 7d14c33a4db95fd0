"""A store as one reader sees it for a moment: what was listed or read is not asked for again."""

from collections.abc import Iterator

from eval_platform.store.base import Entry, ReadOnly, Store


class ReadOnce(ReadOnly):
    """The face of `store` for reading. Keep it no longer than its answers may be old."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self._listed: dict[tuple[str, str | None, str | None], tuple[Entry, ...]] = {}
        self._read: dict[str, bytes | None] = {}

    def list(self, prefix: str, delimiter: str | None = None, after: str | None = None) -> Iterator[Entry]:
        asked = prefix, delimiter, after
        if asked not in self._listed:
            self._listed[asked] = tuple(self.store.list(prefix, delimiter, after))
        return iter(self._listed[asked])

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        if key not in self._read:
            try:
                self._read[key] = self.store.read(key)
            except KeyError:
                self._read[key] = None
        body = self._read[key]
        if body is None:
            raise KeyError(key)
        return body[start:end]
