"""Four devices, models of two sizes, workers and drivers killed at random: no device is shared or leaked by mistake."""

import fcntl
import itertools
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from socket import gethostname
from typing import IO, Any, NoReturn

import pytest
from checkpoint_factory import make_checkpoint
from fault_tools import Driver, Place, until
from hypothesis import given
from hypothesis import strategies as st
from stub_engine import StubEngine

from eval_platform import devices, doctor, launching, nursery, worker
from eval_platform.config import Config, Engine, Worker, load_config
from eval_platform.devices import visible_devices
from eval_platform.errors import ConfigError
from eval_platform.launching import local, slots
from eval_platform.plan import Wanted, plan, plan_of
from eval_platform.store import LocalStore
from eval_platform.tasks import read_lock
from eval_platform.values import Arrival

DEVICES = ("0", "1", "2", "3")
CHECKPOINTS = 12
KILLS = 12
DEVICE_BYTES = 1000
SMALL, LARGE = 64, 200  # numbers of four bytes in each of a model's two tensors: 512 and 1,600 bytes
KILL_EVERY_S = 0.2
BATCH_S = 0.1
PATIENCE_S = 120.0
_held: list[IO[bytes]] = []  # by this worker, until it ends


class Box(Place):
    """A machine with four devices, one to a slot."""

    def config(self, state: str = "state") -> Config:
        workers = Worker(slots=4, devices=DEVICES, lease_seconds=1.0, retry_wait_seconds=0.1)
        return super().config(state).model_copy(update={"worker": workers, "engine": Engine(dtype="float32")})

    def is_free(self, name: str) -> bool:
        with (self.config().state_dir / "slots" / name).open("ab") as file:
            return _is_mine(file) if name.isdecimal() else _is_whole(file)

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


def _is_whole(device: IO[bytes]) -> bool:
    """Whether nobody has any part of it."""
    try:
        slots.lock_part(device, 0, 1)
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
        make_checkpoint(box.checkpoints / "a" / f"step_{seed}", seed, values=LARGE if seed % 3 == 1 else SMALL)
    todo = [box.arrive(f"a/step_{seed}") for seed in range(CHECKPOINTS)]
    config = box.config()
    # Whatever is edited meanwhile, all of them run the code that they began with; and none starts any other way.
    monkeypatch.setattr(nursery, "_made_of", lambda: "the test")
    monkeypatch.setattr(local, "_from_nothing", _refuse)
    monkeypatch.setattr(local, "memory_bytes", lambda names: [DEVICE_BYTES] * len(names))
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
            assert all(one.where.startswith(f"{gethostname()}, device") for one in at_work if one.where)
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
    memory = dict.fromkeys(DEVICES, DEVICE_BYTES)
    (everything,) = slots.take(config, 3 * DEVICE_BYTES, memory)  # and nobody is left in line
    assert everything.devices == DEVICES
    used: dict[int, set[str]] = {1: set(), 2: set()}
    for folder in (config.state_dir / "workers").iterdir():
        names = hello(folder)
        if names is not None:
            key = json.loads((folder / "plan.json").read_text())["arrival"]["key"]
            assert len(names) == devices_of(key)
            used[len(names)].update(names)
    assert used[1] == set(DEVICES)
    assert len(used[2]) >= 2
    for commit in box.commits():
        record = json.loads(box.store.read(commit))
        assert record["device_seconds"] == record["seconds"] * devices_of(record["key"])


def devices_of(key: str) -> int:
    return 2 if int(key.rpartition("_")[2]) % 3 == 1 else 1


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
        ("slots = 5\ndevices = [0, 1]", "2 devices cannot be shared out evenly to slots = 5"),
        ("slots = 2\ndevices = [0, 0]", "0 stands there twice"),
        ('devices = ["0,1"]', "'0,1' is no device"),
        (
            'slots = 1\ndevices = [0, 1]\n[engine]\ndevice = "cuda:1"',
            'set engine.device = "auto", or as many slots as devices',
        ),
        ('slots = 2\ndevices = [0]\n[engine]\ndevice = "map"', "2 slots share each"),
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
    file.write_text("[worker]\nslots = 6\ndevices = [0, 1]\n")
    shares = load_config(file).worker
    assert [shares.devices_of(slot) for slot in range(6)] == [("0",), ("1",)] * 3
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


def test_a_model_too_large_for_all_devices_is_refused_before_a_slot_is_waited_for(
    machine: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "memory_bytes", lambda names: [DEVICE_BYTES] * len(names))
    config = machine(2, "0", "1")
    model = make_checkpoint(tmp_path / "model", values=240)  # 1,920 bytes, and they may take 1,900
    arrival = Arrival("runs/model", 1, "fingerprint", str(model), "runs")
    todo = plan_of(arrival, (), {}, config.run_settings(), config, LocalStore(tmp_path / "results"))
    with pytest.raises(
        ConfigError, match=r"runs/model: its weights take .* of its 2 devices together they may take 95%"
    ):
        launching.launch(todo, config)
    (everything,) = slots.take(config, 1900, dict.fromkeys("01", DEVICE_BYTES))
    assert everything.devices == ("0", "1")


def rooms(everything: Sequence[slots.Bundle]) -> Iterator[tuple[frozenset[int], float]]:
    """Every set of slots that one worker may have, and the bytes of weights that it has room for."""
    for n in range(1, len(everything) + 1):
        for some in itertools.combinations(everything, n):
            yield frozenset(slot for one in some for slot in one.slots), 0.85 * sum(one.memory for one in some)
    for one in everything:
        for n in range(1, len(one.slots)):
            for chosen in itertools.combinations(one.slots, n):
                yield frozenset(chosen), 0.85 * 0.9 * one.memory * n / len(one.slots)


@given(
    parts=st.integers(1, 3),
    memory=st.lists(st.sampled_from([400, 1000, 2000]), min_size=1, max_size=3),
    weights=st.integers(0, 7000),
    busy=st.sets(st.integers(0, 8)),
)
def test_a_model_gets_the_fewest_slots_that_have_room_for_it(
    parts: int, memory: list[int], weights: int, busy: set[int]
) -> None:
    worker = Worker(slots=parts * len(memory), devices=tuple(map(str, range(len(memory)))))
    everything = slots.bundles(worker, dict(zip(worker.devices, memory, strict=True)))
    all_slots = set(range(worker.slots))
    free = all_slots - busy
    able = [chosen for chosen, room in rooms(everything) if weights <= room] or [all_slots]
    able = [chosen for chosen in able if chosen <= free]
    found = slots.choose(weights, free, everything)
    assert (found is None) == (not able)
    if found is not None:
        assert set(found) in able
        assert len(found) == min(map(len, able))


class Waiter:
    """A thread that waits for slots, as a driver does."""

    def __init__(self, config: Config, weights: int) -> None:
        self.taken: list[slots.Taken] = []
        self.reasons: list[str] = []
        self._thread = threading.Thread(target=self._take, args=(config, weights), daemon=True)
        self._thread.start()

    def _take(self, config: Config, weights: int) -> None:
        memory = dict.fromkeys(config.worker.devices, DEVICE_BYTES)
        self.taken = slots.take(config, weights, memory, self.reasons.append)

    def leave(self) -> slots.Taken:
        """What it got, which is free again."""
        self._thread.join(PATIENCE_S)
        (one,) = self.taken
        one.locks.close()
        return one


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Config]:
    monkeypatch.setattr(slots, "_POLL_SECONDS", 0.01)

    def with_slots(count: int, *devices: str, shards: int = 1) -> Config:
        return Config(folder=tmp_path, state=str(tmp_path), worker=Worker(slots=count, devices=devices, shards=shards))

    return with_slots


def test_a_large_model_has_its_turn_although_small_ones_come(machine: Callable[..., Config]) -> None:
    config = machine(2, "0", "1")
    first = Waiter(config, 500)
    until(lambda: first.taken, "a free machine")
    dead = Driver(lambda: slots.take(config, 1600, dict.fromkeys("01", DEVICE_BYTES)))
    until(lambda: list((config.state_dir / "slots" / "line").iterdir()), "it to stand in line")
    large = Waiter(config, 1600)
    until(lambda: large.reasons, "the large one to wait")
    small = Waiter(config, 500)
    until(lambda: small.reasons, "the small one to wait behind it")
    dead.kill()
    time.sleep(0.1)  # the first in line is gone, there is a free slot, and it is the large one's to be
    assert not small.taken
    assert set(large.reasons) == {"waiting for 2 free device slots at once: the model's weights take 0.0 GB"}
    assert first.leave().devices == ("0",)
    until(lambda: large.taken, "room for the large one")
    time.sleep(0.05)
    assert not small.taken
    assert large.leave().devices == ("0", "1")
    assert small.leave().devices == ("0",)


def test_who_is_stopped_in_line_keeps_nobody_waiting(
    machine: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "_ASLEEP_SECONDS", 0.3)
    config = machine(2, "0", "1")
    first = Waiter(config, 500)
    until(lambda: first.taken, "a free machine")
    waits, memory = config.state_dir / "waits", dict.fromkeys("01", DEVICE_BYTES)
    with monkeypatch.context() as patient:
        patient.setattr(slots, "_POLL_SECONDS", 60.0)  # it has looked, and is not stopped while it looks
        stopped = Driver(lambda: slots.take(config, 1600, memory, lambda reason: waits.touch()))
    until(waits.exists, "it to stand in line")
    os.kill(stopped.pid, signal.SIGSTOP)
    try:
        assert Waiter(config, 500).leave().devices == ("1",)
    finally:
        stopped.kill()


def test_nobody_takes_a_second_slot_while_another_stands_in_line(
    machine: Callable[..., Config], tmp_path: Path
) -> None:
    """Processes of their own; whoever has got slots keeps them."""
    config = machine(3, shards=3)
    line = config.state_dir / "slots" / "line"

    def stand(name: str) -> None:
        taken = slots.take(config, 0, {})
        (tmp_path / f"{name} has {len(taken)}").touch()
        signal.pause()

    drivers: list[Driver] = []
    try:
        drivers.append(Driver(lambda: stand("the worker")))
        until((tmp_path / "the worker has 3").exists, "all slots to be taken")
        for place, name in ((1, "the first"), (2, "the second")):
            drivers.append(Driver(lambda name=name: stand(name)))
            until(lambda place=place: len(list(line.iterdir())) == place, "it to stand in line")
        drivers.pop(0).kill()
        until(lambda: list(tmp_path.glob("the second has *")), "a slot for the second", 10.0)
    finally:
        for driver in drivers:
            driver.kill()
    # Not all of the three need have been free when the first in line looked.
    assert (tmp_path / "the first has 2").exists() or (tmp_path / "the first has 1").exists()


def test_parts_of_a_device_are_shared_and_never_overlap(machine: Callable[..., Config]) -> None:
    config = machine(3, "0", shards=3)
    third, two_thirds = Waiter(config, 0), 450
    until(lambda: third.taken, "a free machine")
    assert [(one.devices, round(one.share, 6)) for one in third.taken] == [(("0",), 0.333333)] * 3
    for one in third.taken[:2]:
        one.locks.close()
    third.taken = third.taken[2:]
    (both,) = slots.take(machine(3, "0"), two_thirds, {"0": DEVICE_BYTES})
    assert (both.devices, round(both.share, 6)) == (("0",), 0.666667)
    both.locks.close()
    # Somebody has the last third of it, whatever number its slot has: one half may be had, the other not.
    halves = machine(2, "0", shards=2)
    (half,) = slots.take(halves, 0, {"0": DEVICE_BYTES})
    assert half.share == 0.5
    half.locks.close()
    whole = Waiter(machine(1, "0"), 0)
    until(lambda: whole.reasons, "who wants all of it to wait")
    third.leave()
    assert whole.leave().share == 1
