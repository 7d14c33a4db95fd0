"""What is under way: a program, and the slot in which it runs."""

import socket
from dataclasses import dataclass, field

from eval_platform.sandbox import memory
from eval_platform.sandbox.verdict import Program, Reason, Verdict


@dataclass
class Run:
    """A program that is under way, as itself or as its own control."""

    number: int
    program: Program
    mark: str
    process: int  # ours to watch: bubblewrap, the interpreter (unsafe), or the slot's server (warm)
    ended: int  # a descriptor that is readable when it has ended: of the process, or the server's socket (warm)
    report: int
    began: float
    passed: Verdict | None = None  # what the program itself came to, when this is its control run
    started: float | None = None
    said: bytearray = field(default_factory=bytearray)
    killed: Reason | None = None
    kills_before: int = 0
    folder: str | None = None


@dataclass
class Slot:
    """Where one program runs at a time. user: its own, when we are root, so that the kernel counts its processes."""

    user: int | None
    group: memory.Group | None
    tmp: str  # what its program writes lies here, in the supervisor's own mounts
    complaints: int = -1  # the reading end of the standard error of whatever was started last
    server: int | None = None
    control: socket.socket | None = None
    run: Run | None = None
