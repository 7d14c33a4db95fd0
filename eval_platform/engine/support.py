"""Can this model run packed, and are its numbers then the same? Found out by running it both ways at load."""

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from eval_platform.engine import trie, varlen
from eval_platform.engine.attention import IMPLEMENTATION, Group, Slots, Unsupported
from eval_platform.engine.head import FEW_ROWS, Head
from eval_platform.engine.packed import PackedModel
from eval_platform.engine.plain import FIXED_ROPE, rope_types
from eval_platform.engine.stream import Kept, forwards

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Largest error allowed in the check: of a hidden state relative to its length, and of a log-probability in nats. Two
# right computations differ by some 1e-6 in float32 and 1e-2 in half precision; a wrong mask or position by 1e-1.
_HIDDEN = {torch.float32: 1e-4, torch.bfloat16: 0.08, torch.float16: 0.02}
_NATS = {torch.float32: 1e-3, torch.bfloat16: 1.0, torch.float16: 0.2}
# In half precision a deep model is further from itself than that: then so many times the difference between two of
# transformers' own attentions is allowed, up to a hidden state that is a quarter off.
_TIMES_ITS_OWN = 2.0
_HIDDEN_AT_MOST = 0.25


# In the name of a module by which attention looks at keys that it picks, or sums up, once there are many (DeepSeek
# sparse attention and its like): the check's short sequences never get there.
_LENGTH_DEPENDENT = ("Indexer", "Compressor")


@dataclass(frozen=True, slots=True)
class Expected:
    """What the model itself makes of the check's sequences: (tokens, hidden states, logits) of each; and how far off
    others may be, hidden states relative to their length and log-probabilities in nats.
    """

    sequences: Sequence[tuple[list[int], Tensor, Tensor]]
    hidden: float
    nats: float


class WrongProducts(Unsupported):
    """The numbers were right until the products were chosen; the model's layers have been swapped since."""


@torch.inference_mode()
def reference(model: "PreTrainedModel") -> Expected:
    """The check's sequences by the model as transformers runs it, one at a time.

    Asked before anything is changed about the model. Raises Unsupported for what is known not to run packed.
    """
    _refuse_known(model)
    found = _by_itself(model)
    hidden, nats = _HIDDEN[model.dtype], _NATS[model.dtype]
    original = model.config._attn_implementation
    assert original is not None  # set when the model was made
    if model.dtype == torch.float32 or original == "eager":
        return Expected(found, hidden, nats)
    model.set_attn_implementation("eager")  # the fused kernel's counterpart, written out step by step
    try:
        others = _by_itself(model)
    finally:
        model.set_attn_implementation(original)
    for (tokens, states, logits), (_, other_states, other_logits) in zip(found, others, strict=True):
        relative = float(_relative(other_states, states).max())
        if math.isfinite(relative):
            hidden = max(hidden, min(_HIDDEN_AT_MOST, _TIMES_ITS_OWN * relative))
            off = (_log_probability(other_logits, tokens) - _log_probability(logits, tokens)).abs().max()
            nats = max(nats, _TIMES_ITS_OWN * float(off))
    return Expected(found, hidden, nats)


def _by_itself(model: "PreTrainedModel") -> list[tuple[list[int], Tensor, Tensor]]:
    found = []
    hidden: list[Tensor] = []
    handle = model.base_model.register_forward_hook(lambda _base, _given, made: hidden.append(made.last_hidden_state))
    try:
        for tokens in _sequences(model):
            ids = torch.tensor([tokens], device=model.device)
            output: Any = model(input_ids=ids, use_cache=False, output_hidden_states=False)
            if not hidden:  # OPT's class goes past its base model to what is in it
                model.base_model(input_ids=ids, use_cache=False)
            found.append((tokens, hidden.pop()[0].float(), output.logits[0].float()))
    finally:
        handle.remove()
    return found


def _relative(states: Tensor, expected: Tensor) -> Tensor:
    """[rows]"""
    return (states.float() - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-30)


def _log_probability(logits: Tensor, tokens: Sequence[int]) -> Tensor:
    """Of each token but the first, after those before it: float64 [tokens - 1] on the CPU."""
    index = torch.tensor(tokens[1:], device=logits.device)[:, None]
    return torch.log_softmax(logits[: len(tokens) - 1], -1).gather(1, index)[:, 0].double().cpu()


def packed_model(model: "PreTrainedModel", expected: Expected) -> PackedModel:
    """The model set to packed attention and checked against `expected` (see `reference`).

    Raises Unsupported with the reason when the model does what packed attention doesn't or gives other numbers; its
    attention is then what it was.
    """
    original = model.config._attn_implementation
    assert original is not None  # set when the model was made
    try:
        model.set_attn_implementation(IMPLEMENTATION)
        packed = _packed(model, expected.sequences[0][0], original)
        check(packed, Head(model, "torch", "torch"), expected)
    except Exception as error:
        model.set_attn_implementation(original)
        if isinstance(error, Unsupported):
            raise
        # A model's own code fails as it likes when it meets what it did not expect.
        raise Unsupported(f"it fails in a packed forward: {type(error).__name__}: {error}") from error
    return packed


def _refuse_known(model: "PreTrainedModel") -> None:
    config = model.config.get_text_config()
    if model.config.is_encoder_decoder:
        raise Unsupported("it is an encoder-decoder")
    rope = rope_types(config.to_dict()) - FIXED_ROPE
    if rope:
        raise Unsupported(
            f"its rotary frequencies depend on the length of a batch (rope_type {', '.join(sorted(rope))})"
        )
    if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        raise Unsupported("its forward takes no position ids")
    for module in model.modules():
        if any(word in type(module).__name__ for word in _LENGTH_DEPENDENT):
            raise Unsupported(f"on long texts it looks at chosen or summed-up keys only ({type(module).__name__})")
    if model.base_model is model:
        raise Unsupported("its class does not say which of its modules is the model without the head")
    if model.get_output_embeddings() is None:
        raise Unsupported("it has no output embeddings")


def _sequences(model: "PreTrainedModel") -> list[list[int]]:
    """A small tree of token sequences: two branches of one beginning, one that ends inside another, one apart."""
    vocabulary = int(model.config.get_text_config().vocab_size)
    window = min(24, int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 24))
    draw = np.random.default_rng(7)
    first, second, apart = (draw.integers(0, vocabulary, window).tolist() for _ in range(3))
    half, third = window // 2, window // 3
    return [first, first[:half] + second[half:], first[:third], apart]


def _packed(model: "PreTrainedModel", tokens: list[int], original: str) -> PackedModel:
    reaches, layers = PackedModel(model, None, original).find_reaches(tokens)
    if not reaches:
        raise Unsupported("it makes its attention masks by itself")
    expected = getattr(model.config.get_text_config(), "num_hidden_layers", layers)
    if layers != expected:
        raise Unsupported(f"{layers} of its {expected} layers are attention of the usual kind")
    return PackedModel(model, reaches, original)


def check(packed: PackedModel, head: Head, expected: Expected) -> None:
    """Raises Unsupported when packed hidden states or log-probabilities are not the `expected` ones."""
    # As few tokens a forward as makes nodes wait for their descendants in memory.
    sequences = [np.asarray(tokens, dtype=np.int64) for tokens, _, _ in expected.sequences]
    roots, ends = trie.build(sequences)
    kept = Kept()
    order = list(trie.depth_first(roots))
    kept.pinned |= set(order)  # for the decoding step below
    hidden_of: dict[trie.Node, list[Tensor]] = {}
    for forward in forwards(order, 11, kept):
        hidden, broken = packed.run(forward)
        if broken is not None:
            raise Unsupported(f"{broken.where} is not finite")
        for piece in forward.pieces:
            hidden_of.setdefault(piece.node, []).append(hidden[piece.row : piece.stop])
    for (tokens, hidden, logits), end in zip(expected.sequences, ends, strict=True):
        path = list(end.path())[::-1]
        ours = torch.cat([part for node in path for part in hidden_of[node]])
        _must_agree(packed, head, tokens, ours, hidden, logits, expected, "packed")
    # The head may multiply many rows otherwise than few: the first sequence again, as often as makes many of it.
    tokens, hidden, logits = expected.sequences[0]
    ours = torch.cat([part for node in list(ends[0].path())[::-1] for part in hidden_of[node]])
    times = 1 + FEW_ROWS // len(ours)
    ours, hidden, logits = (states.repeat(times, 1) for states in (ours, hidden, logits))
    _must_agree(packed, head, tokens * times, ours, hidden, logits, expected, "many rows")
    _compare_decoding(packed, head, expected, ends, kept)
    packed.forwards = packed.tokens = 0


def _compare_decoding(
    packed: PackedModel,
    head: Head,
    expected: Expected,
    ends: list[trie.Node],
    kept: Kept,
) -> None:
    """Some tokens of the first sequence again, one at a time, after the third, which is its beginning."""
    (tokens, hidden, logits), (beginning, _, _) = expected.sequences[0], expected.sequences[2]
    # Each step reads every weight; what goes wrong in decoding does so from the second step on.
    last = min(len(tokens), len(beginning) + 5)
    path = list(ends[2].path())
    slots = Slots()
    for keys, values in kept.blocks[path[0]][0].layers:
        for states, stored in ((keys, slots.keys), (values, slots.values)):
            heads, _, depth = states.shape
            on_cpu = states.new_zeros(1, heads, len(tokens), depth)
            stored.append(varlen.room(states, 1, len(tokens)) if packed.on_gpu else on_cpu)
    groups = [Group(slice(0, 1), kept.blocks[node]) for node in path]
    shared = len(beginning)
    if packed.on_gpu:
        for block in (block for node in path for block in kept.blocks[node]):
            for layer, (keys, values) in enumerate(block.layers):
                slots.keys[layer][0, :, block.start : block.end] = keys
                slots.values[layer][0, :, block.start : block.end] = values
        groups, shared = [], 0
    ours = []
    for position in range(len(beginning), last):
        hidden_states, _ = packed.decode([tokens[position]], [position], slots, [position - shared], groups)
        ours.append(hidden_states.clone())  # a recorded step writes to one place
    rest = slice(len(beginning), last)
    _must_agree(packed, head, tokens[rest], torch.cat(ours), hidden[rest], logits[rest], expected, "decoding")


def _must_agree(
    packed: PackedModel,
    head: Head,
    tokens: list[int],
    ours: Tensor,
    hidden: Tensor,
    logits: Tensor,
    expected: Expected,
    what: str,
) -> None:
    def over_rows(errors: Tensor) -> float:
        # In half precision two right computations send a token to other experts where two are nearly level, and what
        # comes out for it is another vector (by up to 1.4 of its length). Most tokens go the same way; a wrong mask or
        # position moves most. The median is NaN if any error is.
        turned = packed.chooses_experts and ours.dtype != torch.float32
        return float(errors.median() if turned else errors.max())

    error = over_rows(_relative(ours, hidden))
    if not error <= expected.hidden:
        raise Unsupported(f"its hidden states come out otherwise ({what}: relative error {error:.1e})")
    value, _ = head.score(ours, list(range(len(tokens) - 1)), tokens[1:])
    nats = over_rows((value - _log_probability(logits, tokens)).abs())
    if not nats <= expected.nats:
        raise Unsupported(f"its log-probabilities come out otherwise ({what}: {nats:.1e} nats off)")
