"""Hostile programs, each with the verdict that shows it was stopped.

The first are the project's measured list (`shared/prototypes/sandbox/attack2.py` and `forge.py`), written anew; the
rest are our own. A program asserts that its attack fails, so that "passed" means: stopped, and the program could say
so. {host} stands for a dict of what there is outside to reach for.
"""

import textwrap
from collections.abc import Mapping
from typing import Any

_HEAD = """
import ctypes, errno, os
host = {host}
libc = ctypes.CDLL(None, use_errno=True)

def fails(attempt, *errors):
    try:
        attempt()
    except errors or OSError:
        return True
    return False

def call(number, *arguments):
    "A system call by its number: the name of the error, or OK."
    result = libc.syscall(number, *arguments)
    return "OK" if result >= 0 else errno.errorcode[ctypes.get_errno()]
"""

# name -> (program, verdicts that mean it was stopped)
ATTACKS: dict[str, tuple[str, tuple[str, ...]]] = {}


def _attack(name: str, program: str, *stopped: str) -> None:
    ATTACKS[name] = (textwrap.dedent(program), stopped or ("passed",))


def programs(host: Mapping[str, Any]) -> dict[str, str]:
    """Every attack's program, against this host."""
    head = _HEAD.replace("{host}", repr(dict(host)))
    return {name: head + program for name, (program, _) in ATTACKS.items()}


# -- attack2.py ------------------------------------------------------------------------------------------------------

_attack("read /etc/shadow", "assert fails(lambda: open('/etc/shadow')) and fails(lambda: open('/etc/passwd'))")
_attack(
    "read the host's folders",
    """
    assert not os.path.exists(host["repository"])
    assert os.listdir("/tmp") == [] and os.getcwd() == "/tmp"
    assert sorted(os.listdir("/proc/1/root")) == sorted(os.listdir("/"))
    assert not {"home", "etc", "var", "run", "sys"} & set(os.listdir("/"))
    """,
)
_attack("secrets in os.environ", "assert host['secret'] not in os.environ and not os.environ")
_attack(
    "secrets in /proc/*/environ",
    """
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{process}/environ", "rb") as file:
                assert host["secret"].encode() not in file.read()
        except OSError:
            pass
    """,
)
_attack(
    "TCP to the host", "import socket\nassert fails(lambda: socket.create_connection(('127.0.0.1', host['port']), 1))"
)
_attack(
    "Unix sockets of the host",
    """
    import socket
    assert fails(lambda: socket.socket(socket.AF_UNIX).connect(host["abstract"]))
    assert fails(lambda: socket.socket(socket.AF_UNIX).connect(host["socket"]))
    """,
)
_attack(
    "UDP, raw and netlink sockets",
    """
    import socket
    assert all(fails(lambda: socket.socket(*kind)) for kind in ((2, 2, 0), (2, 3, 1), (16, 3, 0), (40, 1, 0)))
    """,
)
_attack(
    "write outside its tmp",
    """
    for place in ("/usr", "/etc", "", "/lib", "/sandbox", "/dev", "/dev/shm", "/var/tmp", "/root", host["repository"]):
        assert fails(lambda: open(place + "/pwned", "w")), place
    assert fails(lambda: os.mkdir("/pwned")) and fails(lambda: os.rename("/sandbox", "/box"))
    assert fails(lambda: open("/sandbox/runner.py", "a")) and fails(lambda: os.chmod("/sandbox/runner.py", 0o777))
    assert fails(lambda: open("/proc/sys/kernel/core_pattern", "w")) and fails(lambda: open("/proc/sysrq-trigger", "w"))
    """,
)
_attack(
    "kill what is outside",
    """
    assert fails(lambda: os.kill(host["victim"], 9), ProcessLookupError, PermissionError)
    for number in (15, 9):
        os.kill(os.getppid(), number)  # the first process of the namespace: it lives on
    assert os.getppid() > 0
    """,
)
_attack(
    "fork 400 times",
    """
    import time
    made = 0
    try:
        for _ in range(400):
            if os.fork() == 0:
                time.sleep(30)
                os._exit(0)
            made += 1
    except BlockingIOError:
        pass
    assert 0 < made <= 16, made
    """,
)
_attack("2 GiB at once", "assert fails(lambda: bytearray(2 << 30), MemoryError)")
_attack(
    "fork and fill: 8 x 300 MB",
    """
    import time
    for _ in range(8):
        if os.fork() == 0:
            held = bytearray(300 << 20)
            for page in range(0, len(held), 4096):
                held[page] = 1
            time.sleep(30)
    time.sleep(30)
    """,
    "memory",
)
_attack(
    "fill the disk",
    """
    def fill():
        for n in range(14):
            with open(f"/tmp/{n}", "wb") as file:
                file.write(bytes(7 << 20))
    assert fails(fill)
    assert sum(os.path.getsize(f"/tmp/{name}") for name in os.listdir("/tmp")) <= 16 << 20
    """,
)
_attack("run for ever", "while True: pass", "timeout")
_attack(
    "sleep for ever, deaf to signals",
    """
    import signal, time
    for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_IGN)
    while True:
        time.sleep(1000)
    """,
    "timeout",
)
_attack(
    "leave a daemon behind",
    """
    import time
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.closerange(0, 64)
            time.sleep(300)
        os._exit(0)
    """,
)
_attack(
    "inherited descriptors",
    """
    import stat
    there = {}
    for descriptor in range(64):
        try:
            there[descriptor] = os.fstat(descriptor)
        except OSError:
            pass
    assert set(there) <= {0, 1, 2, 4, 5}, there
    assert all(there[n].st_rdev == os.makedev(1, 3) for n in (0, 1, 2))
    assert all(stat.S_ISFIFO(there[n].st_mode) for n in (4, 5))
    """,
)
_attack(
    "system calls that lead out",
    """
    calls = {
        "unshare": (272, 0x10000000), "mount": (165, b"t", b"/tmp", b"tmpfs", 0, 0), "ptrace": (101, 0, 0, 0, 0),
        "bpf": (321, 0, 0, 0), "io_uring": (425, 4, 0), "keyctl": (250, 0, -3, 0), "userfaultfd": (323, 0),
        "perf": (298, 0, 0, -1, -1, 0), "setns": (308, 4, 0), "chroot": (161, b"/tmp"), "personality": (135, 8),
    }
    if os.uname().machine == "x86_64":
        said = {name: call(*arguments) for name, arguments in calls.items()}
        assert set(said.values()) == {"EPERM"}, said
    """,
)
_attack("flood the output", "import sys\nfor _ in range(200):\n    sys.stdout.write('x' * (1 << 20))")

# -- forge.py --------------------------------------------------------------------------------------------------------

_attack("sys.exit(0)", "import sys\nsys.exit(0)", "exit")
_attack("os._exit(0)", "os._exit(0)", "exit")
_attack(
    "the mark in the frames",
    r"""
    import re, sys
    seen, todo = set(), [sys._getframe()]
    while todo:
        it = todo.pop()
        if id(it) in seen or len(seen) > 20000:
            continue
        seen.add(id(it))
        if isinstance(it, (str, bytes)):
            text = it if isinstance(it, str) else it.decode("latin-1")
            assert not re.fullmatch("[0-9a-f]{32}", text), it
        if isinstance(it, type(sys._getframe())):
            todo += [it.f_back, it.f_locals, it.f_globals, it.f_code.co_consts]
        elif isinstance(it, dict):
            todo += it.values()
        elif isinstance(it, (list, tuple, set)):
            todo += it
    assert len(seen) > 50
    """,
)
_attack(
    "start the host's programs",
    "import subprocess\nassert fails(lambda: subprocess.run(['id']))\nassert os.system('id')",
)
_attack("ten thousand million numbers", "held = [0] * 10**9", "memory")
_attack("recurse for ever", "def f(n): return f(n + 1)\nf(0)", "exception")
_attack("the host's packages", "import numpy", "exception")
_attack("semaphores in shared memory", "import multiprocessing\nmultiprocessing.Pool(2).map(abs, [-1])", "exception")

# -- our own ---------------------------------------------------------------------------------------------------------

_REPORT = 'os.write(5, b"passed\\n0.1\\n" + mark + b"\\n")\n'
_attack(
    "read the mark and report oneself",
    f"mark = os.read(4, 64)\n{_REPORT}os._exit(0)",
    "forged",
)
_attack("report without the mark", f"mark = b'0' * 32\n{_REPORT}os._exit(0)", "forged")
_attack("close every descriptor", "os.closerange(0, 64)", "exit", "forged")
_attack(
    "a forked child reports",
    f"if os.fork():\n    os.wait()\n    os._exit(1)\nmark = os.read(4, 64)\n{_REPORT}os._exit(0)",
    "forged",
)
_attack(
    "rewrite the runner's own functions",
    f"""
import sys
frame = sys._getframe()
while frame.f_back:
    frame = frame.f_back
def described(error):
    mark = os.read(4, 64)
    {_REPORT.strip()}
    os._exit(0)
for one in [f for f in (frame, sys._getframe().f_back)]:
    one.f_globals["described"] = described
assert False
""",
    "forged",
)
_attack(
    "jump over the assertions",
    """
    import sys
    def jump(frame, event, argument):
        if event == "line" and frame.f_code.co_filename == "<program>" and frame.f_lineno >= first:
            try:
                frame.f_lineno = frame.f_lineno + 1
            except ValueError:
                os.read(4, 0)
                report()
        return jump
    def report():
        sys.settrace(None)
        mark = os.read(4, 64)
        os.write(5, b"passed\\n0.1\\n" + mark + b"\\n")
        os._exit(0)
    first = sys._getframe().f_lineno + 3
    sys._getframe().f_trace = jump
    sys.settrace(jump)
    assert 1 == 2
    assert 1 == 3
    """,
    "forged",
    "assertion",
    "exception",
)
_attack("another AssertionError", "import builtins\nbuiltins.AssertionError = SystemExit\nassert 1 == 2", "assertion")
_attack(
    "memory that belongs to no process",
    """
    if os.uname().machine == "x86_64":
        calls = {
            "shmget": (29, 0, 1 << 30, 0o1600), "memfd_create": (319, b"x", 0), "msgget": (68, 0, 0o1600),
            "semget": (64, 0, 1, 0o1600), "mq_open": (240, b"/x", 0o102, 0o600, 0), "memfd_secret": (447, 0),
        }
        said = {name: call(*arguments) for name, arguments in calls.items()}
        assert set(said.values()) == {"EPERM"}, said
    """,
)
_attack(
    "namespaces by clone, clone3 and 32-bit calls",
    """
    if os.uname().machine == "x86_64":
        for flag in (0x10000000, 0x20000, 0x20000000, 0x40000000, 0x2000000):
            assert call(56, flag | 17, 0, 0, 0, 0) == "EPERM"
        assert call(435, 0, 0) == "ENOSYS"
        assert call(0x40000000 + 39) == "ENOSYS"
        assert call(500, 0) == "ENOSYS"
    """,
)
_attack(
    "a million empty files",
    """
    def fill():
        for n in range(1_000_000):
            os.close(os.open(f"/tmp/{n}", os.O_CREAT | os.O_WRONLY))
    assert fails(fill) and len(os.listdir("/tmp")) <= 1000
    """,
)
_attack(
    "raise one's own limits",
    """
    import resource
    for what in (resource.RLIMIT_AS, resource.RLIMIT_NPROC, resource.RLIMIT_NOFILE, resource.RLIMIT_FSIZE):
        assert fails(lambda: resource.setrlimit(what, (-1, -1)), ValueError, OSError)
    assert fails(lambda: os.nice(-5)) and fails(lambda: os.setuid(0)) and os.getuid() != 0
    """,
)
_attack(
    "threads that never end",
    "import threading, time\nfor _ in range(5):\n    threading.Thread(target=time.sleep, args=(300,)).start()",
)
_attack("flood the report", "for _ in range(400):\n    os.write(5, b'x' * 65536)\nos._exit(0)", "exit")
_attack(
    "an error whose text never ends",
    "class E(Exception):\n    def __str__(self):\n        while True: pass\nraise E",
    "timeout",
)
_attack("a text that no parser takes", "x = " + "(" * 50_000, "syntax", "memory", "crash")
_attack("stop oneself", "import signal\nos.kill(os.getpid(), signal.SIGSTOP)", "timeout")
_attack(
    "take the control run's last line for what it is",
    """
    class Sly:
        def __eq__(self, other):
            mark = os.read(4, 64)
            os.write(5, b"passed\\n0.1\\n" + mark + b"\\n")
            os._exit(0)
    assert Sly() == 1
    """,
    "forged",
)

# -- places that wait beside the one in which a program runs (warm) --------------------------------------------------

_attack(
    "signals to one's process group, in which those who started it may be",
    """
    import signal
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
        os.kill(0, number)
        os.killpg(0, number)
    """,
)
_attack(
    "see, signal or slow down other programs of its user",
    """
    import resource, signal
    assert set(filter(str.isdigit, os.listdir("/proc"))) == {"1", str(os.getpid())}
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    assert fails(lambda: os.kill(-1, signal.SIGTERM))  # there is nobody but itself and the first process
    for process in range(3, 300):
        if process != os.getpid():
            assert fails(lambda: os.kill(process, 0))
            assert fails(lambda: resource.prlimit(process, resource.RLIMIT_CPU, (1, 1)))
            assert fails(lambda: os.sched_setaffinity(process, {0}))
    """,
)
_attack(
    "a socket of whoever started it, through /proc",
    """
    for process in filter(str.isdigit, os.listdir("/proc")):
        for number in range(64):
            try:
                held = os.readlink(f"/proc/{process}/fd/{number}")
            except OSError:
                continue
            assert not held.startswith("socket:"), (process, number)
    """,
)
_attack(
    "the memory of the first process",
    """
    import time
    with open("/proc/1/maps") as file:
        places = [line.split()[0].split("-") for line in file if " rw-p " in line]
    with open("/proc/1/mem", "wb", buffering=0) as file:
        for first, last in places:
            file.seek(int(first, 16))
            file.write(bytes(int(last, 16) - int(first, 16)))
    """,
    "passed",
    "exception",
    "exit",
    "crash",
    "timeout",
)
