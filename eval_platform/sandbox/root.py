"""What does a program see of the disk? A root folder with what Python needs and nothing else.

The root is put together in a mount namespace of the supervisor's own: a tmpfs with copies of the shared libraries and
of the interpreter, and the standard library mounted into it. Nobody outside sees it, nothing has to be removed, and a
program's own user can read it where the interpreter lies in somebody's home. Packages are left out.
"""

import ctypes
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eval_platform.errors import SandboxError

SCRIPTS = "/sandbox"  # where runner.py and server.py lie in the root
_NEW_USER, _NEW_MOUNTS = 0x10000000, 0x00020000
_READ_ONLY, _BIND, _RECURSIVE, _PRIVATE = 1, 4096, 16384, 1 << 18
_NO_SUID_NO_DEVICES = 2 | 4
_DETACH = 2
_PLACES = ("/mnt", "/media", "/srv", "/opt", "/home", "/tmp")
# Windows on a screen: their libraries are many and their modules of no use without a screen.
_LEFT_OUT = ("_tkinter.",)


@dataclass(frozen=True, slots=True)
class Python:
    """The interpreter that programs run with. libraries: the shared libraries it and its modules load, as loaded."""

    executable: str
    standard_library: str
    libraries: tuple[str, ...]

    @property
    def library_path(self) -> str:
        """LD_LIBRARY_PATH for a root that has no cache of the dynamic linker."""
        return ":".join(dict.fromkeys(os.path.dirname(path) for path in self.libraries))


def this_python() -> Python:
    """The interpreter under this process, without its virtual environment. Raises SandboxError."""
    executable = os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)
    standard_library = os.path.realpath(sysconfig.get_paths(vars={"installed_base": sys.base_prefix})["stdlib"])
    modules = sorted(
        str(path) for path in Path(standard_library, "lib-dynload").glob("*.so") if not path.name.startswith(_LEFT_OUT)
    )
    return Python(executable, standard_library, _libraries(executable, modules))


def _libraries(executable: str, modules: Sequence[str]) -> tuple[str, ...]:
    """The shared libraries that the dynamic linker loads for all of them, by the paths under which it finds them.

    What ldd does for one file after another, in one go: the linker lists what it would load, and starts nothing.
    """
    asked = {"LD_TRACE_LOADED_OBJECTS": "1", "LD_PRELOAD": ":".join(modules)}
    try:
        said = subprocess.run(
            [executable, "-c", ""], env={**os.environ, **asked}, capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise SandboxError(
            f"the shared libraries of {executable} cannot be listed: {error}", remedy="use a Python linked with glibc"
        ) from error
    found: set[str] = set()
    for line in said.splitlines():
        words = line.split()  # "libm.so.6 => /lib/libm.so.6 (0x7f...)", or "/lib64/ld-linux.so.2 (0x7f...)"
        path = words[2] if "=>" in words and len(words) > 2 else words[0] if words else ""
        if path.startswith("/"):
            found.add(path)
    return tuple(sorted(found - set(modules)))


def enter_own_mounts() -> None:
    """Give this process mounts of its own; without root's rights also a user namespace, in which it may mount.

    Raises SandboxError naming what forbids it.
    """
    user, group = os.getuid(), os.getgid()
    flags = _NEW_MOUNTS if user == 0 else _NEW_MOUNTS | _NEW_USER
    try:
        _done(_LIBC.unshare(flags))
        if user != 0:
            for name, text in (
                ("setgroups", "deny"),
                ("uid_map", f"{user} {user} 1"),
                ("gid_map", f"{group} {group} 1"),
            ):
                Path("/proc/self", name).write_text(text)
        _mount("none", "/", None, _RECURSIVE | _PRIVATE)
    except OSError as error:
        raise SandboxError(f"this process may make no namespaces of its own: {error}", remedy=NAMESPACES) from error


def assemble(python: Python) -> str:
    """Put the root together; returns the folder it was made in: the root is `root` there. Raises SandboxError.

    Call `enter_own_mounts` first.
    """
    needed = [python.executable, python.standard_library, *python.libraries, __file__]
    for place in _PLACES:
        if os.path.isdir(place) and not any(os.path.realpath(path).startswith(place + "/") for path in needed):
            break
    else:
        raise SandboxError(f"no folder to mount the sandbox's root on; tried {', '.join(_PLACES)}", remedy="mkdir /mnt")
    here = Path(__file__).parent
    scripts = {name: (here / name).read_bytes() for name in ("runner.py", "server.py")}
    try:
        _mount("tmpfs", place, "tmpfs", _NO_SUID_NO_DEVICES, "mode=755,size=512m")
        root = f"{place}/root"
        for path in (*python.libraries, python.executable):
            copy = root + path
            os.makedirs(os.path.dirname(copy), exist_ok=True)
            shutil.copyfile(path, copy)
            os.chmod(copy, 0o755)
        os.makedirs(root + python.standard_library)
        _mount(python.standard_library, root + python.standard_library, None, _BIND | _RECURSIVE)
        for packages in ("site-packages", "dist-packages"):
            folder = f"{root}{python.standard_library}/{packages}"
            if os.path.isdir(folder):
                _mount("tmpfs", folder, "tmpfs", _READ_ONLY | _NO_SUID_NO_DEVICES, "mode=755,size=4k")
        for name in ("proc", "dev", "tmp", SCRIPTS[1:]):
            os.makedirs(f"{root}/{name}", exist_ok=True)
        for name, text in scripts.items():
            Path(f"{root}{SCRIPTS}", name).write_bytes(text)
    except OSError as error:
        raise SandboxError(f"the sandbox's root cannot be put together: {error}", remedy=NAMESPACES) from error
    return place


def mount_tmp(folder: str, size: int, most: int, owner: int) -> None:
    """An empty tmpfs of `size` bytes on `folder` for one program, so that what it writes goes with it.

    most: how many files; a million empty ones fill the kernel's memory, and no size bounds them.
    """
    os.makedirs(folder, exist_ok=True)
    options = f"mode=700,size={size},nr_inodes={most},uid={owner},gid={owner}"
    _mount("tmpfs", folder, "tmpfs", _NO_SUID_NO_DEVICES, options)


def unmount_tmp(folder: str) -> None:
    """Let go of a program's tmpfs; with its last process it is gone."""
    _done(_LIBC.umount2(os.fsencode(folder), _DETACH), folder)


NAMESPACES = (
    "allow unprivileged user namespaces: `sysctl kernel.apparmor_restrict_unprivileged_userns=0` (Ubuntu), "
    "`sysctl kernel.unprivileged_userns_clone=1` (Debian), `sysctl user.max_user_namespaces=15000` (RHEL); in a "
    "container: `docker run --security-opt seccomp=unconfined --security-opt apparmor=unconfined --cap-add SYS_ADMIN`"
)
_LIBC = ctypes.CDLL(None, use_errno=True)


def _mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    as_bytes = [None if text is None else os.fsencode(text) for text in (source, target, kind, options)]
    _done(_LIBC.mount(*as_bytes[:3], ctypes.c_ulong(flags), as_bytes[3]), target)


def _done(result: int, what: str | None = None) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
