"""How long from `_SUCCESS` to rows in `sql`? One arrival at a time, 8 tasks, through a real platform, by stage.

Run from the repository's root: `python -m benchmarks.arrival_latency [--arrivals 20]`. It starts what `eval-platform
up` starts on a temporary folder, drops tiny checkpoints (each with other weights) one after another, and waits until
`select * from leaderboard` has a row for every task. The time inside the engine's `answer` is taken off, since it is
the model's and not the platform's. Prints one line a stage; exits 1 when the median is over 20 s or the 95th
percentile over 35 s. Needs an otherwise idle machine: the load average is printed beside the figures.
"""

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval_platform import warehouse
from eval_platform.config import Config, load_config
from eval_platform.store import Store, arrivals, open_store
from eval_platform.tasks import sync_tasks
from eval_platform.up import platform
from tests.tiny_models import make_checkpoint

if TYPE_CHECKING:
    import dagster as dg

MEDIAN_LIMIT_SECONDS = 20.0
P95_LIMIT_SECONDS = 35.0
GIVE_UP_SECONDS = 180.0
TASKS = ("addition", "brackets", "comparison", "copying", "parity", "reversal", "sorting", "stories_perplexity")


@dataclass(frozen=True)
class Measured:
    """One arrival. stages: name -> seconds, in the order of the road; together with `answer` they are `whole`."""

    stages: dict[str, float]
    answer: float
    whole: float

    @property
    def without_answer(self) -> float:
        return self.whole - self.answer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--arrivals", type=int, default=20)
    parser.add_argument("--keep", type=Path, help="work in this folder and leave it, to look at logs and messages")
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a `timeout` ends the platform too
    if arguments.keep:
        arguments.keep.mkdir(parents=True)
        return _measure(arguments.keep.resolve(), arguments.arrivals)
    with tempfile.TemporaryDirectory() as folder:
        return _measure(Path(folder), arguments.arrivals)


def _measure(folder: Path, count: int) -> int:
    config = _configuration(folder)
    store = open_store(config.results)
    errors = sync_tasks(config.tasks, store, config.lock_path).errors
    if errors:
        raise errors[0]
    prepared = [make_checkpoint(folder / "prepared" / f"step_{n}", seed=n) for n in range(count)]
    warehouse.refresh(store, config.catalog_path)
    measured = []
    with platform(config, print):
        chance = random.Random(0)
        for n, checkpoint in enumerate(prepared):
            # Dagster's sensor loop takes 5 s: a drop right after the last run's end would always meet the same moment.
            time.sleep(chance.uniform(0, 5))
            measured.append(_one(config, store, checkpoint, n))
            one = measured[-1]
            print(
                f"arrival {n}: {one.without_answer:5.1f} s without the {one.answer:.1f} s inside answer; "
                f"load {os.getloadavg()[0]:.1f}",
                flush=True,
            )
    return _report(measured)


def _configuration(folder: Path) -> Config:
    """The defaults, but for the tasks."""
    (folder / "checkpoints").mkdir()
    file = folder / "eval_platform.toml"
    file.write_text(f'[tasks]\ninclude = {json.dumps(TASKS)}\n[engine]\ndevice = "cpu"\n', encoding="utf-8")
    return load_config(file)


def _one(config: Config, store: Store, checkpoint: Path, n: int) -> Measured:
    """Drop one checkpoint, wait for its rows and for the end of its run, and read back when each stage began."""
    target = Path(config.checkpoints[0].path) / "bench" / checkpoint.name
    shutil.copytree(checkpoint, target)
    (target / "checkpoint.json").write_text(json.dumps({"run": "bench", "step": n}), encoding="utf-8")
    key = f"checkpoints/bench/{checkpoint.name}"
    (target / "_SUCCESS").touch()
    dropped = time.time()
    in_sql = _wait_for_rows(config, store, key)
    events = _run_events(config, key)
    arrival = arrivals.newest(store, key)
    assert arrival is not None
    assert arrival.arrived_at is not None
    folder, messages = _worker(config, key)
    answered = warehouse.query(
        config.catalog_path, store, f"select sum(answer_seconds) as s from evaluations where key = '{key}'"
    )["s"][0].as_py()
    marks = {
        "_SUCCESS -> sensor registers it": datetime.fromisoformat(arrival.arrived_at).timestamp(),
        "-> run enqueued": events["PIPELINE_ENQUEUED"],
        "-> run launched": events["PIPELINE_STARTING"],
        "-> op begins (process, imports)": events["STEP_START"],
        "-> worker launched": int(folder.name.partition("-")[0]) / 1e9,
        "-> worker's imports done": (folder / "process.json").stat().st_mtime,
        "-> staged": _first(messages, "staged"),
        "-> loaded": _first(messages, "loaded"),
        "-> last commit, answer taken off": max(m["time"] for m in messages if m["type"] == "committed"),
        "-> last decision": _last_decision(config, store, key),
        "-> rows in sql": in_sql,
    }
    stages, before = {}, dropped
    for name, moment in marks.items():
        stages[name] = moment - before
        before = moment
    stages["-> last commit, answer taken off"] -= answered
    return Measured(stages, answered, in_sql - dropped)


def _wait_for_rows(config: Config, store: Store, key: str) -> float:
    """When the leaderboard had a row for every task. Asked only when the catalog is another file: a query costs CPU."""
    board = f"select count(distinct task) as n from leaderboard where key = '{key}'"
    bad = f"select task, status, reasons from evaluations where key = '{key}' and status <> 'published'"
    deadline, seen = time.monotonic() + GIVE_UP_SECONDS, 0
    while time.monotonic() < deadline:
        now = config.catalog_path.stat().st_mtime_ns
        if now != seen and warehouse.query(config.catalog_path, store, board)["n"][0].as_py() == len(TASKS):
            return time.time()
        seen = now
        time.sleep(0.05)
    found = warehouse.query(config.catalog_path, store, bad).to_pylist()
    raise SystemExit(f"{key} is not on the leaderboard after {GIVE_UP_SECONDS:.0f} s: {found}")


def _run_events(config: Config, key: str) -> dict[str, float]:
    """Event type -> when it was first logged, of the arrival's run; waits until that has ended."""
    import dagster as dg

    with dg.DagsterInstance.from_config(str(config.dagster_home)) as instance:
        deadline = time.monotonic() + GIVE_UP_SECONDS
        while not (runs := _ended(instance, key)):
            if time.monotonic() > deadline:
                raise SystemExit(f"the run of {key} does not end; see {config.state_dir}/logs")
            time.sleep(0.5)
        found: dict[str, float] = {}
        for entry in instance.all_logs(runs[0].dagster_run.run_id):
            if entry.dagster_event is not None:
                found.setdefault(entry.dagster_event.event_type_value, entry.timestamp)
        return found


def _ended(instance: "dg.DagsterInstance", key: str) -> "list[dg.RunRecord]":
    import dagster as dg

    where = dg.RunsFilter(
        tags={"eval/arrival": f"{key}@1"}, statuses=[dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE]
    )
    return list(instance.get_run_records(where, limit=1))


def _worker(config: Config, key: str) -> tuple[Path, list[dict[str, Any]]]:
    """The folder and the messages of the one worker that the arrival had."""
    found = []
    for folder in sorted((config.state_dir / "workers").glob("*")):
        plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
        if plan["arrival"]["key"] == key:
            lines = (folder / "messages.jsonl").read_text(encoding="utf-8").splitlines()
            found.append((folder, [json.loads(line)["params"]["payload"] for line in lines]))
    if len(found) != 1:
        raise SystemExit(f"{key} had {len(found)} workers, not one")
    return found[0]


def _first(messages: list[dict[str, Any]], kind: str) -> float:
    return next(message["time"] for message in messages if message["type"] == kind)


def _last_decision(config: Config, store: Store, key: str) -> float:
    sql = f"""
        select max(d.time) as t from decisions d join evaluations e using (evaluation_id, attempt)
        where e.key = '{key}'
    """
    return warehouse.query(config.catalog_path, store, sql)["t"][0].as_py().timestamp()


def _report(measured: list[Measured]) -> int:
    print(f"\n{len(measured)} arrivals x {len(TASKS)} tasks; seconds")
    print(f"{'stage':<36} {'median':>7} {'p95':>7}")
    for name, values in _columns(measured):
        print(f"{name:<36} {statistics.median(values):7.2f} {_p95(values):7.2f}")
    whole = [one.without_answer for one in measured]
    median, p95 = statistics.median(whole), _p95(whole)
    if median > MEDIAN_LIMIT_SECONDS or p95 > P95_LIMIT_SECONDS:
        print(f"too slow: at most {MEDIAN_LIMIT_SECONDS:.0f} s, 95 % within {P95_LIMIT_SECONDS:.0f} s", file=sys.stderr)
        return 1
    return 0


def _columns(measured: list[Measured]) -> Iterator[tuple[str, list[float]]]:
    for name in measured[0].stages:
        yield name, [one.stages[name] for one in measured]
    yield "all, answer taken off", [one.without_answer for one in measured]
    yield "inside answer", [one.answer for one in measured]


def _p95(values: list[float]) -> float:
    """The smallest value that at least 95 % of the values do not exceed."""
    return sorted(values)[max(0, -(-95 * len(values) // 100) - 1)]


if __name__ == "__main__":
    sys.exit(main())
