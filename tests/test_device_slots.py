"""Four devices, twelve checkpoints, workers and drivers killed at random: none is ever shared, none is leaked."""

import fcntl
import json
import os
import random
import signal
import time
from pathlib import Path
from socket import gethostname
from typing import IO, Any, NoReturn

import pytest
from checkpoint_factory import make_checkpoint
from fault_tools import Driver, Place, until
from stub_engine import StubEngine

from eval_platform import devices, doctor, launching, nursery, worker
from eval_platform.config import Config, Worker, load_config
from eval_platform.devices import visible_devices
from eval_platform.errors import ConfigError
from eval_platform.launching import local
from eval_platform.plan import Wanted, plan
from eval_platform.tasks import read_lock
from eval_platform.values import Arrival

DEVICES = ("0", "1", "2", "3")
CHECKPOINTS = 12
KILLS = 12
KILL_EVERY_S = 0.2
BATCH_S = 0.1
PATIENCE_S = 120.0
_held: list[IO[bytes]] = []  # by this worker, until it ends


class Box(Place):
    """A machine with four devices, one to a slot."""

    def config(self, state: str = "state") -> Config:
        workers = Worker(slots=4, devices=DEVICES, lease_seconds=1.0, retry_wait_seconds=0.1)
        return super().config(state).model_copy(update={"worker": workers})

    def is_free(self, name: str) -> bool:
        with (self.config().state_dir / "slots" / name).open("ab") as file:
            return _is_mine(file)

    def serve(self) -> None:
        """A nursery whose workers have a stub for an engine, and note which devices they use."""

        def load(path: Path, settings: object) -> StubEngine:
            for name in visible_devices() or ():
                self.use_device(name)
            return StubEngine(lambda batch: time.sleep(BATCH_S))

        worker.load_engine = load  # type: ignore[assignment]
        nursery._MODULES = ("eval_platform.worker",)
        nursery._forks_may_use_gpus = lambda: True  # nothing here has heard of one
        os.environ.update({**launching.WORKER_ENV, **os.environ})  # as `up` starts one
        nursery.main(self.config().state_dir)

    def use_device(self, name: str) -> None:
        """The witness: a lock of the test's own, which the kernel too takes back at a worker's end, if in its own
        order; hence the patience."""
        file = (self.control / f"used-{name}").open("ab")
        deadline = time.monotonic() + 0.5
        while not _is_mine(file):
            if time.monotonic() > deadline:
                (self.control / "shared").write_text(f"two living workers use device {name}")
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(0.01)
        _held.append(file)

    def drive_one(self, arrival: Arrival) -> None:
        """What a driver does with its worker; all that the gate adds comes after."""
        todo = plan(arrival, Wanted(read_lock(self.config().lock_path)), self.config(), self.store)
        (shard,) = launching.launch(todo, self.config())
        for _ in shard.handle.messages():
            pass


def _is_mine(file: IO[bytes]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _has_ended(driver: Driver) -> bool:
    pid, status = os.waitpid(driver.pid, os.WNOHANG)
    assert status == 0, f"a driver ended with {os.waitstatus_to_exitcode(status)}"
    return pid != 0


def _refuse(*_: object) -> NoReturn:
    raise RuntimeError("the nursery did not answer")


def test_twelve_checkpoints_on_four_devices_with_random_kills(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    box = Box(tmp_path)
    box.write_task("sums")
    box.sync()
    for seed in range(CHECKPOINTS):
        make_checkpoint(box.checkpoints / "a" / f"step_{seed}", seed)
    todo = [box.arrive(f"a/step_{seed}") for seed in range(CHECKPOINTS)]
    config = box.config()
    # Whatever is edited meanwhile, all of them run the code that they began with; and none starts any other way.
    monkeypatch.setattr(nursery, "_made_of", lambda: "the test")
    monkeypatch.setattr(local, "_from_nothing", _refuse)
    server = Driver(box.serve)
    until((config.state_dir / "nursery.sock").exists, "the nursery to be ready", PATIENCE_S)

    chance = random.Random(7)
    driven: dict[str, Driver] = {}
    killed_workers: dict[str, int] = {}  # by key: the third would be the last until a person says `retry`
    killed_drivers = 0
    deadline = time.monotonic() + PATIENCE_S
    next_kill = time.monotonic() + KILL_EVERY_S
    try:
        while todo or driven:
            assert time.monotonic() < deadline, (todo, driven)
            assert not (box.control / "shared").exists()
            while todo and len(driven) < 6:  # more than there are slots
                arrival = todo.pop(0)
                driven[arrival.key] = Driver(lambda arrival=arrival: box.drive_one(arrival))
            time.sleep(0.05)
            done = committed(box)
            for key in [key for key, driver in driven.items() if _has_ended(driver)]:
                del driven[key]
                if key not in done:
                    todo.append(box.arrive(key.removeprefix("runs/")))
            if time.monotonic() < next_kill or len(killed_workers) + killed_drivers >= KILLS:
                continue
            next_kill = time.monotonic() + KILL_EVERY_S
            at_work = launching.running(config)
            assert {one.where for one in at_work} <= {"", *(f"{gethostname()}, device {name}" for name in DEVICES)}
            living = [one for one in at_work if killed_workers.get(one.plan.arrival.key, 0) < 2]
            if chance.random() < 0.5 and living:
                one = chance.choice(living)
                os.kill(one.pid, signal.SIGKILL)
                killed_workers[one.plan.arrival.key] = killed_workers.get(one.plan.arrival.key, 0) + 1
            elif driven:
                key = chance.choice(sorted(driven))
                os.kill(driven[key].pid, signal.SIGKILL)
                assert driven.pop(key).wait() in (0, -signal.SIGKILL)  # 0: it was quicker
                killed_drivers += 1
                todo.append(box.arrive(key.removeprefix("runs/")))
        until(lambda: not launching.running(config), "the last orphan to end", PATIENCE_S)
    finally:
        server.kill()

    print(f"{sum(killed_workers.values())} workers and {killed_drivers} drivers killed")
    assert sum(killed_workers.values()) >= 3
    assert killed_drivers >= 3
    assert not (box.control / "shared").exists()
    assert len(committed(box)) == len(box.commits()) == CHECKPOINTS
    names = [*map(str, range(4)), *(f"device-{name}" for name in DEVICES)]
    until(lambda: all(box.is_free(name) for name in names), "every slot and device to be free", 5.0)
    said = [hello(folder) for folder in (config.state_dir / "workers").iterdir()]
    assert {tuple(one) for one in said if one is not None} == {(name,) for name in DEVICES}


def committed(box: Box) -> set[str]:
    return {json.loads(box.store.read(key))["key"] for key in box.commits()}


def hello(folder: Path) -> list[str] | None:
    """The devices of the worker of this folder; None when it was killed before it could say so."""
    file = folder / "messages.jsonl"
    first = file.read_text().partition("\n")[0] if file.exists() else ""
    return json.loads(first)["params"]["payload"]["devices"] if first else None


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("slots = 2\ndevices = [0, 1, 2]", "3 devices cannot be shared out evenly to slots = 2"),
        ("slots = 4\ndevices = [0, 1]", "2 devices cannot be shared out evenly to slots = 4"),
        ("slots = 2\ndevices = [0, 0]", "0 stands there twice"),
        ('devices = ["0,1"]', "'0,1' is no device"),
        ("slots = 1\ndevices = [0, 1]", 'set engine.device = "map", or as many slots as devices'),
    ],
)
def test_devices_that_do_not_fit_their_slots_are_refused(tmp_path: Path, lines: str, words: str) -> None:
    file = tmp_path / "eval_platform.toml"
    file.write_text(f"[worker]\n{lines}\n")
    with pytest.raises(ConfigError, match="devices") as caught:
        load_config(file)
    assert words in str(caught.value)
    assert str(file) in str(caught.value)


def test_devices_are_shared_out_in_order(tmp_path: Path) -> None:
    file = tmp_path / "eval_platform.toml"
    file.write_text('[engine]\ndevice = "map"\n[worker]\nslots = 2\ndevices = [3, 2, "GPU-5f0c", 0]\n')
    shares = load_config(file).worker
    assert [shares.devices_of(slot) for slot in range(2)] == [("3", "2"), ("GPU-5f0c", "0")]
    assert load_config(file).run_settings().device == "map"
    file.write_text("[worker]\nslots = 2\ndevices = [0, 1]\n")
    assert load_config(file).run_settings().device == "cuda"  # and never, in silence, the CPU
    file.write_text("[worker]\nslots = 2\n")
    assert load_config(file).run_settings().device == "auto"


def test_more_devices_than_the_machine_has_are_refused_before_a_worker_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "_uuids", lambda: ["GPU-5f0c-1", "GPU-77aa-2"])
    assert devices.missing_devices(["1", "GPU-77", "MIG-x"]) == ([], 2)
    file = tmp_path / "eval_platform.toml"
    file.write_text('[worker]\nslots = 3\ndevices = [0, 2, "GPU-88"]\n')
    todo: Any = None
    with pytest.raises(
        ConfigError, match=r"field worker\.devices names 2, GPU-88; this machine has GPUs 0 to 1"
    ) as caught:
        launching.launch(todo, load_config(file))
    assert "remedy" in str(caught.value)
    assert not (tmp_path / ".eval_platform").exists()
    (finding,) = doctor._worker_devices(load_config(file))
    assert (finding.ok, finding.found) == (False, "2, GPU-88 not among 2 GPUs")
