"""What comes next? Log-probabilities and best tokens from hidden states, without a [rows, vocabulary] tensor."""

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from eval_platform.engine.pages import Pages
from eval_platform.engine.products import product

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The block of logits that is made at a time: 8 MiB of float32, about what two cores' caches hold.
_ROWS = 512
_VOCABULARY = 4096
# Rows of a decoding step: 64 slots at most.
FEW_ROWS = 64
_Product = Callable[[Tensor], Tensor]


class _Concatenated(nn.Module):
    """A head whose weight is held in blocks only."""

    def __init__(self, products: Sequence[tuple[int, _Product]]) -> None:
        super().__init__()
        self._products = products

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.cat([multiply(hidden) for _, multiply in self._products], dim=-1)


class Head:
    """A model's output embedding, applied in blocks of the vocabulary; logits are float32 whatever the model's dtype.

    What models do to logits after the product (soft-capping, a scale) is read from their config; the engine's check
    at load compares the result with the model's own logits, so that a model which does something else is seen.
    """

    def __init__(self, model: "PreTrainedModel", kind: str, kind_of_few: str) -> None:
        """`kind`: the product to use, see `products.product`; `kind_of_few`: for the few rows of a decoding step, the
        same where it is packed. The model's own head uses a packed one too from then on, so that it is not held twice.
        """
        layer: Any = model.get_output_embeddings()
        weight, bias = layer.weight.detach(), getattr(layer, "bias", None)
        self._products: list[tuple[int, _Product]] = []
        self._of_few: list[tuple[int, _Product]] = []
        # A GPU takes the whole vocabulary at once: 256 MiB of logits at 128,000 tokens.
        width = _VOCABULARY if weight.device.type == "cpu" else weight.shape[0]
        for first in range(0, weight.shape[0], width):
            block = slice(first, first + width)
            part = None if bias is None else bias.detach()[block]
            multiply = product(weight[block], part, kind)
            self._products.append((first, multiply))
            of_few = multiply if kind_of_few == kind else product(weight[block], part, kind_of_few)
            self._of_few.append((first, of_few))
        self.device = weight.device
        if kind == "onednn-packed":
            where, size = weight.data_ptr(), weight.nbytes
            model.set_output_embeddings(_Concatenated(self._products))
            del layer, weight
            Pages().release(where, size)
        config = model.config.get_text_config()
        self._scale = 1.0
        # Cohere multiplies by logit_scale, Granite divides by logits_scaling, Gemma caps softly.
        if getattr(config, "logit_scale", None):
            self._scale *= float(config.logit_scale)
        if getattr(config, "logits_scaling", None):
            self._scale /= float(config.logits_scaling)
        self._cap = getattr(config, "final_logit_softcapping", None)

    def score(self, hidden: Tensor, rows: Sequence[int], tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Log-probability (nats, float64) of tokens[i] after hidden[rows[i]], and whether it is the most probable.

        hidden: [n, hidden size]; `rows` ascending. Both results are on the CPU; with a NaN nothing is most probable.
        """
        row_index = torch.tensor(rows, dtype=torch.long, device=self.device)
        token_index = torch.tensor(tokens, dtype=torch.long, device=self.device)
        bounds = torch.arange(0, hidden.shape[0] + _ROWS, _ROWS, device=self.device)
        cuts = torch.searchsorted(row_index, bounds).tolist()
        values, flags = [], []
        for i, (a, b) in enumerate(itertools.pairwise(cuts)):
            if a == b:
                continue
            first = i * _ROWS
            value, flag = self._score(hidden[first : first + _ROWS], row_index[a:b] - first, token_index[a:b])
            values.append(value)
            flags.append(flag)
        if not values:
            return torch.empty(0, dtype=torch.float64), torch.empty(0, dtype=torch.bool)
        return torch.cat(values).cpu(), torch.cat(flags).cpu()

    def best(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """The most probable token after each row of hidden [n, hidden size], and whether its logits are all numbers:
        int64 and bool [n], on the head's device, where they may still have to be computed.
        """
        high, index = None, None
        broken = torch.zeros(hidden.shape[0], dtype=torch.bool, device=hidden.device)
        for first, logits in self._blocks(hidden):
            block_index = _argmax(logits)
            block_high = logits.gather(-1, block_index[:, None])[:, 0]
            # The maximum is NaN if any logit is, +inf if one is.
            broken |= block_high.isnan() | (block_high == torch.inf)
            if high is None or index is None:
                high, index = block_high, block_index
            else:
                better = block_high > high
                high, index = torch.where(better, block_high, high), torch.where(better, block_index + first, index)
        assert high is not None
        assert index is not None
        return index, ~(broken | (high == -torch.inf))

    def logits(self, hidden: Tensor) -> Tensor:
        """All logits: float32 [n, vocabulary]."""
        return torch.cat([logits for _, logits in self._blocks(hidden)], dim=-1)

    def _score(self, hidden: Tensor, rows: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        picked = torch.empty(len(rows), dtype=torch.float32, device=hidden.device)
        total, high = None, None
        for first, logits in self._blocks(hidden):
            last = first + logits.shape[-1]
            here = ((tokens >= first) & (tokens < last)).nonzero()[:, 0]
            picked[here] = logits[rows[here], tokens[here] - first]
            block_high = logits.amax(-1)
            # In place, in three passes: on CPU half the time of log_softmax. A block may be -inf throughout (tokens
            # that a model never gives), and -inf - -inf would be NaN.
            least = block_high.clamp_min(torch.finfo(torch.float32).min)
            block_total = least + logits.sub_(least[:, None]).exp_().sum(-1).log()
            total = block_total if total is None else torch.logaddexp(total, block_total)
            high = block_high if high is None else torch.maximum(high, block_high)
        assert total is not None
        assert high is not None
        value = picked.double() - total[rows].double()
        # An infinite logit equals the highest, and its log-probability is NaN all the same: that is no prediction.
        return value, (picked == high[rows]) & ~value.isnan()

    def _blocks(self, hidden: Tensor) -> Any:
        for first, multiply in self._of_few if len(hidden) <= FEW_ROWS else self._products:
            logits = multiply(hidden).float()
            if self._scale != 1.0:
                logits = logits * self._scale
            if self._cap is not None:
                logits = torch.tanh(logits / self._cap) * self._cap
            yield first, logits


def _argmax(logits: Tensor) -> Tensor:
    """Where each row's maximum is, or its first NaN. On a CPU numpy finds it several times as fast as torch."""
    if logits.device.type != "cpu":
        return logits.max(-1).indices
    return torch.from_numpy(logits.numpy().argmax(-1))
