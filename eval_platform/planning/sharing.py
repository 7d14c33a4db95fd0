"""How is work of known cost shared out? Longest processing time first (Graham 1969). Pure functions."""

import heapq
from collections.abc import Iterable, Sequence


def share_out_costs(costs: Sequence[float], load: float, most: int) -> list[list[int]]:
    """The places in `costs` of each shard, in order; every shard costs `load` besides.

    So many shards, `most` at most, that their end plus all that is spent on loading is least: another one must bring
    the end down by more than it costs.
    """
    ways = [_longest_first(costs, n) for n in range(1, min(most, len(costs)) + 1)]
    return min(ways, key=lambda way: max(sum(costs[i] for i in shard) for shard in way) + len(way) * load)


def _longest_first(costs: Sequence[float], n: int) -> list[list[int]]:
    """The longest to whoever has the least to do. Ends at most 4/3 - 1/(3 n) times as late as can be."""
    shards: list[list[int]] = [[] for _ in range(n)]
    least = [(0.0, k) for k in range(n)]
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        total, k = least[0]
        shards[k].append(i)
        heapq.heapreplace(least, (total + costs[i], k))
    return [sorted(shard) for shard in shards]


def end_of_queue(at_work: Iterable[float], waiting: Iterable[float], slots: int) -> float:
    """Seconds until all is done: whoever waits begins, in this order, on the first slot that is free.

    at_work: seconds that each worker still needs.
    """
    free = sorted(at_work)[-slots:]  # were there more than slots, the first to end are nobody's to wait for
    free = [*[0.0] * (slots - len(free)), *free]
    for seconds in waiting:
        heapq.heapreplace(free, free[0] + seconds)
    return max(free)
