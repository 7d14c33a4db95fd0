"""Which arithmetic runs on this processor? A short measurement at the model's own layer shapes chooses the products.

torch computes a float32 linear layer with MKL; oneDNN, which torch brings along, has the same product, with the weight
as it is ("onednn") or blocked ahead for the processor ("onednn-packed"). Which is faster differs from one processor to
the next, by up to two times, and with the number of rows, so it is measured when a model is loaded.
"""

import ctypes
import logging
import math
import mmap
import os
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_log = logging.getLogger(__name__)

_HEAD = "head"
KINDS = ("torch", "onednn", "onednn-packed")
Product = Callable[[Tensor], Tensor]
Place = tuple[nn.Module, str]  # a layer's parent and its name there

# A measurement costs more than it can bring to a model of fewer parameters.
_SMALL_MODEL = 5_000_000
# Rows of a scoring forward, and of decoding steps while a set of 64 slots empties.
_SCORING_ROWS = 1024
_DECODING_ROWS = (4, 16, 64)
# Large layers are measured on fewer rows and on a part of their outputs, which does not change who wins.
_MEASURED_FLOP = 1.5e9
_MEASURED_WEIGHTS = 2**22
_ROUNDS = 5
# torch's own product is left for a gain over scoring and decoding that noise does not explain (geometric mean), and
# never when either gets slower by more than noise.
_CLEAR_GAIN = 1.05
_LEAST_GAIN = 0.92
# The row count that oneDNN chooses the blocking for; the kernels for other counts take the same blocking.
_PACKED_FOR = 1024
# malloc.h's names for mallopt's parameters.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3


@dataclass(frozen=True, slots=True)
class Kernels:
    """Which arithmetic runs; recorded with the evaluation.

    linear: the kind of product (KINDS) by shape "inputsxoutputs", one for each distinct shape among the linear layers
    that may be swapped; "inputsxoutputs+outputs" where several multiply the same tensor, packed as one product. head:
    the kind for the output embedding, which `head.Head` multiplies by. threads: of one product. huge_pages: malloc
    takes huge pages from the kernel.
    """

    linear: Mapping[str, str]
    head: str
    threads: int
    huge_pages: bool

    @property
    def are_torchs(self) -> bool:
        """Whether every product is torch's own, as it was before."""
        return {self.head, *self.linear.values()} == {"torch"}

    def describe(self) -> str:
        """One line, for example "threads 2; linear onednn-packed (4 shapes), torch (1); head torch"."""
        counts = Counter(self.linear.values()).most_common()
        kinds = ", ".join(
            f"{kind} ({count}{'' if index else ' shape' if count == 1 else ' shapes'})"
            for index, (kind, count) in enumerate(counts)
        )
        pages = "; huge pages" if self.huge_pages else ""
        return f"threads {self.threads}; linear {kinds or 'torch'}; head {self.head}{pages}"


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
    places, head = _swappable(model)
    units = [[place] for place in places]
    measures = not deterministic and places and _has_onednn(model.dtype) and model.num_parameters() >= _SMALL_MODEL
    if measures:
        units = siblings(places, forward)
    shapes: dict[str, list[list[Place]]] = {}
    for unit in units:
        shapes.setdefault(_shape(_layers(unit)), []).append(unit)
    chosen = dict.fromkeys(shapes, "torch")
    if measures:
        samples = {shape: _Sample(_layers(there[0])) for shape, there in shapes.items()}
        if head is not None:
            samples[_HEAD] = _Sample([head])
        with torch.inference_mode():
            if _may_choose_threads():
                seconds /= 2
                largest = max(samples.values(), key=lambda sample: sample.size)
                torch.set_num_threads(_best_threads(largest, seconds))
            chosen = _choose(samples, seconds)
        del samples
        pages = Pages()
        for shape, there in shapes.items():
            if chosen[shape] != "torch":
                for unit in there:
                    _swap(unit, chosen[shape], pages)
    for_head = chosen.pop(_HEAD, "torch")
    kernels = Kernels(chosen, for_head, torch.get_num_threads(), _has_huge_pages())
    _log.info("%s", kernels.describe())
    return kernels


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


class _Joint:
    """One packed product in the place of several layers that are given the same tensor, one call after the other."""

    def __init__(self, layers: Sequence[nn.Linear | Conv1D]) -> None:
        weights = [_weight(layer) for layer in layers]
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

    def __init__(self, layer: nn.Linear | Conv1D, kind: str, joint: tuple[_Joint, int] | None = None) -> None:
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
            packed = _pack(_weight(layer))
            self._product = _onednn(packed, layer.bias)
            self._unpacked = packed.to_dense
        else:
            # Not by assignment: the class has a property of this name.
            self._parameters["weight"] = layer.weight  # pyright: ignore[reportArgumentType]
            self._product = product(_weight(layer), layer.bias, kind)
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


def _swap(unit: Sequence[Place], kind: str, pages: "Pages") -> None:
    layers = _layers(unit)
    held = [(layer.weight.data_ptr(), layer.weight.nbytes) for layer in layers]
    with torch.no_grad():
        joint = _Joint(layers) if len(unit) > 1 and kind == "onednn-packed" else None
        for index, (parent, name) in enumerate(unit):
            setattr(parent, name, Linear(layers[index], kind, None if joint is None else (joint, index)))
    layers.clear()
    if kind == "onednn-packed":
        for where, size in held:
            pages.release(where, size)
        if len(held) > 1:
            pages.trim()  # of the weights one after the other, which were packed as one


class Pages:
    """Gives the memory of a weight that nobody needs any more back to the kernel.

    safetensors maps a file, and a weight stays a view of it when its dtype needs no conversion. The mapping lives as
    long as any weight in it, so dropping one weight frees nothing: its pages are given back here.
    """

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None)
        self._starts: list[int] = []
        self._ends: list[int] = []
        maps = Path("/proc/self/maps")
        for line in maps.read_text(encoding="utf-8").splitlines() if maps.exists() else ():
            span, mode, _offset, _device, inode, *_path = line.split(maxsplit=5)
            if inode != "0" and mode.endswith("p"):
                start, end = (int(number, 16) for number in span.split("-"))
                self._starts.append(start)
                self._ends.append(end)

    def release(self, where: int, size: int) -> None:
        """Give back the pages of the `size` bytes at the address `where`, which held a weight."""
        index = bisect_right(self._starts, where) - 1
        if index < 0 or where + size > self._ends[index]:
            self.trim()
            return
        first = -(-where // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (where + size) // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first:
            # A private page of a file that was not written to is read from it again if somebody looks after all.
            self._libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)

    def trim(self) -> None:
        """Give back what malloc has of memory that is free by now, and keeps for later unless it is asked."""
        if hasattr(self._libc, "malloc_trim"):
            self._libc.malloc_trim(0)


def settle_allocator() -> None:
    """Let malloc keep the memory of a forward's temporaries for the next forward. Call it once models are loaded.

    glibc gives the end of its heap back as soon as it is free and large temporaries always, so that each forward
    faults its memory in again: 40,000 page faults in 2,048 tokens of a 24 M-parameter Llama, none with these settings,
    at half the kernel's time and the same peak of resident memory. What is kept is bounded. Does nothing elsewhere.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)
        libc.mallopt(_M_TRIM_THRESHOLD, 256 * 2**20)


# -- which layers


def _swappable(model: "PreTrainedModel") -> tuple[list[Place], nn.Linear | None]:
    """The linear layers that may be swapped, as (parent, name); and the head, if its weight may be packed too."""
    named = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    # A quantizer's tensors are of classes of their own.
    plain = [tensor for tensors in named for _, tensor in tensors if type(tensor) in (nn.Parameter, Tensor)]
    owners = Counter(tensor.data_ptr() for tensor in plain)
    head = model.get_output_embeddings()

    def is_swappable(layer: Any) -> bool:
        return (
            type(layer) in (nn.Linear, Conv1D)
            and type(layer.weight) is nn.Parameter
            and layer.weight.device.type == "cpu"
            and layer.weight.dtype == model.dtype
            and layer.weight.numel() > 0
            and owners[layer.weight.data_ptr()] == 1
            and (layer.bias is None or layer.bias.dtype == model.dtype)
            # accelerate puts a `forward` on the instance.
            and not (layer._forward_hooks or layer._forward_pre_hooks or "forward" in layer.__dict__)
        )

    layers = [
        (parent, name)
        for parent in model.modules()
        for name, layer in parent.named_children()
        if layer is not head and is_swappable(layer)
    ]
    return layers, head if isinstance(head, nn.Linear) and is_swappable(head) else None


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


def _weight(layer: nn.Linear | Conv1D) -> Tensor:
    """The layer's weight as [out, in]."""
    return layer.weight.detach().t() if isinstance(layer, Conv1D) else layer.weight.detach()


def _shape(layers: Sequence[nn.Linear | Conv1D]) -> str:
    shapes = [_weight(layer).shape for layer in layers]
    return f"{shapes[0][1]}x{'+'.join(str(outputs) for outputs, _ in shapes)}"


def _has_onednn(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


# -- measurement


class _Sample:
    """A unit of layers, or the part of a large one that is measured, and its inputs by number of rows."""

    def __init__(self, layers: Sequence[nn.Linear | Conv1D]) -> None:
        inputs = _weight(layers[0]).shape[1]
        most = max(1, _MEASURED_WEIGHTS // inputs // len(layers))
        self.parts = [
            (_weight(layer)[:most], None if layer.bias is None else layer.bias.detach()[:most]) for layer in layers
        ]
        self.size = sum(weight.numel() for weight, _ in self.parts)
        rows = int(_MEASURED_FLOP / (2 * self.size))
        scoring = torch.ones(max(128, min(_SCORING_ROWS, rows)), inputs, dtype=layers[0].weight.dtype)
        # Of scoring, then of decoding steps.
        self.inputs = [scoring, *(scoring[:rows] for rows in _DECODING_ROWS)]

    def runs(self, kind: str) -> Sequence[Product]:
        """What computes the unit: one product a layer, but for packed weights, which are one."""
        if kind != "onednn-packed" or len(self.parts) == 1:
            return [product(weight, bias, kind) for weight, bias in self.parts]
        # A bias is added in either case and changes nothing of who wins.
        return [product(torch.cat([weight for weight, _ in self.parts]), None, kind)]


def _choose(samples: Mapping[str, _Sample], seconds: float) -> dict[str, str]:
    """The best kind for each shape. The kinds are timed in turn, so that whatever else runs meets all of them, and so
    that between two calls of one product the others' weights have passed through the nearest cache.
    """
    deadline = time.perf_counter() + seconds
    runs = {(shape, kind): sample.runs(kind) for shape, sample in samples.items() for kind in KINDS}
    best = {key: [math.inf] * (1 + len(_DECODING_ROWS)) for key in runs}
    for index in range(_ROUNDS + 1):
        for number in range(1 + len(_DECODING_ROWS)):
            for (shape, kind), products in runs.items():
                x = samples[shape].inputs[number]
                start = time.perf_counter()
                for run in products:
                    run(x)
                took = time.perf_counter() - start
                if index:  # the first call makes the kernel
                    best[shape, kind][number] = min(best[shape, kind][number], took)
        if index and time.perf_counter() > deadline:
            break
    return {
        shape: _fastest({kind: (best[shape, kind][0], sum(best[shape, kind][1:])) for kind in KINDS})
        for shape in samples
    }


def _fastest(times: Mapping[str, tuple[float, float]]) -> str:
    """`times`: seconds of scoring and of decoding by kind."""
    scoring, decoding = times["torch"]
    chosen, most = "torch", _CLEAR_GAIN
    for kind, (its_scoring, its_decoding) in times.items():
        gains = scoring / its_scoring, decoding / its_decoding
        if min(gains) >= _LEAST_GAIN and math.sqrt(gains[0] * gains[1]) >= most:
            chosen, most = kind, math.sqrt(gains[0] * gains[1])
    return chosen


def _may_choose_threads() -> bool:
    """Two hardware threads of one core share its arithmetic; whoever has set a number has said what he wants."""
    return (os.cpu_count() or 1) > 2 and not {"OMP_NUM_THREADS", "MKL_NUM_THREADS"} & set(os.environ)


def _best_threads(sample: _Sample, seconds: float) -> int:
    """torch's own number of threads, or half of it where that is clearly faster. Leaves torch's number as it was."""
    usual = torch.get_num_threads()
    candidates: Sequence[int] = sorted({usual, max(1, usual // 2)})
    runs = sample.runs("torch")
    best = dict.fromkeys(candidates, math.inf)
    deadline = time.perf_counter() + seconds
    try:
        for index in range(_ROUNDS + 1):
            for threads in candidates:
                torch.set_num_threads(threads)
                start = time.perf_counter()
                for run in runs:
                    run(sample.inputs[0])
                if index:
                    best[threads] = min(best[threads], time.perf_counter() - start)
            if index and time.perf_counter() > deadline:
                break
    finally:
        torch.set_num_threads(usual)
    half = candidates[0]
    return half if best[half] * _CLEAR_GAIN < best[usual] else usual


def _has_huge_pages() -> bool:
    """Whether malloc's memory comes in transparent huge pages: always, or because malloc asks for them."""
    file = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    mode = file.read_text(encoding="utf-8") if file.exists() else ""
    asks = "glibc.malloc.hugetlb=1" in os.environ.get("GLIBC_TUNABLES", "").split(":")
    return "[always]" in mode or ("[madvise]" in mode and asks)
