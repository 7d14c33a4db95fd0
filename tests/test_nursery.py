"""Workers forked by the nursery: the same work, and the same end however they, their driver or the nursery end."""

import fcntl
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_tools import CONTROL, Place, sitecustomize, until
from shared_nursery import start

from eval_platform import launching, nursery
from eval_platform.launching.local import LocalHandle
from eval_platform.store.process import known_dead
from eval_platform.worker import EXIT_DONE, EXIT_TRY_AGAIN


class World:
    """A place, a nursery that serves it, and a new checkpoint whenever one is asked for."""

    def __init__(self, folder: Path) -> None:
        self.place = Place(folder)
        self.place.write_task("sums", n=20)
        self.place.sync()
        self.state = self.place.config().state_dir
        self.state.mkdir()
        self.serve()
        self.count = 0

    def serve(self) -> None:
        self.server = start(self.state, os.environ)

    def worker(self, *, pauses: bool = False) -> LocalHandle:
        """A forked worker on a new checkpoint; with `pauses` it waits after its first answer."""
        self.count += 1
        name = f"a/step_{self.count}"
        self.place.checkpoint(name, seed=self.count)
        if pauses:
            self.place.command("pause_answer", 1)
        handle = self.place.launch(self.place.arrive(name))
        assert isinstance(handle.process, nursery.Child), handle.last_words()
        if pauses:
            assert self.place.paused() == handle.process.pid
        return handle

    def is_slot_free(self) -> bool:
        with (self.state / "slots" / "0").open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("nursery")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(sitecustomize(folder / "python")), prepend=os.pathsep)
        patch.setenv(CONTROL, str(folder / "place" / "control"))
        one = World(folder / "place")
        yield one
        one.server.kill()
        one.server.wait()


def said(handle: LocalHandle) -> list[str]:
    return [message["type"] for messages in handle.messages() for message in messages]


def test_a_forked_worker_does_the_whole_work_and_its_exit_code_is_known(world: World) -> None:
    handle = world.worker()
    kinds = [kind for kind in said(handle) if kind not in {"log", "staging", "progress"}]
    assert kinds == ["hello", "staged", "started", "loaded", "committed", "end"]
    assert handle.poll() == EXIT_DONE == handle.process.wait()
    processes = json.loads((handle.folder / "process.json").read_text())
    assert processes["worker"]["pid"] == handle.process.pid
    assert processes["driver"]["pid"] == os.getpid()
    assert "threads" in (handle.folder / "worker.log").read_text()
    assert world.is_slot_free()


def test_a_forked_worker_holds_its_slot_and_leaves_when_told_to(world: World) -> None:
    handle = world.worker(pauses=True)
    assert handle.poll() is None
    assert not world.is_slot_free()
    handle.stop()
    world.place.revoke("pause_answer")
    assert handle.poll() == EXIT_TRY_AGAIN
    assert world.is_slot_free()


def test_a_killed_worker_is_known_as_killed_and_frees_its_slot(world: World) -> None:
    handle = world.worker(pauses=True)
    os.kill(handle.process.pid, signal.SIGKILL)
    assert handle.process.wait() == -signal.SIGKILL
    world.place.revoke("pause_answer")
    assert world.is_slot_free()
    assert world.server.poll() is None


def test_a_worker_whose_driver_is_gone_works_to_its_end(world: World) -> None:
    before = len(world.place.commits())
    handle = world.worker(pauses=True)
    assert isinstance(handle.process, nursery.Child)
    handle.process.connection.close()
    world.place.revoke("pause_answer")
    until(lambda: known_dead(handle.process.record), "the worker to end")  # type: ignore[union-attr]
    assert len(world.place.commits()) == before + 1


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "HF_HOME"])
def test_a_worker_with_another_environment_is_refused(world: World, name: str, tmp_path: Path) -> None:
    with (tmp_path / "slot").open("ab") as slot:
        env = {**launching.WORKER_ENV, **os.environ, name: "3"}
        assert nursery.fork_worker(world.state, tmp_path, [slot.fileno()], env) is None
    assert list(tmp_path.iterdir()) == [tmp_path / "slot"]


def test_a_worker_that_nobody_waits_for_does_nothing(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever asked has started another in the meantime, in the same folder and on the same slot."""
    world.server.send_signal(signal.SIGSTOP)
    monkeypatch.setattr(nursery, "_ANSWER_SECONDS", 0.2)
    with (tmp_path / "slot").open("ab") as slot:
        env = {**launching.WORKER_ENV, **os.environ}
        assert nursery.fork_worker(world.state, tmp_path, [slot.fileno()], env) is None
        world.server.send_signal(signal.SIGCONT)
        monkeypatch.undo()
        # One after the other: when this is refused, the one before was forked.
        assert nursery.fork_worker(world.state, tmp_path, [slot.fileno()], {**env, "HF_HOME": "3"}) is None
    children = Path(f"/proc/{world.server.pid}/task/{world.server.pid}/children")
    until(lambda: not children.read_text(), "the worker to leave")
    assert list(tmp_path.iterdir()) == [tmp_path / "slot"]


def test_no_nursery_no_child(tmp_path: Path) -> None:
    with (tmp_path / "slot").open("ab") as slot:
        assert nursery.fork_worker(tmp_path, tmp_path, [slot.fileno()], os.environ) is None


def test_newer_code_retires_the_nursery_but_not_its_workers(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = world.worker(pauses=True)
    monkeypatch.setattr(nursery, "_made_of", lambda: "newer")
    with (world.state / "slot").open("ab") as slot:
        env = {**launching.WORKER_ENV, **os.environ}
        assert nursery.fork_worker(world.state, world.state, [slot.fileno()], env) is None
    world.place.revoke("pause_answer")
    assert handle.process.wait() == EXIT_DONE
    assert world.server.wait(10) == 0


def test_a_worker_goes_on_when_the_nursery_is_killed(world: World) -> None:
    world.serve()
    handle = world.worker(pauses=True)
    world.server.kill()
    world.server.wait()
    assert handle.poll() is None
    world.place.revoke("pause_answer")
    assert said(handle)[-2:] == ["committed", "end"]
