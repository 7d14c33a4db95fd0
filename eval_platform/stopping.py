"""When is this worker told to leave, and is it gone in time?

Python runs a signal's handler between two of its own steps. So a long call into a library delays it, and the exception
it raises can be lost: it is ignored in a destructor, and an extension module that is being imported makes an
ImportError of it. Therefore what was asked is kept and looked at again, and a thread that the signal wakes by itself
ends the process when that is still there after LEAVE_SECONDS: 10 s are promised, and whoever started the worker may
kill it then. What protects the work is the journal, not the way out.
"""

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

LEAVE_SECONDS = 8.0

_asked = False
_held_back = 0  # how many blocks deep


class Stopped(BaseException):
    """SIGTERM: flush and leave. Not an Exception, so that no task's handler takes it for a failure."""


def obey_sigterm(code: int) -> None:
    """From now on SIGTERM raises Stopped in the main thread, which calls this. A process that is still there
    LEAVE_SECONDS later says where it hangs, on standard error, and ends with `code`. Later SIGTERMs change nothing."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)  # written to at once, whatever Python is in the middle of
    threading.Thread(target=_end_in_time, args=(reading, code), name="SIGTERM", daemon=True).start()
    signal.signal(signal.SIGTERM, _on_sigterm)


def was_asked() -> bool:
    """Whether this process was told to leave: what goes wrong from then on may be the stop's own doing."""
    return _asked


def is_over() -> None:
    """There is nothing left to stop: from now on SIGTERM is ignored. Raises Stopped where it came just before."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextmanager
def held_back() -> Iterator[None]:
    """Within, the stop waits: for a few steps of the main thread that belong together. Raises Stopped at the end."""
    global _held_back
    _held_back += 1
    try:
        yield
    finally:
        _held_back -= 1
    if _asked and not _held_back:
        raise Stopped


def _on_sigterm(_number: int, _frame: FrameType | None) -> None:
    global _asked
    is_first, _asked = not _asked, True
    if is_first and not _held_back:
        raise Stopped


def _end_in_time(reading: int, code: int) -> None:
    while os.read(reading, 1) != bytes([signal.SIGTERM]):  # other signals with a handler wake us too
        pass
    time.sleep(LEAVE_SECONDS)
    print(f"still here {LEAVE_SECONDS} s after SIGTERM; ended where it hangs:", file=sys.stderr, flush=True)
    faulthandler.dump_traceback()
    os._exit(code)
