"""The tree engine: every distinct token position of a call is computed once, in packed forwards without padding."""

import contextlib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from eval_platform.engine import decoding, trie
from eval_platform.engine.attention import IMPLEMENTATION, Broken
from eval_platform.engine.batching import again_with_less
from eval_platform.engine.completion import Completion, Prompt
from eval_platform.engine.face import EngineInfo
from eval_platform.engine.head import Head
from eval_platform.engine.kernels import Kernels
from eval_platform.engine.likelihood import Row, Scored
from eval_platform.engine.memory import remembered_bytes
from eval_platform.engine.packed import PackedModel
from eval_platform.engine.plain import PlainEngine
from eval_platform.engine.remembering import Remembered
from eval_platform.engine.stream import Forward, Kept, forwards
from eval_platform.engine.trie import Node
from eval_platform.values import RunSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

# Below this a forward is all overhead; a machine whose memory does not hold it does not hold the model.
_LEAST_TOKENS = 32


@dataclass(slots=True)
class _Wanted:
    """The targets within one node: at which of its tokens, which token comes next, for which part."""

    position: list[int] = field(default_factory=list)
    token: list[int] = field(default_factory=list)
    part: list[int] = field(default_factory=list)


class TreeEngine(PlainEngine):
    """Answers as PlainEngine does, sharing every common beginning; see `face.Engine` for what it promises."""

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        settings: RunSettings,
        info: EngineInfo,
        *,
        packed: PackedModel,
        head: Head,
        budget: int,
        kernels: Kernels,
    ) -> None:
        super().__init__(model, tokenizer, settings, info)
        refusal = decoding.why_not(model)
        if refusal:
            _log.warning("completions go the plain path: %s", refusal)
        path = "tree+plain" if refusal else "tree"
        self._info = replace(info, engine_path=path, versions={**info.versions, "kernels": kernels.describe()})
        self._packed = packed
        self._head = head
        self._budget = budget
        self._head_rows = 0
        self._min_shared = least_shared(info.n_parameters - _embeddings(model))
        self._completes_plainly = bool(refusal)
        self._remembered: Remembered | None = None

    @property
    def counters(self) -> Mapping[str, int]:
        """What was computed so far: token positions, rows of the head, forwards."""
        return {
            "forward_tokens": self._packed.tokens,
            "head_rows": self._head_rows,
            "forwards": self._packed.forwards,
        }

    @contextlib.contextmanager
    def remembering(self) -> Iterator[None]:
        """See `face.Engine.remembering`."""
        outer = self._remembered
        if outer is None:
            self._remembered = Remembered(remembered_bytes(self._model.device))
        try:
            yield
        finally:
            self._remembered = outer

    def _score(self, rows: Sequence[Row]) -> Iterator[Scored]:
        waiting = list(rows)
        finished: set[tuple[int, int]] = set()

        def attempt() -> Iterator[Scored]:
            for row, target, scored in self._score_all(waiting):
                finished.add((row, target))
                yield scored

        def shrink() -> bool:
            nonlocal waiting
            if self._budget <= _LEAST_TOKENS:
                return False
            self._budget //= 2
            if self._remembered is not None:
                self._remembered.clear()
            _log.warning("out of memory; going on with %d tokens in one forward", self._budget)
            waiting = _unfinished(waiting, finished)
            finished.clear()
            return True

        yield from again_with_less(attempt, shrink)

    def _score_all(self, rows: Sequence[Row]) -> Iterator[tuple[int, int, Scored]]:
        """(row, target, result) for every target of every row."""
        roots, ends = trie.build([np.asarray(row.tokens_in, dtype=np.int64) for row in rows], self._min_shared)
        parts: list[tuple[int, int]] = []
        wanted: dict[Node, _Wanted] = {}
        for i, (row, end) in enumerate(zip(rows, ends, strict=True)):
            for j, (_, tokens) in enumerate(row.targets):
                _want(wanted, end, len(row.tokens_in) - len(tokens), tokens, len(parts))
                parts.append((i, j))
        totals = np.zeros(len(parts))
        greedy = np.ones(len(parts), dtype=bool)
        missing = np.array([len(rows[i].targets[j][1]) for i, j in parts])
        ruined: dict[Node, int] = {}

        order = list(trie.depth_first(roots))
        kept = Kept()
        if self._remembered is not None:
            paths = [(np.asarray(r.tokens_in, dtype=np.int64), end, r.first) for r, end in zip(rows, ends, strict=True)]
            self._remembered.lay(kept, paths)
            kept.pinned.clear()  # kept as long as a descendant needs it, as what is computed
        for forward in forwards(order, self._budget, kept):
            at, tokens, part = _targets(forward, wanted)
            needed, index = np.unique(at, return_inverse=True)
            hidden, broken = self._packed.run(forward, needed)
            _note_ruined(ruined, forward, broken)
            if not len(part):
                continue
            self._head_rows += len(needed)
            value, best = self._head.score(hidden, index.tolist(), tokens.tolist())
            values, bests = value.numpy(), best.numpy()
            if ruined:
                bad = _ruined_rows(forward, ruined)[at]
                values[bad], bests[bad] = math.nan, False
            np.add.at(totals, part, values)
            np.logical_and.at(greedy, part, bests)
            np.subtract.at(missing, part, 1)
            for k in np.unique(part[missing[part] == 0]).tolist():
                i, j = parts[k]
                owner = rows[i].targets[j][0]
                yield i, j, Scored(owner, float(totals[k]), bool(greedy[k]))

    def _target_logits(self, tokens_in: Sequence[int], targets: Sequence[int]) -> torch.Tensor:
        with _attention(self._model, self._packed.original_attention):
            return super()._target_logits(tokens_in, targets)

    def _first_broken(self) -> str:
        return self._packed.first_broken

    def _complete(self, prompts: Sequence[Prompt]) -> Iterator[tuple[Prompt, Completion]]:
        if self._completes_plainly:
            with _attention(self._model, self._packed.original_attention):
                yield from super()._complete(prompts)
            return
        yield from decoding.complete(
            self._packed,
            self._head,
            self._tokenizer,
            prompts,
            self._ends,
            budget=self._budget,
            remembered=self._remembered,
        )


def _embeddings(model: "PreTrainedModel") -> int:
    """Parameters that are looked up, or multiplied with targets only; the kernels may have packed the head's."""
    table: Any = model.get_input_embeddings()
    is_tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    return table.weight.numel() * (1 if is_tied else 2)


def least_shared(n_parameters: int) -> int:
    """How many shared tokens are worth a node of their own in a model of so many parameters without embeddings.

    A node costs about two attention calls in each layer, a token 2 x parameters operations: at 24 M parameters and the
    rates of docs/performance.md a node is reckoned at 4 tokens.
    """
    return max(1, min(16, 100_000_000 // max(1, n_parameters)))


def _want(wanted: dict[Node, _Wanted], end: Node, first: int, tokens: Sequence[int], part: int) -> None:
    """Note that `tokens` are predicted from position `first` on, along the path that ends at `end`."""
    stop = first + len(tokens)
    for node in end.path():
        low = max(first, node.start)
        if low < stop:
            there = wanted.setdefault(node, _Wanted())
            there.position.extend(range(low - node.start, stop - node.start))
            there.token.extend(tokens[low - first : stop - first])
            there.part.extend([part] * (stop - low))
            stop = low
        if stop <= first:
            return


def _targets(forward: Forward, wanted: Mapping[Node, _Wanted]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Row of the forward, token to predict, and part, of every target that this forward gives; by row."""
    at, token, part = [], [], []
    for piece in forward.pieces:
        there = wanted.get(piece.node)
        if there is None:
            continue
        position = np.asarray(there.position)
        here = (position >= piece.first) & (position < piece.last)
        at.append(position[here] - piece.first + piece.row)
        token.append(np.asarray(there.token)[here])
        part.append(np.asarray(there.part)[here])
    if not at:
        nothing = np.empty(0, dtype=np.int64)
        return nothing, nothing, nothing
    rows = np.concatenate(at)
    order = np.argsort(rows, kind="stable")
    return rows[order], np.concatenate(token)[order], np.concatenate(part)[order]


def _note_ruined(ruined: dict[Node, int], forward: Forward, broken: Broken | None) -> None:
    """Remember from which of its tokens on a node is not finite. What follows a NaN on its path is one."""
    bad = None if broken is None else broken.rows.cpu().numpy()
    for piece in forward.pieces:
        if piece.node in ruined:
            continue
        if piece.node.parent in ruined:
            ruined[piece.node] = 0
        elif bad is not None and bad[piece.row : piece.stop].any():
            ruined[piece.node] = piece.first + int(bad[piece.row : piece.stop].argmax())


def _ruined_rows(forward: Forward, ruined: Mapping[Node, int]) -> NDArray[np.bool_]:
    bad = np.zeros(len(forward.tokens), dtype=bool)
    for piece in forward.pieces:
        first = ruined.get(piece.node)
        if first is not None:
            bad[piece.row + max(0, first - piece.first) : piece.stop] = True
    return bad


def _unfinished(rows: Sequence[Row], finished: set[tuple[int, int]]) -> list[Row]:
    left = []
    for i, row in enumerate(rows):
        targets = [target for j, target in enumerate(row.targets) if (i, j) not in finished]
        if targets:
            left.append(Row(row.tokens_in, targets))
    return left


@contextlib.contextmanager
def _attention(model: "PreTrainedModel", implementation: str) -> Iterator[None]:
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(IMPLEMENTATION)
