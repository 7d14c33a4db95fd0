"""What does a tick of the new-checkpoints sensor cost at 10,000 known checkpoints, and what does it find?

Run from the repository's root: `python -m benchmarks.sensor_tick [--checkpoints 10000]`. Real folders with tiny files,
registered in a results root, and partitions in a real Dagster instance (SQLite). The ticks run in a process of their
own, one after another, with the cursor handed on as the daemon does. Prints how long they take, how much memory they
add, whether a new checkpoint is found in its tick, and after how many ticks a changed one is; a round of the sweep is
as many ticks as it takes to look at every known folder again. Exits 1 when a tick takes over 1 s, all add over 50 MB,
or something is found too late.
"""

import argparse
import gc
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from eval_platform.checkpoints.files import list_folder
from eval_platform.config import load_config
from eval_platform.store import arrivals, open_store, watcher_id
from eval_platform.tasks import read_lock, sync_tasks

TICK_LIMIT_SECONDS = 1.0
MEMORY_LIMIT_MB = 50.0
STEPS_A_RUN = 100


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--checkpoints", type=int, default=10_000)
    count = parser.parse_args().checkpoints
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        begun = time.perf_counter()
        _fill(folder, count)
        print(f"{count:,} checkpoints written and registered in {time.perf_counter() - begun:.0f} s", flush=True)
        # A fresh process: what filling has taken must not hide what the ticks take.
        process = multiprocessing.get_context("spawn").Process(target=_measure, args=(folder, count))
        process.start()
        process.join()
    return process.exitcode or 0


def _fill(folder: Path, count: int) -> None:
    import dagster as dg

    (folder / "eval_platform.toml").write_text('[tasks]\ninclude = ["parity"]\n', encoding="utf-8")
    config = load_config(folder / "eval_platform.toml")
    store, watcher = open_store(config.results), watcher_id(config.state_dir)
    sync_tasks(config.tasks, store, config.lock_path)
    keys = []
    for n in range(count):
        run, step = f"run-{n // STEPS_A_RUN}", n % STEPS_A_RUN
        checkpoint = Path(config.checkpoints[0].path) / run / f"step-{step}"
        _write_checkpoint(checkpoint, n)
        keys.append(f"checkpoints/{run}/step-{step}")
        arrivals.register(
            store,
            key=keys[-1],
            uri=str(checkpoint),
            fingerprint=list_folder(checkpoint).fingerprint,
            run=run,
            step=step,
            watcher=watcher,
        )
    home = folder / "dagster"
    home.mkdir()
    with dg.DagsterInstance.local_temp(str(home)) as instance:
        instance.add_dynamic_partitions("checkpoints", keys)


def _write_checkpoint(folder: Path, n: int) -> None:
    """Complete as far as its files can tell: one tensor with one number, which is `n`."""
    head = json.dumps({"w": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}}).encode()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    (folder / "model.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + n.to_bytes(8, "little"))
    (folder / "_SUCCESS").unlink(missing_ok=True)
    (folder / "_SUCCESS").touch()


def _measure(folder: Path, count: int) -> None:
    import dagster as dg

    from resources.store import StoreResource
    from sensors.arrivals import new_checkpoints_sensor

    config = load_config(folder / "eval_platform.toml")
    root = Path(config.checkpoints[0].path)
    sensor = new_checkpoints_sensor(read_lock(config.lock_path), config.sensor.interval_seconds)
    cursor: str | None = None
    seconds: list[float] = []

    def tick(instance: dg.DagsterInstance) -> list[str]:
        """One evaluation; the partition keys that runs were asked for."""
        nonlocal cursor
        context = dg.build_sensor_context(
            instance=instance, cursor=cursor, resources={"store": StoreResource(config_file=str(config.file))}
        )
        begun = time.perf_counter()
        result = sensor(context)
        seconds.append(time.perf_counter() - begun)
        assert isinstance(result, dg.SensorResult)
        cursor = result.cursor
        for request in result.dynamic_partitions_requests or ():
            instance.add_dynamic_partitions("checkpoints", list(request.partition_keys))
        return [str(request.partition_key) for request in result.run_requests or ()]

    with dg.DagsterInstance.local_temp(str(folder / "dagster")) as instance:
        gc.collect()
        before = peak_mb()
        tick(instance)
        _write_checkpoint(root / "run-new" / "step-0", count)
        new = tick(instance) == ["checkpoints/run-new/step-0"]

        a_round = -(-(count + 1) // config.sensor.sweep_per_tick)
        position = json.loads(cursor or "{}")["position"]
        # The worst place: what the sweep has just passed.
        changed = Path(root, *position.split("/")[1:])
        _write_checkpoint(changed, count + 1)
        ticks = 1
        while tick(instance) != [position] and ticks <= a_round + 1:
            ticks += 1
        memory = peak_mb() - before

    load = os.getloadavg()[0]
    print(
        f"{len(seconds)} ticks: {statistics.median(seconds):.2f} s median, {max(seconds):.2f} s worst; load {load:.1f}"
    )
    print(f"memory added: {memory:.0f} MB")
    print(f"a new checkpoint was found in its tick: {'yes' if new else 'no'}")
    print(f"a changed one was found after {ticks} ticks; a round of the sweep is {a_round} ticks")
    late = not new or ticks > a_round
    if statistics.median(seconds) > TICK_LIMIT_SECONDS or memory > MEMORY_LIMIT_MB or late:
        print(f"not good enough: {TICK_LIMIT_SECONDS:.0f} s, {MEMORY_LIMIT_MB:.0f} MB, one round", file=sys.stderr)
        sys.exit(1)


def peak_mb() -> float:
    """The most memory this process has had; not ru_maxrss, which a new program inherits from the one it replaced."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")) / 1024


if __name__ == "__main__":
    sys.exit(main())
