"""How many tokens fit into one forward? From the memory that is free when the model has been loaded."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from eval_platform.devices import device_share, own_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# More tokens a forward are no faster: on two CPU cores 1,024 and 2,048 are level, 512 is slower and 256 slower still.
_BEST = {"cpu": 1024, "cuda": 16384}
_LEAST = 64
# Half of what is free is left to the head's blocks, to kept keys and values, and to whatever else runs.
_SHARE = 0.5
# Of what is free, for keys and values of finished turns; and in bytes, where it is not known what is free.
_REMEMBERED_SHARE = 0.125
_REMEMBERED = 2**30


def best_tokens(device: torch.device) -> int:
    """Tokens in one forward that are fastest on `device`, padding counted, if they fit."""
    return _BEST.get(device.type, _BEST["cpu"])


def token_budget(model: "PreTrainedModel") -> int:
    """Tokens in one packed forward of `model` on its device."""
    best = best_tokens(model.device)
    free = _free_bytes(model.device)
    return best if free is None else max(_LEAST, min(best, int(free * _SHARE / _bytes_per_token(model))))


def remembered_bytes(device: torch.device) -> int:
    """How much of `device`'s memory finished turns of conversations may take."""
    free = _free_bytes(device)
    return _REMEMBERED if free is None else int(free * _REMEMBERED_SHARE)


def free_on_gpu(device: torch.device) -> int:
    """Bytes of the GPU that this process may yet take, beyond what torch's allocator holds already."""
    free, total = torch.cuda.mem_get_info(device)
    share = device_share()
    if share < 1:  # what others of the same GPU have not taken yet is theirs all the same
        free = min(free, own_bytes(total, share) - torch.cuda.memory_reserved(device))
    return max(0, free)


def _bytes_per_token(model: "PreTrainedModel") -> int:
    """What a token takes while a forward runs: the widest layer's intermediates, and its keys and values kept."""
    config: Any = model.config.get_text_config()
    matrices = [weight.shape for weight in model.parameters() if weight.dim() == 2]
    widest = max((max(shape) for shape in matrices if config.vocab_size not in shape), default=config.hidden_size)
    size = max(4, model.dtype.itemsize)  # attention's partial results are float32
    kept = 2 * config.num_hidden_layers * config.hidden_size  # at most: with as many key-value heads as heads
    return size * (8 * config.hidden_size + 4 * widest + kept)


def _free_bytes(device: torch.device) -> int | None:
    """Free memory of `device`; on CPU the less of what the machine and the control group have left; None: unknown."""
    if device.type == "cuda":
        return free_on_gpu(device)
    found = []
    machine = Path("/proc/meminfo")
    if machine.is_file():
        fields = dict(line.split(":", 1) for line in machine.read_text(encoding="ascii").splitlines())
        found.append(int(fields["MemAvailable"].split()[0]) * 1024)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and limit.read_text(encoding="ascii").strip() != "max":
        found.append(int(limit.read_text(encoding="ascii")) - int(used.read_text(encoding="ascii")))
    return min(found, default=None)
