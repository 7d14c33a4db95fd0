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
from dataclasses import asdict
from typing import Any

from eval_platform.errors import SandboxError
from eval_platform.sandbox import memory
from eval_platform.sandbox.judge import judge
from eval_platform.sandbox.processes import adopt_orphans, end, send
from eval_platform.sandbox.root import SCRIPTS, Python, unmount_tmp
from eval_platform.sandbox.runner import STARTED
from eval_platform.sandbox.slot import Run, Slot
from eval_platform.sandbox.start import (
    START_SECONDS,
    Way,
    command,
    filter_file,
    find_bubblewrap,
    mount,
    own_place,
    sealed,
    serve,
    spawn,
    stop_server,
    users_of_slots,
    why_not_started,
)
from eval_platform.sandbox.verdict import Limits, Mode, Program, Verdict

LONGEST_REPORT = 1 << 14
SERVER_PROCESSES = 8  # what bubblewrap and the server of a warm slot need beside the program
_FORGED = "it passes also where its last assertion does not hold"


class Supervisor:
    """The slots, and the loop over them."""

    def __init__(self, mode: Mode, n_slots: int, limits: Limits, python: Python) -> None:
        self.waiting: deque[tuple[int, Program]] = deque()
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

    def start(self, slot: Slot, number: int, program: Program, passed: Verdict | None = None) -> None:
        """Start `program` in the slot, or its control when it has `passed`."""
        # The two texts differ in one digit of a line of their own, and the failing one comes second.
        a, b = secrets.randbelow(9000) + 1000, secrets.randbelow(9000) + 1000
        last = f"\nassert {a} * {b} == {a * b + (passed is not None)}\n"
        job = {
            "source": program.source + last,
            "cpu_seconds": math.ceil(program.timeout) + 1,
            **asdict(self.way.limits),
        }
        mark = secrets.token_hex(16)
        job_end = sealed(marshal.dumps(job))
        mark_end, mark_in = os.pipe()
        os.write(mark_in, mark.encode())
        os.close(mark_in)
        report, report_end = os.pipe()
        ends = (job_end, mark_end, report_end)
        folder = None
        if self.way.mode == "warm":
            serve(self.way, slot)
            assert slot.control is not None
            assert slot.server is not None
            socket.send_fds(slot.control, [b"run"], ends)
            process, ended = slot.server, slot.control.fileno()
        else:
            if self.way.mode == "unsafe":
                folder = tempfile.mkdtemp(prefix="eval-platform-unsafe-")
            else:
                mount(self.way, slot)
            process = spawn(self.way, slot, ends, command(self.way, slot, [f"{SCRIPTS}/runner.py"]), folder)
            ended = os.pidfd_open(process)
        for descriptor in ends:
            os.close(descriptor)
        slot.run = Run(number, program, mark, process, ended, report, time.monotonic(), passed, folder=folder)
        slot.run.kills_before = slot.group.kills() if slot.group else 0
        os.set_blocking(report, False)
        self.selector.register(report, selectors.EVENT_READ, (slot, "report"))
        self.selector.register(ended, selectors.EVENT_READ, (slot, "ended"))

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

    def finish(self, slot: Slot) -> None:
        """The slot's program has ended: clear up, judge, and go on with its control or answer."""
        run = slot.run
        assert run is not None
        while run.report in self.selector.get_map():  # what it said last
            before = len(run.said)
            self.read_report(run)
            if len(run.said) == before:
                break
        status = self._cleared(slot, run)
        slot.run = None
        if run.started is None:
            raise why_not_started(self.way, slot)
        verdict = judge(run, status, kernel_killed=slot.group is not None and slot.group.kills() > run.kills_before)
        if run.passed is not None:
            honest = verdict.reason not in ("passed", "forged")
            self.answers.append((run.number, run.passed if honest else Verdict("forged", _FORGED, run.passed.seconds)))
        elif verdict.passed:
            self.start(slot, run.number, run.program, passed=verdict)
        else:
            self.answers.append((run.number, verdict))

    def _cleared(self, slot: Slot, run: Run) -> int:
        """Nothing of the run is left; returns the wait status of its process (of the program, where warm)."""
        status = 0
        self.selector.unregister(run.ended)
        if run.report in self.selector.get_map():
            self.selector.unregister(run.report)
        os.close(run.report)
        if self.way.mode == "warm":
            assert slot.control is not None
            assert slot.server is not None
            slot.control.settimeout(0)
            try:
                answer = slot.control.recv(64)
            except OSError:
                answer = b""
            if run.killed or not answer:
                stop_server(slot)
                status = signal.SIGKILL
            else:
                status = int(answer)
        else:
            if self.way.mode == "cold":
                unmount_tmp(slot.tmp)
            os.close(run.ended)
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

    def turn(self, others: bool) -> bool:
        """Start what can be started, wait for the next thing to happen, deal with it.

        others: whether a descriptor that was registered with data None (the input) is waited for too; True when it
        is readable.
        """
        for slot in self.slots:
            if slot.run is None and self.waiting:
                self.start(slot, *self.waiting.popleft())
        readable = False
        for key, _ in self.selector.select(self._patience(others)):
            if key.data is None:
                readable = True
                continue
            slot, what = key.data
            if slot.run is None or key.fd not in self.selector.get_map():
                continue  # dealt with a moment ago, by what else happened in this turn
            if what == "report":
                self.read_report(slot.run)
            else:
                self.finish(slot)
        for slot in self.slots:
            if slot.run is not None:
                self._look_after(slot, slot.run)
        return readable

    def _patience(self, others: bool) -> float | None:
        """Seconds until something must be looked after."""
        runs = [slot.run for slot in self.slots if slot.run]
        if not runs:
            return None if others else 0.0
        ends = min(_deadline(run) for run in runs) - time.monotonic()
        watching = any(run.killed is None for run in runs) and not self.slots[0].group
        return max(0.0, min(ends, memory.WATCH_SECONDS if watching else 1.0))

    def _look_after(self, slot: Slot, run: Run) -> None:
        """End the program that has run for too long, or holds too much."""
        if run.killed:
            return
        if time.monotonic() > _deadline(run):
            run.killed = "timeout"
        elif slot.group is None:
            size, processes = memory.held(run.process)
            # The kernel counts processes too, but not those of root in a namespace that has no other user.
            if size > self.way.limits.total_memory or processes > self.way.limits.processes + SERVER_PROCESSES:
                run.killed = "memory"
        if run.killed:
            for process in memory.descendants(run.process) if self.way.mode == "unsafe" else (run.process,):
                send(process, signal.SIGKILL)

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
    return run.began + START_SECONDS if run.started is None else run.started + run.program.timeout + 0.1


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
            if supervisor.turn(others=True):
                got = os.read(source.fileno(), 1 << 20)
                if not got:
                    return
                *lines, rest = (rest + got).split(b"\n")
                for line in lines:
                    message = json.loads(line)
                    supervisor.waiting.append((message["number"], Program(message["source"], message["timeout"])))
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
