"""What does the platform add to the workers' own time? Many checkpoints on many slots against few on one.

    python -m benchmarks.orchestration [--seconds 60] [--checkpoints 40] [--slots 8] [--alone 4]

Starts what `eval-platform up` starts on a temporary folder, twice, and lets all checkpoints arrive at once when it is
ready: `--alone` of them with one slot, then `--checkpoints` with `--slots`. A worker is the platform's own but for its
engine, which sleeps `--seconds` in all and answers two tasks as `benchmarks.soak.truth` says; every score is compared
with it. Prints

efficiency   what the checkpoints take by what one took on the one slot, shared out on the slots, over the time from the
             first run's start to the last run's end; and the same with `seconds`, the sleep alone, in its place
overhead     of a checkpoint on the one slot: from the end of one run to the end of the next, less its worker's own time
             (from its start to its last word)
memory       of a run's process: the most that was resident (VmHWM), and what of it no other process shares
processor    seconds a checkpoint of all processes together, workers included

Exits 1 when the first is under 90 %, the median overhead over 5 s, or more than 200 MB of that memory are a
run's own. Needs an otherwise idle machine: the load average is printed beside the figures.
"""

import argparse
import json
import os
import resource
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.soak import truth
from benchmarks.soak.stub import CONTROL
from eval_platform import warehouse
from eval_platform.config import Config, load_config
from eval_platform.launching import folders
from eval_platform.plan import read_plan
from eval_platform.store import open_store
from eval_platform.tasks import sync_tasks
from eval_platform.up import platform

if TYPE_CHECKING:
    import dagster as dg

LEAST_EFFICIENCY = 0.9
MOST_OVERHEAD_SECONDS = 5.0
MOST_MEMORY_MB = 200.0
N_REQUESTS = 2 * truth.N_SUMS + truth.N_WORDS
SECONDS_A_REQUEST = "EVAL_PLATFORM_BENCHMARK_SECONDS_A_REQUEST"
_TOML = """
[[checkpoints]]
name = "runs"
path = "checkpoints"
require_success = true

[tasks]
folders = ["tasks"]

[engine]
device = "cpu"

[worker]
slots = {slots}
"""
_SITE = f"""\
import os, sys

if {{"eval_platform.worker", "eval_platform.nursery"}} & set(sys.orig_argv):
    from pathlib import Path

    from benchmarks.soak import stub

    stub._SECONDS_A_REQUEST = float(os.environ[{SECONDS_A_REQUEST!r}])
    stub.obey(Path(os.environ[{CONTROL!r}]))
"""


@dataclass(frozen=True)
class Run:
    """One checkpoint, in seconds since 1970: its run in Dagster from its beginning to its end, within it its worker."""

    began: float
    launched: float
    worker_ended: float
    ended: float

    @property
    def worker(self) -> float:
        return self.worker_ended - self.launched


@dataclass
class Memory:
    """Of the runs' processes, in bytes by process."""

    resident: dict[int, int] = field(default_factory=dict)
    own: dict[int, int] = field(default_factory=dict)

    def look(self, instance: "dg.DagsterInstance") -> None:
        """At those that are at work now."""
        import dagster as dg

        from resources.run_launcher import PROCESS_TAG

        where = dg.RunsFilter(job_name="evaluate", statuses=[dg.DagsterRunStatus.STARTED])
        for run in instance.get_runs(where):
            process = json.loads(run.tags.get(PROCESS_TAG, "{}"))
            with suppress(FileNotFoundError, ProcessLookupError):  # it has ended since
                if process:
                    self._add(process["pid"])

    def _add(self, pid: int) -> None:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        shares = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        own = sum(int(line.split()[1]) * 1024 for line in shares if line.startswith("Private_"))
        self.resident[pid] = int(status["VmHWM"].split()[0]) * 1024
        self.own[pid] = max(own, self.own.get(pid, 0))


@dataclass(frozen=True)
class Measured:
    runs: Sequence[Run]
    memory: Memory
    processor_seconds: float

    @property
    def seconds(self) -> float:
        """From the first run's start to the last one's end."""
        return max(run.ended for run in self.runs) - min(run.began for run in self.runs)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.orchestration",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="that a worker sleeps")
    parser.add_argument("--checkpoints", type=int, default=40)
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--alone", type=int, default=4, help="checkpoints on one slot")
    arguments = parser.parse_args()
    if arguments.alone < 2:
        parser.error("--alone must be at least 2: an overhead is from the end of one run to the end of the next")
    os.environ["HF_HUB_OFFLINE"] = "1"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a `timeout` ends the platform too
    with tempfile.TemporaryDirectory(prefix="orchestration-") as folder:
        alone = _measure(Path(folder) / "alone", arguments.alone, 1, arguments.seconds)
        many = _measure(Path(folder) / "many", arguments.checkpoints, arguments.slots, arguments.seconds)
    return _report(arguments, alone, many)


def _measure(home: Path, n: int, slots: int, seconds: float) -> Measured:
    """All `n` checkpoints through a platform of their own."""
    from tests.checkpoint_factory import make_checkpoint

    config = _configuration(home, slots)
    os.environ[SECONDS_A_REQUEST] = str(seconds / N_REQUESTS)
    arriving = [
        make_checkpoint(home / "checkpoints" / "bench" / f"step_{seed}", seed, values=2_000) for seed in range(n)
    ]
    before = _processor_seconds()
    memory = Memory()
    with platform(config, print) as running:
        for name, folder in (("nursery", config.state_dir), ("run_nursery", config.dagster_home)):
            while name in running.commands and not (folder / "nursery.sock").exists():
                time.sleep(0.1)
        for checkpoint in arriving:
            (checkpoint / "_SUCCESS").touch()
        runs = _runs(config, n, memory, give_up_after=300 + 3 * n * seconds / slots)
    _check(config, n)
    return Measured(runs, memory, _processor_seconds() - before)


def _configuration(home: Path, slots: int) -> Config:
    """Its tasks synced; the workers of this process's platforms answer from now on as `truth` says."""
    for name in ("site", "tasks"):
        (home / name).mkdir(parents=True)
    for name, rows, body in truth.task_files():
        (home / "tasks" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        definition = {**body, "task": name, "documents": {"file": f"{name}.jsonl"}}
        (home / "tasks" / f"{name}.yaml").write_text(json.dumps(definition))  # JSON is YAML
    (home / "site" / "sitecustomize.py").write_text(_SITE)
    (home / "eval_platform.toml").write_text(_TOML.format(slots=slots))
    config = load_config(home / "eval_platform.toml")
    synced = sync_tasks(config.tasks, open_store(config.results), config.lock_path)
    if synced.errors:
        raise synced.errors[0]
    os.environ[CONTROL] = str(home / "control")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(home / "site"), str(Path(__file__).resolve().parents[1])])
    return config


def _runs(config: Config, n: int, memory: Memory, *, give_up_after: float) -> list[Run]:
    """Wait until `n` runs have ended; when each did what."""
    import dagster as dg

    deadline = time.monotonic() + give_up_after
    ended = dg.RunsFilter(job_name="evaluate", statuses=[dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE])
    with dg.DagsterInstance.from_config(str(config.dagster_home)) as instance:
        while (done := instance.get_runs_count(ended)) < n:
            if time.monotonic() > deadline:
                raise SystemExit(f"{done} of {n} runs have ended; see {config.state_dir}/logs")
            memory.look(instance)
            time.sleep(1)
        workers = _workers(config)
        return [_run(instance, run, workers) for run in instance.get_runs(ended)]


def _run(instance: "dg.DagsterInstance", run: "dg.DagsterRun", workers: dict[str, tuple[float, float]]) -> Run:
    moments = {
        entry.dagster_event.event_type_value: entry.timestamp
        for entry in instance.all_logs(run.run_id)
        if entry.dagster_event is not None
    }
    if "PIPELINE_SUCCESS" not in moments:
        raise SystemExit(f"the run {run.run_id} did not end well")
    launched, worker_ended = workers[run.tags["dagster/partition"]]
    return Run(moments["PIPELINE_STARTING"], launched, worker_ended, moments["PIPELINE_SUCCESS"])


def _workers(config: Config) -> dict[str, tuple[float, float]]:
    """Of each checkpoint's one worker when it was begun and when it ended."""
    found: dict[str, tuple[float, float]] = {}
    for folder in folders.workers(config).iterdir():
        key = read_plan(folder / "plan.json").arrival.key
        if key in found:
            raise SystemExit(f"{key} had more than one worker")
        (end,) = [one for one in folders.read_messages(folder) if one["type"] == "end"]
        found[key] = (int(folder.name.partition("-")[0]) / 1e9, end["time"])
    return found


def _check(config: Config, n: int) -> None:
    """Every checkpoint has the scores that follow from its weights."""
    store = open_store(config.results)
    warehouse.refresh(store, config.catalog_path)
    rows: list[dict[str, Any]] = warehouse.query(
        config.catalog_path, store, "select key, task, value from leaderboard"
    ).to_pylist()
    if len(rows) != 2 * n:
        raise SystemExit(f"{len(rows)} scores are on the leaderboard, not {2 * n}")
    arriving = Path(config.checkpoints[0].path)
    for row in rows:
        weights = truth.weights_digest(arriving / row["key"].removeprefix("runs/"))
        if row["value"] != truth.expected_score(row["task"], weights):
            raise SystemExit(f"{row} is wrong")


def _processor_seconds() -> float:
    """Of all processes that were started here and have ended, with theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _overheads(one_after_another: Sequence[Run]) -> Iterator[float]:
    runs = sorted(one_after_another, key=lambda run: run.ended)
    for before, run in pairwise(runs):
        yield run.ended - before.ended - run.worker


def _report(asked: argparse.Namespace, alone: Measured, many: Measured) -> int:
    rounds = asked.checkpoints / asked.slots
    efficiency = rounds * alone.seconds / asked.alone / many.seconds
    overhead = statistics.median(_overheads(alone.runs))
    if not many.memory.resident:
        raise SystemExit("no run was seen at work, so that nothing is known of its memory: give it more --seconds")
    resident, own = (max(sizes.values()) / 1e6 for sizes in (many.memory.resident, many.memory.own))
    print(f"{asked.alone} checkpoints of {asked.seconds:g} s on one slot: {alone.seconds:.1f} s")
    print(f"{asked.checkpoints} on {asked.slots} slots: {many.seconds:.1f} s; load {os.getloadavg()[0]:.1f}")
    print(
        f"efficiency: {efficiency:.1%} of the one slot's; the sleep alone {rounds * asked.seconds / many.seconds:.1%}"
    )
    print(f"overhead of a checkpoint on one slot: {overhead:.1f} s (median of {asked.alone - 1})")
    for name, measured in (("one slot", alone), (f"{asked.slots} slots", many)):
        runs = sorted(measured.runs, key=lambda run: run.began)
        to_worker = statistics.median(run.launched - run.began for run in runs)
        after_it = statistics.median(run.ended - run.worker_ended for run in runs)
        of_worker = statistics.median(run.worker for run in runs)
        print(
            f"{name}, medians: {to_worker:.1f} s from a run's start to its worker, {of_worker:.1f} s the worker, "
            f"{after_it:.1f} s to the run's end; {measured.processor_seconds / len(runs):.1f} s of a processor each"
        )
    print(f"memory of a run's process: {resident:.0f} MB resident, of which at most {own:.0f} MB are its own")
    good = efficiency >= LEAST_EFFICIENCY and overhead <= MOST_OVERHEAD_SECONDS and own <= MOST_MEMORY_MB
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
