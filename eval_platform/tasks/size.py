"""How much does a task ask, before any model was asked it? Counted in characters, which need no tokenizer."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from eval_platform.values import Item, Request


@dataclass(frozen=True, slots=True)
class Size:
    """items: as many as there are documents. requests: different ones, each as often as it is asked. characters: see
    `characters`. longest: how many tokens a completion may have, 0 where nothing is drawn.
    """

    items: int
    requests: int
    characters: int
    longest: int


def size_of(items: Sequence[Item], repeats: int) -> Size:
    """Of all items of a task, as they are asked without a chat."""
    distinct = {request.request_id: request for item in items for request in item.requests}
    return Size(
        items=len(items),
        requests=len(distinct) * repeats,
        characters=characters(distinct.values()),
        longest=max((one.settings.max_new_tokens for one in distinct.values() if one.settings), default=0),
    )


def characters(requests: Iterable[Request]) -> int:
    """Of prompts, and of what is scored behind them. Where several prompts begin alike, that beginning counts once, as
    an engine computes it; so does a request that is asked several times."""
    asked = {(request.context, request.continuation or "") for request in requests}
    count, before = sum(len(scored) for _, scored in asked), ""
    for context in sorted({context for context, _ in asked}):
        count += len(context) - _shared(before, context)
        before = context
    return count


def _shared(one: str, other: str) -> int:
    """How many characters both begin with. By halves, since slices are compared in C."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
