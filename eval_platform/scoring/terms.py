"""What an item adds to a score that is no mean over items (`sums` makes the score).

The terms of an item stand in its row's `metrics` beside its own value, as `<score>@0`, `<score>@1` and so on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Terms:
    """What one item adds to a score, and the score's value for it alone, None where it has none.

    No terms: the item is not of the kind that the score is about.
    """

    value: float | None
    terms: tuple[float, ...]


def ratio_of(numerator: float, denominator: float) -> Terms:
    """The terms of a score that is a sum over a sum."""
    return Terms(numerator / denominator if denominator else None, (numerator, denominator))


NOT_COUNTED = Terms(None, ())


def entries(score: str, result: float | Terms | None) -> dict[str, float | None]:
    """What a row's `metrics` says of a score; nothing where the item has no value of its own and no terms."""
    if not isinstance(result, Terms):
        return {score: result}
    own: dict[str, float | None] = {} if result.value is None else {score: result.value}
    return own | {f"{score}@{k}": term for k, term in enumerate(result.terms)}


def is_term(name: str) -> bool:
    """Whether an entry of `metrics` is a term, and no score."""
    return "@" in name


def terms_of(score: str, rows: Sequence[Mapping[str, Any]]) -> list[float] | None:
    """An item's terms, those of its repeats averaged; None when it is not counted, empty when its value is missing."""
    found = []
    for row in rows:
        said = dict(row["metrics"])
        terms = [said[f"{score}@{k}"] for k in range(len(said)) if f"{score}@{k}" in said]
        if score in said and not terms:
            return []
        if terms:
            found.append(terms)
    return [sum(term) / len(found) for term in zip(*found, strict=True)] if found else None
