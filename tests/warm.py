"""Programs of the tests that need torch, run in forks of one process that has imported it: a second instead of ten.

A fork is a process of its own, with memory, threads and kernels of its own; only the imports are not made again.
"""

import atexit
import json
import os
import subprocess
import sys
import tempfile
import traceback
from functools import cache
from pathlib import Path
from typing import Any


def run_warm(program: str, *arguments: str) -> tuple[str, str]:
    """Standard output and error of `python -c program arguments...`, torch and the engine imported before it begins."""
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        json.dump({"program": program, "arguments": arguments, "folder": folder}, server.stdin)
        server.stdin.write("\n")
        server.stdin.flush()
        code = server.stdout.readline().strip()
        out, err = (Path(folder, name).read_text() for name in ("stdout", "stderr"))
        assert code == "0", f"ended with {code}: {err}"
        return out, err


@cache
def _server() -> subprocess.Popen[str]:
    server = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.kill)
    return server


def _serve() -> None:
    import transformers.modeling_utils  # noqa: F401

    import eval_platform.engine.loading  # noqa: F401

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # a library's own words are no answers
    for line in sys.stdin:
        job = json.loads(line)
        if (pid := os.fork()) == 0:
            _run(job)
        answers.write(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n")


def _run(job: dict[str, Any]) -> None:
    """In the fork: run the program and leave, whatever happens."""
    code = 1
    try:
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(Path(job["folder"], name), os.O_WRONLY | os.O_CREAT), number)
        sys.argv = ["-c", *job["arguments"]]
        exec(compile(job["program"], "<program>", "exec"), {"__name__": "__main__"})
        code = 0
    except BaseException:  # noqa: BLE001 -- the last word of a process: say it, end with its code
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
