"""What do these token sequences have in common? A radix tree in which a shared beginning is one node."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int64]


class Node:
    """Tokens `start` to `end` (absolute positions, end exclusive) of every sequence that passes through here."""

    __slots__ = ("children", "parent", "start", "tokens")

    def __init__(self, parent: "Node | None", start: int, tokens: Tokens) -> None:
        self.parent = parent
        self.start = start
        self.tokens = tokens
        self.children: list[Node] = []

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)

    def path(self) -> "Iterator[Node]":
        """This node and its ancestors, deepest first."""
        node: Node | None = self
        while node is not None:
            yield node
            node = node.parent


def build(sequences: Sequence[Tokens], min_shared: int = 1) -> tuple[list[Node], list[Node]]:
    """Roots of the tree over distinct, non-empty `sequences`, and for each of them the node where it ends.

    A branch is made only where at least `min_shared` more tokens are shared: a node costs some attention calls of its
    own, so for a few tokens of a small model it is cheaper to compute them twice. Sorted by token, depth-first order
    is one, whatever order the sequences came in. O(n log n) comparisons.
    """
    order = sorted(range(len(sequences)), key=lambda i: sort_key(sequences[i]))
    shared = [0] + [common(sequences[order[i - 1]], sequences[order[i]]) for i in range(1, len(order))]
    roots: list[Node] = []
    ends: dict[int, Node] = {}
    # (first, last, depth, parent): sequences order[first:last] agree up to depth, which is where parent ends.
    open_ranges: list[tuple[int, int, int, Node | None]] = [(0, len(order), 0, None)]
    while open_ranges:
        first, last, depth, parent = open_ranges.pop()
        cuts = [i for i in range(first + 1, last) if shared[i] < depth + min_shared]
        for a, b in zip([first, *cuts], [*cuts, last], strict=True):
            if a == b:
                continue
            sequence = sequences[order[a]]
            if b - a == 1:
                if parent is not None and len(sequence) == depth:
                    ends[order[a]] = parent
                    continue
                node = Node(parent, depth, sequence[depth:])
                ends[order[a]] = node
            else:
                branch = min(shared[a + 1 : b])
                node = Node(parent, depth, sequence[depth:branch])
                open_ranges.append((a, b, branch, node))
            (roots if parent is None else parent.children).append(node)
    return roots, [ends[i] for i in range(len(sequences))]


def depth_first(roots: Sequence[Node]) -> Iterator[Node]:
    """Every node, each before its children."""
    waiting = list(reversed(roots))
    while waiting:
        node = waiting.pop()
        yield node
        waiting.extend(reversed(node.children))


def sort_key(tokens: Tokens) -> bytes:
    """Bytes that sort as the tokens do, the beginning of a sequence before it."""
    return tokens.astype(">u4").tobytes()


def common(a: Tokens, b: Tokens) -> int:
    """Length of the longest common beginning."""
    length = min(len(a), len(b))
    differ = np.flatnonzero(a[:length] != b[:length])
    return int(differ[0]) if differ.size else length
