"""How does a program start: behind which command, with which descriptors, as which user?"""

import fcntl
import os
import platform
import shutil
from dataclasses import dataclass

from eval_platform.errors import SandboxError
from eval_platform.sandbox.processes import die_with_parent
from eval_platform.sandbox.root import NAMESPACES, Python, assemble, enter_own_mounts, mount_tmp
from eval_platform.sandbox.runner import REPORT
from eval_platform.sandbox.seccomp import seccomp_filter
from eval_platform.sandbox.slot import Slot
from eval_platform.sandbox.verdict import Limits, Mode, first_user

START_SECONDS = 30.0  # for bubblewrap and Python, on a machine that is busy
_ENVIRONMENT = {"PYTHONHASHSEED": "0"}  # sets in the same order every time: the same program has the same verdict


@dataclass(frozen=True, slots=True)
class Way:
    """How programs are run here. Of an unsafe one nothing else is there: no bubblewrap, filter (a descriptor), place.

    place: the folder, in mounts of our own, below which the sandbox's root and the slots' /tmp lie.
    """

    mode: Mode
    limits: Limits
    python: Python
    bubblewrap: str = ""
    filter: int = -1
    place: str = ""


def own_place(python: Python) -> str:
    """The sandbox's root, made once; from here on this process is in mounts of its own."""
    enter_own_mounts()
    return assemble(python)


def command(way: Way, slot: Slot, script: list[str]) -> list[str]:
    """The command that runs `script` in the slot; unsafe: that runs a program."""
    python = [way.python.executable, "-s", "-P", "-S", "-B"]
    if way.mode == "unsafe":
        return [*python, os.path.join(os.path.dirname(os.path.abspath(__file__)), "runner.py")]
    environment = {**_ENVIRONMENT, "LD_LIBRARY_PATH": way.python.library_path}
    seccomp = [] if way.mode == "warm" else ["--seccomp", str(REPORT + 1)]  # a warm program brings its own
    return [
        way.bubblewrap,
        *("--unshare-all", "--unshare-user", "--uid", "65534", "--gid", "65534", "--hostname", "sandbox"),
        *("--die-with-parent", "--new-session", "--cap-drop", "ALL", "--clearenv"),
        *(word for name, value in environment.items() for word in ("--setenv", name, value)),
        *("--ro-bind", f"{way.place}/root", "/", "--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev"),
        *("--bind", slot.tmp, "/tmp", "--chdir", "/tmp"),
        *seccomp,
        "--",
        *python,
        *script,
    ]


def spawn(way: Way, slot: Slot, ends: tuple[int, ...], words: list[str], folder: str | None = None) -> int:
    """Start the command `words` with `ends` (then the filter) as its descriptors 3, 4, ...; returns its process id."""
    _forget_complaints(slot)
    slot.complaints, complaints = os.pipe()
    os.set_blocking(slot.complaints, False)
    child = os.fork()
    if child:
        os.close(complaints)
        return child
    try:
        # Nothing of ours may be inherited but what is given; 100 and above is out of the way of what is wanted.
        held = [fcntl.fcntl(one, fcntl.F_DUPFD, 100) for one in (complaints, *ends)]
        if way.mode != "unsafe":  # opened anew, for a descriptor of ours would share its place in the file
            held.append(fcntl.fcntl(os.open(f"/proc/self/fd/{way.filter}", os.O_RDONLY), fcntl.F_DUPFD, 100))
        null = os.open(os.devnull, os.O_RDWR)
        for wanted, got in enumerate((null, null, *held)):
            os.dup2(got, wanted)
        os.closerange(len(held) + 2, 65536)
        os.setsid()
        if folder is not None:
            os.chdir(folder)
            die_with_parent()  # bubblewrap does this by itself
        if slot.group is not None:
            slot.group.enter()
        if slot.user is not None:
            os.setgroups([])
            os.setresgid(slot.user, slot.user, slot.user)
            os.setresuid(slot.user, slot.user, slot.user)
        os.execve(words[0], words, {} if folder is None else _ENVIRONMENT)
    except BaseException as error:  # noqa: BLE001 -- a child: whatever happened is said, and it ends here
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
        os._exit(127)


def mount(way: Way, slot: Slot) -> None:
    """Give the slot a /tmp of its own, empty."""
    owner = os.getuid() if slot.user is None else slot.user
    mount_tmp(slot.tmp, way.limits.files, way.limits.most_files, owner)


def why_not_started(way: Way, slot: Slot) -> SandboxError:
    """What to tell when what was started in the slot has ended before any program did."""
    try:
        said = os.read(slot.complaints, 4096).decode(errors="replace").strip()
    except BlockingIOError:
        said = ""
    return _not_started(way.mode, said)


def _forget_complaints(slot: Slot) -> None:
    if slot.complaints >= 0:
        os.close(slot.complaints)
        slot.complaints = -1


def find_bubblewrap() -> str:
    """The path of bwrap. Raises SandboxError naming how it is installed."""
    found = shutil.which("bwrap")
    if found is None:
        raise SandboxError(
            "bubblewrap (bwrap) is not installed, and a model's programs run in nothing less",
            remedy="apt-get install bubblewrap (or dnf install bubblewrap)",
        )
    return found


def _not_started(mode: Mode, said: str) -> SandboxError:
    """What to tell of a sandbox in which no program starts; `said`: its standard error."""
    if not said:
        return SandboxError(
            f"no program was started in {START_SECONDS:.0f} s, and nothing says why",
            remedy="run less beside it; `eval-platform doctor` tries the sandbox alone",
        )
    if mode == "unsafe":
        return SandboxError(f"Python does not start under its limits: {said}", remedy="see the line above")
    return SandboxError(f"the sandbox does not start: {said}", remedy=NAMESPACES)


def sealed(body: bytes) -> int:
    """A file in memory that nobody can change any more, not even who holds its descriptor."""
    file = os.memfd_create("sandbox", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with os.fdopen(os.dup(file), "wb") as writer:
        writer.write(body)
    os.lseek(file, 0, os.SEEK_SET)
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
    return file


def filter_file() -> int:
    """The filter of system calls, as a descriptor. Raises SandboxError where none is known for the machine."""
    try:
        return sealed(seccomp_filter(platform.machine()))
    except KeyError as error:
        raise SandboxError(
            f"no filter of system calls is known for this machine ({error})", remedy="run it on x86_64 or aarch64"
        ) from None


def users_of_slots(n: int) -> list[int | None]:
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
