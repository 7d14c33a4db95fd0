"""How are processes tied to the one that watches them, and how are they ended?"""

import ctypes
import os
import signal
from contextlib import suppress

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_LIBC = ctypes.CDLL(None, use_errno=True)


def adopt_orphans() -> None:
    """Whatever our descendants leave behind becomes our child. Raises OSError."""
    if _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def die_with_parent() -> None:
    """This process is killed when its parent ends. Makes no promise where the kernel refuses."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def end(process: int) -> None:
    """Kill a child of ours and wait for it."""
    send(process, signal.SIGKILL)
    with suppress(ChildProcessError):  # it was waited for already
        os.waitpid(process, 0)


def send(process: int, number: int) -> None:
    with suppress(ProcessLookupError):  # it has ended by itself
        os.kill(process, number)
