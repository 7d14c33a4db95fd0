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

import ctypes
import fcntl
import json
import marshal
import math
import os
import platform
import secrets
import selectors
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from eval_platform.errors import SandboxError
from eval_platform.sandbox import memory
from eval_platform.sandbox.root import NAMESPACES, SCRIPTS, Python, assemble, enter_own_mounts, mount_tmp, unmount_tmp
from eval_platform.sandbox.runner import REPORT, STARTED
from eval_platform.sandbox.seccomp import seccomp_filter
from eval_platform.sandbox.verdict import Limits, Mode, Program, Reason, Verdict, first_user

START_SECONDS = 30.0  # for bubblewrap and Python, on a machine that is busy
LONGEST_REPORT = 1 << 14
SERVER_PROCESSES = 8  # what bubblewrap and the server of a warm slot need beside the program
_ENVIRONMENT = {"PYTHONHASHSEED": "0"}  # sets in the same order every time: the same program has the same verdict
_PR_SET_CHILD_SUBREAPER, _PR_SET_PDEATHSIG = 36, 1
_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass
class _Run:
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
class _Slot:
    """Where one program runs at a time. user: its own, when we are root, so that the kernel counts its processes."""

    user: int | None
    group: memory.Group | None
    tmp: str  # what its program writes lies here, in the supervisor's own mounts
    complaints: int = -1  # the reading end of the standard error of whatever was started last
    server: int | None = None
    control: socket.socket | None = None
    run: _Run | None = None


class Supervisor:
    """The slots, and the loop over them."""

    def __init__(self, mode: Mode, n_slots: int, limits: Limits, python: Python) -> None:
        self.mode: Mode = mode
        self.limits, self.python = limits, python
        self.waiting: deque[tuple[int, Program]] = deque()
        self.answers: deque[tuple[int, Verdict]] = deque()
        self.selector = selectors.DefaultSelector()
        self.watched_by = "the supervisor"
        self.place = ""
        _done(_LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))
        groups: list[memory.Group] | str = "unsafe"
        if mode != "unsafe":
            self.bubblewrap = find_bubblewrap()
            self.filter = _sealed(_filter())
            groups = memory.make_groups(n_slots, limits.total_memory, limits.processes + SERVER_PROCESSES)
            enter_own_mounts()
            self.place = assemble(python)
        if isinstance(groups, list):
            self.watched_by = "a control group"
        users = _users(n_slots) if os.geteuid() == 0 and mode != "unsafe" else [None] * n_slots
        self.slots = [
            _Slot(user, groups[n] if isinstance(groups, list) else None, f"{self.place}/tmp-{n}")
            for n, user in enumerate(users)
        ]

    # -- one program ---------------------------------------------------------------------------------------------

    def start(self, slot: _Slot, number: int, program: Program, passed: Verdict | None = None) -> None:
        """Start `program` in the slot, or its control when it has `passed`."""
        # The two texts differ in one digit of a line of their own, and the failing one comes second.
        a, b = secrets.randbelow(9000) + 1000, secrets.randbelow(9000) + 1000
        last = f"\nassert {a} * {b} == {a * b + (passed is not None)}\n"
        job = {
            "source": program.source + last,
            "cpu_seconds": math.ceil(program.timeout) + 1,
            **asdict(self.limits),
        }
        mark = secrets.token_hex(16)
        job_end = _sealed(marshal.dumps(job))
        mark_end, mark_in = os.pipe()
        os.write(mark_in, mark.encode())
        os.close(mark_in)
        report, report_end = os.pipe()
        ends = (job_end, mark_end, report_end)
        folder = None
        if self.mode == "warm":
            self._ready(slot)
            assert slot.control is not None
            assert slot.server is not None
            socket.send_fds(slot.control, [b"run"], ends)
            process, ended = slot.server, slot.control.fileno()
        else:
            if self.mode == "unsafe":
                folder = tempfile.mkdtemp(prefix="eval-platform-unsafe-")
            else:
                self._mount_tmp(slot)
            process = self._spawn(slot, ends, self._command(slot, [f"{SCRIPTS}/runner.py"]), folder)
            ended = os.pidfd_open(process)
        for end in ends:
            os.close(end)
        slot.run = _Run(number, program, mark, process, ended, report, time.monotonic(), passed, folder=folder)
        slot.run.kills_before = slot.group.kills() if slot.group else 0
        os.set_blocking(report, False)
        self.selector.register(report, selectors.EVENT_READ, (slot, "report"))
        self.selector.register(ended, selectors.EVENT_READ, (slot, "ended"))

    def _command(self, slot: _Slot, script: list[str]) -> list[str]:
        python = [self.python.executable, "-s", "-P", "-S", "-B"]
        if self.mode == "unsafe":
            return [*python, os.path.join(os.path.dirname(os.path.abspath(__file__)), "runner.py")]
        environment = {**_ENVIRONMENT, "LD_LIBRARY_PATH": self.python.library_path}
        seccomp = [] if self.mode == "warm" else ["--seccomp", str(REPORT + 1)]  # a warm program brings its own
        return [
            self.bubblewrap,
            *("--unshare-all", "--unshare-user", "--uid", "65534", "--gid", "65534", "--hostname", "sandbox"),
            *("--die-with-parent", "--new-session", "--cap-drop", "ALL", "--clearenv"),
            *(word for name, value in environment.items() for word in ("--setenv", name, value)),
            *("--ro-bind", f"{self.place}/root", "/", "--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev"),
            *("--bind", slot.tmp, "/tmp", "--chdir", "/tmp"),
            *seccomp,
            "--",
            *python,
            *script,
        ]

    def _spawn(self, slot: _Slot, ends: tuple[int, ...], command: list[str], folder: str | None = None) -> int:
        """Start `command` with `ends` (then the filter) as its descriptors 3, 4, ...; returns its process id."""
        self._forget_complaints(slot)
        slot.complaints, complaints = os.pipe()
        os.set_blocking(slot.complaints, False)
        child = os.fork()
        if child:
            os.close(complaints)
            return child
        try:
            # Nothing of ours may be inherited but what is given; 100 and above is out of the way of what is wanted.
            held = [fcntl.fcntl(end, fcntl.F_DUPFD, 100) for end in (complaints, *ends)]
            if self.mode != "unsafe":  # opened anew, for a descriptor of ours would share its place in the file
                held.append(fcntl.fcntl(os.open(f"/proc/self/fd/{self.filter}", os.O_RDONLY), fcntl.F_DUPFD, 100))
            null = os.open(os.devnull, os.O_RDWR)
            for wanted, got in enumerate((null, null, *held)):
                os.dup2(got, wanted)
            os.closerange(len(held) + 2, 65536)
            os.setsid()
            if folder is not None:
                os.chdir(folder)
                _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # bubblewrap does this by itself
            if slot.group is not None:
                slot.group.enter()
            if slot.user is not None:
                os.setgroups([])
                os.setresgid(slot.user, slot.user, slot.user)
                os.setresuid(slot.user, slot.user, slot.user)
            os.execve(command[0], command, {} if folder is None else _ENVIRONMENT)
        except BaseException as error:  # noqa: BLE001 -- a child: whatever happened is said, and it ends here
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(127)

    def _mount_tmp(self, slot: _Slot) -> None:
        owner = os.getuid() if slot.user is None else slot.user
        mount_tmp(slot.tmp, self.limits.files, self.limits.most_files, owner)

    def _ready(self, slot: _Slot) -> None:
        """See that the slot's server runs. Raises SandboxError when it does not start."""
        if slot.server is not None:
            return
        self._mount_tmp(slot)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        slot.server = self._spawn(slot, (theirs.fileno(),), self._command(slot, [f"{SCRIPTS}/server.py"]))
        theirs.close()
        ours.settimeout(START_SECONDS)
        try:
            ready = ours.recv(16) == b"ready"
        except TimeoutError:
            ready = False
        if not ready:
            self._stop_server(slot)
            raise self._not_started(slot)
        slot.control = ours

    # -- what comes of it ----------------------------------------------------------------------------------------

    def read_report(self, run: _Run) -> None:
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

    def finish(self, slot: _Slot) -> None:
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
            raise self._not_started(slot)
        verdict = self._judged(slot, run, status)
        if run.passed is not None:
            honest = verdict.reason not in ("passed", "forged")
            self.answers.append((run.number, run.passed if honest else Verdict("forged", _FORGED, run.passed.seconds)))
        elif verdict.passed:
            self.start(slot, run.number, run.program, passed=verdict)
        else:
            self.answers.append((run.number, verdict))

    def _cleared(self, slot: _Slot, run: _Run) -> int:
        """Nothing of the run is left; returns the wait status of its process (of the program, where warm)."""
        status = 0
        self.selector.unregister(run.ended)
        if run.report in self.selector.get_map():
            self.selector.unregister(run.report)
        os.close(run.report)
        if self.mode == "warm":
            assert slot.control is not None
            assert slot.server is not None
            slot.control.settimeout(0)
            try:
                answer = slot.control.recv(64)
            except OSError:
                answer = b""
            if run.killed or not answer:
                self._stop_server(slot)
                status = signal.SIGKILL
            else:
                status = int(answer)
        else:
            if self.mode == "cold":
                unmount_tmp(slot.tmp)
            os.close(run.ended)
            status = os.waitpid(run.process, 0)[1]
        self.end_strays()
        if run.folder is not None:
            shutil.rmtree(run.folder, ignore_errors=True)
        return status

    def _stop_server(self, slot: _Slot) -> None:
        if slot.server is not None:
            _end(slot.server)
            unmount_tmp(slot.tmp)
        if slot.control is not None:
            slot.control.close()
        slot.server, slot.control = None, None

    def end_strays(self) -> None:
        """End what we never started: a program's processes that outlived the one they belonged to."""
        ours = {slot.server for slot in self.slots} | {slot.run.process for slot in self.slots if slot.run}
        while strays := [child for child in memory.children(os.getpid()) if child not in ours]:
            for stray in strays:
                _end(stray)

    def _judged(self, slot: _Slot, run: _Run, status: int) -> Verdict:
        seconds = time.monotonic() - (run.started or run.began)
        if run.killed:
            return Verdict(run.killed, "", seconds)
        if slot.group is not None and slot.group.kills() > run.kills_before:
            return Verdict("memory", "", seconds)
        report = _report(bytes(run.said[len(STARTED) :]))
        if report is None:
            ended_by = os.waitstatus_to_exitcode(status)
            by_signal = -ended_by if ended_by < 0 else ended_by - 128 if ended_by > 128 else 0
            if by_signal in (signal.SIGXCPU, signal.SIGKILL) and seconds >= run.program.timeout:
                return Verdict("timeout", "", seconds)
            if by_signal:
                return Verdict("crash", _signal_name(by_signal), seconds)
            return Verdict("exit", f"status {ended_by}", seconds)
        if report.reason == "passed" and not secrets.compare_digest(report.mark, run.mark.encode()):
            return Verdict("forged", "it says that it passed, and does not know the mark", seconds)
        if report.reason == "passed" and report.seconds > run.program.timeout:
            return Verdict("timeout", "", report.seconds)
        return Verdict(report.reason, report.detail, report.seconds)

    def _not_started(self, slot: _Slot) -> SandboxError:
        try:
            said = os.read(slot.complaints, 4096).decode(errors="replace").strip()
        except BlockingIOError:
            said = ""
        return not_started(self.mode, said)

    def _forget_complaints(self, slot: _Slot) -> None:
        if slot.complaints >= 0:
            os.close(slot.complaints)
            slot.complaints = -1

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

    def _look_after(self, slot: _Slot, run: _Run) -> None:
        """End the program that has run for too long, or holds too much."""
        if run.killed:
            return
        if time.monotonic() > _deadline(run):
            run.killed = "timeout"
        elif slot.group is None:
            size, processes = memory.held(run.process)
            # The kernel counts processes too, but not those of root in a namespace that has no other user.
            if size > self.limits.total_memory or processes > self.limits.processes + SERVER_PROCESSES:
                run.killed = "memory"
        if run.killed:
            for process in memory.descendants(run.process) if self.mode == "unsafe" else (run.process,):
                _signal(process, signal.SIGKILL)

    def close(self) -> None:
        """End everything, and leave nothing."""
        for slot in self.slots:
            if slot.run is not None:
                for process in list(memory.descendants(slot.run.process)):
                    _signal(process, signal.SIGKILL)
                if slot.run.folder is not None:
                    shutil.rmtree(slot.run.folder, ignore_errors=True)
            slot.run = None
            self._stop_server(slot)
        self.end_strays()
        for slot in self.slots:
            if slot.group is not None:
                slot.group.remove()


def find_bubblewrap() -> str:
    """The path of bwrap. Raises SandboxError naming how it is installed."""
    found = shutil.which("bwrap")
    if found is None:
        raise SandboxError(
            "bubblewrap (bwrap) is not installed, and a model's programs run in nothing less",
            remedy="apt-get install bubblewrap (or dnf install bubblewrap)",
        )
    return found


def not_started(mode: Mode, said: str) -> SandboxError:
    """What to tell of a sandbox in which no program starts; `said`: its standard error."""
    if not said:
        return SandboxError(
            f"no program was started in {START_SECONDS:.0f} s, and nothing says why",
            remedy="run less beside it; `eval-platform doctor` tries the sandbox alone",
        )
    if mode == "unsafe":
        return SandboxError(f"Python does not start under its limits: {said}", remedy="see the line above")
    return SandboxError(f"the sandbox does not start: {said}", remedy=NAMESPACES)


_FORGED = "it passes also where its last assertion does not hold"


def _deadline(run: _Run) -> float:
    """A pass that took longer than the timeout is none; what runs a little longer still is ended."""
    return run.began + START_SECONDS if run.started is None else run.started + run.program.timeout + 0.1


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


def _sealed(body: bytes) -> int:
    """A file in memory that nobody can change any more, not even who holds its descriptor."""
    file = os.memfd_create("sandbox", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with os.fdopen(os.dup(file), "wb") as writer:
        writer.write(body)
    os.lseek(file, 0, os.SEEK_SET)
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
    return file


def _filter() -> bytes:
    try:
        return seccomp_filter(platform.machine())
    except KeyError as error:
        raise SandboxError(
            f"no filter of system calls is known for this machine ({error})", remedy="run it on x86_64 or aarch64"
        ) from None


def _users(n: int) -> list[int | None]:
    """A user for each slot, out of the range that this process's user namespace has; no account's, and not root.

    None where root is the only user that the namespace has: then the programs run as whoever made it.
    """
    with open("/proc/self/uid_map", encoding="ascii") as file:
        highest = max(int(first) + int(count) for first, _, count in map(str.split, file))
    if highest <= n + 2:
        return [None] * n
    own = first_user(os.getpid())
    first = own if highest >= own + n else min(60000, highest - n - 2)
    return [first + slot for slot in range(n)]


def _end(process: int) -> None:
    """Kill a child of ours and wait for it."""
    _signal(process, signal.SIGKILL)
    with suppress(ChildProcessError):  # it was waited for already
        os.waitpid(process, 0)


def _signal(process: int, number: int) -> None:
    with suppress(ProcessLookupError):  # it has ended by itself
        os.kill(process, number)


def _done(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


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
