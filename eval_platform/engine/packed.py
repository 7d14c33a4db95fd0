"""Runs a model over packed forwards: hidden states from tokens, positions and what each row looks at."""

import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eval_platform.engine.attention import (
    Broken,
    DecodingPass,
    Group,
    Pass,
    Reach,
    Slots,
    StreamPass,
    bunched,
    running,
)
from eval_platform.engine.stream import Forward, Piece
from eval_platform.engine.trie import Node
from eval_platform.engine.varlen import SlotPass, VarlenPass

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_log = logging.getLogger(__name__)

# Devices on which attention is `varlen`'s.
_GPUS = ("cuda",)
# Rows of recorded decoding steps: a step of fewer rows runs as the next larger one.
_RECORDED = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)

# Of this many times more rows than are wanted the last layer is computed for the wanted ones only.
_NARROW = 1.5

# Where a number was not finite that nobody looked at before the end.
_LAST = "the last hidden state"

# Names that configs have for their number of experts.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True, slots=True)
class _Step:
    """A recorded decoding step: what it reads, and where it leaves what it makes."""

    graph: "torch.cuda.CUDAGraph"
    given: Tensor  # [3, rows]: tokens, positions, lengths of what the slots hold
    hidden: Tensor
    finite: Tensor


class PackedModel:
    """A causal model whose attention is `attention.IMPLEMENTATION`; counts what it computes.

    `reaches`: of the masks that the model makes in one forward, in their order. `original_attention`: the name of the
    implementation it ran with before.
    """

    def __init__(self, model: "PreTrainedModel", reaches: Sequence[Reach] | None, original_attention: str) -> None:
        self._base: Any = model.base_model
        self.on_gpu = model.device.type in _GPUS
        self._recorded: dict[int, _Step] = {}  # by rows
        self._recorded_for: Callable[[], Slots | None] = lambda: None
        self._records = model.device.type == "cuda"
        self.reaches = reaches
        self.original_attention = original_attention
        self.device = model.device
        self._layers = 0
        self.forwards = 0
        self.tokens = 0
        self.first_broken = ""  # where a number was not finite first
        self.token_bytes = 0  # of one token's keys and values in all layers, known once a forward has run

    @property
    def chooses_experts(self) -> bool:
        """Whether a token's way through the layers is a choice (mixture of experts), which rounding may turn over."""
        config = self._base.config.get_text_config()
        return any((getattr(config, name, None) or 0) > 1 for name in _EXPERTS)

    def run(self, forward: Forward, wanted: NDArray[np.int64] | None = None) -> tuple[Tensor, Broken | None]:
        """Hidden states [wanted, hidden size] of the `wanted` rows of a forward (ascending; None: of all), and which of
        all its rows are no numbers from some layer on; fills the blocks to keep.
        """
        narrow = wanted if wanted is not None and len(wanted) * _NARROW <= len(forward.tokens) else None
        hidden, broken = self._run(forward, narrow)
        if wanted is None:
            return hidden, broken
        return hidden[torch.from_numpy(wanted).to(self.device)], broken

    def _run(self, forward: Forward, wanted: NDArray[np.int64] | None) -> tuple[Tensor, Broken | None]:
        """Hidden states of all rows; where `wanted` are given the others' may be anything."""
        positions = torch.from_numpy(forward.positions).to(self.device)
        if self.on_gpu:
            a_pass = VarlenPass(positions=positions, reaches=self.reaches, forward=forward)
            return self._through(torch.from_numpy(forward.tokens), a_pass)
        pieces, bunches = bunched(forward.pieces, self.device)
        a_pass = StreamPass(
            positions=positions,
            reaches=self.reaches,
            pieces=pieces,
            bunches=bunches,
            ancestors=forward.ancestors,
            keep=forward.keep,
            # Where nothing is wanted (the first part of a long text) one row is computed all the same.
            wanted=np.zeros(1, dtype=np.int64) if wanted is not None and not len(wanted) else wanted,
            all_layers=self._layers,
        )
        return self._through(torch.from_numpy(forward.tokens), a_pass)

    def decode(
        self, tokens: Sequence[int], positions: Sequence[int], slots: Slots, lengths: Sequence[int], groups: list[Group]
    ) -> tuple[Tensor, Broken | None]:
        """Hidden states of one more token for each row, whose keys and values go to its slot; as `run`.

        On a GPU the slots hold all that the rows look at, `groups` is empty, and the result is good until the next
        call.
        """
        assert self.reaches is not None
        if self.on_gpu:
            hidden, finite = self.decode_ahead(torch.tensor(tokens), positions, slots, lengths)
            if bool(finite.all()):
                return hidden, None
            self.first_broken = self.first_broken or _LAST
            return hidden, Broken(~finite, _LAST)
        a_pass = DecodingPass(
            positions=torch.tensor(positions),
            reaches=self.reaches,
            slots=slots,
            lengths=torch.tensor(lengths),
            longest=max(lengths),
            groups=groups,
        )
        given, first_broken = torch.tensor(tokens), self.first_broken
        made = self._through(given, a_pass)
        if a_pass.is_sound:
            return made
        self.first_broken = first_broken  # the second time says in which layer it began
        return self._through(given, replace(a_pass, careful=True, layers=0, masks=0, token_bytes=0))

    @torch.inference_mode()
    def decode_ahead(
        self, tokens: Tensor, positions: Sequence[int], slots: Slots, lengths: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """As `decode` on a GPU, without waiting for it: hidden states [rows, hidden size] and which rows are numbers.

        tokens: [rows], best on the device already. Both results are good until the next call.
        """
        count = len(positions)
        where = torch.tensor([positions, lengths], pin_memory=self.device.type == "cuda")
        rows = min(size for size in (*_RECORDED, slots.keys[0].shape[0]) if size >= count)
        step = self._recorded_step(rows, slots) if self._records else None
        if step is None:
            where = where.to(self.device)
            a_pass = SlotPass(positions=where[0], reaches=self.reaches, slots=slots, lengths=where[1])
            hidden, _ = self._through(tokens, a_pass)
            return hidden, hidden.isfinite().all(-1)
        step.given[0, :count].copy_(tokens, non_blocking=True)
        step.given[1:, :count].copy_(where, non_blocking=True)
        # Rows beyond belong to slots that are free.
        step.given[2, count:] = 0
        step.graph.replay()
        self.forwards += 1
        self.tokens += count
        return step.hidden[:count], step.finite[:count]

    def _recorded_step(self, rows: int, slots: Slots) -> "_Step | None":
        """A recorded step reads and writes the memory of the very slots it was recorded over: others, even at the same
        address, need their own.
        """
        if self._recorded_for() is not slots:
            self._recorded.clear()
            self._recorded_for = weakref.ref(slots)
        if rows not in self._recorded:
            step = self._record(rows, slots)
            if step is None:
                return None
            self._recorded[rows] = step
        return self._recorded[rows]

    def _record(self, rows: int, slots: Slots) -> "_Step | None":
        """A decoding step of `rows` rows as one CUDA graph; None, and no further try, when the model's code cannot be
        recorded.
        """
        given = torch.zeros(3, rows, dtype=torch.long, device=self.device)

        def step() -> Tensor:
            a_pass = SlotPass(positions=given[1], reaches=self.reaches, slots=slots, lengths=given[2])
            with running(a_pass):
                return self._base(input_ids=given[:1], position_ids=given[1:2], use_cache=False).last_hidden_state[0]

        # What is lazily made on first use must not be recorded; of what these steps write nothing is in use: the
        # first position of a slot is written again when the step is replayed, or when the slot is filled.
        kept = [(states, states[:rows, :, :1].clone()) for states in (*slots.keys, *slots.values)]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.stream(stream):
                step()
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph):
                hidden = step()
                finite = hidden.isfinite().all(-1)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            _log.info("decoding steps are not recorded: %s", error)
            self._records = False
            self._recorded.clear()
            return None
        finally:
            for states, first in kept:
                states[:rows, :, :1] = first
        return _Step(graph, given, hidden, finite)

    def find_reaches(self, tokens: Sequence[int]) -> tuple[list[Reach], int]:
        """The reaches of the masks the model makes, and how often it calls its attention, in one forward."""
        ids = torch.tensor(tokens)
        node = Node(None, 0, ids.numpy())
        positions = torch.arange(len(tokens), device=self.device)
        a_pass = StreamPass(positions=positions, reaches=None, pieces=[Piece(node, 0, len(tokens), 0)])
        self._through(ids, a_pass)
        return a_pass.found, a_pass.layers

    @torch.inference_mode()
    def _through(self, tokens: Tensor, a_pass: Pass) -> tuple[Tensor, Broken | None]:
        self.forwards += 1
        self.tokens += len(tokens)
        # No mask and no cache; positions are given, so nothing in the model's code counts rows.
        with running(a_pass):
            output = self._base(
                input_ids=tokens[None].to(self.device), position_ids=a_pass.positions[None], use_cache=False
            )
        self.token_bytes = a_pass.token_bytes
        self._layers = a_pass.layers
        hidden: Tensor = output.last_hidden_state[0]
        if a_pass.broken is not None:
            self.first_broken = self.first_broken or a_pass.broken.where
        elif not self.first_broken and not bool(hidden.sum(dtype=torch.float32).isfinite()):
            # Nothing follows from it for other rows, and the head makes a NaN of it by itself.
            self.first_broken = _LAST
        return hidden, a_pass.broken
