"""The same through Dagster: `eval-platform up` on the buckets, its workers and now and then a run's own process killed.

What was cut off comes back by the platform's own means alone: a run that a dead worker failed is asked for again by the
reconciliation sensor, a run whose process died by Dagster's monitoring and the launcher's health check.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import dagster as dg
import psutil
from rich.console import Console

from assets.results import results_key
from benchmarks.soak.audit import TASKS, Count, audit
from benchmarks.soak.killer import Killer
from benchmarks.soak.report import progress, report
from benchmarks.soak.stub import CONTROL, append, lines
from benchmarks.soak.world import World
from eval_platform import once, warehouse
from eval_platform.config import Config
from eval_platform.errors import EvalPlatformError
from eval_platform.store import Store
from eval_platform.store.process import known_dead
from resources.run_launcher import PROCESS_TAG

AHEAD = 6
SLOTS = 3
LEASE_SECONDS = 10.0
MEAN_WAIT = 4.0
WORKERS_A_RUN = 5  # after so many kills of workers a run's process is killed too
GIVE_UP_SECONDS = 420.0
_LOOK_SECONDS = 2.0
_ENDED = (dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED)


def soak_dagster(one: World, *, kills: int, seed: int, console: Console) -> Count:
    """Until so many workers were killed and all that arrived is published and shown; what was counted, and printed."""
    began = time.monotonic()
    config = one.machine("platform", slots=SLOTS, lease_seconds=LEASE_SECONDS)
    store = one.store(config)
    chance = random.Random(seed)
    killer = Killer(one.control, chance, MEAN_WAIT)
    with _up(one, config), _instance(config) as instance:
        news, told = time.monotonic(), (0, 0)
        while True:
            done = _published(one, config, store)
            dead = len(killer.deaths())
            if (len(done), dead) != told:
                news, told = time.monotonic(), (len(done), dead)
                progress(console, dead, kills, len(done), len(one.dropped), began, every=1)
            if time.monotonic() - news > GIVE_UP_SECONDS:
                raise RuntimeError(f"nothing has happened for {GIVE_UP_SECONDS:.0f} s; see {config.state_dir / 'logs'}")
            if dead >= kills:
                killer.withdraw()
                if done == set(one.dropped) and _all_ended(instance):
                    break
            elif len(one.dropped) - len(done) < AHEAD:
                one.drop(config)
            if len(lines(one.control / "runs_killed.jsonl")) < min(dead, kills) // WORKERS_A_RUN:
                _kill_a_run(one, instance, chance)
            _forgive(one, config, store)
            until = time.monotonic() + _LOOK_SECONDS
            while time.monotonic() < until:
                killer.step(kills - len(killer.deaths()))
                time.sleep(0.02)
        killer.end_all()
        runs = Counter(run.status.value for run in instance.get_runs())
        shown = {task: set(instance.get_materialized_partitions(results_key(task))) for task in TASKS}
    deaths = killer.deaths()
    count = audit(one, [config], deaths)
    for task, keys in shown.items():
        count.must(keys == set(one.dropped), f"Dagster does not show {task} of {sorted(set(one.dropped) - keys)}")
    count.figures["runs killed"] = len(lines(one.control / "runs_killed.jsonl"))
    count.figures["runs, by how they ended"] = ", ".join(f"{n} {status.lower()}" for status, n in sorted(runs.items()))
    count.figures["workers"] = len(lines(one.control / "births.jsonl"))
    count.figures["seconds"] = f"{time.monotonic() - began:.0f}"
    report(console, f"{len(deaths)} kills -9 of workers through Dagster on S3, seed {seed}", count, deaths)
    return count


@contextmanager
def _up(one: World, config: Config) -> Iterator[None]:
    """`eval-platform up`, as a person starts it; its workers obey the soak."""
    root = Path(__file__).resolve().parents[2]
    site = one.folder / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        "import os, sys\n"
        'if {"eval_platform.worker", "eval_platform.nursery"} & set(sys.orig_argv):\n'
        "    from pathlib import Path\n"
        "    from benchmarks.soak.stub import obey\n"
        f"    obey(Path(os.environ[{CONTROL!r}]))\n"
    )
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(site), str(root)]),
        CONTROL: str(one.control),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, "-c", "from eval_platform.cli import main; main()", "--config", str(config.file), "up"]
    with (one.control / "processes.log").open("ab") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment, cwd=config.folder, start_new_session=True
        )
    try:
        yield
    finally:
        tree = []
        if process.poll() is None:
            tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            process.send_signal(signal.SIGTERM)
        _, alive = psutil.wait_procs(tree, timeout=60)
        for left in alive:
            left.kill()
        process.wait()


@contextmanager
def _instance(config: Config) -> Iterator[dg.DagsterInstance]:
    """Dagster's own records, once the platform has made their folder."""
    deadline = time.monotonic() + 120
    while not (config.dagster_home / "workspace.yaml").exists():
        if time.monotonic() > deadline:
            raise RuntimeError("`eval-platform up` does not come up")
        time.sleep(0.2)
    with dg.DagsterInstance.from_config(str(config.dagster_home)) as instance:
        yield instance


def _published(one: World, config: Config, store: Store) -> set[str]:
    """Keys whose every task is on the leaderboard, as a machine of its own sees it."""
    catalog = one.folder / "onlooker.duckdb"
    warehouse.refresh(store, catalog)
    rows = warehouse.query(catalog, store, "select key, task from leaderboard").to_pylist()
    found = Counter(row["key"] for row in rows)
    return {key for key, n in found.items() if n == len(TASKS)}


def _all_ended(instance: dg.DagsterInstance) -> bool:
    return all(run.status in _ENDED for run in instance.get_runs())


def _forgive(one: World, config: Config, store: Store) -> None:
    """What was killed three times has failed for good, until a person says otherwise."""
    catalog = one.folder / "onlooker.duckdb"
    for key in {row["key"] for row in warehouse.query(catalog, store, "select key from failed").to_pylist()}:
        with suppress(EvalPlatformError):  # it is not failed any more
            once.act(config, store, "retry", key, attempt=None, actor="soak", reason="it was killed three times")
            append(one.control / "forgiven.jsonl", {"key": key})


def _kill_a_run(one: World, instance: dg.DagsterInstance, chance: random.Random) -> None:
    """kill -9 of the process of a run that has begun its op, not of the worker that it drives."""
    where = dg.RunsFilter(job_name="evaluate", statuses=[dg.DagsterRunStatus.STARTED])
    runs: list[dict[str, Any]] = [json.loads(run.tags.get(PROCESS_TAG, "{}")) for run in instance.get_runs(where)]
    living = [process for process in runs if process and not known_dead(process)]
    if not living:
        return
    process = chance.choice(living)
    with suppress(ProcessLookupError):
        descriptor = os.pidfd_open(process["pid"])
        try:
            if not known_dead(process):  # held by its descriptor: no other can have its number now
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
                append(one.control / "runs_killed.jsonl", {"pid": process["pid"]})
        finally:
            os.close(descriptor)
