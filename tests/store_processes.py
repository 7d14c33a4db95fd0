"""Real processes for the store's tests: forked, so that a test's own functions run in them at no import cost."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

_FORK = multiprocessing.get_context("fork")
PATIENCE_S = 60
# For a test of a rule that no store has a part in: with `store_roots`, on a folder alone.
folders_only = pytest.mark.parametrize("new_store", ["folder"], indirect=True)


def race(n: int, run: Callable[[int], Any]) -> list[Any]:
    """`run(i)` in n processes that begin together; what each returned. All stay alive until the last has finished."""
    barrier = _FORK.Barrier(n)
    results = _FORK.SimpleQueue()

    def racer(i: int) -> None:
        barrier.wait(PATIENCE_S)
        results.put((i, run(i)))
        barrier.wait(PATIENCE_S)

    processes = [_FORK.Process(target=racer, args=(i,)) for i in range(n)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE_S)
    assert [process.exitcode for process in processes] == [0] * n
    return [result for _, result in sorted(results.get() for _ in processes)]


def kill_after(run: Callable[[], Any]) -> int:
    """`run()` in a process that then gets SIGKILL; its process number, which is free again on return."""
    pid = os.fork()
    if pid == 0:
        with suppress(BaseException):  # whatever it was shows as an exit that is no kill
            run()
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status), "the process failed before it could be killed"
    return pid


class Child:
    """A process that runs `run(tell, hear)`: `tell(value)` reaches `told()` here, `say(value)` its `hear()` there."""

    def __init__(self, run: Callable[[Callable[[Any], None], Callable[[], Any]], None]) -> None:
        here, there = _FORK.Pipe()
        self._pipe = here
        self._process = _FORK.Process(target=run, args=(there.send, there.recv))
        self._process.start()
        there.close()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def told(self) -> Any:
        assert self._pipe.poll(PATIENCE_S), "the child says nothing"
        return self._pipe.recv()

    def say(self, value: Any) -> None:
        self._pipe.send(value)

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()  # ends a stopped process too
        self._process.join(PATIENCE_S)
