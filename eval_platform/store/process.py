"""Which process is this, and is that one known to be dead?

Only what can be known for certain counts: a process is known dead when it lived under the same kernel boot and in the
same process namespace as we do, and its number is free, a zombie's, or a later process's. Host names decide nothing
(containers share and change them). Where there is no /proc nothing is known, and leases pass on by their ttl alone.
"""

import os
import socket
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# A forked child inherits this, so it identifies a process only together with the process number.
_TOKEN = uuid.uuid4().hex


def this_process() -> dict[str, Any]:
    """The record of this process: `host` for people; `machine`, `pid`, `started`, `token` for comparing."""
    return {**process_record(os.getpid()), "token": _TOKEN}


def process_record(pid: int) -> dict[str, Any]:
    """The record of process `pid` on this machine, for `known_dead` to judge later."""
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": pid,
        "started": _state_and_start(pid)[1],
    }


def same_process(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two records are of one process."""
    return all(one.get(field) == other.get(field) for field in ("machine", "pid", "started", "token"))


def same_machine(process: Mapping[str, Any]) -> bool:
    """Whether the record was made under this boot and in this process namespace: only then its number means one here.

    True also where there is no /proc to tell by.
    """
    return process.get("machine") == _machine()


def known_dead(process: Mapping[str, Any]) -> bool:
    """Whether the process of this record has certainly ended. False when it lives or when nobody here can know."""
    machine = _machine()
    if machine is None or process.get("machine") != machine or process.get("started") is None:
        return False
    state, started = _state_and_start(process["pid"])
    if started is None:
        return not _signalable(process["pid"])
    return state in "ZX" or started != process["started"]


def _machine() -> str | None:
    """This boot of this kernel and this process namespace: within it a process number means one thing."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no /proc (macOS, Windows)
        return None


def _signalable(pid: int) -> bool:
    """Whether the process exists: /proc may hide other users' processes (hidepid), signals do not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _state_and_start(pid: int) -> tuple[str, int | None]:
    """(state letter, start in clock ticks since boot) as proc_pid_stat(5) has them; ("", None) when there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text()
    except OSError:  # ended, or no /proc
        return "", None
    # The second field is the program's name in parentheses and may hold anything, spaces and parentheses too.
    after_name = fields.rpartition(")")[2].split()
    return after_name[0], int(after_name[19])
