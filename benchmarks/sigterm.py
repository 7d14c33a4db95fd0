"""How long does a worker take to leave once it is told to, whatever it is in the middle of?

    python -m benchmarks.sigterm [--times 8] [--device cuda]

The model is the demo's (`demo/train.py`), untrained, so that no completion ends early; the tasks are the demo's. Each
line is one moment of a worker's life: the program is started `--times` times, is sent SIGTERM so long after it has come
there as chance has it, and the time to its end is taken. The last moment is the driver's own: Ctrl-C of `eval-platform
run` while the gate decides. Prints a table; exits 1 when one took more than the 10 s that are promised, or ended with
another code than it should.
"""

import argparse
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eval_platform import checkpoints, launching
from eval_platform.config import Config, load_config
from eval_platform.launching import folders
from eval_platform.plan import Wanted, plan
from eval_platform.store import arrivals, open_store, watcher_id
from eval_platform.tasks import read_lock, sync_tasks
from eval_platform.worker import EXIT_TRY_AGAIN

PROMISED_SECONDS = 10.0
GIVE_UP_SECONDS = 120.0
INTERRUPTED = 130  # of a command that was ended by Ctrl-C
_TOML = """
[[checkpoints]]
name = "demo"
path = "checkpoints"
require_success = true

[tasks]
include = ["stories_perplexity", "gsm8k_50"]

[engine]
device = "{device}"
dtype = "float32"
"""

Message = dict[str, Any]


@dataclass(frozen=True)
class Moment:
    """begins: whether a message says that the worker is there; seconds: how much later it is told at most."""

    name: str
    task: str
    begins: Callable[[Message], bool]
    seconds: float
    codes: Sequence[int] = (EXIT_TRY_AGAIN,)


def _is(kind: str) -> Callable[[Message], bool]:
    return lambda message: message["type"] == kind


def _answered_all(message: Message) -> bool:
    return message["type"] == "progress" and message["done"] == message["total"]


_BORN = Moment("importing", "stories_perplexity", _is("born"), 0.6, (-signal.SIGTERM, EXIT_TRY_AGAIN))
MOMENTS = (
    _BORN,
    Moment("staging", "stories_perplexity", _is("hello"), 0.05),
    Moment("importing torch, loading the model", "stories_perplexity", _is("started"), 4.0, (EXIT_TRY_AGAIN, 0)),
    Moment("prefill, whole texts", "stories_perplexity", _is("loaded"), 0.3, (EXIT_TRY_AGAIN, 0)),
    Moment("prefill and decoding, 8 shots", "gsm8k_50", _is("loaded"), 6.0, (EXIT_TRY_AGAIN, 0)),
    Moment("scoring and committing", "stories_perplexity", _answered_all, 0.05, (EXIT_TRY_AGAIN, 0)),
)
GATE = Moment(
    "the gate (Ctrl-C of the driver)", "stories_perplexity", _is("committed"), 1.0, (INTERRUPTED, -signal.SIGINT, 0)
)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sigterm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--times", type=int, default=8)
    parser.add_argument("--device", default="cpu", help="as [engine] device names it")
    arguments = parser.parse_args()
    times = arguments.times
    os.environ["HF_HUB_OFFLINE"] = "1"
    chance = random.Random(0)
    good = True
    print("| moment | times | median, s | longest, s | codes |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="sigterm-") as made:
        as_it_begins = _make_place(Path(made) / "place", arguments.device)
        for moment in (*MOMENTS, GATE):
            ends: list[tuple[float, int]] = []
            delay = chance.uniform(0, moment.seconds)
            while len(ends) < times:
                home = shutil.copytree(as_it_begins, Path(made) / "now")
                config = load_config(home / "eval_platform.toml")
                command, folder = _driver(config, moment) if moment is GATE else _worker(config, moment)
                end = _ended(command, folder, moment, delay)
                shutil.rmtree(home)
                if end is None:
                    delay /= 2  # it had left by itself
                else:
                    ends.append(end)
                    delay = chance.uniform(0, moment.seconds)
            seconds = [took for took, _ in ends]
            codes = sorted({code for _, code in ends})
            print(
                f"| {moment.name} | {times} | {statistics.median(seconds):.2f} | {max(seconds):.2f} | "
                f"{', '.join(map(str, codes))} |",
                flush=True,
            )
            good = good and max(seconds) <= PROMISED_SECONDS and set(codes) <= set(moment.codes)
    print(f"load {os.getloadavg()[0]:.1f}")
    return 0 if good else 1


def _make_place(home: Path, device: str) -> Path:
    """One checkpoint of the demo's model, and its tasks."""
    from demo.train import make_model, train_tokenizer, write_checkpoint

    (home / "checkpoints").mkdir(parents=True)
    (home / "eval_platform.toml").write_text(_TOML.format(device=device))
    config = load_config(home / "eval_platform.toml")
    tokenizer = train_tokenizer(0)
    model = make_model(tokenizer, 0)
    write_checkpoint(home / "checkpoints" / "step_0", model, tokenizer, run="sigterm", step=0, tokens_seen=0)
    synced = sync_tasks(config.tasks, open_store(config.results), config.lock_path)
    if synced.errors:
        raise synced.errors[0]
    return home


def _worker(config: Config, moment: Moment) -> tuple[list[str], Path]:
    """The program as every launcher starts it, and its folder."""
    store = open_store(config.results)
    found = checkpoints.locate(
        Path(config.checkpoints[0].path) / "step_0", config.checkpoints, config.cache_dir, lambda done, total: None
    )
    arrival, _ = arrivals.register(store, watcher=watcher_id(config.state_dir), **asdict(found))
    folder = folders.workers(config) / "0-sigterm"
    folder.mkdir(parents=True)
    todo = plan(arrival, Wanted(read_lock(config.lock_path), [moment.task]), config, store)
    (folder / "plan.json").write_text(todo.to_json(), encoding="utf-8")
    return [sys.executable, "-m", "eval_platform.worker", str(folder)], folders.workers(config)


def _driver(config: Config, moment: Moment) -> tuple[list[str], Path]:
    checkpoint = str(Path(config.checkpoints[0].path) / "step_0")
    cli = [sys.executable, "-c", "from eval_platform.cli import main; main()", "--config", str(config.file)]
    return [*cli, "run", "--checkpoint", checkpoint, "--tasks", moment.task], folders.workers(config)


def _ended(command: list[str], workers: Path, moment: Moment, delay: float) -> tuple[float, int] | None:
    """(seconds from the signal to the end, exit code) of a process that is told to leave so long after `moment`; None
    when it has ended by then."""
    printed = workers.parents[1] / "printed.log"
    with printed.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env={**launching.WORKER_ENV, **os.environ})
    deadline = time.monotonic() + GIVE_UP_SECONDS
    while moment is not _BORN and not any(map(moment.begins, _said(workers))):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise SystemExit(f"{moment.name}: it never came there: {printed.read_text()}")
        time.sleep(0.005)
    time.sleep(delay)
    if process.poll() is not None:
        return None
    told = time.monotonic()
    process.send_signal(signal.SIGINT if moment is GATE else signal.SIGTERM)
    code = process.wait(GIVE_UP_SECONDS)
    return time.monotonic() - told, code


def _said(workers: Path) -> list[Message]:
    return [message for folder in workers.glob("*") for message in folders.messages_from(folder, 0)[0]]


if __name__ == "__main__":
    sys.exit(main())
