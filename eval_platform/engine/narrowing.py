"""What of the last layer need not be computed? Behind its attention each row is its own affair, and of most rows nobody
asks for the hidden state: they are there for the keys and values that others look at.

So the linear layers that a forward calls behind its last attention are made to multiply the wanted rows only and to
give zeros for the rest. The model's own code runs as it is; that its rows are apart there is tried out once.
"""

import logging
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from eval_platform.engine.attention import current
from eval_platform.engine.packed import PackedModel
from eval_platform.engine.products import Linear
from eval_platform.engine.stream import Kept, forwards
from eval_platform.engine.trie import Node

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_log = logging.getLogger(__name__)


def narrow(model: "PreTrainedModel", packed: PackedModel, tokens: list[int], tolerance: float) -> int:
    """Let the model's last products be made for wanted rows only; how many products these are, 0 where all rows stay
    computed.

    To be called once all layers are what they will be. `tolerance`: of a wanted row's hidden state, relative to its
    length, when the others' are left out; beyond it everything stays as it was.
    """
    if packed.on_gpu:
        return 0  # not measured there
    node = Node(None, 0, np.asarray(tokens, dtype=np.int64))
    (forward,) = forwards([node], len(tokens), Kept())
    calls: Counter[nn.Module] = Counter()
    late: list[nn.Module] = []

    def note(layer: nn.Module, given: tuple[Any, ...]) -> None:
        calls[layer] += 1
        a_pass = current()
        if a_pass is not None and a_pass.layers == a_pass.all_layers and _is_of_rows(given, len(tokens)):
            late.append(layer)

    noting = [m.register_forward_pre_hook(note) for m in model.base_model.modules() if _is_linear(m)]
    whole, _ = packed.run(forward)
    for handle in noting:
        handle.remove()
    hooks = []
    found = [layer for layer in late if calls[layer] == 1]
    for layer in found:
        hooks += [layer.register_forward_pre_hook(_before), layer.register_forward_hook(_after)]
    wanted = np.arange(1, len(tokens), 5)  # few enough for attention to take them by themselves
    part, _ = packed.run(forward, wanted)
    expected = whole[torch.from_numpy(wanted)].float()
    error = float(((part.float() - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-30)).max())
    packed.forwards = packed.tokens = 0
    if not error <= tolerance:
        for handle in hooks:
            handle.remove()
        _log.info("the last layer is computed for all rows: without some the others are %.1e off", error)
        return 0
    return len(found)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | Conv1D | Linear)


def _is_of_rows(given: tuple[Any, ...], rows: int) -> bool:
    return len(given) == 1 and given[0].shape[:-1] == (1, rows)


def _before(_layer: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
    a_pass = current()
    if a_pass is None or a_pass.wanted is None:
        return None
    # The same tensor gives the same rows: layers that share a product know it by that.
    if a_pass.narrowed is None or a_pass.narrowed[0] is not given[0]:
        a_pass.narrowed = given[0], given[0][:, torch.from_numpy(a_pass.wanted)]
    return (a_pass.narrowed[1],)


def _after(_layer: nn.Module, _given: tuple[Any, ...], made: Tensor) -> Tensor | None:
    rows = _rows()
    if rows is None:
        return None
    a_pass = current()
    assert a_pass is not None
    whole = made.new_zeros(1, len(a_pass.positions), made.shape[-1])
    whole[:, rows] = made
    return whole


def _rows() -> Tensor | None:
    """The wanted rows of the forward that is running; None where all are, or where no forward of the engine is."""
    a_pass = current()
    return None if a_pass is None or a_pass.wanted is None else torch.from_numpy(a_pass.wanted)
