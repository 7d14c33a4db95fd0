"""Inside the sandbox: one program, from its first statement to its report. Standard library only; run as a script.

    python runner.py        a job on descriptor 3, the mark on 4, the report to 5

The job is a marshalled dict: source, limits. The report is lines: that it started; then the reason, the seconds, the
mark, and as the rest what was raised. (To import json would make a program's start half as long again.) The mark is
read from its pipe only after the program's last statement, and the report of a program that passed repeats it. A
program can read that pipe too, for it runs in this very process; the control run (supervisor.py) is what finds out.
"""

import builtins
import marshal
import os
import resource
import sys
import time

JOB, MARK, REPORT = 3, 4, 5
STARTED = b"started\n"
LONGEST_DETAIL = 300
FAILED = 77  # the exit status of a place that could not be made (server.py)


def main():
    job = read_job()
    limit(job)
    limit_time(job)
    silence()
    run(job)


def read_job():
    with os.fdopen(JOB, "rb") as file:
        return marshal.loads(file.read())


def limit(limits):
    """Give this process the limits that all programs have; its children inherit them."""
    for what, value in (
        (resource.RLIMIT_AS, limits["process_memory"]),
        (resource.RLIMIT_NPROC, limits["processes"]),
        (resource.RLIMIT_FSIZE, limits["files"]),
        (resource.RLIMIT_NOFILE, limits["open_files"]),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        _limit(what, value)


def limit_time(job):
    """Give this process the program's own limit: seconds of CPU."""
    _limit(resource.RLIMIT_CPU, job["cpu_seconds"])


def _limit(what, value):
    hard = resource.getrlimit(what)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(what, (value, value))


def silence():
    """Standard input has nothing to read, and what is written to the other two is heard by nobody."""
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.close(null)


def run(job):
    """Run the program as `__main__`, say what came of it, and end the process."""
    # The program may replace anything that it can reach by name; what comes after it was taken before it.
    write, leave, read, clock = os.write, os._exit, os.read, time.perf_counter
    reasons = {AssertionError: "assertion", MemoryError: "memory", SystemExit: "exit"}
    os.environ.clear()
    sys.argv = [""]
    sys.dont_write_bytecode = True
    module = type(sys)("__main__")
    module.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = module
    write(REPORT, STARTED)
    began = clock()
    reason, detail = "passed", ""
    try:
        code = compile(job.pop("source"), "<program>", "exec")
    except BaseException as error:  # noqa: BLE001 -- SyntaxError, ValueError (a NUL), RecursionError, ...
        reason, detail = reasons.get(type(error), "syntax"), described(error)
    else:
        try:
            exec(code, module.__dict__)
        except BaseException as error:  # noqa: BLE001 -- a program may raise anything
            reason = next((name for kind, name in reasons.items() if isinstance(error, kind)), "exception")
            detail = described(error)
    seconds, mark = clock() - began, b""
    if reason == "passed":
        try:
            mark = read(MARK, 256)
        except OSError:  # it has closed the descriptor: then it has no mark to show
            mark = b""
    write(REPORT, b"%b\n%r\n%b\n%b" % (reason.encode(), seconds, mark, detail.encode("utf-8", "backslashreplace")))
    leave(0)


def described(error):
    """What was raised, in a line; the error's own text may be hostile code."""
    name = type(error).__name__
    try:
        text = str(error)
    except BaseException:  # noqa: BLE001 -- whatever it raises, there is no text
        text = "(its text cannot be had)"
    return f"{name}: {text}"[:LONGEST_DETAIL] if text else name[:LONGEST_DETAIL]


if __name__ == "__main__":
    main()
