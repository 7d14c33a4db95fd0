"""One nursery for the workers that the tests of this process start: torch is imported once for all of them."""

import atexit
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from fault_tools import until

from eval_platform import launching

SOCKET = "nursery.sock"
_READY_SECONDS = 120.0


def lend(state: Path) -> None:
    """Let whoever launches a worker with this state folder find the nursery."""
    state.mkdir(parents=True, exist_ok=True)
    (state / SOCKET).symlink_to(_served() / SOCKET)


def start(folder: Path, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """A nursery whose socket is in `folder`, once it is ready."""
    command = [sys.executable, "-m", "eval_platform.nursery", str(folder)]
    process = subprocess.Popen(command, env={**launching.WORKER_ENV, **env})
    until(lambda: (folder / SOCKET).exists() or process.poll() is not None, "the nursery to be ready", _READY_SECONDS)
    assert process.poll() is None
    return process


@cache
def _served() -> Path:
    """The folder of its socket. It has the environment that `cli_tools.run_cli` gives."""
    folder = Path(tempfile.mkdtemp(prefix="nursery-"))
    atexit.register(start(folder, {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}).kill)
    return folder
