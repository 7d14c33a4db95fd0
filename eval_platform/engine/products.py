"""How is a linear layer multiplied? torch's product, two of oneDNN's, and the module that stands in for a layer.

torch computes a float32 linear layer with MKL; oneDNN, which torch brings along, has the same product, with the weight
as it is ("onednn") or blocked ahead for the processor ("onednn-packed").
"""

import logging
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

_log = logging.getLogger(__name__)

KINDS = ("torch", "onednn", "onednn-packed")
AS_IT_IS = ("torch", "onednn")  # those that take a weight as it is, and make no copy of it
Product = Callable[[Tensor], Tensor]

# The row count that oneDNN chooses the blocking for; the kernels for other counts take the same blocking.
_PACKED_FOR = 1024


def product(weight: Tensor, bias: Tensor | None, kind: str) -> Product:
    """The linear map of `weight` [out, in] and `bias` [out] as a function: x [..., in] -> [..., out], x's dtype.

    The result is never differentiable. "onednn-packed" keeps a blocked copy and not `weight`; "onednn" and
    "onednn-packed" want a CPU, and float32 or bfloat16. Raises ValueError for a kind that is none of KINDS.
    """
    weight = weight.detach()
    bias = None if bias is None else bias.detach()
    if kind == "torch":
        return lambda x: F.linear(x, weight, bias)
    if kind == "onednn":
        return _onednn(weight, bias)
    if kind == "onednn-packed":
        return _onednn(_pack(weight), bias)
    raise ValueError(f"{kind!r} is no kind of product; known: {', '.join(KINDS)}")


def _onednn(weight: Tensor, bias: Tensor | None) -> Product:
    linear = torch.ops.mkldnn._linear_pointwise.default
    return lambda x: linear(x, weight, bias, "none", [], None)


def _pack(weight: Tensor) -> Tensor:
    """An opaque copy of `weight` [out, in] in oneDNN's blocked layout."""
    return torch.ops.mkldnn._reorder_linear_weight.default(weight, _PACKED_FOR)


class Joint:
    """One packed product in the place of several layers that are given the same tensor, one call after the other."""

    def __init__(self, layers: Sequence[nn.Linear | Conv1D]) -> None:
        weights = [weight_of(layer) for layer in layers]
        biases = [layer.bias for layer in layers]
        bias = None
        if any(one is not None for one in biases):
            pairs = zip(weights, biases, strict=True)
            bias = torch.cat([w.new_zeros(len(w)) if one is None else one.detach() for w, one in pairs])
        self._sizes = [len(weight) for weight in weights]
        self._packed = _pack(torch.cat(weights))
        self._product = _onednn(self._packed, bias)
        # Held until each layer has had its part: the very tensor, so that no other can be taken for it.
        self._given: Tensor | None = None
        self._made: list[Tensor] = []
        self._left = 0

    def part(self, index: int, x: Tensor) -> Tensor:
        """What layer `index` makes of x: [..., its outputs], a view."""
        if x is not self._given:
            self._given, self._made, self._left = x, list(self._product(x).split(self._sizes, -1)), len(self._sizes)
        made = self._made[index]
        self._left -= 1
        if not self._left:
            self._given, self._made = None, []
        return made

    def weight(self, index: int) -> Tensor:
        return self._packed.to_dense().split(self._sizes)[index].clone()


class Linear(nn.Module):
    """A linear layer that runs one of oneDNN's products, in the place of an `nn.Linear` or a `Conv1D`; with `joint`
    its part (of that index) of a product that it shares.

    Some models read `layer.weight` beside calling the layer (its dtype, or for a product of their own). The first
    such read turns a packed layer back into what it was, for good: right at once, and no slower than before.
    """

    def __init__(self, layer: nn.Linear | Conv1D, kind: str, joint: tuple[Joint, int] | None = None) -> None:
        super().__init__()
        self.is_transposed = isinstance(layer, Conv1D)
        self.bias = layer.bias
        if isinstance(layer, Conv1D):
            self.nf, self.nx = layer.nf, layer.nx
        else:
            self.in_features, self.out_features = layer.in_features, layer.out_features
        self._unpacked: Callable[[], Tensor] | None = None  # the packed weight as [out, in]
        if joint is not None:
            shared, index = joint
            self._product = lambda x: shared.part(index, x)
            self._unpacked = lambda: shared.weight(index)
        elif kind == "onednn-packed":
            packed = _pack(weight_of(layer))
            self._product = _onednn(packed, layer.bias)
            self._unpacked = packed.to_dense
        else:
            # Not by assignment: the class has a property of this name.
            self._parameters["weight"] = layer.weight  # pyright: ignore[reportArgumentType]
            self._product = product(weight_of(layer), layer.bias, kind)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        return self._product(x)

    @property
    def weight(self) -> Tensor:
        """As the layer had it: [out, in] of a Linear, [in, out] of a Conv1D."""
        if self._unpacked is not None:
            _log.info("the model reads the weight of a packed linear layer, which is unpacked for it")
            weight = self._unpacked()
            self._product = product(weight, self.bias, "torch")
            self._parameters["weight"] = nn.Parameter(weight.t() if self.is_transposed else weight, False)
            self._unpacked = None
        weight = self._parameters["weight"]
        assert weight is not None
        return weight


def weight_of(layer: nn.Linear | Conv1D) -> Tensor:
    """The layer's weight as [out, in]."""
    return layer.weight.detach().t() if isinstance(layer, Conv1D) else layer.weight.detach()
