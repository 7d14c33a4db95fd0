"""Which GPUs has this machine, how large are they, and which of them, or what share, may this process use?

Asked without torch, which takes seconds.
"""

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from eval_platform.errors import ConfigError

_NVML = "libnvidia-ml.so.1"
_UUID_BYTES = 96  # NVML_DEVICE_UUID_V2_BUFFER_SIZE

# Said by whoever starts a worker on a device that others use too: its share of it, such as 0.5.
SHARE_VARIABLE = "EVAL_PLATFORM_DEVICE_SHARE"
# Of its share a worker fills so much: what CUDA itself takes in each process is in no allocator's books.
_FILLED = 0.9


class _Memory(ctypes.Structure):
    """NVML's nvmlMemory_t, in bytes."""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def visible_devices() -> tuple[str, ...] | None:
    """The names in CUDA_VISIBLE_DEVICES, by which whoever started this process gave it devices; None: all there are."""
    text = os.environ.get("CUDA_VISIBLE_DEVICES")
    if text is None:
        return None
    return tuple(name.strip() for name in text.split(",") if name.strip())


def device_share() -> float:
    """What part of each of its devices this process may use. Raises ConfigError for what is no part."""
    text = os.environ.get(SHARE_VARIABLE, "1")
    with suppress(ValueError):
        if 0 < float(text) <= 1:
            return float(text)
    raise ConfigError(f"{SHARE_VARIABLE} is {text!r}", remedy="unset it: whoever starts workers sets it, up to 1")


def own_bytes(total: int, share: float) -> int:
    """What a worker may fill of a device with `total` bytes of which it has this share."""
    return total if share == 1 else int(total * share * _FILLED)


def missing_devices(names: Sequence[str]) -> tuple[list[str], int] | None:
    """(which of `names` this machine has not, how many GPUs it has); None where no NVIDIA driver says so.

    Names are CUDA's: a number in the order of the PCI bus, or a UUID that may be cut short. Of parts of a GPU (MIG-)
    nothing is said here.
    """
    uuids = _uuids()
    if uuids is None:
        return None

    def is_there(name: str) -> bool:
        return name.startswith("MIG-") or _uuid_of(name, uuids) is not None

    return [name for name in names if not is_there(name)], len(uuids)


def memory_bytes(names: Sequence[str]) -> list[int] | None:
    """How much memory each of these devices has, used or not, in bytes; None where no NVIDIA driver says so of all."""
    uuids = _uuids()
    if uuids is None:
        return None
    found = [name if name.startswith("MIG-") else _uuid_of(name, uuids) for name in names]
    with _nvml() as nvml:
        sizes = [_memory(nvml, uuid) if nvml is not None and uuid else None for uuid in found]
    return None if None in sizes else [size for size in sizes if size is not None]


def _uuid_of(name: str, uuids: Sequence[str]) -> str | None:
    """The UUID ("": it does not answer) of a whole GPU of this name; None where there is none."""
    if name.isdecimal():
        return uuids[int(name)] if int(name) < len(uuids) else None
    return next((uuid for uuid in uuids if uuid.startswith(name)), None)


def _uuids() -> list[str] | None:
    """Of every GPU in the order of the PCI bus, "" where it does not answer; None without a driver that answers."""
    with _nvml() as nvml:
        count = ctypes.c_uint()
        if nvml is None or nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
            return None
        return [_uuid(nvml, index) for index in range(count.value)]


@contextmanager
def _nvml() -> Iterator[ctypes.CDLL | None]:
    """The driver's library, ready to be asked; None where there is none that answers."""
    try:
        nvml = ctypes.CDLL(_NVML)
    except OSError:
        nvml = None
    if nvml is None or nvml.nvmlInit_v2() != 0:  # the library of a driver that is not loaded
        yield None
        return
    try:
        yield nvml
    finally:
        nvml.nvmlShutdown()


def _uuid(nvml: ctypes.CDLL, index: int) -> str:
    device, text = ctypes.c_void_p(), ctypes.create_string_buffer(_UUID_BYTES)
    if nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(device)) != 0:
        return ""
    if nvml.nvmlDeviceGetUUID(device, text, ctypes.c_uint(_UUID_BYTES)) != 0:
        return ""
    return text.value.decode()


def _memory(nvml: ctypes.CDLL, uuid: str) -> int | None:
    device, memory = ctypes.c_void_p(), _Memory()
    if nvml.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(device)) != 0:
        return None
    if nvml.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory)) != 0:
        return None
    return memory.total


def peak_memory_bytes(device: str) -> int | None:
    """The most memory that this process has held: on its GPUs for a model that lies there, else in main memory.

    device: as `EngineInfo.device` names it. None where nothing tells (no /proc, or a model behind a server).
    """
    if "cuda" in device:
        import torch  # the model lies on a GPU: it is imported

        return sum(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count()))
    # VmHWM and not getrusage's, which a process inherits from whoever started it.
    with suppress(FileNotFoundError), open("/proc/self/status", encoding="utf-8") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None
