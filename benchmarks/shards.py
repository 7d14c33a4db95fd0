"""Do the workers that share a checkpoint out end together? The demo's suite in two, one after the other.

    python -m benchmarks.shards [--train 200] [CHECKPOINT ...]

Of a run's checkpoints the first is evaluated by one worker; each that follows is shared out in two by what the ones
before it took, and the two workers run one after the other, so that neither keeps the other waiting. What counts is
the processor time of each worker's whole process, imports and loading in it. Without checkpoints the demo's model is
trained here. Prints a line a checkpoint; exits 1 when the slowest is more than 15 % over the mean.
"""

import argparse
import resource
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from eval_platform import checkpoints, launching, planning
from eval_platform.config import Config, load_config
from eval_platform.plan import Plan, Wanted, plan
from eval_platform.store import Store, arrivals, open_store, watcher_id
from eval_platform.tasks import read_lock, sync_tasks

ROOT = Path(__file__).resolve().parent.parent
MOST_OVER_THE_MEAN = 0.15
CHECKPOINTS = 4


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.shards", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", nargs="*", type=Path, help="folders of one run's checkpoints, in order")
    parser.add_argument("--train", type=int, default=200, metavar="STEPS", help="of the demo's model (default 200)")
    arguments = parser.parse_args()
    if len(arguments.checkpoints) == 1:
        parser.error("name at least two checkpoints: what the first takes is what is expected of the second")
    with tempfile.TemporaryDirectory(prefix="shards-") as made:
        home = Path(made)
        text = (ROOT / "demo" / "eval_platform.toml").read_text(encoding="utf-8").replace("quiet_seconds = 3", "")
        (home / "eval_platform.toml").write_text(f"{text}\n[worker]\nnursery = false\n", encoding="utf-8")
        config = load_config(home / "eval_platform.toml")
        run = Path(config.checkpoints[0].path) / "run"
        _bring(arguments.checkpoints, run, arguments.train)
        store = open_store(config.results)
        synced = sync_tasks(config.tasks, store, config.lock_path)
        if synced.errors:
            raise RuntimeError(f"the tasks cannot be had: {synced.errors}")
        worst = _measure(config, store, sorted(run.iterdir()))
    print(f"slowest over the mean: {worst:.1%} at most ({MOST_OVER_THE_MEAN:.0%} are allowed)")
    return 1 if worst > MOST_OVER_THE_MEAN else 0


def _bring(given: Sequence[Path], run: Path, steps: int) -> None:
    if not given:
        from demo.train import train

        train(run, run="run", steps=steps, n_checkpoints=CHECKPOINTS)
    for i, path in enumerate(given):
        shutil.copytree(path, run / f"step_{i:05}", copy_function=shutil.copy2)


def _measure(config: Config, store: Store, folders: Sequence[Path]) -> float:
    """The largest share by which the slowest worker of a checkpoint was over the mean of its workers."""
    first, *later = (_plan(config, store, folder) for folder in folders)
    _, seconds = _work(first, config)
    print(f"{first.arrival.key}: one worker, nothing known: {seconds:.1f} s of a core", flush=True)
    worst = 0.0
    for todo in later:
        expected = planning.expect(todo, config, store)
        told: list[str] = []
        processor: list[float] = []
        # To load so small a model takes longer than a second worker would save, so that none would be begun.
        for shard in planning.share_out(replace(expected, expected_load_seconds=0.0), 2):
            took, used = _work(shard, config)
            processor.append(used)
            names = ", ".join(task.name for task in shard.tasks)
            told.append(
                f"{used:.1f} s of a core, {took:.1f} s by the clock, "
                f"{planning.expected_seconds(shard) or float('nan'):.1f} s expected besides loading ({names})"
            )
        if len(processor) < 2:
            raise RuntimeError(f"{todo.arrival.key} was not shared out: {expected.expected_seconds} is expected of it")
        over = max(processor) / (sum(processor) / len(processor)) - 1
        worst = max(worst, over)
        print(f"{todo.arrival.key}: " + "; ".join(told) + f"; slowest {over:.1%} over the mean", flush=True)
    return worst


def _plan(config: Config, store: Store, folder: Path) -> Plan:
    located = checkpoints.locate(folder, config.checkpoints, config.cache_dir, lambda done, total: None)
    arrival, _ = arrivals.register(store, watcher=watcher_id(config.state_dir), **asdict(located))
    return plan(arrival, Wanted(read_lock(config.lock_path)), config, store)


def _work(todo: Plan, config: Config) -> tuple[float, float]:
    """(seconds from loading to its end, processor seconds of its whole process) of a worker on `todo`."""
    before = _processor_seconds()
    ((_, handle),) = launching.launch(todo, config)
    said = [message for messages in handle.messages() for message in messages if message["type"] != "log"]
    if handle.poll() != 0:
        raise RuntimeError(f"the worker ended with {handle.poll()}:\n{handle.last_words()}")
    staged = next(message["time"] for message in said if message["type"] == "staged")
    return said[-1]["time"] - staged, _processor_seconds() - before


def _processor_seconds() -> float:
    """Of all children of this process that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    sys.exit(main())
