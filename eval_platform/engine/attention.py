"""What does each token look at? Attention over a packed stream of tree nodes, under transformers' own attention face.

A forward is one row without padding (`stream.Forward`). Each piece looks at itself causally and at its ancestors
densely, unless a sliding window cuts them; partial results are merged by their log-sum-exps, which is exact
(Milakov & Gimelshein 2018, arXiv:1805.02867; the same merge as cascade inference and split-K flash decoding).
The model's own code stays as it is: the function is registered with `AttentionInterface`, and the mask function with
`AttentionMaskInterface` hands each layer a marker that says how far back the layer sees.
"""

import abc
import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from eval_platform.engine.stream import Ancestor, Block, Piece

IMPLEMENTATION = "eval_platform_tree"

# Scores of one block of masked or soft-capped attention: 4 MiB of float32, about what a core's caches hold.
_SCORES = 2**20
# Pieces up to this many tokens share calls: a call's own cost is that of some 30 tokens.
_SHORT = 48
# A bunch's longest piece is at most this many times its shortest: what fills up is computed for nothing.
_FILL = 1.5
# In the last layer so many times fewer wanted rows than rows are few: they are then attended for by themselves.
_FEW = 4
# Arguments of attention functions that change nothing here: the mask's marker carries the window, the rest is about
# outputs and caches. Anything else that is set is a kind of attention we do not know.
_HARMLESS = {
    "cache_position",
    "cu_seq_lens_k",
    "cu_seq_lens_q",
    "is_causal",
    "max_length_k",
    "max_length_q",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "position_ids",
    "return_dict",
    "sliding_window",
    "use_cache",
}


class Unsupported(Exception):
    """The model does something that packed attention does not do; the plain path does."""


@dataclass(frozen=True, slots=True)
class Reach:
    """A mask's marker: a token sees those at most `window - 1` positions before it, or all (None).

    Of window 0 is a mask by which nothing is seen, not even the token itself: models that choose masks by the kind of
    layer make one for a kind that no layer is of (Qwen2-MoE without sliding windows). No layer may attend by it.
    """

    window: int | None


@dataclass(slots=True, weakref_slot=True)
class Slots:
    """The own keys and values of rows that are being decoded: row i of a forward is slot i.

    keys[layer]: [slots, key-value heads, capacity, head dimension], the first `lengths[i]` of row i filled.
    """

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)


@dataclass(slots=True)
class Group:
    """Rows of a decoding forward (indices, or a slice when they are contiguous) that share the blocks of a node."""

    rows: Tensor | slice
    blocks: list[Block]


@dataclass(frozen=True, slots=True)
class Bunch:
    """Short pieces of about one length, whose attention within themselves is one call.

    index: [pieces, longest], the forward's rows, a shorter piece filled up with its last one; nothing looks ahead, so
    what fills up is never seen. rows and places: where each real row stands in the forward, and in `index` laid flat.
    """

    index: Tensor
    rows: Tensor
    places: Tensor


@dataclass(slots=True)
class Broken:
    """Rows of a forward where something was not finite, and the first layer that met it."""

    rows: Tensor  # bool [rows]
    where: str


@dataclass(slots=True, kw_only=True)
class Pass(abc.ABC):
    """What the attention of one forward needs to know. Layers and masks are counted as they are called."""

    positions: Tensor  # [rows], absolute
    reaches: Sequence[Reach] | None  # of the model's masks, in the order it makes them; None: find out
    found: list[Reach] = field(default_factory=list)
    # Rows, ascending, whose last hidden state is asked for; None: all. Nobody looks at the last layer of the others.
    wanted: NDArray[np.int64] | None = None
    narrowed: tuple[Tensor, Tensor] | None = None  # what a linear layer was given last, and its wanted rows
    all_layers: int = 0  # how many attend; 0: not known yet
    layers: int = 0
    masks: int = 0
    token_bytes: int = 0  # of one token's keys and values, in all layers so far
    broken: Broken | None = None

    @property
    def is_narrow(self) -> bool:
        """Whether what is computed now serves the wanted rows alone: in the last layer's attention and behind it."""
        return self.wanted is not None and 0 < self.all_layers <= self.layers + 1

    @abc.abstractmethod
    def attend(self, query: Tensor, key: Tensor, value: Tensor, how: "How") -> Tensor:
        """query [heads, rows, d], key and value [key-value heads, rows, d] -> [rows, heads, d of value]."""

    def look_at(
        self,
        output: Tensor,
        lse: Tensor,
        query: Tensor,
        rows: slice | Tensor,
        blocks: Sequence[tuple[Tensor, Tensor, int]],
        how: "How",
    ) -> None:
        """Merge into `output` and `lse` what `rows` see of blocks (keys, values, position of the first)."""
        chosen, at = query[:, :, rows], self.positions[rows]
        so_far, so_far_lse = output[:, :, rows], lse[:, :, rows]
        for keys, values, start in blocks:
            part = _dense(chosen, keys, values, at, start, how)
            if part is not None:
                _merge(so_far, so_far_lse, *part)
        if not isinstance(rows, slice):  # those were copies
            output[:, :, rows], lse[:, :, rows] = so_far, so_far_lse

    def look_at_layer(self, *states: Tensor) -> None:
        """Note what is not finite of a layer's queries, keys and values. The fused kernel would hide it: torch 2.13 on
        CPU gives zeros, not NaN, for NaN queries over fewer than 16 keys.
        """
        self.look_for_broken(f"layer {self.layers}", *states)

    def look_for_broken(self, where: str, *states: Tensor) -> None:
        """Note rows with a NaN or an infinity in any of `states`, each [heads, rows, d].

        A sum is finite only if every term is, and cheaper than a look at each.
        """
        if all(math.isfinite(state.sum(dtype=torch.float32).item()) for state in states):
            return
        rows = torch.zeros_like(self.positions, dtype=torch.bool)
        for state in states:
            rows |= ~state.isfinite().all(-1).all(0)
        if self.broken is not None:
            self.broken.rows |= rows
        elif bool(rows.any()):
            self.broken = Broken(rows, where)


@dataclass(slots=True, kw_only=True)
class StreamPass(Pass):
    """Attention of a forward over pieces of nodes. Every row is in one of `pieces` or in one of `bunches`."""

    pieces: Sequence[Piece]
    bunches: Sequence[Bunch] = ()
    ancestors: Sequence[Ancestor] = ()
    keep: Sequence[tuple[Piece, Block]] = ()

    def attend(self, query: Tensor, key: Tensor, value: Tensor, how: "How") -> Tensor:
        layer = self.layers
        for piece, block in self.keep:
            rows = slice(piece.row, piece.stop)
            # A copy: a view would keep the keys and values of the whole forward.
            block.layers.append((key[:, rows].clone(), value[:, rows].clone()))
        heads = key.shape[0]
        grouped = query.unflatten(0, (heads, -1))
        if len(self.pieces) == 1 and not self.bunches and not self.ancestors:
            output, lse = _causal(grouped, key, value, self.positions, how)
        else:
            output, lse = _empty(grouped, value)
            for piece in self.pieces:
                rows = slice(piece.row, piece.stop)
                some = self._wanted_in(piece.row, piece.stop)
                if some is None:
                    part = _causal(grouped[:, :, rows], key[:, rows], value[:, rows], self.positions[rows], how)
                    output[:, :, rows], lse[:, :, rows] = part
                    continue
                output[:, :, rows], lse[:, :, rows] = 0.0, 0.0
                if len(some):
                    part = _blocked(
                        grouped[:, :, some],
                        key[:, rows],
                        value[:, rows],
                        self.positions[some],
                        self.positions[rows],
                        how,
                    )
                    output[:, :, some], lse[:, :, some] = part
            for bunch in self.bunches:
                output[:, :, bunch.rows], lse[:, :, bunch.rows] = _bunched(grouped, key, value, bunch, how)
            for ancestor in self.ancestors:
                some = self._wanted_in(ancestor.first, ancestor.last)
                if some is not None and not len(some):
                    continue
                if isinstance(ancestor.source, Piece):
                    there = slice(ancestor.source.row, ancestor.source.stop)
                    keys, values = key[:, there], value[:, there]
                else:
                    keys, values = ancestor.source.layers[layer]
                rows = slice(ancestor.first, ancestor.last) if some is None else some
                self.look_at(output, lse, grouped, rows, [(keys, values, ancestor.start)], how)
        return _finish(output, lse, how)

    def _wanted_in(self, first: int, last: int) -> Tensor | None:
        """The wanted rows from `first` to `last`, where it is they alone that count and few; None: take all."""
        if self.wanted is None or not self.is_narrow:
            return None
        low, high = np.searchsorted(self.wanted, (first, last))
        if (high - low) * _FEW > last - first:
            return None
        return torch.from_numpy(self.wanted[low:high]).to(self.positions.device)


@dataclass(slots=True, kw_only=True)
class DecodingPass(Pass):
    """Attention of a forward in which every row is one more token of a sample of its own."""

    slots: Slots
    lengths: Tensor  # [rows], of what the slots hold before this forward
    longest: int
    groups: Sequence[Group]
    # Look at each layer for what is not finite; else only add up, and the forward is to be run again when `is_sound`
    # says no: what it wrote is then written again.
    careful: bool = False
    sums: list[Tensor] = field(default_factory=list)
    unseen: dict[tuple[int | None, torch.dtype], Tensor] = field(default_factory=dict)  # by window: see _unseen
    # By key-value heads, of which layers may have different numbers: where a row's new keys go in the slots laid flat.
    places: dict[int, Tensor] = field(default_factory=dict)

    def look_at_layer(self, *states: Tensor) -> None:
        if self.careful:
            Pass.look_at_layer(self, *states)
        else:
            self.sums += [state.sum(dtype=torch.float32) for state in states]

    @property
    def is_sound(self) -> bool:
        """Whether all that the layers added up is finite."""
        return not self.sums or math.isfinite(torch.stack(self.sums).sum().item())

    def attend(self, query: Tensor, key: Tensor, value: Tensor, how: "How") -> Tensor:
        rows = query.shape[1]
        keys, values = self.slots.keys[self.layers], self.slots.values[self.layers]
        for states, new in ((keys, key), (values, value)):
            states.view(-1, states.shape[-1]).index_copy_(0, self._places(states), new.transpose(0, 1).flatten(0, 1))
        grouped = query.unflatten(0, (key.shape[0], -1))
        output, lse = self._own(grouped, keys[:rows, :, : self.longest + 1], values[:rows, :, : self.longest + 1], how)
        for group in self.groups:
            blocks = [(*block.layers[self.layers], block.start) for block in group.blocks]
            self.look_at(output, lse, grouped, group.rows, blocks, how)
        return _finish(output, lse, how)

    def _places(self, states: Tensor) -> Tensor:
        """[rows * key-value heads]"""
        _, heads, capacity, _ = states.shape
        if heads not in self.places:
            first = torch.arange(len(self.lengths) * heads).view(-1, heads) * capacity
            self.places[heads] = (first + self.lengths[:, None]).flatten()
        return self.places[heads]

    def _own(self, query: Tensor, key: Tensor, value: Tensor, how: "How") -> tuple[Tensor, Tensor]:
        """Each row on the filled part of its own slot, itself included. key: [rows, kv heads, longest + 1, d]."""
        each = query.permute(2, 0, 1, 3)  # [rows, kv heads, group, d]
        unseen = self._unseen(how.window, query.dtype)
        if _flash_takes(query, value, how):
            output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                each,
                key,
                value,
                0.0,
                False,
                attn_mask=unseen.expand(-1, 1, query.shape[1], -1),
                scale=how.scale,
            )
        else:
            scores = _scores(each, key, how).add_(unseen)
            lse = scores.logsumexp(-1)
            output = torch.matmul(scores.sub_(lse[..., None]).exp_().to(value.dtype), value)
        return output.permute(1, 2, 0, 3), lse.permute(1, 2, 0)

    def _unseen(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """[rows, 1, 1, longest + 1]: -inf where a row does not see its slot, else 0."""
        if (window, dtype) not in self.unseen:
            there = torch.arange(self.longest + 1)
            hidden = there > self.lengths[:, None]
            if window is not None:
                hidden |= there <= self.lengths[:, None] - window
            zeros = torch.zeros(hidden.shape, dtype=dtype)
            self.unseen[window, dtype] = zeros.masked_fill_(hidden, -torch.inf)[:, None, None]
        return self.unseen[window, dtype]


@dataclass(frozen=True, slots=True)
class How:
    """How a layer weighs what it sees: the arguments of its attention that change a number."""

    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None  # [heads]: a logit of its own in each head's softmax, with no value behind it


_current: ContextVar[Pass | None] = ContextVar("_current", default=None)


def current() -> Pass | None:
    """The pass that is running, if one is."""
    return _current.get()


@contextlib.contextmanager
def running(a_pass: Pass) -> Iterator[None]:
    """Within, attention of a model under IMPLEMENTATION is that of `a_pass`."""
    token = _current.set(a_pass)
    try:
        yield
    finally:
        _current.reset(token)


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention face: query [1, heads, rows, d], key and value [1, key-value heads, rows, d]."""
    a_pass = _current.get()
    if a_pass is None:
        raise Unsupported("attention was called outside a forward of the engine")
    unknown = [name for name, given in others.items() if given is not None and name not in _HARMLESS]
    if unknown:
        raise Unsupported(f"its attention takes {', '.join(unknown)}")
    if not isinstance(attention_mask, Reach):
        raise Unsupported("its layers make attention masks of their own")
    if attention_mask.window == 0:
        raise Unsupported("a layer's mask hides a token from itself")
    if query.shape[0] != 1 or dropout:
        raise Unsupported("its attention is not called row by row")
    how = How(query.shape[-1] ** -0.5 if scaling is None else scaling, attention_mask.window, softcap, s_aux)
    a_pass.look_at_layer(query[0], key[0], value[0])
    output = a_pass.attend(query[0], key[0], value[0], how)
    a_pass.layers += 1
    a_pass.token_bytes += (key.nbytes + value.nbytes) // key.shape[2]
    return output[None], None


def _mask(mask_function: Callable[..., Any], **_others: Any) -> Reach:
    a_pass = _current.get()
    if a_pass is None:
        raise Unsupported("a mask was made outside a forward of the engine")
    if a_pass.reaches is None:
        reach = reach_of(mask_function)
        a_pass.found.append(reach)
    elif a_pass.masks < len(a_pass.reaches):
        reach = a_pass.reaches[a_pass.masks]
    else:
        raise Unsupported("it makes more masks in one forward than in another")
    a_pass.masks += 1
    return reach


AttentionInterface.register(IMPLEMENTATION, _attention)
AttentionMaskInterface.register(IMPLEMENTATION, _mask)


def reach_of(mask_function: Callable[..., Any]) -> Reach:
    """How far back a mask lets a token see, found by asking it: `mask_function(batch, head, query, key)`.

    Raises Unsupported when that differs from position to position (chunked attention) or when it looks ahead.
    """
    zero = torch.zeros((), dtype=torch.long)

    def sees(query: int, distance: int) -> bool:
        return bool(mask_function(zero, zero, torch.tensor(query), torch.tensor(query - distance)))

    far = 2**30  # beyond every window
    queries = [far + offset for offset in (0, 1, 12345, 2**20 + 7)]
    if any(sees(query, -1) for query in queries):
        raise Unsupported("its mask is not causal")
    if not any(sees(query, distance) for query in queries for distance in (0, 1, query)):
        return Reach(0)
    if not all(sees(query, 0) for query in queries):
        raise Unsupported("its mask hides a token from itself")
    windows = set()
    for query in queries:
        if sees(query, query):
            windows.add(None)
            continue
        low, high = 0, query  # sees low, does not see high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if sees(query, middle) else (low, middle)
        windows.add(high)
    if len(windows) > 1:
        raise Unsupported("how far back its mask sees differs from position to position (chunked attention?)")
    return Reach(windows.pop())


# -- partial attention: each gives (output [kv heads, group, rows, d], log-sum-exp [kv heads, group, rows])


def _empty(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Room for the whole forward's output, rows outermost in memory, so that the model's reshape copies nothing."""
    heads, group, rows, _ = query.shape
    output = query.new_empty(rows, heads, group, value.shape[-1]).permute(1, 2, 0, 3)
    lse = torch.empty(rows, heads, group, device=query.device).permute(1, 2, 0)
    return output, lse


def _causal(query: Tensor, key: Tensor, value: Tensor, positions: Tensor, how: How) -> tuple[Tensor, Tensor]:
    """Every row sees itself and the rows before it."""
    if _flash_takes(query, value, how) and (how.window is None or how.window >= query.shape[2]):
        return _flash(query, key, value, how.scale, causal=True)
    return _blocked(query, key, value, positions, positions, how)


def _bunched(query: Tensor, key: Tensor, value: Tensor, bunch: Bunch, how: How) -> tuple[Tensor, Tensor]:
    """Attention of a bunch's pieces within themselves: [kv heads, group, rows, d] and [kv heads, group, rows]."""
    heads = query.shape[0]
    pieces, longest = bunch.index.shape
    flat = bunch.index.flatten()

    def batched(states: Tensor) -> Tensor:  # [kv heads, rows, d] -> [pieces * kv heads, longest, d]
        return states[:, flat].unflatten(1, (pieces, longest)).transpose(0, 1).flatten(0, 1)

    queries = query[:, :, flat].unflatten(2, (pieces, longest)).permute(2, 0, 1, 3, 4).flatten(0, 1)
    there = torch.arange(longest, device=query.device)
    output, lse = _causal(queries, batched(key), batched(value), there, how)
    output = output.unflatten(0, (pieces, heads)).permute(1, 2, 0, 3, 4).flatten(2, 3)
    lse = lse.unflatten(0, (pieces, heads)).permute(1, 2, 0, 3).flatten(2, 3)
    return output[:, :, bunch.places], lse[:, :, bunch.places]


def bunched(pieces: Sequence[Piece], device: torch.device) -> tuple[list[Piece], list[Bunch]]:
    """`pieces` that are long enough for a call of their own, and the rest in bunches."""
    long, short = [], []
    for piece in pieces:
        (short if piece.stop - piece.row <= _SHORT else long).append(piece)
    short.sort(key=lambda piece: piece.stop - piece.row, reverse=True)
    bunches, first = [], 0
    while first < len(short):
        longest = short[first].stop - short[first].row
        last = first + 1
        while last < len(short) and (short[last].stop - short[last].row) * _FILL >= longest:
            last += 1
        if last - first == 1:
            long.append(short[first])
        else:
            bunches.append(_bunch(short[first:last], longest, device))
        first = last
    return long, bunches


def _bunch(pieces: Sequence[Piece], longest: int, device: torch.device) -> Bunch:
    starts = torch.tensor([piece.row for piece in pieces])
    lengths = torch.tensor([piece.stop - piece.row for piece in pieces])
    place = torch.arange(longest)[None]
    index = starts[:, None] + torch.minimum(place, lengths[:, None] - 1)
    real = place < lengths[:, None]
    return Bunch(index.to(device), index[real].to(device), real.flatten().nonzero()[:, 0].to(device))


def _dense(
    query: Tensor, key: Tensor, value: Tensor, positions: Tensor, start: int, how: How
) -> tuple[Tensor, Tensor] | None:
    """Every row sees every key, unless it is out of the window; None when no row sees any."""
    length = key.shape[1]
    if how.window is not None:
        nearest, farthest = int(positions.min()), int(positions.max())
        # Keys before the first row's window are out of every row's.
        hidden = max(0, nearest - how.window + 1 - start)
        if hidden >= length:
            return None
        key, value, start, length = key[:, hidden:], value[:, hidden:], start + hidden, length - hidden
        if farthest - start >= how.window:
            there = torch.arange(start, start + length, device=query.device)
            return _blocked(query, key, value, positions, there, how)
    if _flash_takes(query, value, how):
        return _flash(query, key, value, how.scale, causal=False)
    return _blocked(query, key, value, None, None, how)


def _flash_takes(query: Tensor, value: Tensor, how: How) -> bool:
    return query.device.type == "cpu" and how.softcap is None and query.shape[-1] == value.shape[-1]


def _flash(query: Tensor, key: Tensor, value: Tensor, scale: float, *, causal: bool) -> tuple[Tensor, Tensor]:
    group = query.shape[1]
    # Key-value heads are the kernel's batch, and each head of a group sees the same keys without a copy of them.
    spread = (key.shape[0], group, key.shape[1], -1)
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key[:, None].expand(spread), value[:, None].expand(spread), 0.0, causal, scale=scale
    )


def _blocked(
    query: Tensor, key: Tensor, value: Tensor, positions: Tensor | None, there: Tensor | None, how: How
) -> tuple[Tensor, Tensor]:
    """Attention written out, some rows at a time: with a window, soft-capping, or heads of unequal size.

    positions [rows] and there [keys] are absolute; None: every row sees every key. A row that sees nothing gets a
    log-sum-exp of -inf, which the merge takes as weight zero.
    """
    output, lse = _empty(query, value)
    heads, group, rows, _ = query.shape
    step = max(1, _SCORES // (heads * group * key.shape[1]))
    for first in range(0, rows, step):
        some = slice(first, min(rows, first + step))
        scores = _scores(query[:, :, some], key[:, None], how)
        if positions is not None and there is not None:
            distance = positions[some, None] - there[None]
            hidden = distance < 0
            if how.window is not None:
                hidden |= distance >= how.window
            scores.masked_fill_(hidden, -torch.inf)
        high = scores.amax(-1, keepdim=True)
        # Of a row that sees nothing all scores are -inf, and -inf - -inf would be NaN.
        weights = scores.sub_(high.clamp_min(torch.finfo(torch.float32).min)).exp_()
        total = weights.sum(-1, keepdim=True)
        output[:, :, some] = torch.matmul(weights / total.clamp_min(1e-37), value[:, None].float()).to(query.dtype)
        lse[:, :, some] = (total.log() + high).squeeze(-1)
    return output, lse


def _scores(query: Tensor, key: Tensor, how: How) -> Tensor:
    """float32 [..., rows, keys]."""
    scores = torch.matmul(query, key.transpose(-1, -2)).float() * how.scale
    if how.softcap is not None:
        scores = torch.tanh(scores / how.softcap) * how.softcap
    return scores


def _merge(output: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> None:
    """In place: attention over two sets of keys from attention over each."""
    # sigmoid(b - a) = e^b / (e^a + e^b): the other set's share. NaN only where both saw nothing, which no row does:
    # every row sees itself first.
    share = torch.sigmoid(other_lse - lse)[..., None]
    if output.dtype == torch.float32:
        output.lerp_(other, share)
    else:
        output.copy_(output.float().lerp_(other.float(), share))
    lse.copy_(torch.logaddexp(lse, other_lse))


def _finish(output: Tensor, lse: Tensor, how: How) -> Tensor:
    """[kv heads, group, rows, d] -> [rows, heads, d], with the sinks' share of the softmax taken off."""
    if how.sinks is not None:
        sinks = how.sinks.float().view(*output.shape[:2], 1)
        output = output * torch.sigmoid(lse - sinks)[..., None].to(output.dtype)
    return output.permute(2, 0, 1, 3).flatten(1, 2)
