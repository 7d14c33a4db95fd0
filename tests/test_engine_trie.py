"""The tree of tokens and the stream cut out of it, against plain sets of prefixes and paths. No model is asked."""

from collections.abc import Sequence

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from eval_platform.engine import trie
from eval_platform.engine.stream import Block, Forward, Kept, Piece, forwards
from eval_platform.engine.trie import Node

# Few different tokens, so that much is shared; the second kind are variations of a long beginning.
SHORT = st.lists(st.integers(0, 2), min_size=1, max_size=9)
LONG = st.builds(
    lambda cut, rest: [0, 1, 2, 0, 2, 1] * 20 + rest if cut > 120 else ([0, 1, 2, 0, 2, 1] * 20)[:cut] + rest,
    st.integers(1, 121),
    st.lists(st.integers(0, 2), max_size=5),
)
SEQUENCES = st.lists((SHORT | LONG).map(tuple), min_size=1, max_size=14, unique=True)
SHARED = st.integers(1, 6)


def build(sequences: Sequence[tuple[int, ...]], min_shared: int) -> tuple[list[Node], list[Node]]:
    return trie.build([np.asarray(sequence, dtype=np.int64) for sequence in sequences], min_shared)


def tokens_of(end: Node) -> tuple[int, ...]:
    return tuple(token for node in list(end.path())[::-1] for token in node.tokens.tolist())


def size(roots: Sequence[Node]) -> int:
    return sum(len(node.tokens) for node in trie.depth_first(roots))


@settings(max_examples=14, deadline=None)
@given(sequences=SEQUENCES, min_shared=SHARED)
def test_every_sequence_is_the_tokens_of_its_path(sequences: list[tuple[int, ...]], min_shared: int) -> None:
    roots, ends = build(sequences, min_shared)
    assert [tokens_of(end) for end in ends] == sequences
    order = list(trie.depth_first(roots))
    assert len(set(order)) == len(order)
    assert set(order) == {node for end in ends for node in end.path()}
    for node in order:
        assert len(node.tokens) > 0
        assert node.start == (0 if node.parent is None else node.parent.end)
        assert node in (roots if node.parent is None else node.parent.children)
        assert node.parent is None or order.index(node.parent) < order.index(node)


@settings(max_examples=14, deadline=None)
@given(sequences=SEQUENCES)
def test_every_distinct_prefix_stands_once(sequences: list[tuple[int, ...]]) -> None:
    roots, _ = build(sequences, 1)
    assert size(roots) == len({sequence[: i + 1] for sequence in sequences for i in range(len(sequence))})


@settings(max_examples=14, deadline=None)
@given(sequences=SEQUENCES, min_shared=SHARED, data=st.data())
def test_the_order_of_the_input_does_not_show(
    sequences: list[tuple[int, ...]], min_shared: int, data: st.DataObject
) -> None:
    def shape(given_: Sequence[tuple[int, ...]]) -> list[tuple[int, tuple[int, ...]]]:
        return [(node.start, tuple(node.tokens.tolist())) for node in trie.depth_first(build(given_, min_shared)[0])]

    assert shape(sequences) == shape(data.draw(st.permutations(sequences)))


@settings(max_examples=14, deadline=None)
@given(sequences=SEQUENCES, min_shared=SHARED)
def test_a_branch_shares_no_less_than_asked(sequences: list[tuple[int, ...]], min_shared: int) -> None:
    roots, ends = build(sequences, min_shared)
    for node in trie.depth_first(roots):
        through = sum(node in set(end.path()) for end in ends)
        assert through == 1 or len(node.tokens) >= min_shared
    # And whatever could be shared is: of siblings no two agree on as many tokens.
    for siblings in [roots, *(node.children for node in trie.depth_first(roots))]:
        starts = [tuple(node.tokens[:min_shared].tolist()) for node in siblings if len(node.tokens) >= min_shared]
        assert len(set(starts)) == len(starts)


# -- the stream


def own_piece(forward: Forward, row: int) -> Piece:
    (own,) = [piece for piece in forward.pieces if piece.row <= row < piece.stop]
    return own


def visible(forward: Forward, row: int) -> list[tuple[Node | Block, int]]:
    """What `row` of a forward sees, as (source, absolute position), its own piece's first rows included."""
    own = own_piece(forward, row)
    seen: list[tuple[Node | Block, int]] = [
        (own.node, own.node.start + own.first + i) for i in range(row - own.row + 1)
    ]
    for ancestor in forward.ancestors:
        if not ancestor.first <= row < ancestor.last:
            continue
        source = ancestor.source
        if isinstance(source, Block):
            assert source.layers == ["filled"], "a block that no forward has filled"
            assert ancestor.start == source.start
            seen += [(source, position) for position in range(source.start, source.end)]
        else:
            assert ancestor.start == source.node.start + source.first
            seen += [(source.node, ancestor.start + i) for i in range(source.stop - source.row)]
    return seen


@settings(max_examples=16, deadline=None)
@given(
    sequences=SEQUENCES,
    min_shared=SHARED,
    budget=st.integers(1, 12) | st.integers(13, 300),
    data=st.data(),
)
def test_every_token_once_and_each_row_sees_its_path(
    sequences: list[tuple[int, ...]], min_shared: int, budget: int, data: st.DataObject
) -> None:
    roots, _ = build(sequences, min_shared)
    order = list(trie.depth_first(roots))
    kept = Kept()
    pinned = set(data.draw(st.lists(st.sampled_from(order), max_size=3)))
    kept.pinned |= pinned
    owner: dict[Block, Node] = {}  # of every block that was ever made
    done: dict[Node, list[int]] = {node: [] for node in order}

    for forward in forwards(order, budget, kept):
        assert 1 <= len(forward.tokens) <= budget
        row = 0
        for piece in forward.pieces:
            assert piece.row == row
            row = piece.stop
            assert (
                forward.tokens[piece.row : piece.stop].tolist() == piece.node.tokens[piece.first : piece.last].tolist()
            )
            assert forward.positions[piece.row : piece.stop].tolist() == list(
                range(piece.node.start + piece.first, piece.node.start + piece.last)
            )
            done[piece.node].extend(range(piece.first, piece.last))
        assert row == len(forward.tokens)

        # Before the forward ends: what it looks at is in memory, and belongs to the row's own path.
        for block in [a.source for a in forward.ancestors if isinstance(a.source, Block)]:
            assert any(block in blocks for blocks in kept.blocks.values())
        for row, position in enumerate(forward.positions.tolist()):
            seen = visible(forward, row)
            assert sorted(at for _, at in seen) == list(range(position + 1))
            path = set(own_piece(forward, row).node.path())
            for source, at in seen:
                node = owner[source] if isinstance(source, Block) else source
                assert node in path
                assert node.start <= at < node.end

        for piece, block in forward.keep:
            owner[block] = piece.node
            block.layers.append("filled")  # type: ignore[arg-type]

    for node in order:
        assert done[node] == list(range(len(node.tokens)))
    assert set(kept.blocks) == pinned
    for node in pinned:
        assert [at for block in kept.blocks[node] for at in range(block.start, block.end)] == list(
            range(node.start, node.end)
        )


def check_what_is_kept(sequences: list[tuple[int, ...]], min_shared: int, budget: int) -> None:
    """Asserts that nothing is held but the nodes of one path that tokens to come still look at."""
    roots, _ = build(sequences, min_shared)
    order = list(trie.depth_first(roots))
    kept = Kept()
    done: dict[Node, int] = dict.fromkeys(order, 0)
    for forward in forwards(order, budget, kept):
        # The generator has gone on, so it has dropped what was of use to the forwards before this one only.
        to_come = [node for node in order if done[node] < len(node.tokens)]
        needed = {ancestor for node in to_come for ancestor in node.path()}
        assert set(kept.blocks) <= needed
        if kept.blocks:
            deepest = max(kept.blocks, key=lambda node: node.end)
            assert set(kept.blocks) <= set(deepest.path())
        for piece in forward.pieces:
            done[piece.node] = piece.last
    assert not kept.blocks


@settings(max_examples=16, deadline=None)
@given(sequences=SEQUENCES, min_shared=SHARED, budget=st.integers(1, 12) | st.integers(13, 300))
def test_what_is_kept_is_one_open_path(sequences: list[tuple[int, ...]], min_shared: int, budget: int) -> None:
    check_what_is_kept(sequences, min_shared, budget)


def test_nodes_computed_by_an_earlier_call_are_seen_through_what_was_kept() -> None:
    """As decoding admits prompts: pinned beginnings first, then other ends of the same tree."""
    roots, ends = build([(1, 2, 3, 4, 5), (1, 2, 3, 6), (1, 2, 3, 7, 8)], 1)
    kept = Kept()
    kept.pinned |= set(roots)
    first = [roots[0], ends[0]]
    for forward in forwards(first, 100, kept):
        for _, block in forward.keep:
            block.layers.append("filled")  # type: ignore[arg-type]
    assert set(kept.blocks) == set(roots)
    for forward in forwards([ends[1], ends[2]], 100, kept):
        for row, position in enumerate(forward.positions.tolist()):
            assert sorted(at for _, at in visible(forward, row)) == list(range(position + 1))
    assert set(kept.blocks) == set(roots)
