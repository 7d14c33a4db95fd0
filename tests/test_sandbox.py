"""What the sandbox says of programs, what it leaves behind, and when it refuses. Hostile ones: test_sandbox_attacks."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from benchmarks.verify_code import UNTIDY
from eval_platform.errors import SandboxError
from eval_platform.sandbox import Limits, Program, describe, memory, run_programs
from eval_platform.sandbox.seccomp import CLONE, CLONE3, FORBIDDEN, IOCTL, LAST_KNOWN
from eval_platform.sandbox.verdict import MOST_SLOTS, first_user
from tests.machine import needs_sandbox
from tests.sandbox_attacks import ATTACKS

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True, scope="module")
def _sandbox() -> None:
    needs_sandbox()


# program -> the reason it ends for, and the beginning of the detail.
ENDS = {
    "def f(x): return x + 1\nassert f(1) == 2": ("passed", ""),
    "assert 1 == 2, 'not so'": ("assertion", "AssertionError: not so"),
    "{}['k']": ("exception", "KeyError: 'k'"),
    "class E(AssertionError): pass\nraise E": ("assertion", "E"),
    "x = = 1": ("syntax", "SyntaxError: invalid syntax"),
    "x = '\0'": ("syntax", ""),
    "x = '\ud800'": ("syntax", "UnicodeEncodeError"),
    "import sys\nsys.exit()": ("exit", "SystemExit"),
    "import os\nos._exit(3)": ("exit", "status 3"),
    "while True: pass": ("timeout", ""),
    "import time\ntime.sleep(60)": ("timeout", ""),
    "input()": ("exception", "EOFError"),
    "held = 'x' * 10**9": ("memory", ""),
    "import os\nos.abort()": ("crash", "SIGABRT"),
    "assert __name__ == '__main__'\nimport sys\nassert sys.modules['__main__'].__dict__ is globals()": ("passed", ""),
    "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\nassert A(1) == A(1)": ("passed", ""),
    "open('x', 'w').write('1')\nassert open('x').read() == '1'": ("passed", ""),
    "import threading\nt = threading.Thread(target=print)\nt.start()\nt.join()": ("passed", ""),
}


@pytest.mark.parametrize("mode", ["cold", "warm"])
def test_every_program_ends_for_its_reason(mode):
    programs = [Program(source, 0.4 if ends[0] == "timeout" else 10.0) for source, ends in ENDS.items()]

    verdicts = run_programs([*programs, programs[1]], mode)

    found = {source: (v.reason, v.detail) for source, v in zip(ENDS, verdicts, strict=False)}
    wrong = {
        source: said
        for source, said in found.items()
        if said[0] != ENDS[source][0] or not said[1].startswith(ENDS[source][1])
    }
    assert not wrong
    assert verdicts[-1] == verdicts[1]
    assert all(0.4 <= v.seconds < 5 for v in verdicts if v.reason == "timeout")
    assert [v.passed for v in verdicts] == [v.reason == "passed" for v in verdicts]


def test_a_program_has_the_same_verdict_every_time():
    """Sets of texts have one order, which else depends on a random seed."""
    known = subprocess.run(
        [sys.executable, "-c", "print(list({'one', 'two', 'three', 'four', 'five'}))"],
        env={"PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    program = Program(f"assert list({{'one', 'two', 'three', 'four', 'five'}}) == {known}")
    assert run_programs([program], "warm")[0].reason == "passed"


def test_no_programs_need_no_sandbox(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert run_programs([]) == []


@pytest.mark.parametrize(("mode", "n_programs"), [("cold", 20), ("warm", 34), ("unsafe", 6)])
def test_untidy_programs_leave_nothing(mode, n_programs, tmp_path, monkeypatch):
    """Sixty in all, with daemons, threads, files and memory; a thousand: benchmarks/verify_code.py."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    mounts = Path("/proc/self/mountinfo").read_text()

    with watched() as seen:
        verdicts = run_programs([Program(UNTIDY.format(n=n), timeout=10.0) for n in range(n_programs)], mode)

    assert {v.reason for v in verdicts} == {"passed"}
    assert len(seen) > n_programs
    assert left_of(seen) == []
    assert list(tmp_path.iterdir()) == []
    assert Path("/proc/self/mountinfo").read_text() == mounts


@contextmanager
def watched() -> Iterator[set[int]]:
    """The process ids of everything that begins below this process during the block; the supervisor is the first."""
    before = set(memory.descendants(os.getpid()))  # among them servers that other tests left running
    seen: set[int] = set()
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            seen.update(set(memory.descendants(os.getpid())) - before)
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield seen
    finally:
        over.set()
        watcher.join()


def left_of(seen: set[int]) -> list[str]:
    """What still runs of these, or as the user of a slot that one of them may have had."""
    users = {first_user(one) + slot for one in seen for slot in range(MOST_SLOTS)}
    left = []
    for process in filter(str.isdigit, os.listdir("/proc")):
        with suppress(FileNotFoundError, ProcessLookupError):
            if int(process) in seen or os.stat(f"/proc/{process}").st_uid in users:
                left.append(Path(f"/proc/{process}/cmdline").read_text())
    return left


def test_memory_of_all_processes_together_is_bounded():
    """8 processes of 150 MB want 1,200 MB and may have 400; between two looks they get a little more."""
    fill = """
import os, time
for _ in range(8):
    if os.fork() == 0:
        held = bytearray(150 << 20)
        for page in range(0, len(held), 4096):
            held[page] = 1
        time.sleep(60)
time.sleep(60)
"""
    most, over = 0, threading.Event()
    others = set(memory.children(os.getpid()))  # servers that tests before this one left running
    own = Path("/proc/self/cmdline").read_bytes()

    def bytes_of(child: int) -> int:
        with suppress(FileNotFoundError, ProcessLookupError):
            # Until it is a program of its own it shares the memory of this process, which may be large.
            if child not in others and Path(f"/proc/{child}/cmdline").read_bytes() != own:
                return memory.held(child)[0]
        return 0

    def watch() -> None:
        nonlocal most
        while not over.is_set():
            most = max(most, sum(map(bytes_of, memory.children(os.getpid()))))
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    (verdict,) = run_programs([Program(fill, timeout=20.0)], limits=Limits(total_memory=400 << 20))
    over.set()
    watcher.join()

    assert verdict.reason == "memory"
    assert 400 << 20 < most < 800 << 20  # what watches and starts is in it too


def test_whoever_started_the_programs_is_killed_and_nothing_runs_on(tmp_path):
    script = "from eval_platform.sandbox import *; run_programs([Program('while True: pass', timeout=60.0)])"
    with subprocess.Popen([sys.executable, "-c", script], cwd=REPOSITORY) as process:
        _wait(lambda: any(map(_runs_a_program, memory.descendants(process.pid))), "no program was started")
        below = set(memory.descendants(process.pid))
        process.send_signal(signal.SIGKILL)
    _wait(lambda: left_of(below) == [], "something runs on")


def _runs_a_program(process: int) -> bool:
    with suppress(FileNotFoundError, ProcessLookupError):
        return "/sandbox/runner.py" in Path(f"/proc/{process}/cmdline").read_text()
    return False


def _wait(until, otherwise: str) -> None:
    deadline = time.monotonic() + 20
    while not until():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.02)


def test_without_bubblewrap_it_refuses_and_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SandboxError, match="apt-get install bubblewrap"):
        run_programs([Program("pass")])
    with pytest.raises(SandboxError, match="apt-get install bubblewrap"):
        describe("warm")


def test_where_namespaces_are_forbidden_it_refuses_and_names_the_setting():
    """In a namespace whose limit of user namespaces is used up, as where an administrator forbids them."""
    script = "from eval_platform.sandbox import *; describe()"
    forbidden = subprocess.run(
        ["bwrap", "--unshare-user", "--disable-userns", "--dev-bind", "/", "/", sys.executable, "-c", script],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    assert forbidden.returncode == 1
    assert "SandboxError" in forbidden.stderr
    assert "sysctl user.max_user_namespaces" in forbidden.stderr


def test_it_works_without_roots_rights():
    """As a user who is nobody: then the programs run as that user, in namespaces of their own."""
    command = [sys.executable]
    if os.geteuid() == 0:
        python = shutil.which("python3", path="/usr/bin")
        if python is None or sys.version_info[:2] != (3, 11) or shutil.which("setpriv") is None:
            pytest.skip("needs setpriv and a Python in /usr/bin that another user may read")
        command = ["setpriv", "--reuid", "1234", "--regid", "1234", "--clear-groups", python]
    forks = ATTACKS["fork 400 times"][0].replace("time.sleep(30)", "time.sleep(9)")
    hostile = ["import os\n" + forks, "open('/etc/passwd')", "1/0", "while True: pass"]
    script = (
        "import json, sys\n"
        "from eval_platform.sandbox import *\n"
        "programs = [Program(source, 1.0) for source in json.load(sys.stdin)]\n"
        "for mode in ('cold', 'warm'):\n"
        "    print(*[verdict.reason for verdict in run_programs(programs, mode)])\n"
    )
    said = subprocess.run(
        [*command, "-B", "-c", script],
        env={"PYTHONPATH": str(REPOSITORY), "PATH": os.environ["PATH"]},
        input=json.dumps(hostile),
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.stdout.splitlines() == ["passed exception exception timeout"] * 2, said.stderr


def test_unsafe_is_unsafe_and_says_so():
    """What the sandbox hides is there: the mode is for machines that have nothing to hide."""
    programs = [
        Program(f"import os\nassert os.path.exists({str(REPOSITORY)!r})"),
        Program("assert 1 == 2"),
        Program("while True: pass", timeout=0.3),
        Program("import os\nos._exit(0)"),
    ]
    assert [v.reason for v in run_programs(programs, "unsafe")] == ["passed", "assertion", "timeout", "exit"]
    assert run_programs(programs[:1])[0].reason == "assertion"
    assert describe("unsafe").startswith("UNSAFE: plain processes, ")
    assert re.match(r"bubblewrap [\d.]+, cold, Python 3\.[\d.]+, 512 MiB a process, 1024 MiB in all", describe("cold"))


@pytest.mark.parametrize(
    ("column", "header", "pattern"),
    [
        (0, "/usr/include/x86_64-linux-gnu/asm/unistd_64.h", r"#define __NR_(\w+)\s+(\d+)"),
        (1, "/usr/include/asm-generic/unistd.h", r"#define __NR(?:3264)?_(\w+)\s+(\d+)"),
    ],
)
def test_system_calls_have_the_kernels_numbers(column, header, pattern):
    if not Path(header).exists():
        pytest.skip(f"the kernel's headers are needed: no {header} (apt-get install linux-libc-dev)")
    known = {name: int(number) for name, number in re.findall(pattern, Path(header).read_text())}
    ours = {name: numbers[column] for name, numbers in FORBIDDEN.items()}
    assert {name: known.get(name) for name in ours} == ours
    assert (known["clone"], known["clone3"], known["ioctl"]) == (CLONE[column], CLONE3, IOCTL[column])
    assert known["set_mempolicy_home_node"] <= LAST_KNOWN
