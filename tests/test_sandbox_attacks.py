"""What hostile programs can do in the sandbox: nothing, cold or warm; and it leaves nothing behind."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from eval_platform.sandbox import Program, memory, run_programs
from tests.machine import needs_sandbox
from tests.sandbox_attacks import ATTACKS, programs

SECRET = "EVAL_PLATFORM_TEST_SECRET"


@pytest.fixture(autouse=True, scope="module")
def _sandbox() -> None:
    needs_sandbox()


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """Things outside that a program would reach for: a port, sockets, a process, a secret in the environment."""
    folder = tmp_path_factory.mktemp("sockets")
    victim = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
    os.environ[SECRET] = "hunter2"
    with socket.socket() as tcp, socket.socket(socket.AF_UNIX) as named, socket.socket(socket.AF_UNIX) as abstract:
        tcp.bind(("127.0.0.1", 0))
        named.bind(str(folder / "s"))
        abstract.bind(f"\0eval-platform-test-{os.getpid()}")
        for listening in (tcp, named, abstract):
            listening.listen()
        yield {
            "port": tcp.getsockname()[1],
            "socket": str(folder / "s"),
            "abstract": f"\0eval-platform-test-{os.getpid()}",
            "victim": victim.pid,
            "secret": SECRET,
            "repository": str(Path(__file__).resolve().parent.parent),
        }
    del os.environ[SECRET]
    assert victim.poll() is None
    victim.kill()
    victim.wait()


@pytest.mark.parametrize("mode", ["cold", "warm"])
def test_every_attack_is_stopped(mode, host):
    named = programs(host)
    hostile = [Program(source, 0.4 if ATTACKS[name][1] == ("timeout",) else 10.0) for name, source in named.items()]
    verdicts = run_programs(hostile, mode)
    wrong = {
        name: verdict for name, verdict in zip(named, verdicts, strict=True) if verdict.reason not in ATTACKS[name][1]
    }
    assert not wrong


LEAVES = """
import fcntl, os, signal, sys, time
sys.left = os.left = open("/tmp/left", "w")
__builtins__.left = 1
os.nice(19)
os.umask(0o777)
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
held = os.open(os.__file__, os.O_RDONLY)
fcntl.flock(held, fcntl.LOCK_EX)
for _ in range(4):
    if os.fork() == 0:
        os.setsid()
        os.close(4), os.close(5)
        held_too = bytearray(100 << 20)
        while True:
            time.sleep(600)
"""
FINDS = """
import fcntl, os, signal, sys
assert os.listdir("/tmp") == [] and os.getcwd() == "/tmp"
assert not hasattr(sys, "left") and not hasattr(os, "left") and not hasattr(__builtins__, "left")
assert os.nice(0) == 0 and os.umask(0) == 0o22 and signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL
assert sorted(filter(str.isdigit, os.listdir("/proc"))) == ["1", "2"] and os.getpid() == 2
fcntl.flock(os.open(os.__file__, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
{n}
"""


def test_no_program_finds_what_another_one_left():
    """One slot, so that each of them runs in a place that was made while an untidy one ran, or beside it."""
    programs = [Program((FINDS if n % 3 else LEAVES).replace("{n}", str(n)), 10.0) for n in range(12)]
    assert [verdict.reason for verdict in run_programs(programs, "warm", slots=1)] == ["passed"] * 12


def test_a_place_that_is_killed_as_it_waits_costs_no_verdict():
    """As the kernel does when memory runs out. Who waits for a program has a socket, and who runs one has none."""
    killed: set[int] = set()
    over = threading.Event()
    before = set(memory.descendants(os.getpid()))

    def sockets(process: int) -> int:
        with suppress(OSError):
            held = [os.readlink(f"/proc/{process}/fd/{name}") for name in os.listdir(f"/proc/{process}/fd")]
            return sum(what.startswith("socket:") for what in held)
        return 0

    def serves(process: int) -> bool:
        words = Path(f"/proc/{process}/cmdline").read_text()
        return "/sandbox/server.py" in words and "--unshare-all" not in words  # which bubblewrap has

    def kill_one() -> None:
        while not over.wait(0.02) and not killed:
            # The newest first: the others run before it, so that it is not given a program at this very moment.
            for first in sorted(set(memory.descendants(os.getpid())) - before, reverse=True):
                with suppress(OSError):
                    waiting = [one for one in memory.children(first) if serves(one) and sockets(one)]
                    if serves(first) and not sockets(first) and len(waiting) == 1:
                        os.kill(waiting[0], signal.SIGKILL)
                        killed.add(waiting[0])
                        return

    killer = threading.Thread(target=kill_one)
    killer.start()
    try:
        verdicts = run_programs([Program(f"import time\ntime.sleep(0.1)\n{n}") for n in range(6)], "warm", slots=1)
    finally:
        over.set()
        killer.join()
    assert killed
    assert [verdict.reason for verdict in verdicts] == ["passed"] * 6


def test_a_server_that_is_killed_costs_no_verdict():
    """As the kernel does, or a lack of processes: what ran there is run again, under a new server."""
    before = set(memory.descendants(os.getpid()))
    killed: list[int] = []
    over = threading.Event()

    def kill_it() -> None:
        while not over.wait(0.02):
            for process in set(memory.descendants(os.getpid())) - before:
                with suppress(OSError):
                    if serving(process):
                        over.wait(0.4)  # by then the program has begun
                        os.kill(process, signal.SIGKILL)
                        killed.append(process)
                        return

    def serving(process: int) -> bool:
        words = Path(f"/proc/{process}/cmdline").read_text().split("\0")
        return words[0].endswith("bwrap") and "/sandbox/server.py" in words

    killer = threading.Thread(target=kill_it)
    killer.start()
    try:
        (verdict,) = run_programs([Program("import time\ntime.sleep(0.8)")], "warm", slots=1)
    finally:
        over.set()
        killer.join()
    assert killed
    assert verdict.reason == "passed"
