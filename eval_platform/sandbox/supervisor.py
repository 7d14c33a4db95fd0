"""Outside the sandbox: a small process that starts programs, several at a time, watches them and judges them.

    python -m eval_platform.sandbox.supervisor        a JSON line of settings, then one a program; answers likewise

It is a process of its own because it forks for every program, which is dear in one that holds a model, and because
whatever a program leaves behind becomes its child (PR_SET_CHILD_SUBREAPER) and is ended by it. When its input ends,
also because whoever started it has died, it ends every program and then itself.

How a verdict comes about. A program reports through a pipe of its own, and a report of having passed must repeat the
mark, which lies in another pipe and is read after the program's last statement. A program could read the mark itself,
since it runs in the process that reads it. So whatever passes is run once more with a last assertion that does not
hold and another mark: a program that passes this control run too never needed its tests, and is called forged.
"""

import json
import marshal
import math
import os
import secrets
import selectors
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import deque
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

from eval_platform.errors import SandboxError
from eval_platform.sandbox import memory
from eval_platform.sandbox.judge import judge
from eval_platform.sandbox.processes import adopt_orphans, end, send
from eval_platform.sandbox.root import SCRIPTS, Python, unmount_tmp
from eval_platform.sandbox.runner import FAILED, STARTED
from eval_platform.sandbox.slot import Run, Slot, Task
from eval_platform.sandbox.start import (
    START_SECONDS,
    Way,
    command,
    filter_file,
    find_bubblewrap,
    mount,
    own_place,
    sealed,
    spawn,
    users_of_slots,
    why_not_started,
)
from eval_platform.sandbox.verdict import Limits, Mode, Program, Verdict
from eval_platform.sandbox.warm import hear, serve, stop_server

LONGEST_REPORT = 1 << 14
# What there is beside the program: bubblewrap's two and, warm, the server and its places (server.py), each with a first
# process and with one that waits.
SERVER_PROCESSES = 8
_FORGED = "it passes also where its last assertion does not hold"


class Supervisor:
    """The slots, and the loop over them."""

    def __init__(self, mode: Mode, n_slots: int, limits: Limits, python: Python) -> None:
        self.waiting: deque[Task] = deque()
        self.answers: deque[tuple[int, Verdict]] = deque()
        self.selector = selectors.DefaultSelector()
        adopt_orphans()
        groups: list[memory.Group] | str = "unsafe"
        if mode == "unsafe":
            self.way = Way(mode, limits, python)
        else:
            bubblewrap, steps = find_bubblewrap(), filter_file()
            groups = memory.make_groups(n_slots, limits.total_memory, limits.processes + SERVER_PROCESSES)
            self.way = Way(mode, limits, python, bubblewrap, steps, own_place(python))
        self.watched_by = "a control group" if isinstance(groups, list) else "the supervisor"
        users = users_of_slots(n_slots) if os.geteuid() == 0 and mode != "unsafe" else [None] * n_slots
        self.slots = [
            Slot(user, groups[n] if isinstance(groups, list) else None, f"{self.way.place}/tmp-{n}")
            for n, user in enumerate(users)
        ]

    # -- one program ---------------------------------------------------------------------------------------------

    def start(self, slot: Slot, task: Task) -> None:
        """Start `task` in the slot, which has a place for it."""
        # The two texts differ in one digit of a line of their own, and the failing one comes second.
        a, b = secrets.randbelow(9000) + 1000, secrets.randbelow(9000) + 1000
        last = f"\nassert {a} * {b} == {a * b + (task.passed is not None)}\n"
        job = {
            "source": task.program.source + last,
            "cpu_seconds": math.ceil(task.program.timeout) + 1,
            **asdict(self.way.limits),
        }
        mark = secrets.token_hex(16)
        job_end = sealed(marshal.dumps(job))
        mark_end, mark_in = os.pipe()
        os.write(mark_in, mark.encode())
        os.close(mark_in)
        report, report_end = os.pipe()
        ends = (job_end, mark_end, report_end)
        folder, place = None, None
        if self.way.mode == "warm":
            place = slot.places.popleft()
            with suppress(ConnectionError):  # it has been killed as it waited: the server will say so
                socket.send_fds(place.door, [b"run"], ends)
            process, handle = place.first, place.handle
        else:
            if self.way.mode == "unsafe":
                folder = tempfile.mkdtemp(prefix="eval-platform-unsafe-")
            else:
                mount(self.way, slot)
            process = spawn(self.way, slot, ends, command(self.way, slot, [f"{SCRIPTS}/runner.py"]), folder)
            handle = os.pidfd_open(process)
            self.selector.register(handle, selectors.EVENT_READ, (slot, "ended"))
        for descriptor in ends:
            os.close(descriptor)
        now = time.monotonic()
        slot.run = Run(task, mark, process, handle, report, now, place, looked=now, folder=folder)
        slot.run.kills_before = slot.group.kills() if slot.group else 0
        os.set_blocking(report, False)
        self.selector.register(report, selectors.EVENT_READ, (slot, "report"))

    # -- what comes of it ----------------------------------------------------------------------------------------

    def read_report(self, run: Run) -> None:
        try:
            got = os.read(run.report, 1 << 16)
        except BlockingIOError:
            return
        if not got:
            self.selector.unregister(run.report)
            return
        run.said += got[: LONGEST_REPORT - len(run.said)]  # what comes beyond is read, and forgotten
        if run.started is None and run.said.startswith(STARTED):
            run.started = time.monotonic()

    def hear(self, slot: Slot) -> None:
        """The slot's server has something to say, or has ended."""
        assert slot.control is not None
        control = slot.control.fileno()
        ended, alive = hear(slot)
        for number, status in ended:
            if slot.run is not None and slot.run.place is not None and slot.run.place.number == number:
                self.finish(slot, status)
            elif idle := next((place for place in slot.places if place.number == number), None):
                slot.places.remove(idle)  # killed as it waited; there will be another one
                idle.close()
            elif os.waitstatus_to_exitcode(status) == FAILED:  # not so who is killed as it is made, for want of memory
                raise why_not_started(self.way, slot)
        if not alive:
            self.selector.unregister(control)
            stop_server(slot)
            self.end_strays()
            if slot.run is not None:
                self.finish(slot, signal.SIGKILL, cut_off=True)

    def finish(self, slot: Slot, status: int | None = None, *, cut_off: bool = False) -> None:
        """The slot's program has ended: clear up, judge, and go on with its control or answer.

        status: its wait status, where the server has said it (warm). cut_off: the server has ended, and it with it.
        """
        run = slot.run
        assert run is not None
        while run.report in self.selector.get_map():  # what it said last
            before = len(run.said)
            self.read_report(run)
            if len(run.said) == before:
                break
        if run.report in self.selector.get_map():
            self.selector.unregister(run.report)
        os.close(run.report)
        slot.run = None
        if status is None:
            status = self._cleared(slot, run)
        elif run.place is not None:
            run.place.close()
        if run.started is None:
            if run.place is None or run.killed or run.task.again:
                raise why_not_started(self.way, slot)
            self._give(slot, replace(run.task, again=True))
            return
        verdict = judge(run, status, kernel_killed=slot.group is not None and slot.group.kills() > run.kills_before)
        task = run.task
        if cut_off and verdict.reason == "crash" and not task.again:  # the second time it may be the program's doing
            self._give(slot, replace(task, again=True))
            return
        if task.passed is not None:
            honest = verdict.reason not in ("passed", "forged")
            final = task.passed if honest else Verdict("forged", _FORGED, task.passed.seconds)
            self.answers.append((task.number, final))
        elif verdict.passed:
            self._give(slot, Task(task.number, task.program, passed=verdict))
        else:
            self.answers.append((task.number, verdict))

    def _cleared(self, slot: Slot, run: Run) -> int:
        """Nothing of the run is left (cold and unsafe); returns the wait status of its process."""
        self.selector.unregister(run.handle)
        os.close(run.handle)
        if self.way.mode == "cold":
            unmount_tmp(slot.tmp)
        status = os.waitpid(run.process, 0)[1]
        self.end_strays()
        if run.folder is not None:
            shutil.rmtree(run.folder, ignore_errors=True)
        return status

    def end_strays(self) -> None:
        """End what we never started: a program's processes that outlived the one they belonged to."""
        ours = {slot.server for slot in self.slots} | {slot.run.process for slot in self.slots if slot.run}
        while strays := [child for child in memory.children(os.getpid()) if child not in ours]:
            for stray in strays:
                end(stray)

    # -- the loop ------------------------------------------------------------------------------------------------

    def turn(self) -> bool:
        """Start what can be started, wait for the next thing to happen, deal with it.

        True when the descriptor that was registered with data None (the input) is readable.
        """
        for slot in self.slots:
            if slot.run is None and slot.task is None and self.waiting:
                self._give(slot, self.waiting.popleft())
            self._begin(slot)
        readable = False
        for key, _ in self.selector.select(self._patience()):
            if key.data is None:
                readable = True
                continue
            slot, what = key.data
            if key.fd not in self.selector.get_map():
                continue  # dealt with a moment ago, by what else happened in this turn
            if what == "server":
                self.hear(slot)
            elif what == "report":
                self.read_report(slot.run)
            else:
                self.finish(slot)
        for slot in self.slots:
            if slot.run is not None:
                self._look_after(slot, slot.run)
        return readable

    def _give(self, slot: Slot, task: Task) -> None:
        """The slot's next task; it begins as soon as there is a place."""
        slot.task, slot.since = task, time.monotonic()

    def _begin(self, slot: Slot) -> None:
        """Start the slot's task, if it has one and there is a place. Raises SandboxError when there never is."""
        if slot.task is None:
            return
        if self.way.mode == "warm":
            if serve(self.way, slot):
                assert slot.control is not None
                self.selector.register(slot.control, selectors.EVENT_READ, (slot, "server"))
            if not slot.places:
                if time.monotonic() > slot.since + START_SECONDS:
                    raise why_not_started(self.way, slot)
                return
        task, slot.task = slot.task, None
        self.start(slot, task)

    def _patience(self) -> float | None:
        """Seconds until something must be looked after."""
        runs = [slot.run for slot in self.slots if slot.run and not slot.run.killed]
        ends = [_deadline(run) for run in runs] + [slot.since + START_SECONDS for slot in self.slots if slot.task]
        if not self.slots[0].group:
            ends += [run.looked + memory.WATCH_SECONDS for run in runs]
        return max(0.0, min(ends) - time.monotonic()) if ends else None

    def _look_after(self, slot: Slot, run: Run) -> None:
        """End the program that has run for too long, or holds too much."""
        now = time.monotonic()
        if run.killed:
            return
        if now > _deadline(run):
            run.killed = "timeout"
        elif slot.group is None and now >= run.looked + memory.WATCH_SECONDS:
            run.looked = now
            size, processes = memory.held(run.process)
            # The kernel counts processes too, but not those of root in a namespace that has no other user.
            if size > self.way.limits.total_memory or processes > self.way.limits.processes + SERVER_PROCESSES:
                run.killed = "memory"
        if run.killed:
            if self.way.mode == "unsafe":
                for process in memory.descendants(run.process):
                    send(process, signal.SIGKILL)
            else:
                with suppress(ProcessLookupError):  # it has ended by itself
                    signal.pidfd_send_signal(run.handle, signal.SIGKILL)

    def close(self) -> None:
        """End everything, and leave nothing."""
        for slot in self.slots:
            if slot.run is not None:
                for process in list(memory.descendants(slot.run.process)):
                    send(process, signal.SIGKILL)
                if slot.run.folder is not None:
                    shutil.rmtree(slot.run.folder, ignore_errors=True)
            slot.run = None
            stop_server(slot)
        self.end_strays()
        for slot in self.slots:
            if slot.group is not None:
                slot.group.remove()


def _deadline(run: Run) -> float:
    """A pass that took longer than the timeout is none; what runs a little longer still is ended."""
    return run.began + START_SECONDS if run.started is None else run.started + run.task.program.timeout + 0.1


def main() -> None:
    """Settings in, then programs; a line out for each, in the order in which they end."""
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    line = source.readline()
    if not line:  # whoever started this has ended already
        return
    settings = json.loads(line)

    def say(message: dict[str, Any]) -> None:
        sink.write(json.dumps(message).encode() + b"\n")
        sink.flush()

    try:
        python = Python(**{**settings["python"], "libraries": tuple(settings["python"]["libraries"])})
        supervisor = Supervisor(settings["mode"], settings["slots"], Limits(**settings["limits"]), python)
    except SandboxError as error:
        say({"error": str(error)})
        return
    say({"ready": True, "memory": supervisor.watched_by})
    os.set_blocking(source.fileno(), False)
    supervisor.selector.register(source.fileno(), selectors.EVENT_READ, None)
    rest = b""
    try:
        while True:
            if supervisor.turn():
                got = os.read(source.fileno(), 1 << 20)
                if not got:
                    return
                *lines, rest = (rest + got).split(b"\n")
                for line in lines:
                    message = json.loads(line)
                    program = Program(message["source"], message["timeout"])
                    supervisor.waiting.append(Task(message["number"], program))
            while supervisor.answers:
                number, verdict = supervisor.answers.popleft()
                say({"number": number, **asdict(verdict)})
    except SandboxError as error:
        say({"error": str(error)})
    except OSError as error:  # of ours: no descriptor, process or mount to be had
        say({"error": f"the sandbox cannot go on: {error}\n  remedy: look for what this machine has run out of"})
    finally:
        supervisor.close()


if __name__ == "__main__":
    main()
