"""What does it go on to say? Continuous batching over shared prefixes: prompts are prefilled through the tree, each
sample holds only what is its own, and a finished sample makes room for the next.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from eval_platform.engine import trie, varlen
from eval_platform.engine.attention import Group, Slots
from eval_platform.engine.batching import again_with_less
from eval_platform.engine.completion import PLAIN, Completion, Prompt, StopFinder, generator, sample
from eval_platform.engine.head import Head
from eval_platform.engine.memory import free_on_gpu
from eval_platform.engine.packed import PackedModel
from eval_platform.engine.remembering import Remembered
from eval_platform.engine.stream import Block, Kept, forwards
from eval_platform.engine.trie import Node

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

# Samples that are decoded together. Each step reads every weight once, however many they are.
_SLOTS = {"cpu": 64, "cuda": 256}
# The share of a GPU's free memory that slots may take.
_SLOTS_SHARE = 0.5
# New samples are taken in when this share of the slots is free: a prefill of few tokens costs as much as a step.
_REFILL = 1 / 8
# A shared beginning costs every step an attention call in each layer, so a short one is computed for each prompt.
_LEAST_SHARED = 32
# Slots grow by this many tokens, so that a completion that ends early never takes the room of the longest.
_GROWTH = 128
# What else a generation config may say without touching which token comes next.
_HARMLESS = {
    "_from_model_config",
    "bos_token_id",
    "cache_implementation",
    "eos_token_id",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "transformers_version",
}


def why_not(model: "PreTrainedModel") -> str:
    """Why the model's completions need transformers' own loop; "" when they don't. Its generation config is plain
    (`completion.plain_generation_config`).
    """
    config = cast("GenerationConfig | None", model.generation_config)
    if config is None:
        return ""
    shaping = {key for key, value in config.to_diff_dict().items() if value} - PLAIN.keys() - _HARMLESS
    return f"its generation config sets {', '.join(sorted(shaping))}" if shaping else ""


@dataclass(frozen=True, slots=True)
class _Ahead:
    """A decoding step that a device was given: whose, in the order of its rows, and what it will say of each.

    tokens: [rows] on the device; said: [2, rows], tokens and whether they are good, in main memory once `done`.
    """

    samples: "list[_Sample]"
    tokens: Tensor
    said: Tensor
    done: torch.cuda.Event | None


@dataclass(eq=False, slots=True)
class _Sample:
    """One completion being drawn, for every prompt that asks for just this one."""

    prompts: list[Prompt]
    end: Node
    holds_stop: StopFinder
    draws: torch.Generator | None
    own: int = 0  # tokens of the prompt that lie in its slot, not in a shared node
    completion: Completion = field(default_factory=Completion)

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return self.end.end


def complete(
    packed: PackedModel,
    head: Head,
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Prompt],
    ends: frozenset[int],
    *,
    budget: int,
    remembered: Remembered | None = None,
) -> Iterator[tuple[Prompt, Completion]]:
    """Complete every prompt, each as soon as its completion has ended. A prompt's completion depends on its own
    tokens, settings and seed only, beyond rounding. What is `remembered` is not computed again; what ends is added.

    When memory runs out the samples at hand start again with half as many at once. Raises MemoryError when a single one
    does not fit.
    """
    if not prompts:
        return
    slots = _SLOTS.get(packed.device.type, _SLOTS["cpu"])
    waiting = list(prompts)
    done: set[int] = set()

    def attempt() -> Iterator[tuple[Prompt, Completion]]:
        run = _Run(packed, head, tokenizer, waiting, ends, budget, slots, remembered)
        for prompt, completion in run.samples():
            done.add(prompt.owner)
            yield prompt, completion

    def shrink() -> bool:
        nonlocal waiting, slots, budget
        if slots == 1:
            return False
        slots //= 2
        budget = max(1, budget // 2)
        if remembered is not None:
            remembered.clear()
        _log.warning("out of memory; going on with %d completions at once", slots)
        waiting = [prompt for prompt in waiting if prompt.owner not in done]
        return True

    yield from again_with_less(attempt, shrink)


class _Run:
    """The state of one call of `complete`: samples waiting, samples in slots, shared nodes in memory."""

    def __init__(
        self,
        packed: PackedModel,
        head: Head,
        tokenizer: "PreTrainedTokenizerBase",
        prompts: Sequence[Prompt],
        ends: frozenset[int],
        budget: int,
        slots: int,
        remembered: Remembered | None,
    ) -> None:
        self._packed = packed
        self._head = head
        self._ends = ends
        self._budget = budget
        self._kept = Kept()
        self._remembered = remembered
        self._computed: set[Node] = set()
        self._ruined: set[Node] = set()
        self._last_hidden: dict[Node, Tensor] = {}
        self._queue, self._place = _samples(prompts, tokenizer)
        self._users = Counter(node for one in self._queue for node in one.end.path())
        self._ending = Counter(one.end for one in self._queue)
        for one in self._queue:
            # What one sample alone uses goes to its slot; on a GPU all that it uses does.
            if packed.on_gpu:
                one.own = one.length
            else:
                one.own = 0 if self._users[one.end] > 1 else len(one.end.tokens)
        if remembered is not None:
            # Of its last token the hidden state is needed.
            paths = [(_tokens(one.end), one.end, one.length - 1) for one in self._queue]
            self._computed |= remembered.lay(self._kept, paths)
        self._queue.reverse()  # taken from its end
        self._active: list[_Sample] = []
        # On a GPU slots are made once, as large as any sample may need: a step recorded for them stays good.
        self._fixed = max(one.length + one.prompts[0].settings.max_new_tokens for one in self._queue)
        if packed.on_gpu:
            slots = _that_fit(slots, self._fixed * packed.token_bytes, packed.device)
        self._most = min(slots, len(self._queue))
        self._slots = Slots()
        self._capacity = 0
        self._groups: list[Group] | None = None
        # On a GPU the next step is begun before the last one's tokens are looked at, if none is drawn on the CPU.
        self._goes_ahead = packed.on_gpu and all(one.draws is None for one in self._queue)
        self._ahead: _Ahead | None = None

    @torch.inference_mode()
    def samples(self) -> Iterator[tuple[Prompt, Completion]]:
        while self._queue or self._active:
            free = self._most - len(self._active)
            if self._queue and (not self._active or free >= max(1, int(self._most * _REFILL))):
                if self._ahead is not None:  # of those who are here already
                    yield from self._retire(self._look_at(self._ahead))
                yield from self._retire(self._admit(self._most - len(self._active)))
            if self._active:
                yield from self._retire(self._step_ahead() if self._goes_ahead else self._step())

    # -- admission

    def _admit(self, count: int) -> list[_Sample]:
        """Prefill the next `count` samples and draw each one's first token; those that ended with it."""
        new = [self._queue.pop() for _ in range(min(count, len(self._queue)))]
        nodes = {node for one in new for node in one.end.path() if node not in self._computed}
        order = sorted(nodes, key=self._place.__getitem__)
        self._kept.pinned |= nodes
        for forward in forwards(order, self._budget, self._kept):
            ending = [p for p in forward.pieces if p.last == len(p.node.tokens) and p.node in self._ending]
            hidden, broken = self._packed.run(forward, np.array([piece.stop - 1 for piece in ending], dtype=np.int64))
            for piece, state in zip(ending, hidden, strict=True):
                self._last_hidden[piece.node] = state.clone()
            bad = None if broken is None else broken.rows.cpu().numpy()
            for piece in forward.pieces:
                node = piece.node
                if node.parent in self._ruined or (bad is not None and bad[piece.row : piece.stop].any()):
                    self._ruined.add(node)
        self._computed |= nodes
        self._groups = None

        first = len(self._active)
        self._active.extend(new)
        self._grow(max(one.own for one in new) + 1)
        self._fill_slots(first, new)
        hidden = torch.stack([self._last_hidden[one.end] for one in new])
        for one in new:
            self._ending[one.end] -= 1
            if not self._ending[one.end]:
                del self._last_hidden[one.end]
        return self._draw(new, hidden, [one.end in self._ruined for one in new])

    def _fill_slots(self, first: int, new: Sequence[_Sample]) -> None:
        """Copy the keys and values of the samples' own tokens to their slots, of which the first one's is `first`."""
        rows_of: dict[Node, list[int]] = {}
        for row, one in enumerate(new, start=first):
            if one.own:
                for node in one.end.path() if self._packed.on_gpu else [one.end]:
                    rows_of.setdefault(node, []).append(row)
        for node, rows in rows_of.items():
            begin = 0 if self._packed.on_gpu else node.start
            its = slice(rows[0], rows[-1] + 1)  # those who share a node come one after another
            for block in self._kept.blocks[node]:
                at = slice(block.start - begin, block.end - begin)
                for layer, (keys, values) in enumerate(block.layers):
                    self._slots.keys[layer][its, :, at] = keys
                    self._slots.values[layer][its, :, at] = values
        for one in new:
            if one.own and self._users[one.end] == 1:
                self._kept.drop(one.end)

    def _grow(self, needed: int) -> None:
        """Make room for `needed` tokens in every slot."""
        if needed <= self._capacity:
            return
        if self._packed.on_gpu:
            for keys, values in _a_block(self._kept).layers:
                self._slots.keys.append(varlen.room(keys, self._most, self._fixed))
                self._slots.values.append(varlen.room(values, self._most, self._fixed))
            self._capacity = self._fixed
            return
        capacity = needed + _GROWTH
        layers = _a_block(self._kept).layers if not self._slots.keys else None
        shapes = layers if layers is not None else list(zip(self._slots.keys, self._slots.values, strict=True))
        for layer, (keys, values) in enumerate(shapes):
            for states, stored in ((keys, self._slots.keys), (values, self._slots.values)):
                heads, depth = states.shape[-3], states.shape[-1]
                room = states.new_zeros(self._most, heads, capacity, depth)
                if layers is None:
                    room[:, :, : self._capacity] = states
                    stored[layer] = room
                else:
                    stored.append(room)
        self._capacity = capacity

    # -- decoding

    def _step(self) -> list[_Sample]:
        """One more token of every active sample; those that ended with it."""
        active = self._active
        lengths = [one.own + len(one.completion.tokens) - 1 for one in active]
        self._grow(max(lengths) + 1)
        if self._groups is None:
            self._groups = self._find_groups()
        hidden, broken = self._packed.decode(
            tokens=[one.completion.tokens[-1] for one in active],
            positions=[one.length + len(one.completion.tokens) - 1 for one in active],
            slots=self._slots,
            lengths=lengths,
            groups=self._groups,
        )
        bad = [False] * len(active) if broken is None else broken.rows.tolist()
        return self._draw(active, hidden, bad)

    def _step_ahead(self) -> list[_Sample]:
        """As `_step`, with the device at work meanwhile on the step after: what that one says of samples that end now
        is not looked at.
        """
        ahead = self._ahead or self._begin(None)
        self._ahead = self._begin(ahead) if any(_goes_on(one) for one in self._active) else None
        return self._look_at(ahead)

    def _begin(self, before: _Ahead | None) -> _Ahead:
        """Give the device one more token of every active sample, behind those that the step `before` will say."""
        active = list(self._active)
        drawn = [len(one.completion.tokens) + (before is not None) for one in active]
        lengths = [one.own + count - 1 for one, count in zip(active, drawn, strict=True)]
        self._grow(max(lengths) + 1)
        if before is None:
            tokens = torch.tensor([one.completion.tokens[-1] for one in active])
        else:
            tokens = before.tokens
            if active != before.samples:  # some have ended since, others moved to their rows
                row_of = {one: row for row, one in enumerate(before.samples)}
                rows = torch.tensor([row_of[one] for one in active], pin_memory=tokens.is_cuda)
                tokens = tokens[rows.to(tokens.device, non_blocking=True)]
        positions = [one.length + count - 1 for one, count in zip(active, drawn, strict=True)]
        hidden, finite = self._packed.decode_ahead(tokens, positions, self._slots, lengths)
        best, good = self._head.best(hidden)
        said = torch.stack([best, good & finite]).to("cpu", non_blocking=True)
        done = None
        if best.is_cuda:
            done = torch.cuda.Event()
            done.record(torch.cuda.current_stream(best.device))  # which need not be the current GPU
        return _Ahead(active, best, said, done)

    def _look_at(self, ahead: _Ahead) -> list[_Sample]:
        """Take what the step says; those that ended with it."""
        if ahead is self._ahead:
            self._ahead = None
        if ahead.done is not None:
            ahead.done.synchronize()
        tokens, good = ahead.said.tolist()
        ended = []
        for one, token, is_good in zip(ahead.samples, tokens, good, strict=True):
            if not one.completion.finish_reason:
                self._take(one, token if is_good else None)
                if one.completion.finish_reason:
                    ended.append(one)
        return ended

    def _find_groups(self) -> list[Group]:
        if self._packed.on_gpu:
            return []
        rows: dict[Node, list[int]] = {}
        for row, one in enumerate(self._active):
            for node in one.end.path():
                if not (one.own and node is one.end):
                    rows.setdefault(node, []).append(row)
        groups = []
        for node, its in rows.items():
            contiguous = its[-1] - its[0] + 1 == len(its)
            index = slice(its[0], its[-1] + 1) if contiguous else torch.tensor(its, device=self._packed.device)
            groups.append(Group(index, self._kept.blocks[node]))
        return groups

    def _draw(self, drawing: Sequence[_Sample], hidden: Tensor, bad: Sequence[bool]) -> list[_Sample]:
        """Choose the next token of each sample from its hidden state; those that ended with it."""
        chosen: dict[int, int] = {}
        for rows in (
            [i for i, one in enumerate(drawing) if one.draws is None],
            [i for i, one in enumerate(drawing) if one.draws is not None],
        ):
            if not rows:
                continue
            states = hidden if len(rows) == len(drawing) else hidden[torch.tensor(rows, device=hidden.device)]
            if drawing[rows[0]].draws is None:
                tokens, finite = (each.tolist() for each in self._head.best(states))
                chosen |= {i: token for i, token, ok in zip(rows, tokens, finite, strict=True) if ok}
            else:
                chosen |= self._draw_each(drawing, rows, states)
        for i, one in enumerate(drawing):
            self._take(one, None if bad[i] else chosen.get(i))
        return [one for one in drawing if one.completion.finish_reason]

    def _take(self, one: _Sample, token: int | None) -> None:
        """The sample's next token, None where its numbers were none, and whether it ends there."""
        completion = one.completion
        if token is None:
            completion.finish_reason = "non_finite"
            self._packed.first_broken = self._packed.first_broken or "a completion's logits"
            return
        completion.add(token, self._ends, one.holds_stop)
        if len(completion.tokens) == one.prompts[0].settings.max_new_tokens:
            completion.finish_reason = completion.finish_reason or "length"

    def _draw_each(self, drawing: Sequence[_Sample], rows: Sequence[int], states: Tensor) -> dict[int, int]:
        chosen = {}
        for i, logits in zip(rows, self._head.logits(states).cpu(), strict=True):
            one = drawing[i]
            high = logits.max()
            if bool(high.isfinite()) and one.draws is not None:
                chosen[i] = sample(logits, one.prompts[0].settings, one.draws)
        return chosen

    # -- retirement

    def _retire(self, ended: Sequence[_Sample]) -> Iterator[tuple[Prompt, Completion]]:
        """Free the slots of `ended`, and the shared nodes that nobody uses any more."""
        for one in ended:
            row, last = self._active.index(one), len(self._active) - 1
            if self._remembered is not None:
                self._remember(self._remembered, row, one)
            if one.completion.finish_reason == "non_finite":
                # Masked or not, what is no number would reach whoever has the slot next: NaN - infinity is NaN.
                for states in (*self._slots.keys, *self._slots.values):
                    states[row] = 0.0
            if row != last:
                moved = self._active[row] = self._active[last]
                length = moved.own + len(moved.completion.tokens)
                for states in (*self._slots.keys, *self._slots.values):
                    states[row, :, :length] = states[last, :, :length]
            self._active.pop()
            self._groups = None
            for node in one.end.path():
                self._users[node] -= 1
                if not self._users[node]:
                    self._kept.drop(node)
        for one in ended:
            for prompt in one.prompts:
                yield prompt, one.completion

    def _remember(self, remembered: Remembered, row: int, one: _Sample) -> None:
        """Keep what the sample in slot `row` has computed: all of its prompt, and what it drew but for the last token,
        which was never read.
        """
        drawn = one.completion.tokens[:-1]
        if one.completion.finish_reason == "non_finite":
            return
        blocks = [] if self._packed.on_gpu else [b for node in _down(one.end) for b in self._kept.blocks.get(node, ())]
        here = one.own + len(drawn)
        if here:
            slot = Block(one.length - one.own, one.length + len(drawn))
            for keys, values in zip(self._slots.keys, self._slots.values, strict=True):
                slot.layers.append((keys[row, :, :here].clone(), values[row, :, :here].clone()))
            blocks.append(slot)
        remembered.add(np.concatenate([_tokens(one.end), np.asarray(drawn, dtype=np.int64)]), blocks)


def _goes_on(one: _Sample) -> bool:
    """Whether its next token may not be its last."""
    return len(one.completion.tokens) + 1 < one.prompts[0].settings.max_new_tokens


def _down(end: Node) -> list[Node]:
    """The path to `end`, root first."""
    return list(end.path())[::-1]


def _tokens(end: Node) -> trie.Tokens:
    """All tokens of the sequence that ends with the node `end`."""
    return np.concatenate([node.tokens for node in _down(end)])


def _samples(prompts: Sequence[Prompt], tokenizer: "PreTrainedTokenizerBase") -> tuple[list[_Sample], dict[Node, int]]:
    """The distinct completions that `prompts` ask for, in depth-first order of their tree, and every node's place."""
    distinct: dict[tuple[int, ...], Node | None] = {tuple(prompt.tokens): None for prompt in prompts}
    roots, ends = trie.build([np.asarray(tokens, dtype=np.int64) for tokens in distinct], _LEAST_SHARED)
    place = {node: i for i, node in enumerate(trie.depth_first(roots))}
    end_of = dict(zip(distinct, ends, strict=True))
    finders: dict[tuple[str, ...], StopFinder] = {}
    found: dict[Any, _Sample] = {}
    for prompt in prompts:
        tokens = tuple(prompt.tokens)
        greedy = prompt.settings.temperature == 0
        # Greedy completions of one prompt are one; drawn ones each have a seed of their own.
        key = (tokens, prompt.settings, None if greedy else prompt.seed_text)
        if key in found:
            found[key].prompts.append(prompt)
            continue
        stop = prompt.settings.stop
        finder = finders.setdefault(stop, StopFinder(tokenizer, stop))
        found[key] = _Sample([prompt], end_of[tokens], finder, None if greedy else generator(prompt.seed_text))
    return sorted(found.values(), key=lambda one: (place[one.end], one.prompts[0].seed_text)), place


def _that_fit(slots: int, slot_bytes: int, device: torch.device) -> int:
    """At most `slots`, at least one, and no more than their share of the free memory holds."""
    if device.type != "cuda":
        return slots
    free = free_on_gpu(device) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return max(1, min(slots, int(free * _SLOTS_SHARE / slot_bytes)))


def _a_block(kept: Kept) -> Block:
    return next(block for blocks in kept.blocks.values() for block in blocks)
