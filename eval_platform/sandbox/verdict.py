"""The values of the sandbox: a program, what came of it, and what it may use."""

from dataclasses import dataclass
from typing import Literal, get_args

# cold: bubblewrap and a new Python for every program. warm: one bubblewrap a slot, in which a Python that is ready
# forks for every program, each in namespaces of its own. unsafe: plain processes with limits and nothing else.
Mode = Literal["cold", "warm", "unsafe"]
MODES: tuple[Mode, ...] = get_args(Mode)

# passed: every statement ran, and the control run (supervisor.py) did not. assertion, exception, syntax: what was
# raised. exit: it ended itself before its last statement. timeout: seconds of wall clock, or of CPU. memory: its own
# limit, or that of all its processes together, or too many of them. crash: a signal ended it. forged: it says "passed"
# where it cannot.
Reason = Literal["passed", "assertion", "exception", "syntax", "exit", "timeout", "memory", "crash", "forged"]


@dataclass(frozen=True, slots=True)
class Program:
    """A Python program that passes when it runs to its end, so it should end with its tests.

    timeout: seconds of wall clock, from its first statement on.
    """

    source: str
    timeout: float = 3.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of a program. detail: what was raised, as text. seconds: wall clock of its run."""

    reason: Reason
    detail: str
    seconds: float

    @property
    def passed(self) -> bool:
        return self.reason == "passed"


@dataclass(frozen=True, slots=True)
class Limits:
    """What one program may use, in bytes and counts. Threads count as processes.

    process_memory: address space of each process. total_memory: resident memory of all its processes together.
    files: one file, and everything in its /tmp (the only place where it may write). most_files: files in /tmp.
    """

    process_memory: int = 512 << 20
    total_memory: int = 1 << 30
    processes: int = 16
    open_files: int = 64
    files: int = 16 << 20
    most_files: int = 1000


DEFAULT_LIMITS = Limits()

# The users of slots, where root starts them: above every account's, for every supervisor others.
FIRST_USER = 1_000_000_000
MOST_SLOTS = 256


def first_user(supervisor: int) -> int:
    """The user of the first slot of the supervisor with this process id; the next slot has the next."""
    return FIRST_USER + (supervisor * MOST_SLOTS) % FIRST_USER
