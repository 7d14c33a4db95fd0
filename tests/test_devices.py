"""How large are devices and models, and on which devices is a model put? The GPUs are made up."""

import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoint_factory import make_adapter, make_checkpoint
from hypothesis import given
from hypothesis import strategies as st

from eval_platform import devices, doctor
from eval_platform.checkpoints import hold, sketched
from eval_platform.checkpoints.files import list_folder
from eval_platform.config import S3, Config, Worker
from eval_platform.engine import memory, placement
from eval_platform.engine.sizes import loaded_bytes
from eval_platform.errors import CheckpointError, ConfigError, NoDevice
from eval_platform.values import Arrival, RunSettings

# Two GPUs of 80 and 24 GB and a part of the first, with the names, types and order of arguments of nvml.h.
NVML = """
#include <string.h>
typedef struct { unsigned long long total, free, used; } nvmlMemory_t;
static const char *names[] = {"GPU-5f0c-1", "GPU-77aa-2", "MIG-5f0c-9"};
static const unsigned long long sizes[] = {80000000000ull, 24000000000ull, 10000000000ull};
int nvmlInit_v2(void) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned int *count) { *count = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned int index, void **device) { *device = (void *)(index + 1ul); return 0; }
int nvmlDeviceGetUUID(void *device, char *uuid, unsigned int length) {
    strncpy(uuid, names[(unsigned long)device - 1], length); return 0;
}
int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {
    for (unsigned long i = 0; i < 3; i++) if (!strcmp(uuid, names[i])) { *device = (void *)(i + 1); return 0; }
    return 6;
}
int nvmlDeviceGetMemoryInfo(void *device, nvmlMemory_t *memory) {
    memory->total = sizes[(unsigned long)device - 1]; memory->free = memory->used = 7; return 0;
}
"""


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler, to make up a driver's library")
def test_the_driver_is_asked_for_names_and_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvml.c").write_text(NVML)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", "libnvidia-ml.so.1", "nvml.c"], cwd=tmp_path, check=True)
    monkeypatch.setattr(devices, "_NVML", str(tmp_path / "libnvidia-ml.so.1"))
    assert devices.memory_bytes(["1", "GPU-5f", "MIG-5f0c-9"]) == [24 * 10**9, 80 * 10**9, 10 * 10**9]
    assert devices.memory_bytes(["0", "2"]) is devices.memory_bytes(["MIG-none"]) is None
    config = Config(folder=tmp_path, worker=Worker(slots=4, devices=("0", "GPU-77")))
    (finding,) = doctor._worker_devices(config)
    assert finding.found == "0, GPU-77 of 2 GPUs, 80 GB, 24 GB, 2 workers on each"
    assert devices.missing_devices(["0", "2", "GPU-88", "GPU-77aa-2"]) == (["2", "GPU-88"], 2)
    monkeypatch.setattr(devices, "_NVML", "no library")
    assert devices.memory_bytes(["0"]) is None


def checkpoint(folder: Path, tensors: dict[str, tuple[str, list[int], int]], **config: Any) -> Path:
    """A model of which only headers and configuration are there. tensors: name -> dtype, shape, bytes; all are zero."""
    header, end = {}, 0
    for name, (dtype, shape, size) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_weights_take_what_they_are_loaded_as(tmp_path: Path) -> None:
    mixed = {"a": ("F32", [100, 10], 4000), "b": ("BF16", [50], 100), "steps": ("I64", [3], 24)}
    assert loaded_bytes(checkpoint(tmp_path, mixed, dtype="bfloat16"), "auto") == 2 * 1050 + 24
    assert loaded_bytes(tmp_path, "float32") == 4 * 1050 + 24
    assert loaded_bytes(checkpoint(tmp_path, mixed), "auto") == 4 * 1050 + 24
    packed = {"a": ("I32", [100, 10], 4000), "scale": ("F16", [50], 100)}
    assert loaded_bytes(checkpoint(tmp_path, packed, quantization_config={"quant_method": "gptq"}), "auto") == 4100
    with pytest.raises(CheckpointError, match="no dtype the engine runs in"):
        loaded_bytes(checkpoint(tmp_path, mixed, dtype="int3"), "auto")
    (tmp_path / "model.safetensors").unlink()
    assert loaded_bytes(tmp_path, "float32") is None


def test_an_arrival_is_measured_where_it_lies(tmp_path: Path) -> None:
    """Of an adapter its base model counts; of what was deleted meanwhile what is held."""

    def measured(folder: Path) -> int | None:
        arrival = Arrival(f"runs/{folder.name}", 1, list_folder(folder).fingerprint, str(folder), "runs")
        assert hold(arrival, tmp_path / "cache")
        if folder.name == "deleted":
            shutil.rmtree(folder)
        with sketched(arrival, tmp_path / "cache", S3()) as found:
            return None if found is None else loaded_bytes(found, "float32")

    assert measured(make_checkpoint(tmp_path / "deleted", values=30)) == 2 * 4 * 30
    base = make_checkpoint(tmp_path / "base", values=50)
    assert measured(make_adapter(tmp_path / "tuned", base)) == 2 * 4 * 50
    assert measured(make_adapter(tmp_path / "lost", tmp_path / "no base")) is None


@given(weights=st.integers(0, 400), memories=st.lists(st.integers(1, 100), min_size=1, max_size=4))
def test_no_more_devices_than_are_needed(weights: int, memories: list[int]) -> None:
    found = placement.devices_needed(weights, memories)
    enough = [n for n in range(1, len(memories) + 1) if placement.has_room(weights, sum(memories[:n]))]
    if enough:
        assert found == enough[0]
    else:
        assert found == (len(memories) if weights <= 0.95 * sum(memories) else None)


def give(monkeypatch: pytest.MonkeyPatch, *totals: int) -> None:
    """Let torch see GPUs of so many bytes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(totals))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(totals))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(total_memory=totals[i]))


def test_a_model_goes_on_the_first_device_or_on_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint(tmp_path, {"a": ("BF16", [1000], 2000)}, dtype="bfloat16")

    def chosen(device: str, dtype: str = "bfloat16") -> str:
        return placement.choose_device(RunSettings(device=device, dtype=dtype), path)

    give(monkeypatch, 3000, 3000)
    assert [chosen(asked) for asked in ("auto", "cuda", "cuda:1", "cpu", "map")] == [
        *("cuda", "cuda", "cuda:1", "cpu", "map")
    ]
    assert [chosen(asked, "float32") for asked in ("auto", "cuda", "cpu")] == ["map", "map", "cpu"]
    with pytest.raises(NoDevice, match=r"0\.0 GB, and of the 0\.0 GB of its device they may take 95%"):
        chosen("cuda:0", "float32")
    monkeypatch.setenv(devices.SHARE_VARIABLE, "0.5")  # 1,350 bytes of each
    assert chosen("cuda") == "map"
    give(monkeypatch, 3000)
    with pytest.raises(NoDevice, match=r"more GPUs \(\[worker\] devices"):
        chosen("cuda")
    give(monkeypatch)
    assert chosen("auto") == "cpu"


def test_who_shares_a_device_keeps_to_its_part(monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, 1000)
    limits: list[tuple[float, int]] = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda part, i: limits.append((part, i)))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (600, 1000))  # others have not begun yet
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 50)
    gpu = torch.device("cuda", 0)
    placement.keep_to_share(RunSettings(device="cuda"))
    assert (limits, memory.free_on_gpu(gpu)) == ([], 600)
    monkeypatch.setenv(devices.SHARE_VARIABLE, "0.25")
    placement.keep_to_share(RunSettings(device="cpu"))
    assert limits == []
    placement.keep_to_share(RunSettings(device="cuda"))
    assert limits == [(0.225, 0)]
    assert memory.free_on_gpu(gpu) == 225 - 50
    monkeypatch.setenv(devices.SHARE_VARIABLE, "2")
    with pytest.raises(ConfigError, match="EVAL_PLATFORM_DEVICE_SHARE is '2'"):
        devices.device_share()
