"""Which folders of a bucket come first, where one look cannot list them all? Those where something happens; then all in
turn.

Listing a bucket is a request for every run. With thousands of runs one look would take longer than a sensor's tick may.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

LIVELY = 16  # how many folders are remembered as those where something was new


class Turns:
    """Small enough for a sensor's cursor: how far the round through each root has come, and where something was new
    lately.

    A round goes through all folders, each with what is below it before its neighbour, in the order of a listing. One
    path says where it is, so that nothing of it is ever forgotten.
    """

    def __init__(self) -> None:
        self._rounds: dict[str, str] = {}
        self._lively: list[str] = []

    @property
    def lively(self) -> Sequence[str]:
        """Keys of folders, the latest first."""
        return tuple(self._lively)

    def last(self, root: str) -> str:
        """Path of the folder that the round through a root was done with last; "" at its beginning."""
        return self._rounds.get(root, "")

    def done(self, root: str, path: str) -> None:
        """The round is done with a folder and all below it; with the root's own folder (""), it begins anew."""
        if path:
            self._rounds[root] = path
        else:
            self._rounds.pop(root, None)

    def was_new(self, key: str) -> None:
        """Something new was seen at `key`, so that its neighbours are worth a look first."""
        folder = key.rpartition("/")[0]
        self._lively = [folder, *(one for one in self._lively if one != folder)][:LIVELY]

    def to_json(self) -> dict[str, Any]:
        return {"rounds": self._rounds, "lively": self._lively} if self._rounds or self._lively else {}

    @classmethod
    def from_json(cls, told: Any) -> "Turns":
        """What `to_json` gave; new ones for anything else: then the round begins anew."""
        turns = cls()
        match told:
            case {"rounds": dict() as rounds, "lively": list() as lively} if all(
                isinstance(one, str) for one in [*rounds, *rounds.values(), *lively]
            ):
                turns._rounds, turns._lively = dict(rounds), lively[:LIVELY]
        return turns


def in_turn(folders: Iterable[str], last: str) -> tuple[list[str], list[str]]:
    """Paths of neighbours, in the order of a listing, as a round that was done with `last` goes on: those whose turn it
    is, among them the one in which `last` lies; and those for which it has come already.
    """
    now: list[str] = []
    before: list[str] = []
    for folder in sorted(folders, key=as_prefix):
        is_done = last and as_prefix(folder) <= as_prefix(last) and not last.startswith(as_prefix(folder))
        (before if is_done else now).append(folder)
    return now, before


def as_prefix(path: str) -> str:
    """The folder at `path` as a listing names it, and has it in its order; "" for the root's own."""
    return f"{path}/" if path else ""


def up_from(key: str) -> Iterator[str]:
    """`key` and all folders above it."""
    while key:
        yield key
        key = key.rpartition("/")[0]
