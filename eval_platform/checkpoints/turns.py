"""Which folders come first, where one look cannot list them all? Those where something happens; then each in turn.

Listing a bucket is a request for every run. With thousands of runs one look would take longer than a sensor's tick may.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

LIVELY = 16  # how many folders are remembered as those where something was new
_LEVELS = 64  # of how many levels the round is remembered


class Turns:
    """Small enough for a sensor's cursor: where each level's round has come to, and where something was new lately."""

    def __init__(self) -> None:
        self._after: dict[str, str] = {}
        self._lively: list[str] = []

    def order(self, level: str, folders: Iterable[str], first: Collection[str]) -> tuple[list[str], list[str]]:
        """`folders` (keys directly below the key `level`) in two lists: those of `first` and those above what is
        lively; and the others, from where the round was.
        """
        places: dict[str, int] = {}
        for n, one in enumerate(self._lively):
            for above in up_from(one):
                places.setdefault(above, n)
        after = self._after.get(level, "")
        wanted: list[tuple[int, str]] = []
        others: list[tuple[bool, str]] = []
        for folder in folders:
            if folder in first or folder in places:
                wanted.append((-1 if folder in first else places[folder], folder))
            else:
                others.append((folder <= after, folder))
        return [folder for _, folder in sorted(wanted)], [folder for _, folder in sorted(others)]

    def looked(self, level: str, others: Sequence[str], at: Collection[str]) -> None:
        """Of `others`, in their order, those of `at` were looked at."""
        if len(at) == len(others):  # nobody waits for his turn
            self._after.pop(level, None)
        elif at:
            self._after.pop(level, None)
            self._after[level] = [one for one in others if one in at][-1]
            for old in list(self._after)[:-_LEVELS]:
                del self._after[old]

    def was_new(self, key: str) -> None:
        """Something new was seen at `key`, so that its neighbours are worth a look first."""
        folder = key.rpartition("/")[0]
        self._lively = [folder, *(one for one in self._lively if one != folder)][:LIVELY]

    def to_json(self) -> dict[str, Any]:
        return {"after": self._after, "lively": self._lively} if self._after or self._lively else {}

    @classmethod
    def from_json(cls, told: Any) -> "Turns":
        """What `to_json` gave; new ones for anything else: then the round begins anew."""
        turns = cls()
        match told:
            case {"after": dict() as after, "lively": list() as lively} if all(
                isinstance(one, str) for one in [*after, *after.values(), *lively]
            ):
                turns._after, turns._lively = dict(after), lively[:LIVELY]
        return turns


def up_from(key: str) -> Iterator[str]:
    """`key` and all folders above it."""
    while key:
        yield key
        key = key.rpartition("/")[0]
