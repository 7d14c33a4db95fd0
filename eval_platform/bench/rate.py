"""How fast does this machine multiply and read? A program: `python -m eval_platform.bench.rate JOB`, told in JSON.

Rows, kernels and shapes are those of the work: a processor's rate at another shape says little about this model.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval_platform.bench.floor import Matrices
from eval_platform.bench.processes import Rates

if TYPE_CHECKING:
    import torch

ROWS = (1024, 2048, 4096)
SECONDS = 0.08  # of repeats of each product, after the first two
LARGEST_READ = 2**30  # bytes
# Llama's proportions at hidden size 2,048: where no model is given, a shape on which kernels are at their best.
USUAL = Matrices({(2048, 2048): 4, (5632, 2048): 2, (2048, 5632): 1}, (32_000, 2048))


def read_matrices(checkpoint: Path, trust_remote_code: bool = False) -> Matrices:
    """The shapes of the model in `checkpoint`, from its config alone.

    Experts that are kept as one stack are not counted, so the floor of a mixture of experts comes out too low.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    config = AutoConfig.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    head = model.get_output_embeddings()
    layers: dict[tuple[int, int], int] = {}
    for module in model.modules():
        if module is head or not isinstance(module, torch.nn.Linear | Conv1D):
            continue
        first, second = module.weight.shape
        # GPT-2's Conv1D keeps its weight the other way round.
        shape = (second, first) if isinstance(module, Conv1D) else (first, second)
        layers[shape] = layers.get(shape, 0) + 1
    return Matrices(layers, (head.weight.shape[0], head.weight.shape[1]))


def matrix_rate(matrices: Matrices, dtype: "torch.dtype", device: "torch.device") -> tuple[float, dict[str, str]]:
    """(FLOP/s of one pass through the layers' matrices with the best kernel and number of rows, kernel by shape)."""
    seconds = dict.fromkeys(ROWS, 0.0)
    chosen: dict[str, str] = {}
    for (outputs, inputs), count in matrices.layers.items():
        for rows in ROWS:
            timed = {name: _seconds(run, device) for name, run in _kernels(rows, outputs, inputs, dtype, device)}
            name = min(timed, key=lambda name: timed[name])
            seconds[rows] += count * timed[name]
            chosen[f"{outputs} x {inputs}"] = name
    return max(2 * rows * matrices.layer_weights / seconds[rows] for rows in ROWS), chosen


def memory_rate(weights: int, dtype: "torch.dtype", device: "torch.device") -> float:
    """Bytes/s at which as much as the weights is read again and again, as decoding does."""
    import torch

    size = min(weights * dtype.itemsize, LARGEST_READ)
    # Floats of four bytes are summed by vector instructions whatever the model's dtype.
    block = torch.ones(size // 4, device=device)
    return block.nbytes / _seconds(block.sum, device)


def _kernels(
    rows: int, outputs: int, inputs: int, dtype: "torch.dtype", device: "torch.device"
) -> Iterator[tuple[str, Callable[[], Any]]]:
    import torch

    x = torch.randn(rows, inputs, dtype=dtype, device=device)
    weight = torch.randn(outputs, inputs, dtype=dtype, device=device)
    yield "linear", lambda: torch.nn.functional.linear(x, weight)
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        try:
            packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
            torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
        except RuntimeError:  # no such kernel for this dtype on this processor
            return
        yield "oneDNN, packed", lambda: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def _seconds(run: Callable[[], Any], device: "torch.device") -> float:
    """Median seconds of a call: what the machine sustains, not its best moment."""
    import torch

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(2):
        run()
    wait()
    times: list[float] = []
    while sum(times) < SECONDS or len(times) < 3:
        begun = time.perf_counter()
        run()
        wait()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def main(job: dict[str, Any]) -> None:
    import torch

    torch.set_num_threads(job["threads"])
    settings = job["settings"]
    dtype, device = getattr(torch, settings["dtype"]), torch.device(settings["device"])
    matrices = read_matrices(Path(job["checkpoint"]), settings["trust_remote_code"]) if job["checkpoint"] else USUAL
    with torch.inference_mode():
        matrix, kernels = matrix_rate(matrices, dtype, device)
        memory = memory_rate(matrices.layer_weights + matrices.head_weights, dtype, device)
    print(json.dumps(asdict(Rates(matrix, memory, kernels))), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
