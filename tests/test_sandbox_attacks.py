"""What hostile programs can do in the sandbox: nothing, cold or warm; and it leaves nothing behind."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from eval_platform.sandbox import Program, run_programs
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
