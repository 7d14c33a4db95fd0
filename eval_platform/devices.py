"""Which GPUs has this machine, and which of them may this process use? Asked without torch, which takes seconds."""

import ctypes
import os
from collections.abc import Sequence
from contextlib import suppress

_NVML = "libnvidia-ml.so.1"
_UUID_BYTES = 96  # NVML_DEVICE_UUID_V2_BUFFER_SIZE


def visible_devices() -> tuple[str, ...] | None:
    """The names in CUDA_VISIBLE_DEVICES, by which whoever started this process gave it devices; None: all there are."""
    text = os.environ.get("CUDA_VISIBLE_DEVICES")
    if text is None:
        return None
    return tuple(name.strip() for name in text.split(",") if name.strip())


def missing_devices(names: Sequence[str]) -> tuple[list[str], int] | None:
    """(which of `names` this machine has not, how many GPUs it has); None where no NVIDIA driver says so.

    Names are CUDA's: a number in the order of the PCI bus, or a UUID that may be cut short. Of parts of a GPU (MIG-)
    nothing is said here.
    """
    uuids = _uuids()
    if uuids is None:
        return None

    def is_there(name: str) -> bool:
        if name.isdecimal():
            return int(name) < len(uuids)
        return not name.startswith("GPU-") or any(uuid.startswith(name) for uuid in uuids)

    return [name for name in names if not is_there(name)], len(uuids)


def _uuids() -> list[str] | None:
    """Of every GPU in the order of the PCI bus, "" where it does not answer; None without a driver that answers."""
    try:
        nvml = ctypes.CDLL(_NVML)
    except OSError:
        return None
    if nvml.nvmlInit_v2() != 0:  # the library of a driver that is not loaded
        return None
    try:
        count = ctypes.c_uint()
        if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
            return None
        return [_uuid(nvml, index) for index in range(count.value)]
    finally:
        nvml.nvmlShutdown()


def _uuid(nvml: ctypes.CDLL, index: int) -> str:
    device, text = ctypes.c_void_p(), ctypes.create_string_buffer(_UUID_BYTES)
    if nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(device)) != 0:
        return ""
    if nvml.nvmlDeviceGetUUID(device, text, ctypes.c_uint(_UUID_BYTES)) != 0:
        return ""
    return text.value.decode()


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
