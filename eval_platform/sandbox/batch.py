"""Programs in, verdicts out: the face of the sandbox towards those who score."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import lru_cache
from typing import IO, Any

from eval_platform.errors import SandboxError
from eval_platform.sandbox.root import Python, this_python
from eval_platform.sandbox.verdict import DEFAULT_LIMITS, MOST_SLOTS, Limits, Mode, Program, Verdict

_AHEAD = 4  # programs in the supervisor's hands, a slot: enough to keep it busy, few enough to fill no pipe


def run_programs(
    programs: Sequence[Program], mode: Mode = "cold", *, slots: int | None = None, limits: Limits = DEFAULT_LIMITS
) -> list[Verdict]:
    """The verdict on each program, in their order; equal programs are run once.

    slots: how many run at a time; as many as this process may use cores. Raises SandboxError when no program can be
    run here, naming what is missing, and when the supervisor dies. A program's own doings are never an error.
    """
    distinct = list(dict.fromkeys(programs))
    if not distinct:
        return []
    n_slots = min(slots or len(os.sched_getaffinity(0)), len(distinct), MOST_SLOTS)
    verdicts: dict[Program, Verdict] = {}
    with _supervisor(mode, n_slots, limits) as (into, out, _):
        todo = iter(enumerate(distinct))
        for _ in range(_AHEAD * n_slots):
            _hand_over(into, next(todo, None))
        while len(verdicts) < len(distinct):
            answer = _read(out)
            number = answer.pop("number")
            verdicts[distinct[number]] = Verdict(**answer)
            _hand_over(into, next(todo, None))
    return [verdicts[program] for program in programs]


def describe(mode: Mode = "cold", *, limits: Limits = DEFAULT_LIMITS) -> str:
    """What programs run in, in words that a result can carry; found out by running one.

    Raises SandboxError as `run_programs` does.
    """
    with _supervisor(mode, 1, limits) as (into, out, ready):
        _hand_over(into, (0, Program("pass", timeout=30.0)))
        verdict = _read(out)
    if verdict["reason"] != "passed":
        raise SandboxError(
            f"a program that does nothing does not pass in the sandbox: {verdict['reason']} {verdict['detail']}",
            remedy="try it again on a machine that is less busy; `eval-platform doctor` tries it too",
        )
    python = f"Python {platform.python_version()}"
    each, total = limits.process_memory >> 20, limits.total_memory >> 20
    memory = f"{each} MiB a process, {total} MiB in all (held by {ready['memory']}), {limits.processes} processes"
    if mode == "unsafe":
        return f"UNSAFE: plain processes, {python}, {memory}"
    version = subprocess.run(["bwrap", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    return f"{version}, {mode}, {python}, {memory}"


@contextmanager
def _supervisor(mode: Mode, slots: int, limits: Limits) -> Iterator[tuple[IO[bytes], IO[bytes], Mapping[str, Any]]]:
    """A supervisor's input and output and its first answer; it and all its programs end with the block."""
    with subprocess.Popen(
        [sys.executable, "-m", "eval_platform.sandbox.supervisor"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        settings = {"mode": mode, "slots": slots, "limits": asdict(limits), "python": asdict(_python())}
        try:
            _send(process.stdin, settings)
            yield process.stdin, process.stdout, _read(process.stdout)
        finally:
            if not process.stdin.closed:
                process.stdin.close()  # which ends it


@lru_cache(maxsize=1)
def _python() -> Python:
    return this_python()


def _hand_over(into: IO[bytes], numbered: tuple[int, Program] | None) -> None:
    if numbered is not None:
        number, program = numbered
        # Surrogates that no encoding has are text that no Python file can hold: the runner's own error, not ours.
        _send(into, {"number": number, "source": program.source, "timeout": program.timeout})


def _send(into: IO[bytes], message: Mapping[str, Any]) -> None:
    try:
        into.write(json.dumps(message).encode() + b"\n")
        into.flush()
    except BrokenPipeError:
        pass  # it has ended: what it said last is read next, and is the better error


def _read(out: IO[bytes]) -> dict[str, Any]:
    line = out.readline()
    if not line:
        raise SandboxError(
            "the process that watches the programs has ended; its own words are in this one's log",
            remedy="try again; if it ends again, look for the kernel's memory killer in `dmesg`",
        )
    message = json.loads(line)
    if "error" in message:
        error, _, remedy = message["error"].partition("\n  remedy: ")
        raise SandboxError(error, remedy=remedy or None)
    return message
