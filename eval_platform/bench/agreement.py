"""Do the two sides' answers agree? Compared request by request, in the engine's documented tolerance."""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval_platform.values import Request


@dataclass(frozen=True, slots=True)
class Agreement:
    """How the two sides' answers differ. None where no answer is of that kind.

    worst: the largest difference of two log-likelihoods, in units of max(1e-4, 1e-5 x target tokens): up to 1 they
    are equal for float32; NaN when only one of them is a number.
    """

    worst: float | None
    largest: float | None  # difference in nats
    greedy_equal: int | None
    texts_equal: int | None
    choices: int
    texts: int


def read_answers(file: Path) -> list[dict[str, Any]]:
    """What a side wrote, in the order of the requests."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def compare(requests: Sequence[Request], ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]]) -> Agreement:
    """Compare answers in the order of the requests. Completions that were sampled are not compared."""
    differences: list[tuple[float, float]] = []  # in units of the tolerance, in nats
    greedy: list[bool] = []
    texts: list[bool] = []
    for request, a, b in zip(requests, ours, theirs, strict=True):
        if request.kind == "generate":
            if request.settings is not None and request.settings.temperature == 0:
                texts.append(a["text"] == b["text"])
            continue
        difference = abs(a["log_likelihood"] - b["log_likelihood"])
        differences.append((difference / max(1e-4, 1e-5 * a["n_tokens"]), difference))
        if request.kind == "choice":
            greedy.append(a["is_greedy"] == b["is_greedy"])
    return Agreement(
        worst=_largest(units for units, _ in differences) if differences else None,
        largest=_largest(nats for _, nats in differences) if differences else None,
        greedy_equal=sum(greedy) if greedy else None,
        texts_equal=sum(texts) if texts else None,
        choices=len(greedy),
        texts=len(texts),
    )


def equal_answers(found: Agreement) -> list[str]:
    """How many greedy flags and texts are the same, in words; nothing of what was not compared."""
    parts = []
    if found.greedy_equal is not None:
        parts.append(f"greedy {found.greedy_equal}/{found.choices}")
    if found.texts_equal is not None:
        parts.append(f"same text {found.texts_equal}/{found.texts}")
    return parts


def _largest(values: Iterable[float]) -> float:
    """The largest; NaN if any is NaN, which `max` would lose."""
    found = list(values)
    return math.nan if any(math.isnan(value) for value in found) else max(found)
