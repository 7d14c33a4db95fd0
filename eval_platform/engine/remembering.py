"""What is already known of a text? Keys and values of finished completions, for the next turn of a conversation.

A further turn's prompt begins with the turn before: its prompt and what was answered. While an engine remembers
(`face.Engine.remembering`), the keys and values of that beginning are kept, and only what is new is computed. Texts are
compared token by token, so where the new prompt's tokens part from those that were drawn, computing goes on from there.

Nobody asks in turns yet: every task makes one request of a completion, and none is written from the answer to another.
It waits for tasks whose second question follows the model's own first answer (MT-Bench), which are judged by another
model and so come with the judge.
"""

import logging
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from eval_platform.engine.stream import Block, Kept
from eval_platform.engine.trie import Node, Tokens, common, sort_key

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Text:
    """Tokens of a finished completion, prompt first, and the keys and values of all of them, in their order."""

    tokens: Tokens
    blocks: Sequence[Block]


class Remembered:
    """Finished completions, at most `limit` bytes of keys and values; the least recently used is forgotten first.

    What several of them share (the nodes of one call) is held and counted once.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._texts: dict[bytes, _Text] = {}  # the least recently used first
        self._sorted: list[bytes] = []
        self._uses: Counter[int] = Counter()  # of each storage, by its address
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._texts)

    def add(self, tokens: Tokens, blocks: Sequence[Block]) -> None:
        """Remember `blocks`, which together are positions 0 to len(tokens); they must never change again."""
        key = sort_key(tokens)
        if key in self._texts:
            return
        size = sum(_storages(blocks).values())
        if size > self._limit:
            _log.info("a completion of %d tokens is not remembered: %d bytes are more than fit", len(tokens), size)
            return
        # What it goes on from is in it.
        before, length = self._nearest(tokens)
        if before is not None and length == len(self._texts[before].tokens):
            self._forget(before)
        self._texts[key] = _Text(tokens, blocks)
        insort(self._sorted, key)
        self._count(blocks, 1)
        while self.bytes > self._limit:
            self._forget(next(iter(self._texts)))

    def lay(self, kept: Kept, paths: Iterable[tuple[Tokens, Node, int]]) -> set[Node]:
        """Give `kept` what is remembered of (tokens, the node where they end, how many of them at most).

        "At most": hidden states are not remembered, so a position that is asked about must be computed. Returns the
        nodes that lack nothing now; of others the first tokens may be there.
        """
        allowed: dict[Node, int] = {}
        found: dict[Node, tuple[int, _Text]] = {}
        for tokens, end, most in paths:
            key, length = self._nearest(tokens)
            text = None
            if key is not None and length:
                text = self._texts[key] = self._texts.pop(key)  # used just now
            for node in end.path():
                allowed[node] = min(allowed.get(node, most), most)
                if text is not None and length > max(node.start, found[node][0] if node in found else 0):
                    found[node] = length, text
        whole = set()
        for node, (length, text) in found.items():
            stop = min(length, allowed[node], node.end)
            if stop > node.start:
                kept.blocks[node] = _cut(text.blocks, node.start, stop)
                kept.pinned.add(node)
                if stop == node.end:
                    whole.add(node)
        return whole

    def clear(self) -> None:
        """Forget everything."""
        self._texts.clear()
        self._sorted.clear()
        self._uses.clear()
        self.bytes = 0

    def _nearest(self, tokens: Tokens) -> tuple[bytes | None, int]:
        """The text that has most tokens at its beginning in common with `tokens`, and how many."""
        key = sort_key(tokens)
        at = bisect_left(self._sorted, key)
        # In sorted order nothing shares more than a neighbour does.
        near = self._sorted[max(0, at - 1) : at + 1]
        shared = [(common(self._texts[other].tokens, tokens), other) for other in near]
        length, best = max(shared, default=(0, None), key=lambda one: one[0])
        return best, length

    def _forget(self, key: bytes) -> None:
        self._count(self._texts.pop(key).blocks, -1)
        del self._sorted[bisect_left(self._sorted, key)]

    def _count(self, blocks: Sequence[Block], by: int) -> None:
        for where, size in _storages(blocks).items():
            was = self._uses[where]
            self._uses[where] += by
            if not was or not self._uses[where]:
                self.bytes += by * size
            if not self._uses[where]:
                del self._uses[where]


def _storages(blocks: Sequence[Block]) -> dict[int, int]:
    """Bytes by address of all memory that the blocks hold on to: a view holds the whole of what it is a view of."""
    storages = [states.untyped_storage() for block in blocks for pair in block.layers for states in pair]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def _cut(blocks: Sequence[Block], start: int, stop: int) -> list[Block]:
    """Positions `start` to `stop` of `blocks`, as views."""
    parts = []
    for block in blocks:
        first, last = max(start, block.start), min(stop, block.end)
        if first < last:
            part = slice(first - block.start, last - block.start)
            layers: list[tuple[Any, Any]] = [(keys[:, part], values[:, part]) for keys, values in block.layers]
            parts.append(Block(first, last, layers))
    return parts
