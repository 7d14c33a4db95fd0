"""Which product is fastest here? The kinds are timed in turn at a layer's own shape.

Which wins differs from one processor to the next, by up to two times, and with the number of rows.
"""

import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from eval_platform.engine.products import KINDS, Product, product, weight_of

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


class Sample:
    """A unit of layers, or the part of a large one that is measured, and its inputs by number of rows.

    kinds: those to choose from. rows: of scoring, of decoding steps, or of both, where one kind must serve both.
    """

    def __init__(
        self,
        layers: Sequence[nn.Linear | Conv1D],
        kinds: Sequence[str] = KINDS,
        rows: Literal["scoring", "decoding", "both"] = "both",
    ) -> None:
        self.kinds = kinds
        inputs = weight_of(layers[0]).shape[1]
        most = max(1, _MEASURED_WEIGHTS // inputs // len(layers))
        self.parts = [
            (weight_of(layer)[:most], None if layer.bias is None else layer.bias.detach()[:most]) for layer in layers
        ]
        self.size = sum(weight.numel() for weight, _ in self.parts)
        fit = int(_MEASURED_FLOP / (2 * self.size))
        scoring = torch.ones(max(128, min(_SCORING_ROWS, fit)), inputs, dtype=layers[0].weight.dtype)
        self.phases = {
            phase: given
            for phase, given in (("scoring", [scoring]), ("decoding", [scoring[:few] for few in _DECODING_ROWS]))
            if rows in (phase, "both")
        }

    def runs(self, kind: str) -> Sequence[Product]:
        """What computes the unit: one product a layer, but for packed weights, which are one."""
        if kind != "onednn-packed" or len(self.parts) == 1:
            return [product(weight, bias, kind) for weight, bias in self.parts]
        # A bias is added in either case and changes nothing of who wins.
        return [product(torch.cat([weight for weight, _ in self.parts]), None, kind)]


def choose(samples: Mapping[str, Sample], seconds: float) -> dict[str, str]:
    """The best kind for each shape. The kinds are timed in turn, so that whatever else runs meets all of them, and so
    that between two calls of one product the others' weights have passed through the nearest cache.
    """
    deadline = time.perf_counter() + seconds
    runs = {(shape, kind): sample.runs(kind) for shape, sample in samples.items() for kind in sample.kinds}
    best = {
        (shape, kind, phase): [math.inf] * len(given)
        for shape, kind in runs
        for phase, given in samples[shape].phases.items()
    }
    for index in range(_ROUNDS + 1):
        for phase, number in (("scoring", 0), *(("decoding", number) for number in range(len(_DECODING_ROWS)))):
            for (shape, kind), products in runs.items():
                if phase not in samples[shape].phases:
                    continue
                x = samples[shape].phases[phase][number]
                start = time.perf_counter()
                for run in products:
                    run(x)
                took = time.perf_counter() - start
                if index:  # the first call makes the kernel
                    best[shape, kind, phase][number] = min(best[shape, kind, phase][number], took)
        if index and time.perf_counter() > deadline:
            break
    return {
        shape: _fastest({kind: [sum(best[shape, kind, phase]) for phase in sample.phases] for kind in sample.kinds})
        for shape, sample in samples.items()
    }


def _fastest(times: Mapping[str, Sequence[float]]) -> str:
    """`times`: by kind, seconds of each phase, such as scoring and decoding."""
    chosen, most = "torch", _CLEAR_GAIN
    for kind, its in times.items():
        gains = [usual / own for usual, own in zip(times["torch"], its, strict=True)]
        mean = math.prod(gains) ** (1 / len(gains))
        if min(gains) >= _LEAST_GAIN and mean >= most:
            chosen, most = kind, mean
    return chosen


def may_choose_threads() -> bool:
    """Two hardware threads of one core share its arithmetic; whoever has set a number has said what he wants."""
    return (os.cpu_count() or 1) > 2 and not {"OMP_NUM_THREADS", "MKL_NUM_THREADS"} & set(os.environ)


def best_threads(sample: Sample, seconds: float) -> int:
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
                    run(sample.phases["scoring"][0])
                if index:
                    best[threads] = min(best[threads], time.perf_counter() - start)
            if index and time.perf_counter() > deadline:
                break
    finally:
        torch.set_num_threads(usual)
    half = candidates[0]
    return half if best[half] * _CLEAR_GAIN < best[usual] else usual
