"""On which devices do the weights lie?

On one, or over as many as they need: `device = "map"`, which "auto" and "cuda" become by themselves. The package
accelerate then fills the devices in order (GPUs, then main memory), and brings what lies in main memory to a GPU
whenever a forward needs it.
"""

from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from eval_platform.devices import device_share, own_bytes, visible_devices
from eval_platform.engine.sizes import loaded_bytes
from eval_platform.errors import ConfigError, NoDevice
from eval_platform.values import RunSettings

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

MAP = "map"
# Of the devices' memory the weights take so much where others can be had instead. The rest is the engine's: what CUDA
# itself takes, keys and values, a forward.
_COMFORTABLE = 0.85
# So much where none can: forwards are smaller then.
_AT_MOST = 0.95


def has_room(weights: int, memory: int) -> bool:
    """Whether devices of so many bytes together hold so many bytes of weights and leave the engine room to work."""
    return weights <= _COMFORTABLE * memory


def devices_needed(weights: int, memories: Sequence[int]) -> int | None:
    """How many devices, the first ones first, have room for so many bytes of weights.

    memories: bytes of each device that a worker may fill. All of them where they hold the weights with little room to
    work; None where they are too small all together.
    """
    for count, memory in enumerate(accumulate(memories), 1):
        if has_room(weights, memory):
            return count
    return len(memories) if weights <= _AT_MOST * sum(memories) else None


def choose_device(settings: RunSettings, path: Path) -> str:
    """The device that the model at `path` is loaded on: what was asked, or MAP where "auto" or "cuda" need several.

    `settings` are resolved. Raises NoDevice where its GPUs are too small for it, before anything is loaded.
    """
    asked = resolve_device(settings.device)
    if not asked.startswith("cuda"):
        return asked
    device = _device(asked)
    weights = loaded_bytes(path, settings.dtype)
    if weights is None:  # loading says why
        return asked
    import torch

    places = range(torch.cuda.device_count()) if device.index is None else [device.index]
    share = device_share()
    memories = [own_bytes(torch.cuda.get_device_properties(place).total_memory, share) for place in places]
    needed = devices_needed(weights, memories)
    if needed is None:
        raise NoDevice(
            f"{path}: {too_large(weights, memories)}",
            remedy="give its worker more GPUs ([worker] devices, [slurm] gres, [ray] num_gpus, [kubernetes] gpus), set "
            '[engine] dtype to a smaller one, or [engine] device = "map", which takes main memory too and is slow',
        )
    return asked if needed == 1 else MAP


def too_large(weights: int, memories: Sequence[int]) -> str:
    """In words, where `devices_needed` is None."""
    of = f"{len(memories)} devices together" if len(memories) > 1 else "device"
    return (
        f"its weights take {weights / 1e9:.1f} GB, and of the {sum(memories) / 1e9:.1f} GB of its {of} they "
        f"may take {_AT_MOST:.0%}"
    )


def keep_to_share(settings: RunSettings) -> None:
    """Let torch refuse what is beyond this process's share of a GPU that others use too."""
    share = device_share()
    if share == 1 or settings.device == "cpu":
        return
    import torch

    for place in range(torch.cuda.device_count()):
        total = torch.cuda.get_device_properties(place).total_memory
        torch.cuda.set_per_process_memory_fraction(own_bytes(total, share) / total, place)


def device_map(settings: RunSettings) -> "dict[str, torch.device] | str | None":
    """transformers' `device_map`: where it puts each weight as it reads it. None is main memory.

    Raises NoDevice for a GPU that is not there, ConfigError for what is no device, for the tree engine over several
    devices, and where accelerate is needed and not installed.
    """
    if settings.device == MAP:
        if settings.engine_path == "tree":
            raise ConfigError(
                '[engine] path = "tree" does not run over several devices (device = "map")',
                remedy='set [engine] path = "auto"',
            )
        _must_have_accelerate(MAP)
        _must_see_its_gpus()
        return "auto"
    device = _device(settings.device)
    if device.type == "cpu":
        return None
    _must_have_accelerate(str(device))
    return {"": device}


def where(model: "PreTrainedModel", path: Path, settings: RunSettings) -> str:
    """The devices as they are recorded: "cpu", "cuda:0", "map(cuda:0,cuda:1,cpu)".

    Raises ConfigError when a part of the model was left on disk, to be read again in every forward.
    """
    if settings.device != MAP:
        return str(model.device)
    # transformers names no places where there is one device only.
    names = name_places(getattr(model, "hf_device_map", {"": model.device}).values())
    if "disk" in names:
        raise ConfigError(
            f"{path} does not fit into the free memory of this machine's devices and its main memory",
            remedy="free some, set [engine] dtype to a smaller one, or take a machine with more",
        )
    return f"map({','.join(names)})"


def name_places(places: "Iterable[int | str | torch.device]") -> list[str]:
    """Names of accelerate's places, each once, in their order; it calls a GPU by its number."""
    return list(dict.fromkeys(f"cuda:{place}" if isinstance(place, int) else str(place) for place in places))


def resolve_device(asked: str) -> str:
    """`asked`, with "auto" made a GPU where there is one, else the CPU."""
    if asked != "auto":
        return asked
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _device(asked: str) -> "torch.device":
    import torch

    asked = resolve_device(asked)
    remedy = "set [engine] device to auto, cpu, cuda (cuda:0, cuda:1, ...) or map"
    try:
        device = torch.device(asked)
    except RuntimeError as error:
        raise ConfigError(f"{asked!r} is no device", remedy=remedy) from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"the engine does not run on {asked!r}", remedy=remedy)
    if device.type == "cuda":
        _must_see_its_gpus()
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise NoDevice(f"device {asked!r}: torch {torch.__version__} sees {count} GPUs here", remedy=remedy)
    return device


def _must_see_its_gpus() -> None:
    """CUDA leaves out the first GPU that is not there and all that are named after it, without a word."""
    import torch

    named, count = visible_devices(), torch.cuda.device_count()
    if named is not None and count < len(named):
        raise NoDevice(
            f"this worker was given the GPUs {', '.join(named)}, and torch {torch.__version__} sees {count} of them",
            remedy="see what `nvidia-smi` says there; mend [worker] devices, or whatever sets CUDA_VISIBLE_DEVICES",
        )


def _must_have_accelerate(device: str) -> None:
    from transformers.utils.import_utils import is_accelerate_available

    if not is_accelerate_available():
        raise ConfigError(
            f"[engine] device = {device!r} needs the package accelerate, which is not installed",
            remedy='pip install accelerate, or set [engine] device = "cpu"',
        )
