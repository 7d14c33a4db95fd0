"""What does each token look at, on a GPU? The same attention as `attention`'s, by flash attention's kernel for rows of
many lengths.

On a CPU each piece and each ancestor is a call of its own; on a GPU that would be launches, not work. Here a forward's
pieces are one call, causal; what they look at before themselves is one more, dense, for all runs of rows that look at
the same keys; the two are merged by their log-sum-exps. A layer with a sliding window takes one call: each piece after
as much of its path as the window shows. (Dao 2023, arXiv:2307.08691: the kernel; causal and windowed masks of a row
that is shorter than its keys are aligned at the end.)
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from eval_platform.engine.attention import How, Pass, Slots, Unsupported
from eval_platform.engine.stream import Ancestor, Block, Forward, Piece

# Keys that one call gathers, at most (or those of one run of rows): at 8 heads of 128, 1 GiB with their values.
_GATHERED = 2**18


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of the kernel: which of the forward's rows ask, and which keys of the bank each sequence of them sees.

    rows: a slice where they lie together. keys: index into the bank (see `_Layout`); None: the forward's own rows.
    """

    rows: slice | Tensor
    keys: Tensor | None
    q_ends: Tensor  # int32 [sequences + 1]
    k_ends: Tensor
    most_q: int
    most_k: int


@dataclass(frozen=True, slots=True)
class _Layout:
    """The calls of one layer: `own` within the pieces, `before` what stands before them; or `whole`, windowed.

    The bank of keys is the blocks' in their order, then the forward's own rows.
    """

    own: _Call | None
    before: Sequence[_Call] = ()
    whole: Sequence[_Call] = ()


@dataclass(frozen=True, slots=True)
class _Run:
    """Rows [first, last) that look at the same keys before themselves: `keys`, positions in the bank."""

    first: int
    last: int
    keys: np.ndarray


@dataclass(slots=True, kw_only=True)
class VarlenPass(Pass):
    """Attention of a packed forward. The layouts are made once for each distinct window among the layers."""

    forward: Forward
    blocks: list[Block] = field(default_factory=list)
    layouts: dict[int | None, _Layout] = field(default_factory=dict)
    kept_rows: Tensor | None = None

    def __post_init__(self) -> None:
        seen = dict.fromkeys(a.source for a in self.forward.ancestors if isinstance(a.source, Block))
        self.blocks = list(seen)
        if self.forward.keep:
            rows = np.concatenate([np.arange(piece.row, piece.stop) for piece, _ in self.forward.keep])
            self.kept_rows = torch.from_numpy(rows).to(self.positions.device)

    def look_at_layer(self, *states: Tensor) -> None:
        """Nothing: on a GPU the kernel passes a NaN on, so the last hidden state shows it, and a look would wait."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, how: How) -> Tensor:
        _refuse(query, value, how)
        q, k, v = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        if self.kept_rows is not None:
            self._keep(k[self.kept_rows], v[self.kept_rows])
        layout = self._layout(how.window)
        if layout.own is not None:
            ends, most = layout.own.q_ends, layout.own.most_q
            output, lse = flash(q, k, v, ends, ends, most, most, scale=how.scale, causal=True)
        else:
            output, lse = torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)
        if layout.before or layout.whole:
            keys, values = self._bank(0, k), self._bank(1, v)
            for call in layout.before:
                part, part_lse = _ask(q, keys, values, call, how, windowed=False)
                share = torch.sigmoid(part_lse - lse[:, call.rows])
                output[call.rows] = output[call.rows].lerp(part, share.t()[..., None].to(part.dtype))
                lse[:, call.rows] = torch.logaddexp(lse[:, call.rows], part_lse)
            for call in layout.whole:
                output[call.rows], lse[:, call.rows] = _ask(q, keys, values, call, how, windowed=True)
        return _without_sinks(output, lse, how)

    def _keep(self, keys: Tensor, values: Tensor) -> None:
        """keys, values: of the kept rows [n, key-value heads, d]. The blocks are views of them."""
        lengths = (piece.last - piece.first for piece, _ in self.forward.keep)
        ends = list(itertools.accumulate(lengths, initial=0))
        for (_, block), (a, b) in zip(self.forward.keep, itertools.pairwise(ends), strict=True):
            block.layers.append((keys[a:b].transpose(0, 1), values[a:b].transpose(0, 1)))

    def _bank(self, which: int, own: Tensor) -> Tensor:
        if not self.blocks:
            return own
        return torch.cat([*(block.layers[self.layers][which].transpose(0, 1) for block in self.blocks), own])

    def _layout(self, window: int | None) -> _Layout:
        if window is not None and window > int(self.forward.positions.max()):
            window = None
        if window not in self.layouts:
            self.layouts[window] = _layout(self.forward, self.blocks, window, self.positions.device)
        return self.layouts[window]


@dataclass(slots=True, kw_only=True)
class SlotPass(Pass):
    """Attention of a forward in which every row is one more token of the sequence in its slot.

    A slot holds all of its sequence, shared beginnings too: reading them again is cheap on a GPU, and what a step does
    then depends on no length, so that it can be recorded once and replayed.
    """

    slots: Slots
    lengths: Tensor  # [rows], of what the slots hold before this forward

    def look_at_layer(self, *states: Tensor) -> None:
        """Nothing, as in VarlenPass."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, how: How) -> Tensor:
        _refuse(query, value, how)
        rows = query.shape[1]
        # [slots, capacity, key-value heads, d], as `room` made them
        keys, values = self.slots.keys[self.layers].transpose(1, 2), self.slots.values[self.layers].transpose(1, 2)
        index = torch.arange(rows, device=query.device)
        keys[index, self.lengths] = key.transpose(0, 1)
        values[index, self.lengths] = value.transpose(0, 1)
        capacity = keys.shape[1]
        ends = torch.arange(rows + 1, device=query.device, dtype=torch.int32)
        output, lse = flash(
            query.transpose(0, 1),
            keys[:rows].flatten(0, 1),
            values[:rows].flatten(0, 1),
            ends,
            ends * capacity,
            1,
            capacity,
            scale=how.scale,
            causal=how.window is not None,
            window=how.window,
            used=(self.lengths + 1).to(torch.int32),
        )
        return _without_sinks(output, lse, how)


def room(like: Tensor, slots: int, capacity: int) -> Tensor:
    """Zeros for the keys or values of `slots` sequences, [slots, key-value heads, capacity, d], laid out for SlotPass.

    like: keys or values of one layer, [key-value heads, n, d].
    """
    return like.new_zeros(slots, capacity, like.shape[0], like.shape[-1]).transpose(1, 2)


def flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    q_ends: Tensor,
    k_ends: Tensor,
    most_q: int,
    most_k: int,
    *,
    scale: float,
    causal: bool,
    window: int | None = None,
    used: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """torch's own flash attention over sequences laid end to end: query [rows, heads, d], key and value
    [keys, key-value heads, d] -> output [rows, heads, d] and log-sum-exp, float32 [heads, rows].

    used: how many of each sequence's keys count. A window of w: a row sees the last w positions up to its own.
    """
    if query.dtype not in (torch.bfloat16, torch.float16):
        raise Unsupported(f"flash attention is for bfloat16 and float16, and it runs in {query.dtype}")
    output, lse, *_ = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        q_ends,
        k_ends,
        most_q,
        most_k,
        0.0,
        causal,
        False,
        scale=scale,
        window_size_left=None if window is None else window - 1,
        window_size_right=None if window is None else 0,
        seqused_k=used,
    )
    return output, lse


def _ask(q: Tensor, keys: Tensor, values: Tensor, call: _Call, how: How, *, windowed: bool) -> tuple[Tensor, Tensor]:
    assert call.keys is not None
    return flash(
        q[call.rows],
        keys[call.keys],
        values[call.keys],
        call.q_ends,
        call.k_ends,
        call.most_q,
        call.most_k,
        scale=how.scale,
        causal=windowed,
        window=how.window if windowed else None,
    )


def _refuse(query: Tensor, value: Tensor, how: How) -> None:
    if how.softcap is not None:
        raise Unsupported("flash attention does not cap scores softly")
    if query.shape[-1] != value.shape[-1]:
        raise Unsupported("its keys and values are of unequal size, which flash attention does not take")


def _without_sinks(output: Tensor, lse: Tensor, how: How) -> Tensor:
    """[rows, heads, d] less the sinks' share of the softmax."""
    if how.sinks is None:
        return output
    share = torch.sigmoid(lse - how.sinks.float()[:, None])
    return output * share.t()[..., None].to(output.dtype)


# -- layouts


def _layout(forward: Forward, blocks: Sequence[Block], window: int | None, device: torch.device) -> _Layout:
    pieces = forward.pieces
    runs = _runs(forward, blocks)
    if window is not None:
        each = [_windowed(piece, run, window, _length(blocks)) for piece, run in zip(pieces, runs, strict=True)]
        return _Layout(None, whole=[_call(some, device) for some in _gathers(each)])
    ends = np.array([0, *(piece.stop for piece in pieces)], dtype=np.int32)
    most = int(np.diff(ends).max())
    at = torch.from_numpy(ends).to(device)
    own = _Call(slice(0, int(ends[-1])), None, at, at, most, most)
    seeing = [run for run in _joined(runs) if len(run.keys)]
    return _Layout(own, before=[_call(some, device) for some in _gathers(seeing)])


def _length(blocks: Sequence[Block]) -> int:
    return sum(block.end - block.start for block in blocks)


def _runs(forward: Forward, blocks: Sequence[Block]) -> list[_Run]:
    """What each piece's rows see before the piece, in the order of positions."""
    begins, at = {}, 0
    for block in blocks:
        begins[block] = at
        at += block.end - block.start
    own = at

    def keys(ancestor: Ancestor) -> np.ndarray:
        source = ancestor.source
        if isinstance(source, Piece):
            return np.arange(own + source.row, own + source.stop)
        return np.arange(begins[source], begins[source] + source.end - source.start)

    nothing = np.empty(0, dtype=np.int64)
    made: dict[tuple[int, ...], np.ndarray] = {}
    runs = []
    by_first = sorted(forward.ancestors, key=lambda a: a.first)
    open_, upcoming = [], 0
    for piece in forward.pieces:
        while upcoming < len(by_first) and by_first[upcoming].first <= piece.row:
            open_.append(by_first[upcoming])
            upcoming += 1
        open_ = [a for a in open_ if a.last > piece.row]
        seen = sorted(open_, key=lambda a: a.start)
        name = tuple(id(a) for a in seen)
        if name not in made:
            made[name] = np.concatenate([keys(a) for a in seen]) if seen else nothing
        runs.append(_Run(piece.row, piece.stop, made[name]))
    return runs


def _joined(runs: Sequence[_Run]) -> Iterator[_Run]:
    """Neighbours that see the same keys as one."""
    for _, same in itertools.groupby(runs, key=lambda run: id(run.keys)):
        together = list(same)
        yield _Run(together[0].first, together[-1].last, together[0].keys)


def _windowed(piece: Piece, run: _Run, window: int, own: int) -> _Run:
    """What the piece's rows see, themselves included, as far as the first row's window reaches back."""
    before = run.keys[max(0, len(run.keys) - (window - 1)) :] if window > 1 else run.keys[:0]
    return _Run(run.first, run.last, np.concatenate([before, np.arange(own + piece.row, own + piece.stop)]))


def _gathers(runs: Sequence[_Run]) -> Iterator[list[_Run]]:
    """The runs in lots of at most _GATHERED keys, or of one run."""
    lot: list[_Run] = []
    size = 0
    for run in runs:
        if lot and size + len(run.keys) > _GATHERED:
            yield lot
            lot, size = [], 0
        lot.append(run)
        size += len(run.keys)
    if lot:
        yield lot


def _call(runs: Sequence[_Run], device: torch.device) -> _Call:
    q_lengths = [run.last - run.first for run in runs]
    k_lengths = [len(run.keys) for run in runs]

    def ends(lengths: Sequence[int]) -> Tensor:
        return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)

    rows: slice | Tensor = slice(runs[0].first, runs[-1].last)
    if sum(q_lengths) != runs[-1].last - runs[0].first:
        rows = torch.from_numpy(np.concatenate([np.arange(run.first, run.last) for run in runs])).to(device)
    keys = torch.from_numpy(np.concatenate([run.keys for run in runs])).to(device)
    return _Call(rows, keys, ends(q_lengths), ends(k_lengths), max(q_lengths), max(k_lengths))
