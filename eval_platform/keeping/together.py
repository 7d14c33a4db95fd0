"""How are many files read? Several at once where each is an answer to wait for, and in bounded numbers."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

from eval_platform.store import Store

# What is called as work goes on: what is being done, how much of it is done, of how much.
Step = Callable[[str, int, int], None]

_AT_A_TIME = 256

A = TypeVar("A")
B = TypeVar("B")


def quietly(_what: str, _done: int, _total: int) -> None:
    """The step of who shows none."""


def each(store: Store, do: Callable[[A], B], items: Iterable[A]) -> Iterator[B]:
    """`do` of each item, in their order. Raises what `do` raises; what was begun beside it is finished first."""
    if store.requests_at_once == 1:
        yield from map(do, items)
        return
    rest = iter(items)
    with ThreadPoolExecutor(store.requests_at_once) as pool:
        while batch := list(islice(rest, _AT_A_TIME)):
            yield from pool.map(do, batch)
