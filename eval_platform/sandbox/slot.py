"""What is under way: a program, and the slot in which it runs."""

import os
import socket
from collections import deque
from dataclasses import dataclass, field

from eval_platform.sandbox import memory
from eval_platform.sandbox.verdict import Program, Reason, Verdict


@dataclass(frozen=True, slots=True)
class Place:
    """Where one program can run, once: a process in namespaces of its own that waits for it (warm; server.py).

    number: the server's name for it. first: process id of the first process of its namespaces, with which all others
    end. handle: a descriptor of that process, since its id may be another's once it has ended. door: takes the job.
    """

    number: int
    first: int
    handle: int
    door: socket.socket

    def close(self) -> None:
        """Let go of it; who waits there for a program ends."""
        self.door.close()
        os.close(self.handle)


@dataclass(frozen=True, slots=True)
class Task:
    """What a slot has to run: a program, or its control once it has `passed`.

    again: the place that it was given first was killed before the program began, or its server while it ran.
    """

    number: int
    program: Program
    passed: Verdict | None = None
    again: bool = False


@dataclass
class Run:
    """A task that is under way."""

    task: Task
    mark: str
    process: int  # ours to watch: bubblewrap, the interpreter (unsafe), or the first process of the place (warm)
    handle: int  # a descriptor of it
    report: int
    began: float
    place: Place | None = None  # where, when warm
    started: float | None = None
    said: bytearray = field(default_factory=bytearray)
    killed: Reason | None = None
    kills_before: int = 0
    looked: float = 0.0  # when it was last looked at how much memory it holds
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
    places: deque[Place] = field(default_factory=deque)  # that are ready
    task: Task | None = None  # what it runs next
    since: float = 0.0  # when it got it
    run: Run | None = None
