"""Runs a model over packed forwards: hidden states from tokens, positions and what each row looks at."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
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

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Names that configs have for their number of experts.
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


class PackedModel:
    """A causal model whose attention is `attention.IMPLEMENTATION`; counts what it computes.

    `reaches`: of the masks that the model makes in one forward, in their order. `original_attention`: the name of the
    implementation it ran with before.
    """

    def __init__(self, model: "PreTrainedModel", reaches: Sequence[Reach] | None, original_attention: str) -> None:
        self._base: Any = model.base_model
        self.reaches = reaches
        self.original_attention = original_attention
        self.device = model.device
        self.forwards = 0
        self.tokens = 0
        self.first_broken = ""  # where a number was not finite first

    @property
    def chooses_experts(self) -> bool:
        """Whether a token's way through the layers is a choice (mixture of experts), which rounding may turn over."""
        config = self._base.config.get_text_config()
        return any((getattr(config, name, None) or 0) > 1 for name in _EXPERTS)

    def run(self, forward: Forward) -> tuple[Tensor, Broken | None]:
        """Hidden states [rows, hidden size] of a forward, and which rows are no numbers; fills the blocks to keep."""
        pieces, bunches = bunched(forward.pieces, self.device)
        a_pass = StreamPass(
            positions=torch.from_numpy(forward.positions).to(self.device),
            reaches=self.reaches,
            pieces=pieces,
            bunches=bunches,
            ancestors=forward.ancestors,
            keep=forward.keep,
        )
        return self._through(torch.from_numpy(forward.tokens), a_pass)

    def decode(
        self, tokens: Sequence[int], positions: Sequence[int], slots: Slots, lengths: Sequence[int], groups: list[Group]
    ) -> tuple[Tensor, Broken | None]:
        """Hidden states of one more token for each row, whose keys and values go to its slot; as `run`."""
        assert self.reaches is not None
        a_pass = DecodingPass(
            positions=torch.tensor(positions, device=self.device),
            reaches=self.reaches,
            slots=slots,
            lengths=torch.tensor(lengths, device=self.device),
            longest=max(lengths),
            groups=groups,
        )
        return self._through(torch.tensor(tokens), a_pass)

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
        hidden: Tensor = output.last_hidden_state[0]
        a_pass.look_for_broken("the last hidden state", hidden[None])
        if a_pass.broken is not None:
            self.first_broken = self.first_broken or a_pass.broken.where
        return hidden, a_pass.broken
