"""Starts a worker process on free slots of this machine, with the devices that they own (`slots.py`).

The worker inherits its slots' locks. One whose parent was killed goes on and commits; the next one finds its work done.
"""

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval_platform import checkpoints
from eval_platform.config import Config
from eval_platform.devices import SHARE_VARIABLE, memory_bytes, missing_devices
from eval_platform.engine.placement import devices_needed, too_large
from eval_platform.engine.sizes import loaded_bytes
from eval_platform.errors import CheckpointError, ConfigError
from eval_platform.launching import folders
from eval_platform.launching.face import Shard, stop_all
from eval_platform.launching.slots import Taken, take
from eval_platform.nursery import Child, fork_worker
from eval_platform.plan import OtherRelease, Plan, read_plan
from eval_platform.store.process import known_dead

log = logging.getLogger(__name__)

STOP_SECONDS = 10.0
# Threads that wait for each other asleep, not spinning: beside a training run (or anything else) on the same cores a
# spinning pair answered MMLU in 141 s instead of 35 s (docs/log.md). What the user has set wins.
WORKER_ENV = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "true",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # huge pages: fewer page faults in every forward
}
# The platform's own secrets, a database's password and an address that whoever knows it may write to: no worker's,
# which may run a checkpoint's own code.
NEVER_SENT = frozenset({"EVAL_PLATFORM_POSTGRES", "EVAL_PLATFORM_WEBHOOK"})


@dataclass
class LocalHandle:
    """A worker that runs on this machine; see `face.Handle`."""

    process: subprocess.Popen[bytes] | Child
    folder: Path

    def poll(self) -> int | None:
        return self.process.poll()

    def messages(self) -> Iterator[list[dict[str, Any]]]:
        return folders.follow(self.folder, lambda: self.poll() is not None)

    def stop(self) -> None:
        if self.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                log.warning("worker %s did not leave in %s s: killed", self.process.pid, STOP_SECONDS)
                self.process.kill()
                self.process.wait()

    def last_words(self, n: int = 20) -> str:
        return folders.last_words(self.folder, n)


def launch(
    plan: Plan,
    split: Callable[[int], Sequence[Plan]],
    config: Config,
    waiting: Callable[[str], None] = lambda reason: None,
    *,
    others: int = 0,
) -> list[Shard]:
    """Wait for free slots that `plan`'s model has room on (calling `waiting` now and then, with the reason), then start
    a worker there, and more on those that are free now, as far as [worker] shards allows.

    split: the plans of as many workers as there is room for, or of fewer. others: so many other checkpoints want a
    worker, each of which is left a slot. Raises ConfigError when more devices are configured than this machine has, or
    the model is too large for all of them.
    """
    _must_be_there(config)
    memory = _memory(config)
    weights = _weights(plan, config) if memory else 0
    _must_fit(plan, weights, memory, config)
    shards: list[Shard] = []
    with ExitStack() as until_started:  # the workers have their own copies of the locks
        taken = take(config, weights, memory, waiting, others=others)
        for one in taken:
            until_started.enter_context(one.locks)
        plans = split(len(taken))
        try:
            for own, folder, slots in zip(plans, folders.make_folders(plans, config), taken, strict=False):
                shards.append(Shard(own, _start(folder, slots, config)))
        except BaseException:  # a share of the work is of no use to anybody
            stop_all([shard.handle for shard in shards])
            raise
    return shards


def _memory(config: Config) -> dict[str, int]:
    """Bytes of each configured device; empty where models are not placed by it, or nobody says."""
    devices = config.worker.devices
    if not devices or config.engine.device not in ("auto", "cuda"):
        return {}
    return dict(zip(devices, memory_bytes(devices) or (), strict=False))


def _weights(plan: Plan, config: Config) -> int:
    """Bytes that the model's weights take; 0 where it cannot be told, so that one slot must do."""
    if plan.arrival.served is not None:
        return 0
    with checkpoints.sketched(plan.arrival, config.cache_dir, config.s3) as folder, suppress(CheckpointError, OSError):
        return (folder and loaded_bytes(folder, plan.settings.dtype)) or 0
    return 0  # its worker says what is wrong with it


def _must_fit(plan: Plan, weights: int, memory: Mapping[str, int], config: Config) -> None:
    if memory and devices_needed(weights, list(memory.values())) is None:
        raise ConfigError(
            f"{plan.arrival.key}: {too_large(weights, list(memory.values()))}",
            remedy=f"{config.file or 'the configuration'}: name more [worker] devices, set [engine] dtype to a smaller "
            'one, or [engine] device = "map", which takes main memory too and is slow',
        )


def _must_be_there(config: Config) -> None:
    """Before a slot is waited for, not when its turn has come."""
    devices = config.worker.devices
    found = missing_devices(devices) if devices and config.engine.device != "cpu" else None
    if found is not None and found[0]:
        missing, count = found
        raise ConfigError(
            f"{config.file or 'the configuration'}: field worker.devices names {', '.join(missing)}; this machine has "
            + (f"GPUs 0 to {count - 1}" if count else "no GPU"),
            remedy="name only what `nvidia-smi -L` shows, and give [worker] slots a number that divides them",
        )


def _start(folder: Path, slots: Taken, config: Config) -> LocalHandle:
    mine = {name: value for name, value in os.environ.items() if name not in NEVER_SENT}
    env = {**WORKER_ENV, **mine, **_env_of(slots)}
    process = fork_worker(config.state_dir, folder, slots.descriptors, env) or _from_nothing(folder, slots, env)
    return LocalHandle(process, folder)


def _env_of(slots: Taken) -> dict[str, str]:
    if not slots.devices:
        return {}
    # The order in which nvidia-smi numbers them; CUDA's own begins with the fastest.
    order = os.environ.get("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    return {
        "CUDA_VISIBLE_DEVICES": ",".join(slots.devices),
        "CUDA_DEVICE_ORDER": order,
        SHARE_VARIABLE: f"{slots.share:.6g}",
    }


def _from_nothing(folder: Path, slots: Taken, env: dict[str, str]) -> subprocess.Popen[bytes]:
    """The ordinary way to start a worker, where no nursery runs."""
    with (folder / "worker.log").open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "eval_platform.worker", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=slots.descriptors,
            # A group of its own: a Ctrl-C meant for the parent reaches the worker as our orderly stop.
            start_new_session=True,
            env=env,
        )


@dataclass(frozen=True)
class Running:
    """A worker at work, as its folder tells it. pid: on the machine where it runs; None: a job that has not begun."""

    plan: Plan
    messages: tuple[dict[str, Any], ...]
    pid: int | None
    is_orphan: bool  # its driver was killed; it works on all the same
    job: str | None = None  # of a cluster: "slurm 71"

    @property
    def waits(self) -> bool:
        """A cluster's job that has not begun, so far as its worker's own words tell."""
        return self.job is not None and not any(message["type"] == "hello" for message in self.messages)

    @property
    def where(self) -> str:
        """For people: "box, device 2" or "node4, devices 0, 1, slurm 71"; empty until the worker has said so."""
        hello = next((message for message in reversed(self.messages) if message["type"] == "hello"), None)
        if hello is None:
            return self.job or ""
        names = hello["devices"] or ()
        devices = f", device{'s' if len(names) > 1 else ''} {', '.join(names)}" if names else ""
        return hello["host"] + devices + (f", {self.job}" if self.job else "")


def running(config: Config) -> list[Running]:
    """The workers that this configuration has at work now, here or as jobs of a cluster, where they may still wait."""
    found = []
    for folder in sorted(folders.workers(config).glob("*")):
        with suppress(FileNotFoundError, OtherRelease):  # being forgotten; or from before an upgrade
            one = _running(folder)
            # A job may have ended once and be queued again: its last word counts.
            if one is not None and (not one.messages or one.messages[-1]["type"] != "end"):
                found.append(one)
    return found


def _running(folder: Path) -> Running | None:
    """None where it has not begun, unless it waits as a job; and where it has ended, as far as is known."""
    job = folders.job(folder)
    if not (folder / "process.json").exists():
        waits = job is not None and not (folder / "ended.json").exists()
        return Running(read_plan(folder / "plan.json"), (), None, is_orphan=False, job=job) if waits else None
    processes = json.loads((folder / "process.json").read_text(encoding="utf-8"))
    worker, driver = processes["worker"], processes["driver"]
    if not folders.may_live(folder, worker):
        return None
    messages = tuple(folders.read_messages(folder))
    return Running(read_plan(folder / "plan.json"), messages, worker["pid"], known_dead(driver), job)


def stop_orphans(config: Config) -> int:
    """Ask the workers whose driver has ended to flush and leave; returns how many. What they did is not lost.

    A cluster's jobs go on: whoever drives next finds them again.
    """
    orphans = [one.pid for one in running(config) if one.is_orphan and one.job is None and one.pid is not None]
    for pid in orphans:
        with suppress(ProcessLookupError):  # it has ended since
            os.kill(pid, signal.SIGTERM)
    return len(orphans)
