"""Which documents stand as examples before a question: lm-evaluation-harness's samplers (0.4.13, `api/samplers.py`)."""

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from eval_platform.errors import TaskError

FEWSHOT_SEED = 1234  # lm-evaluation-harness, `defaults.py:DEFAULT_OTHER_SEED`; its `--fewshot_seed`

Row = Mapping[str, Any]


def draw_shots(
    sampler: str, pool: Sequence[Row], asked: Sequence[Row], n: int, *, exclude_asked: bool, match: str | None = None
) -> Iterator[list[Row]]:
    """For each asked document, in order, its `n` shots from `pool`.

    default: one random.Random(1234) over all documents, so a document's shots depend on how many stand before it.
    first_n: the first of the pool. With `exclude_asked` no shot equals the asked document; with `match`, a field's
    name, the pool of a document is what has its value there. Raises TaskError when the pool is too small.
    """
    rng = random.Random(FEWSHOT_SEED)
    draw = _first if sampler == "first_n" else _sample
    pools: dict[str, list[Row]] = {}
    if match is not None:
        for row in pool:
            pools.setdefault(_value(row, match, "a document of the few-shot split"), []).append(row)
    for document in asked:
        shots: list[Row] = []
        if n:
            own = pool if match is None else pools.get(_value(document, match, "the document"), [])
            shots = draw(own, n, document if exclude_asked else None, rng)
        yield shots


def _value(row: Row, field: str, whose: str) -> str:
    if field not in row:
        raise TaskError(
            f"{whose} has no field {field!r}, which `fewshot: {{match}}` names",
            remedy=f"correct the name; it has {', '.join(row)}",
        )
    return json.dumps(row[field])


def _first(pool: Sequence[Row], n: int, asked: Row | None, _rng: random.Random) -> list[Row]:
    shots: list[Row] = []
    for row in pool:
        if len(shots) == n:
            break
        if asked is None or row != asked:
            shots.append(row)
    if len(shots) < n:
        raise _too_few(len(shots), n)
    return shots


def _sample(pool: Sequence[Row], n: int, asked: Row | None, rng: random.Random) -> list[Row]:
    # One more than needed, to leave out the asked document. More copies of it may be drawn: then once more, without.
    drawn = n + 1 if asked else n
    if len(pool) < drawn:
        raise _too_few(len(pool) - bool(asked), n)
    sampled = rng.sample(pool, drawn)
    if not asked:
        return sampled
    shots = [row for row in sampled if row != asked][:n]
    if len(shots) == n:
        return shots
    others = [row for row in pool if row != asked]
    if len(others) < n:
        raise _too_few(len(others), n)
    return rng.sample(others, n)


def _too_few(there: int, n: int) -> TaskError:
    return TaskError(
        f"num_fewshot is {n}, but there are only {there} documents to draw shots from",
        remedy="lower num_fewshot or name a larger few-shot split",
    )
