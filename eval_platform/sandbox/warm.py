"""Outside the sandbox: what passes between the supervisor and a slot's server (server.py), which keeps places ready."""

import array
import marshal
import os
import socket
import struct
from dataclasses import asdict

from eval_platform.sandbox.processes import end
from eval_platform.sandbox.root import SCRIPTS, unmount_tmp
from eval_platform.sandbox.runner import FAILED
from eval_platform.sandbox.slot import Place, Slot
from eval_platform.sandbox.start import START_SECONDS, Way, command, mount, spawn, why_not_started

_CREDENTIALS = struct.Struct("3i")  # struct ucred: process, user, group


def serve(way: Way, slot: Slot) -> bool:
    """See that the slot's server runs and has a place ready; whether it had to be started.

    Raises SandboxError when it does not start.
    """
    if slot.server is not None:
        return False
    mount(way, slot)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    # The kernel says who sent a message, in our own numbers of processes: how else would we know a place's process?
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    slot.server = spawn(way, slot, (theirs.fileno(),), command(way, slot, [f"{SCRIPTS}/server.py"]))
    theirs.close()
    slot.control = ours
    ours.settimeout(START_SECONDS)
    try:
        ours.send(marshal.dumps(asdict(way.limits)))
        while not slot.places:
            ended = _hear(slot)
            if ended is not None and os.waitstatus_to_exitcode(ended[1]) == FAILED:
                break
    except (TimeoutError, ConnectionError):
        pass  # then no place is ready
    ours.settimeout(0)
    if not slot.places:
        stop_server(slot)
        raise why_not_started(way, slot)
    return True


def hear(slot: Slot) -> tuple[list[tuple[int, int]], bool]:
    """What the server has said by now: new places become the slot's, and those whose number and wait status are
    returned have ended; and whether the server lives.
    """
    ended: list[tuple[int, int]] = []
    while True:
        try:
            one = _hear(slot)
        except BlockingIOError:
            return ended, True
        except ConnectionError:
            return ended, False
        if one is not None:
            ended.append(one)


def _hear(slot: Slot) -> tuple[int, int] | None:
    """One message: that a place is ready, or the number and wait status of one that has ended.

    Raises ConnectionError when the server has ended, and as the socket's `recvmsg` does.
    """
    assert slot.control is not None
    room = socket.CMSG_SPACE(_CREDENTIALS.size) + socket.CMSG_SPACE(array.array("i").itemsize)
    said, beside, _, _ = slot.control.recvmsg(64, room, socket.MSG_CMSG_CLOEXEC)
    if not said:
        raise ConnectionError("the server has ended")
    what, *numbers = said.split()
    if what == b"ended":
        number, status = map(int, numbers)
        return number, status
    given = {kind: body for level, kind, body in beside if level == socket.SOL_SOCKET}
    first, _, _ = _CREDENTIALS.unpack(given[socket.SCM_CREDENTIALS])
    (door,) = array.array("i", given[socket.SCM_RIGHTS])
    try:
        handle = os.pidfd_open(first)
    except ProcessLookupError:  # it has been killed already, and the server will say so
        os.close(door)
    else:
        slot.places.append(Place(int(numbers[0]), first, handle, socket.socket(fileno=door)))
    return None


def stop_server(slot: Slot) -> None:
    """End the slot's server, if it has one, and all that runs or waits in it."""
    if slot.server is not None:
        end(slot.server)
        unmount_tmp(slot.tmp)
    if slot.control is not None:
        slot.control.close()
    while slot.places:
        slot.places.pop().close()
    slot.server, slot.control = None, None
