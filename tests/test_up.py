"""What `eval-platform up` leaves behind when it is stopped: nothing, whatever its servers are busy with."""

import sys
import time
from pathlib import Path

import psutil
import pytest
from fault_tools import until

from eval_platform import up
from eval_platform.config import Config

# A server that is in no hurry, with a run at work: neither ends for a polite word.
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if len(sys.argv) == 1:
    subprocess.Popen([sys.executable, __file__, "run"])
time.sleep(600)
"""


def test_a_run_at_work_ends_with_the_server_that_waits_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(up, "RUNS_SECONDS", 0.2)
    (tmp_path / "server.py").write_text(STUBBORN)
    config = Config(folder=tmp_path, state=str(tmp_path / "state"))
    commands = {"code_server": [sys.executable, str(tmp_path / "server.py")]}
    with (tmp_path / "lock").open("ab") as lock:
        platform = up.Platform(config, "http://127.0.0.1:1", commands, {}, lock)
        platform.start("code_server")
        server = psutil.Process(platform.processes["code_server"].pid)
        (run,) = until(server.children, "its run")

        begun = time.monotonic()
        platform.stop()

    assert time.monotonic() - begun < up.STOP_SECONDS / 2  # which the other servers may take
    assert not server.is_running()
    assert not run.is_running() or run.status() == psutil.STATUS_ZOMBIE
