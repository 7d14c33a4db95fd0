"""On which devices do the weights lie?

On one, or with `device = "map"` on as many as the model needs, filled in order (GPUs, then main memory) by the package
accelerate, which brings what lies in main memory to a GPU whenever a forward needs it.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from eval_platform.devices import visible_devices
from eval_platform.errors import ConfigError, NoDevice
from eval_platform.values import RunSettings

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

MAP = "map"


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
