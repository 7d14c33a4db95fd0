"""What does the end of a program mean? Its own report, the mark in it, and how its process ended."""

import math
import os
import secrets
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass

from eval_platform.sandbox.runner import STARTED
from eval_platform.sandbox.slot import Run
from eval_platform.sandbox.verdict import Reason, Verdict


def judge(run: Run, status: int, *, kernel_killed: bool) -> Verdict:
    """The verdict on a run that has ended with the wait status `status`.

    kernel_killed: the control group has killed something of it since it began, for want of memory.
    """
    seconds = time.monotonic() - (run.started or run.began)
    if run.killed:
        return Verdict(run.killed, "", seconds)
    if kernel_killed:
        return Verdict("memory", "", seconds)
    report = _report(bytes(run.said[len(STARTED) :]))
    if report is None:
        ended_by = os.waitstatus_to_exitcode(status)
        by_signal = -ended_by if ended_by < 0 else ended_by - 128 if ended_by > 128 else 0
        if by_signal in (signal.SIGXCPU, signal.SIGKILL) and seconds >= run.task.program.timeout:
            return Verdict("timeout", "", seconds)
        if by_signal:
            return Verdict("crash", _signal_name(by_signal), seconds)
        return Verdict("exit", f"status {ended_by}", seconds)
    if report.reason == "passed" and not secrets.compare_digest(report.mark, run.mark.encode()):
        return Verdict("forged", "it says that it passed, and does not know the mark", seconds)
    if report.reason == "passed" and report.seconds > run.task.program.timeout:
        return Verdict("timeout", "", report.seconds)
    return Verdict(report.reason, report.detail, report.seconds)


@dataclass(frozen=True, slots=True)
class _Report:
    """What a program says of itself (runner.py), or what somebody else wrote there in its name."""

    reason: Reason
    seconds: float
    mark: bytes
    detail: str


def _report(said: bytes) -> _Report | None:
    """The report, if it is one: what a program has written there itself need not be."""
    parts = said.split(b"\n", 3)
    if len(parts) != 4:
        return None
    reason = _SAID.get(parts[0])
    try:
        seconds = float(parts[1])
    except ValueError:
        return None
    if reason is None or not 0 <= seconds < math.inf:
        return None
    return _Report(reason, seconds, parts[2], parts[3].decode(errors="replace")[:1000])


# What a program itself can say; that it was killed, and why, is known here.
_SAID: Mapping[bytes, Reason] = {
    b"passed": "passed",
    b"assertion": "assertion",
    b"exception": "exception",
    b"syntax": "syntax",
    b"exit": "exit",
    b"memory": "memory",
}


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
