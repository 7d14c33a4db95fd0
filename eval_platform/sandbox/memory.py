"""How much memory do all processes of a program hold together, and who keeps it below the total?

RLIMIT_AS bounds each process, not their sum. Where version 2 of control groups gives us its memory and pids
controllers, the kernel bounds the sum. Elsewhere the supervisor adds up the resident memory of a program's processes
every few milliseconds and ends the program that holds too much: between two looks it can take as much more as the
machine can fill in that time, and never more than `Limits.processes` times `Limits.process_memory`. Resident pages
that processes share are counted for each, so that the sum errs on the safe side.
"""

import errno
import os
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

WATCH_SECONDS = 0.02
REMOVE_SECONDS = 5.0
_PAGE = os.sysconf("SC_PAGE_SIZE")


def held(process: int) -> tuple[int, int]:
    """Bytes resident in `process` and all its descendants, and how many these are; who ends meanwhile holds nothing."""
    all_ = list(descendants(process))
    return sum(map(_resident_of, all_)), len(all_)


def descendants(process: int) -> Iterator[int]:
    """`process` and everything below it. A process namespace keeps its orphans below its own first process."""
    todo = [process]
    while todo:
        one = todo.pop()
        yield one
        todo += children(one)


def children(process: int) -> list[int]:
    """The children of all threads of `process`; none when it has ended."""
    found: list[int] = []
    try:
        for thread in os.listdir(f"/proc/{process}/task"):
            with open(f"/proc/{process}/task/{thread}/children", encoding="ascii") as file:
                found += map(int, file.read().split())
    except (FileNotFoundError, ProcessLookupError):  # it has ended, or its thread has
        return found
    return found


def _resident_of(process: int) -> int:
    try:
        with open(f"/proc/{process}/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * _PAGE
    except (FileNotFoundError, ProcessLookupError):
        return 0


@dataclass(frozen=True, slots=True)
class Group:
    """A control group (version 2) of one slot, bounded in memory and processes."""

    path: Path

    def enter(self) -> None:
        """Move this process in; its children follow."""
        (self.path / "cgroup.procs").write_text("0")

    def kills(self) -> int:
        """How many processes the kernel has ended here for want of memory."""
        for line in (self.path / "memory.events").read_text().splitlines():
            name, count = line.split()
            if name == "oom_kill":
                return int(count)
        return 0

    def remove(self) -> None:
        """Remove it, once the last of its processes has gone. Raises OSError when they stay."""
        if (self.path / "cgroup.kill").exists():  # Linux 5.14
            (self.path / "cgroup.kill").write_text("1")
        deadline = time.monotonic() + REMOVE_SECONDS
        while True:
            try:
                return self.path.rmdir()
            except OSError as error:
                if error.errno != errno.EBUSY or time.monotonic() > deadline:
                    raise
                time.sleep(WATCH_SECONDS)


def make_groups(n: int, memory: int, processes: int) -> list[Group] | str:
    """A group for each of `n` slots, or the reason why there can be none."""
    try:
        base = _base()
    except OSError as error:
        return str(error)
    if isinstance(base, str):
        return base
    groups: list[Group] = []
    name = f"eval-platform-sandbox-{uuid.uuid4().hex[:12]}"
    try:
        for slot in range(n):
            group = Group(base / f"{name}-{slot}")
            group.path.mkdir()
            groups.append(group)
            (group.path / "memory.max").write_text(str(memory))
            (group.path / "pids.max").write_text(str(processes))
            (group.path / "memory.oom.group").write_text("1")
            if (group.path / "memory.swap.max").exists():  # absent where the kernel counts no swap
                (group.path / "memory.swap.max").write_text("0")
        _try(groups[0])
    except OSError as error:
        for group in groups:
            group.path.rmdir()
        return str(error)
    return groups


def _base() -> Path | str:
    """The folder in which groups can be made: beside our own group, or below it. Else the reason."""
    own = next((line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line[:3] == "0::"), None)
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    root = next((folder for _, folder, kind, *_ in mounts if kind == "cgroup2"), None)
    if own is None or root is None:
        return "this system has no control groups of version 2"
    here = Path(root + own)
    for base in dict.fromkeys((here.parent if own != "/" else here, here)):
        enabled = base / "cgroup.subtree_control"
        if enabled.exists() and {"memory", "pids"} <= set(enabled.read_text().split()) and os.access(base, os.W_OK):
            return base
    return f"no writable control group with memory and pids controllers at {here} or beside it"


def _try(group: Group) -> None:
    """Raises OSError unless a process of ours can enter the group."""
    child = os.fork()
    if child == 0:
        try:
            group.enter()
            os._exit(0)
        except OSError as error:
            os._exit(error.errno or 1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status:
        raise OSError(status, f"{os.strerror(status)}: a process cannot be moved into {group.path}")
