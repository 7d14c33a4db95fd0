"""Which tokens go through the model together? A tree's nodes laid end to end, cut into forwards without padding."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from eval_platform.engine.trie import Node, Tokens


@dataclass(eq=False, slots=True)
class Block:
    """Keys and values of positions `start` to `end` of one node, one (keys, values) pair for each attention layer."""

    start: int
    end: int
    layers: list[tuple[Any, Any]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens [first, last) of `node`, at rows [row, row + last - first) of a forward."""

    node: Node
    first: int
    last: int
    row: int

    @property
    def stop(self) -> int:
        """The row after its last."""
        return self.row + self.last - self.first


@dataclass(frozen=True, slots=True)
class Ancestor:
    """Rows [first, last) of a forward look at what stands before them on their path.

    That is either rows [source.row, source.stop) of the same forward, or a block kept from an earlier one; `start` is
    the absolute position of its first key.
    """

    first: int
    last: int
    start: int
    source: Piece | Block


@dataclass(slots=True)
class Forward:
    """One pass of the model over one packed row of tokens."""

    tokens: Tokens
    positions: Tokens
    pieces: list[Piece]
    ancestors: list[Ancestor]
    keep: list[tuple[Piece, Block]]


class Kept:
    """The blocks of nodes that a later forward still looks at."""

    def __init__(self) -> None:
        self.blocks: dict[Node, list[Block]] = {}
        self.pinned: set[Node] = set()

    def length(self, node: Node) -> int:
        """How many of the node's tokens are kept; they are its first."""
        return sum(block.end - block.start for block in self.blocks.get(node, ()))

    def drop(self, node: Node) -> None:
        self.blocks.pop(node, None)
        self.pinned.discard(node)


def forwards(order: Sequence[Node], budget: int, kept: Kept) -> Iterator[Forward]:
    """Cut the nodes of `order` (depth-first; parents before children, or kept already) into forwards of at most
    `budget` tokens.

    A node's keys and values are kept from the forward that computes them until the last of its descendants in `order`
    has run, longer when it is pinned: what is held at any time is one open path, and a path is no longer than the
    model's window. Of a node whose first tokens are kept already only the rest is computed. A node is cut where the
    budget ends, unless it is small enough for the next forward to take whole.
    """
    last_use: dict[Node, int] = {}
    for i, node in enumerate(order):
        for ancestor in node.path():
            last_use[ancestor] = i

    pieces: list[Piece] = []
    rows = 0
    for i, node in enumerate(order):
        done, length = kept.length(node), len(node.tokens)
        while done < length:
            room = budget - rows
            left = length - done
            if left > room and rows and (length <= budget // 2 or room < min(64, budget)):
                yield from _flush(pieces, i, last_use, kept)
                pieces, rows = [], 0
                continue
            take = min(left, room)
            pieces.append(Piece(node, done, done + take, rows))
            rows += take
            done += take
            if rows == budget:
                # A node that goes on, or has descendants to come, is still in use.
                yield from _flush(pieces, i if done < length else i + 1, last_use, kept)
                pieces, rows = [], 0
    if pieces:
        yield from _flush(pieces, len(order), last_use, kept)


def _flush(pieces: list[Piece], upcoming: int, last_use: dict[Node, int], kept: Kept) -> Iterator[Forward]:
    """The forward of `pieces`; once it has run, drop what no node from order[upcoming] on looks at."""
    first_row: dict[Node, int] = {}
    last_row: dict[Node, int] = {}
    for piece in pieces:
        for ancestor in piece.node.path():
            first_row.setdefault(ancestor, piece.row)
            last_row[ancestor] = piece.stop
    ancestors = []
    for node, first in first_row.items():
        for block in kept.blocks.get(node, ()):
            ancestors.append(Ancestor(first, last_row[node], block.start, block))
    for piece in pieces:
        # Descendants follow their node, so the rows after this piece up to the node's last are all theirs (a node
        # appears once in a forward).
        if last_row[piece.node] > piece.stop:
            ancestors.append(Ancestor(piece.stop, last_row[piece.node], piece.node.start + piece.first, piece))
    keep = []
    for piece in pieces:
        if last_use[piece.node] >= upcoming or piece.node in kept.pinned:
            start = piece.node.start + piece.first
            keep.append((piece, Block(start, start + piece.last - piece.first)))
    yield Forward(
        tokens=np.concatenate([p.node.tokens[p.first : p.last] for p in pieces]),
        positions=np.concatenate([np.arange(p.node.start + p.first, p.node.start + p.last) for p in pieces]),
        pieces=pieces,
        ancestors=ancestors,
        keep=keep,
    )
    for piece, block in keep:
        kept.blocks.setdefault(piece.node, []).append(block)
    for node in [n for n in kept.blocks if last_use.get(n, -1) < upcoming and n not in kept.pinned]:
        kept.drop(node)
