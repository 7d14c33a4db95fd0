"""What does a checkpoint cost on GPUs? A whole platform, its workers on real devices, by its own records.

    python -m benchmarks.gpu_worker [--model llama1b] [--checkpoints 3] [--slots 1] [--devices 0] [--dtype bfloat16]

Makes checkpoints of one shape (`benchmarks.engine.models`), each with other weights, starts what `eval-platform up`
starts, lets them arrive at once, and waits until each has its run behind it. The tasks are the demo's. A random model's
answers are at chance, so that the gate may hold them: what is measured is the road, not the scores. Prints for every
task what the catalog says that it cost (medians over the checkpoints), then where a checkpoint's time went, then what
became of the evaluations. Exits 1 when one is missing, or was not computed on a GPU.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.engine.models import MODELS, model_folder
from eval_platform import warehouse
from eval_platform.config import Config, load_config
from eval_platform.launching import folders
from eval_platform.store import open_store
from eval_platform.tasks import read_lock, sync_tasks
from eval_platform.up import platform

GIVE_UP_SECONDS = 480.0
_TOML = """
[[checkpoints]]
name = "runs"
path = "checkpoints"
require_success = true

[tasks]
include = ["copying", "sorting", "addition", "stories_perplexity", "mmlu_abstract_algebra", "gsm8k_50"]

[engine]
device = "cuda"
dtype = "{dtype}"

[worker]
slots = {slots}
devices = {devices}
"""
_COST = """
    select task, any_value(n_requests) as requests, median(seconds) as seconds,
        median(answer_seconds) as answer_seconds, median(load_seconds) as load_seconds,
        median(tokens_per_second) as tokens_per_second, median(device_seconds) as device_seconds,
        max(peak_memory_bytes) / 1e9 as gb
    from evaluations group by task order by task
"""
_WHERE = "select distinct unnest(devices) as device from evaluations"
_FATES = "select status, count(*) as n from evaluations group by status order by status"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_worker",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", choices=MODELS, default="llama1b")
    parser.add_argument("--checkpoints", type=int, default=3)
    parser.add_argument("--slots", type=int, default=1)
    parser.add_argument("--devices", nargs="+", default=["0"], help="as [worker] devices names them")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "eval_platform_engine_benchmark")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory(prefix="gpu-worker-") as folder:
        home = Path(folder)
        values = {"dtype": arguments.dtype, "slots": arguments.slots, "devices": json.dumps(arguments.devices)}
        (home / "eval_platform.toml").write_text(_TOML.format(**values), encoding="utf-8")
        config = load_config(home / "eval_platform.toml")
        store = open_store(config.results)
        synced = sync_tasks(config.tasks, store, config.lock_path)
        if synced.errors:
            raise synced.errors[0]
        base = model_folder(arguments.model, arguments.work.resolve())
        arriving = [
            _other_weights(base, home / "checkpoints" / "bench" / f"step_{n}", n) for n in range(arguments.checkpoints)
        ]
        expected = len(arriving) * len(read_lock(config.lock_path).tasks)
        with platform(config, print):
            began = time.time()
            for checkpoint in arriving:
                (checkpoint / "_SUCCESS").touch()
            _wait(config, expected)
            print(f"{len(arriving)} checkpoints: all in SQL after {time.time() - began:.1f} s")
        return _report(config, expected)


def _other_weights(base: Path, checkpoint: Path, step: int) -> Path:
    """A checkpoint of the same shape: its last norm is another."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(base, checkpoint)
    for file in checkpoint.glob("*.safetensors"):
        weights = load_file(file)
        if "model.norm.weight" in weights:
            weights["model.norm.weight"] *= 1 + step / 16
            save_file(weights, file, {"format": "pt"})
    (checkpoint / "checkpoint.json").write_text(json.dumps({"run": "bench", "step": step}), encoding="utf-8")
    return checkpoint


def _wait(config: Config, expected: int) -> None:
    """Until every evaluation is in the catalog, and decided on."""
    deadline = time.monotonic() + GIVE_UP_SECONDS
    decided = "select count(*) as n from evaluations where status in ('published', 'held')"
    while _rows(config, decided)[0]["n"] < expected:
        if time.monotonic() > deadline:
            raise SystemExit(f"after {GIVE_UP_SECONDS:.0f} s: {_rows(config, _FATES)}\n{_last_words(config)}")
        time.sleep(0.5)


def _rows(config: Config, sql: str) -> list[dict[str, Any]]:
    store = open_store(config.results)
    if not config.catalog_path.exists():
        warehouse.refresh(store, config.catalog_path)
    return warehouse.query(config.catalog_path, store, sql).to_pylist()


def _last_words(config: Config) -> str:
    return "\n".join(folders.last_words(one, 20) for one in sorted(folders.workers(config).glob("*")))


def _report(config: Config, expected: int) -> int:
    cost = _rows(config, _COST)
    print("| " + " | ".join(cost[0]) + " |\n|" + "---|" * len(cost[0]))
    for row in cost:
        shown = (f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values())
        print(f"| {' | '.join(shown)} |")
    lives = [_moments(folder) for folder in sorted(folders.workers(config).glob("*"))]
    for name in lives[0]:
        took = [life[name] for life in lives if name in life]
        print(f"{name}: {statistics.median(took):.2f} s ({min(took):.2f}-{max(took):.2f})")
    fates, devices = _rows(config, _FATES), [row["device"] for row in _rows(config, _WHERE)]
    print(f"{fates}, on {devices}")
    good = sum(fate["n"] for fate in fates) == expected and all("cuda" in device for device in devices)
    return 0 if good else 1


def _moments(folder: Path) -> dict[str, float]:
    """Of one worker: how long each part of its life took, in seconds."""
    messages = list(folders.read_messages(folder))
    first: dict[str, float] = {}
    for message in messages:
        first.setdefault(message["type"], message["time"])
    launched = int(folder.name.partition("-")[0]) / 1e9
    marks: Sequence[tuple[str, float | None]] = [
        ("to its first word", first["hello"]),
        ("staging", first.get("staged")),
        ("importing torch, loading the model", first.get("loaded")),
        ("asking, scoring and committing", messages[-1]["time"]),
    ]
    took, before = {}, launched
    for name, at in marks:
        if at is not None:
            took[name], before = at - before, at
    return took


if __name__ == "__main__":
    sys.exit(main())
