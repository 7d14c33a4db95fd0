"""Inside the sandbox, warm: a Python that is ready forks for every program. Standard library only; run as a script.

    python server.py        a Unix socket on descriptor 3, the seccomp filter on 4

For every message (three descriptors: job, mark, report) a program runs in new user, process and mount namespaces,
with a /proc and a /tmp of its own, without capabilities, behind the filter; then a message
says with which wait status it ended. When the first process of a process namespace ends, the kernel ends all others:
nothing is left to run.
"""

import ctypes
import gc
import marshal
import os
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
NEW_USER, NEW_PROCESSES, NEW_MOUNTS = 0x10000000, 0x20000000, 0x00020000
NO_SUID_NO_DEVICES = 2 | 4
PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 24, 38, 22, 2
CAPABILITIES = 64
FAILED = 77  # the exit status of a process that could not make its namespaces

libc = ctypes.CDLL(None, use_errno=True)


class Filter(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("steps", ctypes.c_void_p))


def serve():
    control = socket.socket(fileno=CONTROL)
    with os.fdopen(FILTER, "rb") as file:
        steps = file.read()
    held = ctypes.create_string_buffer(steps, len(steps))
    program = Filter(len(steps) // 8, ctypes.addressof(held))
    control.send(b"ready")
    gc.collect()
    gc.freeze()  # what lives now is never looked through again, so that forks share its pages
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 64, 3)
        if not message:
            return
        child = os.fork()
        if child == 0:
            control.close()
            apart(descriptors, program)
        for descriptor in descriptors:
            os.close(descriptor)
        status = os.waitpid(child, 0)[1]
        control.send(str(status).encode())


def apart(descriptors, program):
    """In the first child: new namespaces, whose first process is its child. Ends as that one ends."""
    try:
        user, group = os.getuid(), os.getgid()
        done(libc.unshare(NEW_USER | NEW_PROCESSES | NEW_MOUNTS))
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
        child = os.fork()
        if child == 0:
            first_process(descriptors, program)
        for descriptor in descriptors:
            os.close(descriptor)
        end_as(child)
    except BaseException as error:  # noqa: BLE001 -- a child: whatever happened is said, and it ends here
        complain(error)


def first_process(descriptors, program):
    try:
        for wanted, got in zip((10, 11, 12), descriptors, strict=True):  # out of the way of 3, 4 and 5
            os.dup2(got, wanted)
        for wanted, got in ((runner.JOB, 10), (runner.MARK, 11), (runner.REPORT, 12)):
            os.dup2(got, wanted)
        os.closerange(6, 256)
        with os.fdopen(runner.JOB, "rb") as file:
            job = marshal.loads(file.read())
        done(libc.mount(b"proc", b"/proc", b"proc", NO_SUID_NO_DEVICES, None))
        done(
            libc.mount(
                b"tmpfs",
                b"/tmp",
                b"tmpfs",
                NO_SUID_NO_DEVICES,
                b"size=%d,nr_inodes=%d" % (job["files"], job["most_files"]),
            )
        )
        os.chdir("/tmp")
        runner.limit(job)
        for capability in range(CAPABILITIES):
            libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)  # fails for those that this kernel does not have
        header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        done(libc.capset(header, none))
        done(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        done(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0))
        child = os.fork()  # the first process of a namespace is deaf to most signals; a program is none
        if child == 0:
            runner.run(job)
        end_as(child)
    except BaseException as error:  # noqa: BLE001 -- a child: whatever happened is said, and it ends here
        complain(error)


def end_as(child):
    """Wait for the child and end as it ended: with its status, or 128 and the signal's number (as bubblewrap does)."""
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os._exit(status if status >= 0 else 128 - status)


def complain(error):
    """Say on the standard error, which the supervisor reads, why no program was started."""
    os.write(2, f"{type(error).__name__}: {error}\n".encode())
    os._exit(FAILED)


def done(result):
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


if __name__ == "__main__":
    serve()
