"""Which arithmetic runs on this processor? What a short measurement chose (`choice`) stands in for the layers.

Chosen when a model is loaded, at its own layers' shapes: there is no list of processors that could be right.
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from eval_platform.engine.choice import Sample, best_threads, choose, may_choose_threads
from eval_platform.engine.pages import Pages, has_huge_pages
from eval_platform.engine.products import AS_IT_IS, Joint, Linear, weight_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_log = logging.getLogger(__name__)

_HEAD = "head"
_HEAD_FEW = "head, few rows"
Place = tuple[nn.Module, str]  # a layer's parent and its name there

# A measurement costs more than it can bring to a model of fewer parameters.
_SMALL_MODEL = 5_000_000


@dataclass(frozen=True, slots=True)
class Kernels:
    """Which arithmetic runs; recorded with the evaluation.

    linear: the kind of product (KINDS) by shape "inputsxoutputs", one for each distinct shape among the linear layers
    that may be swapped; "inputsxoutputs+outputs" where several multiply the same tensor, packed as one product. head:
    the kind for the output embedding, which `head.Head` multiplies by; head_few: for the few rows of a decoding step
    (another only where the weight is the input embedding's too, and so stays as it is whatever is chosen). threads: of
    one product. huge_pages: malloc takes huge pages from the kernel.
    """

    linear: Mapping[str, str]
    head: str
    head_few: str
    threads: int
    huge_pages: bool

    @property
    def are_torchs(self) -> bool:
        """Whether every product is torch's own, as it was before."""
        return {self.head, self.head_few, *self.linear.values()} == {"torch"}

    def describe(self) -> str:
        """One line, for example "threads 2; linear onednn-packed (4 shapes), torch (1); head torch"."""
        counts = Counter(self.linear.values()).most_common()
        kinds = ", ".join(
            f"{kind} ({count}{'' if index else ' shape' if count == 1 else ' shapes'})"
            for index, (kind, count) in enumerate(counts)
        )
        pages = "; huge pages" if self.huge_pages else ""
        few = f", of few rows {self.head_few}" if self.head_few != self.head else ""
        return f"threads {self.threads}; linear {kinds or 'torch'}; head {self.head}{few}{pages}"


def install(
    model: "PreTrainedModel", forward: Callable[[], object], *, deterministic: bool, seconds: float = 0.5
) -> Kernels:
    """Measure, choose, and swap the model's linear layers for the chosen products in place. `forward` runs the model
    once, on anything: it shows which layers multiply the same tensor (`siblings`).

    Call it when the model is on its device, in its dtype and has all its hooks; a packed weight is no parameter any
    more, so `num_parameters`, `state_dict` and `to` must not be asked afterwards. Layers swapped: those whose class
    is exactly `nn.Linear` or GPT-2's `Conv1D`, in the model's dtype, without hooks, whose weight belongs to nothing
    else; the head is measured only. Resident memory stays that of the weights and, while packing, twice the largest
    unit of layers more.

    `seconds`: about what the measurement may take. torch's own products stay everywhere when `deterministic` (which
    product wins is a matter of noise where two are level), in float16, on other devices than a CPU, and for models
    too small to gain.
    """
    places, head, is_tied = _swappable(model)
    units = [[place] for place in places]
    measures = not deterministic and places and _has_onednn(model.dtype) and model.num_parameters() >= _SMALL_MODEL
    if measures:
        units = siblings(places, forward)
    shapes: dict[str, list[list[Place]]] = {}
    for unit in units:
        shapes.setdefault(_shape(_layers(unit)), []).append(unit)
    chosen = dict.fromkeys(shapes, "torch")
    if measures:
        samples = {shape: Sample(_layers(there[0])) for shape, there in shapes.items()}
        if head is not None and is_tied:
            # Packed it would be held twice.
            samples[_HEAD] = Sample([head], AS_IT_IS, "scoring")
            samples[_HEAD_FEW] = Sample([head], AS_IT_IS, "decoding")
        elif head is not None:
            samples[_HEAD] = Sample([head])
        with torch.inference_mode():
            if may_choose_threads():
                seconds /= 2
                largest = max((one for one in samples.values() if "scoring" in one.phases), key=lambda one: one.size)
                torch.set_num_threads(best_threads(largest, seconds))
            chosen = choose(samples, seconds)
        del samples
        pages = Pages()
        for shape, there in shapes.items():
            if chosen[shape] != "torch":
                for unit in there:
                    _swap(unit, chosen[shape], pages)
    for_head = chosen.pop(_HEAD, "torch")
    for_few = chosen.pop(_HEAD_FEW, for_head)
    kernels = Kernels(chosen, for_head, for_few, torch.get_num_threads(), has_huge_pages())
    _log.info("%s", kernels.describe())
    return kernels


def _swappable(model: "PreTrainedModel") -> tuple[list[Place], nn.Linear | None, bool]:
    """The linear layers that may be swapped, as (parent, name); the head, if another product may multiply by it; and
    whether its weight belongs to something else as well, so that it must stay.
    """
    named = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    # A quantizer's tensors are of classes of their own.
    plain = [tensor for tensors in named for _, tensor in tensors if type(tensor) in (nn.Parameter, Tensor)]
    owners = Counter(tensor.data_ptr() for tensor in plain)
    head = model.get_output_embeddings()

    def is_plain(layer: Any) -> bool:
        return (
            type(layer) in (nn.Linear, Conv1D)
            and type(layer.weight) is nn.Parameter
            and layer.weight.device.type == "cpu"
            and layer.weight.dtype == model.dtype
            and layer.weight.numel() > 0
            and (layer.bias is None or layer.bias.dtype == model.dtype)
            # accelerate puts a `forward` on the instance.
            and not (layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__)
        )

    def is_tied(layer: Any) -> bool:
        return owners[layer.weight.data_ptr()] > 1

    layers = [
        (parent, name)
        for parent in model.modules()
        for name, layer in parent.named_children()
        if layer is not head and is_plain(layer) and not is_tied(layer)
    ]
    if not isinstance(head, nn.Linear) or not is_plain(head):
        return layers, None, False
    return layers, head, is_tied(head)


def siblings(places: Sequence[Place], forward: Callable[[], object]) -> list[list[Place]]:
    """`places` in units of layers that one forward calls once, one after the other, with the same tensor, and that
    belong to the same module: queries, keys and values; gate and up. Most units are of one layer.
    """
    calls: list[tuple[int, Tensor]] = []
    number = {id(getattr(parent, name)): index for index, (parent, name) in enumerate(places)}

    def note(layer: nn.Module, given: tuple[Any, ...]) -> None:
        calls.append((number[id(layer)], given[0]))

    noting = [getattr(parent, name).register_forward_pre_hook(note) for parent, name in places]
    try:
        forward()
    finally:
        for handle in noting:
            handle.remove()
    times = Counter(index for index, _ in calls)
    units: list[list[Place]] = []
    before: tuple[int, Tensor] | None = None
    for index, given in calls:
        if times[index] > 1:
            before = None
            continue
        if before is not None and given is before[1] and places[index][0] is places[before[0]][0]:
            units[-1].append(places[index])
        else:
            units.append([places[index]])
        before = index, given
    return units + [[place] for index, place in enumerate(places) if times[index] != 1]


def _layers(unit: Sequence[Place]) -> list[nn.Linear | Conv1D]:
    return [getattr(parent, name) for parent, name in unit]


def _swap(unit: Sequence[Place], kind: str, pages: Pages) -> None:
    layers = _layers(unit)
    held = [(layer.weight.data_ptr(), layer.weight.nbytes) for layer in layers]
    with torch.no_grad():
        joint = Joint(layers) if len(unit) > 1 and kind == "onednn-packed" else None
        for index, (parent, name) in enumerate(unit):
            setattr(parent, name, Linear(layers[index], kind, None if joint is None else (joint, index)))
    layers.clear()
    if kind == "onednn-packed":
        for where, size in held:
            pages.release(where, size)
        if len(held) > 1:
            pages.trim()  # of the weights one after the other, which were packed as one


def _shape(layers: Sequence[nn.Linear | Conv1D]) -> str:
    shapes = [weight_of(layer).shape for layer in layers]
    return f"{shapes[0][1]}x{'+'.join(str(outputs) for outputs, _ in shapes)}"


def _has_onednn(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
