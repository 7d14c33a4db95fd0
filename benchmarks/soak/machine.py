"""The machines of the soak. Each finds what arrives, and has each arrival driven until it is published, as the platform
does.

    python -m benchmarks.soak.machine <control folder> <seed> <machine's folder>...

What a driver and a worker need is imported once; every machine is then two forks of this process: one is the platform's
nursery, which forks the machine's workers when `launch` asks it (it has no need of torch here), the other finds and
drives, in threads: nothing there is killed. A task that has failed for good, killed three times, is forgiven by
`eval-platform retry`'s own function, as a person would. Files in `control`: `published.jsonl` (machine, key),
`told.jsonl` (what a driver was told of a task that came to nothing), `forgiven.jsonl`, and `errors.jsonl` (what went
wrong here). The file `finish` holds the keys after which a machine may end.
"""

import gc
import importlib
import json
import logging
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NoReturn

from benchmarks.soak.stub import append, lines, obey
from eval_platform import nursery, once
from eval_platform.checkpoints import Found, Watch, discover
from eval_platform.config import Config, load_config
from eval_platform.drive import drive
from eval_platform.errors import EvalPlatformError
from eval_platform.launching import local
from eval_platform.plan import Wanted, plan
from eval_platform.quality import suites
from eval_platform.store import Store, arrivals, open_root, open_store, process, register_root, watcher_id
from eval_platform.tasks import read_lock
from eval_platform.values import Arrival

_LOOK_SECONDS = 1.0
# Of what another machine has published this one looks at every fourth too, and must find it done.
_LOOKED_AT_AGAIN = 0.25


_MADE_OF = "the soak: whatever is edited meanwhile, all its processes run the code that it began with"


def main(control: Path, seed: int, homes: Sequence[Path]) -> int:
    """0 when every machine has ended well."""
    obey(control)
    nursery._made_of = lambda: _MADE_OF
    nursery._forks_may_use_gpus = lambda: True  # nothing here has heard of one
    nursery._MODULES = ("eval_platform.worker", "eval_platform.store.s3", "boto3", "pyarrow.parquet")
    local._from_nothing = _refuse  # a fresh interpreter would load a model, and not be seen
    for module in nursery._MODULES:
        importlib.import_module(module)
    suites._batch_definition()
    config = load_config(homes[0] / "eval_platform.toml")
    open_root(open_store(config.results, config.s3))  # what a client of S3 is made of is read once, too
    gc.collect()
    gc.freeze()
    nurseries = [_forked(home, partial(nursery.main, home / "state")) for home in homes]
    machines = [_forked(home, partial(watch_and_drive, home, control, seed)) for home in homes]
    ended = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in machines]
    for pid in nurseries:
        os.kill(pid, signal.SIGKILL)
    return max(map(abs, ended))


def _forked(home: Path, run: Callable[[], None]) -> int:
    """`run()` in a process on the machine of this name: none on another can know whether it is dead."""
    pid = os.fork()
    if pid:
        return pid
    here = process._machine()
    process._machine = lambda: f"{here}/{home.name}"
    code = 1
    try:
        run()
        code = 0
    except BaseException:  # noqa: BLE001 -- the last word of a process: say it, end with its code
        traceback.print_exc()
    finally:
        os._exit(code)


def watch_and_drive(home: Path, control: Path, seed: int) -> None:
    """Until all that `finish` names is published."""
    while not (home / "state" / "nursery.sock").exists():
        time.sleep(0.01)
    chance = random.Random(f"{seed} {home.name}")
    config = load_config(home / "eval_platform.toml")
    store = open_store(config.results, config.s3)
    for root in config.checkpoints:
        register_root(store, root.name, root.path)
    watch, known = Watch(), dict[str, str]()
    todo: dict[str, Arrival] = {}
    done: set[str] = set()
    running: dict[str, Future[bool]] = {}
    pool = ThreadPoolExecutor(config.worker.slots)
    while True:
        for found in discover(config.checkpoints, known, watch, s3=config.s3):
            if isinstance(found, Found):
                arrival, _ = arrivals.register(store, watcher=watcher_id(config.state_dir), **asdict(found))
                known[found.key] = found.fingerprint
                todo[found.key] = arrival
        elsewhere = {line["key"] for line in lines(control / "published.jsonl")}
        for key in elsewhere & todo.keys() - running.keys():
            if chance.random() > _LOOKED_AT_AGAIN:
                done.add(key)
                del todo[key]
        waiting = sorted(todo.keys() - running.keys())
        while waiting and len(running) < config.worker.slots:
            key = waiting.pop(chance.randrange(len(waiting)))
            running[key] = pool.submit(_drive, config, store, todo[key], control)
        for key in [key for key, driven in running.items() if driven.done()]:
            if running.pop(key).result():
                append(control / "published.jsonl", {"machine": home.name, "key": key})
                done.add(key)
                del todo[key]
        finish = control / "finish"
        if finish.exists() and not running and done >= set(json.loads(finish.read_text())):
            return
        time.sleep(_LOOK_SECONDS)


def _drive(config: Config, store: Store, arrival: Arrival, control: Path) -> bool:
    """Whether every task is published."""
    try:
        return _driven(config, store, arrival, control)
    except Exception:  # noqa: BLE001 -- counted at the end, whatever it was; the others go on
        append(control / "errors.jsonl", {"key": arrival.key, "error": traceback.format_exc()})
        return False


def _driven(config: Config, store: Store, arrival: Arrival, control: Path) -> bool:
    todo = plan(arrival, Wanted(read_lock(config.lock_path)), config, store)
    outcomes = list(drive(todo, config, store, actor=f"soak on {config.folder.name}"))
    unpublished = [one for one in outcomes if one.status != "published"]
    for one in unpublished:
        said = {"key": arrival.key, "task": one.task, "status": one.status, "reason": " ".join(one.reasons)}
        append(control / "told.jsonl", {"machine": config.folder.name, **said})
    if any("failed for good" in reason for one in unpublished for reason in one.reasons):
        why = "it was killed three times, for the sake of the soak"
        with suppress(EvalPlatformError):  # the other machine has forgiven it already
            once.act(config, store, "retry", arrival.key, attempt=None, actor="soak", reason=why)
            append(control / "forgiven.jsonl", {"key": arrival.key})
    return not unpublished


def _refuse(*_: object) -> NoReturn:
    raise RuntimeError("the process that forks workers did not answer")


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), [Path(home) for home in sys.argv[3:]]))
