"""Inside the sandbox, warm: a Python that is ready forks for every program. Standard library only; run as a script.

    python server.py        a Unix socket on descriptor 3, the seccomp filter on 4

The first message is the limits, as a marshalled dict. From then on a few places are kept: each is new user, process
and mount namespaces with a /proc and a /tmp of their own, and in them a process without capabilities, behind the
filter, that waits for one program. What a program needs is made while others run, and every place is used once. The
server itself never sees a program: a new place says "ready" with a socket, through which it is given its three
descriptors (job, mark, report).

When the first process of a process namespace ends, the kernel ends all others and waits for them: when the server
then says "ended", with the place's number and wait status, nothing of the program is left to run.
"""

import ctypes
import gc
import marshal
import os
import signal
import socket
import sys

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
# What programs import most, so that a fork has it already.
import bisect  # noqa: F401
import collections  # noqa: F401
import copy  # noqa: F401
import datetime  # noqa: F401
import functools  # noqa: F401
import hashlib  # noqa: F401
import heapq  # noqa: F401
import itertools  # noqa: F401
import math  # noqa: F401
import operator  # noqa: F401
import random  # noqa: F401
import re  # noqa: F401
import statistics  # noqa: F401
import string  # noqa: F401
import typing  # noqa: F401

import runner

CONTROL, FILTER = 3, 4
PLACES = 3  # one in which a program runs, and two that wait: for its control run, and for the next program
NEW_USER, NEW_PROCESSES, NEW_MOUNTS = 0x10000000, 0x20000000, 0x00020000
CLONE = {"x86_64": 56, "aarch64": 220}
NO_SUID_NO_DEVICES = 2 | 4
PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 24, 38, 22, 2
USER, GROUP = os.getuid(), os.getgid()  # asked here, for in a new user namespace they have no names yet

libc = ctypes.CDLL(None, use_errno=True)
python = ctypes.PyDLL(None, use_errno=True)  # its calls keep the interpreter's lock


class Filter(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("steps", ctypes.c_void_p))


def serve():
    control = socket.socket(fileno=CONTROL)
    with os.fdopen(FILTER, "rb") as file:
        steps = file.read()
    held = ctypes.create_string_buffer(steps, len(steps))
    program = Filter(len(steps) // 8, ctypes.addressof(held))
    limits = marshal.loads(control.recv(4096))
    with open("/proc/sys/kernel/cap_last_cap") as file:
        capabilities = int(file.read()) + 1
    gc.collect()
    gc.freeze()  # what lives now is never looked through again, so that forks share its pages
    places = {}
    number = 0
    while True:
        if len(places) == PLACES:
            process, status = os.waitpid(-1, 0)
            control.send(b"ended %d %d" % (places.pop(process), status))
        process = fork_apart()
        if process == 0:
            first_process(number, control, limits, capabilities, program)
        places[process] = number
        number += 1


def fork_apart():
    """os.fork into new user, process and mount namespaces: 0 in the child, its process id here. Raises OSError.

    One step instead of a fork, unshare and another fork, each of which copies this process. What Python must be told
    around a fork is told (PyOS_BeforeFork, ...). The C library is not told: the child may do what `first_process`
    does, and programs run in a child of it that the C library has forked.
    """
    flags = NEW_USER | NEW_PROCESSES | NEW_MOUNTS | signal.SIGCHLD
    python.PyOS_BeforeFork()
    process = python.syscall(CLONE[os.uname().machine], flags, None, None, None, None)
    number = ctypes.get_errno()
    if process == 0:
        python.PyOS_AfterFork_Child()
    else:
        python.PyOS_AfterFork_Parent()
    if process < 0:
        raise OSError(number, os.strerror(number))
    return process


def first_process(number, control, limits, capabilities, program):
    """The first process of a place: make it, say that it is ready, fork what waits for the program, end as it ends."""
    try:
        os.setsid()  # signals to the process group of a program reach nobody outside its namespace
        for name, text in (("setgroups", "deny"), ("uid_map", f"{USER} {USER} 1"), ("gid_map", f"{GROUP} {GROUP} 1")):
            file = os.open(f"/proc/self/{name}", os.O_WRONLY)
            os.write(file, text.encode())
            os.close(file)
        done(libc.mount(b"proc", b"/proc", b"proc", NO_SUID_NO_DEVICES, None))
        size = b"size=%d,nr_inodes=%d" % (limits["files"], limits["most_files"])
        done(libc.mount(b"tmpfs", b"/tmp", b"tmpfs", NO_SUID_NO_DEVICES, size))
        os.chdir("/tmp")
        runner.limit(limits)
        for capability in range(capabilities):
            done(libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0))
        header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        done(libc.capset(header, none))
        done(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        done(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0))
        door, outside = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        socket.send_fds(control, [b"ready %d" % number], [outside.fileno()])
        outside.close()
        control.close()
        # What follows has no way to the server or to what watches it: no socket, and no standard error that is heard.
        runner.silence()
        child = os.fork()  # the first process of a namespace is deaf to most signals; a program is none
        if child == 0:
            wait_for_program(door)
        door.close()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os._exit(status if status >= 0 else 128 - status)  # 128 and the signal's number, as bubblewrap does
    except BaseException as error:  # noqa: BLE001 -- a child: whatever happened is said, and it ends here
        complain(error)


def wait_for_program(door):
    """In a child of the first process: run the program that comes through the door."""
    try:
        message, descriptors, _, _ = socket.recv_fds(door, 16, 3)
        if not message:  # nobody wants this place any more
            os._exit(0)
        door.close()
        for wanted, got in zip((10, 11, 12), descriptors, strict=True):  # out of the way of 3, 4 and 5
            os.dup2(got, wanted)
        for wanted, got in ((runner.JOB, 10), (runner.MARK, 11), (runner.REPORT, 12)):
            os.dup2(got, wanted)
        os.closerange(6, 256)
        job = runner.read_job()
        runner.limit_time(job)
        runner.run(job)
    except BaseException as error:  # noqa: BLE001 -- a child: whatever happened is said, and it ends here
        complain(error)


def complain(error):
    """Say on the standard error, which the supervisor reads, why no program was started."""
    os.write(2, f"{type(error).__name__}: {error}\n".encode())
    os._exit(runner.FAILED)


def done(result):
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


if __name__ == "__main__":
    serve()
