"""Servers that a test program starts: each ends with that program, whatever happens, and by its process id alone."""

import ctypes
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

# Before a command: it begins as in a container, with no signal ignored, though it be where the tests run (in the
# background of a shell, say).
AS_IN_A_CONTAINER = ("env", "--default-signal")


def start(command: Sequence[str], *, cwd: Path, env: Mapping[str, str], out: Path) -> subprocess.Popen[bytes]:
    """A server that the kernel kills when this process dies; what it prints is added to `out`."""
    with out.open("ab") as output:
        return subprocess.Popen(command, cwd=cwd, env=env, stdout=output, stderr=output, preexec_fn=_die_with_parent)


def end(running: Iterable[subprocess.Popen[bytes]]) -> None:
    """Kill all, the last that was started first."""
    servers = list(running)[::-1]
    for one in servers:
        one.kill()
    for one in servers:
        one.wait(30)


def free_ports(n: int) -> list[int]:
    """Different ports of 127.0.0.1 on which nobody listens now."""
    listening = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [one.getsockname()[1] for one in listening]
    for one in listening:
        one.close()
    return ports


def end_on_sigterm() -> None:
    """SIGTERM ends this program as an exception does, so that every `finally` is reached."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def _die_with_parent() -> None:
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
