"""What changed between two lists of documents? Told by sample_ids, which are content: equal items have equal ids."""

from collections.abc import Sequence
from dataclasses import dataclass

EXAMPLES = 3


@dataclass(frozen=True, slots=True)
class DocumentChange:
    """changed: pairs (old sample_id, new) of items where one stands in the other's place. moved: only the order is
    another."""

    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[tuple[str, str], ...]
    moved: bool

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.changed or self.moved)

    def __str__(self) -> str:
        if self.moved:
            return "the same documents in another order"
        parts = []
        for what, ids in (
            ("added", self.added),
            ("removed", self.removed),
            ("changed", [f"{old[:8]} -> {new[:8]}" for old, new in self.changed]),
        ):
            if ids:
                shown = ", ".join(one if "->" in one else one[:8] for one in ids[:EXAMPLES])
                more = ", …" if len(ids) > EXAMPLES else ""
                parts.append(f"{len(ids)} {what} ({shown}{more})")
        return ", ".join(parts) or "no difference"


def compare_documents(old: Sequence[str], new: Sequence[str]) -> DocumentChange:
    """The difference between two lists of sample_ids.

    An item that is gone and one that is new count as one that changed when both follow the same unchanged item: the
    k-th new one after it takes the place of the k-th that is gone.
    """
    kept = set(old) & set(new)
    gone, come = _after_neighbours(old, kept), _after_neighbours(new, kept)
    changed: list[tuple[str, str]] = []
    removed: list[str] = []
    added: list[str] = []
    for neighbour in dict.fromkeys([*gone, *come]):
        before, after = gone.get(neighbour, []), come.get(neighbour, [])
        both = min(len(before), len(after))
        changed += zip(before[:both], after[:both], strict=True)
        removed += before[both:]
        added += after[both:]
    moved = len(kept) == len(old) == len(new) and list(old) != list(new)
    return DocumentChange(tuple(added), tuple(removed), tuple(changed), moved)


def _after_neighbours(ids: Sequence[str], kept: set[str]) -> dict[str | None, list[str]]:
    """The ids not `kept`, under the last kept id before them (None at the beginning)."""
    found: dict[str | None, list[str]] = {}
    neighbour: str | None = None
    for one in ids:
        if one in kept:
            neighbour = one
        else:
            found.setdefault(neighbour, []).append(one)
    return found
