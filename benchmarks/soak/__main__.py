"""Hundreds of random kill -9 of workers on S3: is anything lost, is anything doubled? Exit code 1 when something is.

    python -m benchmarks.soak [--kills 500] [--dagster 20] [--seed 0]

Two machines (state folders of their own; neither can know whether a process of the other is dead) share one results
root in a bucket of moto's server, and checkpoints go on arriving in another. Workers are the platform's own program,
started by `launch`; an engine that answers from the weights' bytes stands in place of the model. They are killed at
random moments and at aimed ones (see `killer`), until there were so many kills; then all that arrived must be
published, and `audit` counts. With --dagster so many more are killed under `eval-platform up`. Ctrl-C ends the killing,
not the counting: what was killed until then is drained and audited, and the exit code says that it was not all.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from rich.console import Console

from benchmarks.soak.audit import Count, audit
from benchmarks.soak.killer import Killer
from benchmarks.soak.report import progress, report
from benchmarks.soak.stub import lines
from benchmarks.soak.world import World, world
from eval_platform import launching
from eval_platform.config import Config

MACHINES = ("north", "south")
SLOTS = 3
LEASE_SECONDS = 4.0
MEAN_WAIT = 0.6  # seconds between two kills of each kind
AHEAD = 8  # checkpoints that wait or are worked on
GIVE_UP_SECONDS = 300.0  # without anything new
_LOOK_SECONDS = 0.05

console = Console()


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=500, help="kills of workers that `launch` started (default 500)")
    parser.add_argument("--dagster", type=int, default=20, help="kills under Dagster, after those (default 20)")
    parser.add_argument("--seed", type=int, default=0, help="of the killer's choices (default 0)")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a `timeout` ends all that was started
    wrong: list[str] = []
    enough = threading.Event()
    if arguments.kills:
        usual = signal.signal(signal.SIGINT, lambda *_: enough.set())
        with tempfile.TemporaryDirectory(prefix="soak-") as folder, world(Path(folder) / "soak") as one:
            wrong += soak(one, kills=arguments.kills, seed=arguments.seed, enough=enough).wrong
        signal.signal(signal.SIGINT, usual)
    if enough.is_set():
        return 1
    if arguments.dagster:
        from benchmarks.soak.dagster import soak_dagster

        with tempfile.TemporaryDirectory(prefix="soak-") as folder, world(Path(folder) / "soak") as one:
            wrong += soak_dagster(one, kills=arguments.dagster, seed=arguments.seed, console=console).wrong
    return 1 if wrong else 0


def soak(
    one: World,
    *,
    kills: int,
    seed: int,
    machines: Sequence[str] = MACHINES,
    ahead: int = AHEAD,
    mean_wait: float = MEAN_WAIT,
    enough: threading.Event | None = None,
) -> Count:
    """Until there were `kills`, or `enough` is set; then until all is published; what was counted, and printed."""
    began = time.monotonic()
    configs = [one.machine(name, slots=SLOTS, lease_seconds=LEASE_SECONDS) for name in machines]
    killer = Killer(one.control, random.Random(seed), mean_wait)
    with ExitStack() as at_the_end:
        running = at_the_end.enter_context(_machines(one, configs, seed))
        at_the_end.callback(killer.end_all)
        news, told = time.monotonic(), (0, 0)
        while True:
            published = {line["key"] for line in lines(one.control / "published.jsonl")}
            dead = len(killer.deaths())
            if (len(published), dead) != told:
                news, told = time.monotonic(), (len(published), dead)
                progress(console, dead, kills, len(published), len(one.dropped), began)
            if dead >= kills or (enough is not None and enough.is_set()):
                break
            if len(one.dropped) - len(published) < ahead:
                one.drop(configs[0])
            until = time.monotonic() + 0.5
            while time.monotonic() < until:
                killer.step(kills - len(killer.deaths()))
                time.sleep(_LOOK_SECONDS)
            _alive(one, running, news)
        killer.withdraw()
        (one.control / "finish").write_text(json.dumps(sorted(one.dropped)))
        killed_for = time.monotonic() - began
        news = time.monotonic()
        while running.poll() is None:
            now = {line["key"] for line in lines(one.control / "published.jsonl")}
            if now != published:
                news, published = time.monotonic(), now
                progress(console, dead, kills, len(published), len(one.dropped), began)
            time.sleep(4 * _LOOK_SECONDS)
            _alive(one, running, news)
    deaths = killer.deaths()
    count = audit(one, configs, deaths)
    count.figures["workers"] = len(lines(one.control / "births.jsonl"))
    count.figures["seconds of killing / until all was published / in all"] = (
        f"{killed_for:.0f} / {news - began:.0f} / {time.monotonic() - began:.0f}"
    )
    report(console, f"{len(deaths)} kills -9 on S3, seed {seed}", count, deaths)
    return count


@contextmanager
def _machines(one: World, configs: Sequence[Config], seed: int) -> Iterator[subprocess.Popen[bytes]]:
    """All of them in one process group, of which nothing is left when we leave."""
    for config in configs:
        config.state_dir.mkdir(parents=True)
    with (one.control / "processes.log").open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.soak.machine", str(one.control), str(seed)]
            + [str(config.folder) for config in configs],
            stdout=output,
            stderr=output,
            env={**launching.WORKER_ENV, **os.environ},
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _alive(one: World, machines: subprocess.Popen[bytes], news: float) -> None:
    """Raises RuntimeError when a machine has ended badly, or nothing has happened for long."""
    words = (one.control / "processes.log").read_text()[-3000:]
    if machines.poll() not in (None, 0):
        raise RuntimeError(f"a machine of the soak ended; its words:\n{words}")
    if time.monotonic() - news > GIVE_UP_SECONDS:
        told = lines(one.control / "told.jsonl")[-5:]
        raise RuntimeError(f"nothing has happened for {GIVE_UP_SECONDS:.0f} s; last:\n{told}\n{words}")


if __name__ == "__main__":
    sys.exit(main())
