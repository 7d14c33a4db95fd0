"""Which system calls may a program make? A filter for the kernel, as classic BPF (seccomp(2)).

What is forbidden would lead out of the namespaces, hold memory that no limit counts (System V shared memory, message
queues, memfds), open a network socket, watch other processes, or is a wide and seldom used face of the kernel where
faults were found. All of it fails with EPERM. A call that this list does not know yet fails with ENOSYS, and so does
clone3, whose flags a filter cannot read: the C library then uses clone, which can be filtered.
"""

import errno
import struct
from collections.abc import Mapping
from types import MappingProxyType

# Linux's numbers on (x86_64, aarch64); None where the machine has no such call. A test reads the kernel's headers.
FORBIDDEN: Mapping[str, tuple[int | None, int | None]] = MappingProxyType(
    {
        # other processes
        "ptrace": (101, 117),
        "process_vm_readv": (310, 270),
        "process_vm_writev": (311, 271),
        "process_madvise": (440, 440),
        "process_mrelease": (448, 448),
        "kcmp": (312, 272),
        "pidfd_getfd": (438, 438),
        # mounts, roots and namespaces
        "mount": (165, 40),
        "umount2": (166, 39),
        "pivot_root": (155, 41),
        "chroot": (161, 51),
        "move_mount": (429, 429),
        "open_tree": (428, 428),
        "fsopen": (430, 430),
        "fsconfig": (431, 431),
        "fsmount": (432, 432),
        "fspick": (433, 433),
        "mount_setattr": (442, 442),
        "unshare": (272, 97),
        "setns": (308, 268),
        "name_to_handle_at": (303, 264),
        "open_by_handle_at": (304, 265),
        "mknod": (133, None),
        "mknodat": (259, 33),
        "sethostname": (170, 161),
        "setdomainname": (171, 162),
        # memory that belongs to no process, so that no limit counts it
        "memfd_create": (319, 279),
        "memfd_secret": (447, 447),
        "shmget": (29, 194),
        "shmat": (30, 196),
        "shmctl": (31, 195),
        "msgget": (68, 186),
        "msgsnd": (69, 189),
        "msgrcv": (70, 188),
        "semget": (64, 190),
        "semop": (65, 193),
        "semtimedop": (220, 192),
        "mq_open": (240, 180),
        "vmsplice": (278, 75),
        # the network; socketpair stays, which reaches nobody
        "socket": (41, 198),
        # wide faces of the kernel
        "bpf": (321, 280),
        "perf_event_open": (298, 241),
        "userfaultfd": (323, 282),
        "io_uring_setup": (425, 425),
        "io_uring_enter": (426, 426),
        "io_uring_register": (427, 427),
        "keyctl": (250, 219),
        "add_key": (248, 217),
        "request_key": (249, 218),
        "seccomp": (317, 277),
        "landlock_create_ruleset": (444, 444),
        "fanotify_init": (300, 262),
        "fanotify_mark": (301, 263),
        "personality": (135, 92),
        "modify_ldt": (154, None),
        "iopl": (172, None),
        "ioperm": (173, None),
        "uselib": (134, None),
        "ustat": (136, None),
        "sysfs": (139, None),
        "lookup_dcookie": (212, 18),
        "nfsservctl": (180, 42),
        "vhangup": (153, 58),
        "migrate_pages": (256, 238),
        "move_pages": (279, 239),
        "mbind": (237, 235),
        "set_mempolicy": (238, 237),
        "set_mempolicy_home_node": (450, 450),
        # the machine as a whole
        "init_module": (175, 105),
        "finit_module": (313, 273),
        "delete_module": (176, 106),
        "kexec_load": (246, 104),
        "kexec_file_load": (320, 294),
        "reboot": (169, 142),
        "swapon": (167, 224),
        "swapoff": (168, 225),
        "settimeofday": (164, 170),
        "clock_settime": (227, 112),
        "adjtimex": (159, 171),
        "clock_adjtime": (305, 266),
        "quotactl": (179, 60),
        "quotactl_fd": (443, 443),
        "acct": (163, 89),
        "syslog": (103, 116),
    }
)
MACHINES: Mapping[str, int] = MappingProxyType({"x86_64": 0, "aarch64": 1})
CLONE: tuple[int, int] = (56, 220)
CLONE3 = 435
IOCTL: tuple[int, int] = (16, 29)
LAST_KNOWN = 451  # cachestat, Linux 6.5; the calls of 32-bit x86_64 ("x32") lie far above it too

_AUDIT_ARCH = (0xC000003E, 0xC00000B7)
# CLONE_NEWTIME, NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET. In clone the lowest byte is a signal, so
# that NEWTIME (0x80) cannot be asked for there.
_NEW_NAMESPACE = 0x00020000 | 0x02000000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x20000000 | 0x40000000
_TERMINAL_INPUT = (0x5412, 0x541C)  # TIOCSTI and TIOCLINUX: typing into the terminal of whoever started us

# struct seccomp_data: nr, arch, instruction pointer, six arguments of 8 bytes (their low halves come first).
_NUMBER, _ARCH, _FIRST_ARGUMENT, _SECOND_ARGUMENT = 0, 4, 16, 24
_LOAD, _EQUAL, _ABOVE, _ANY_BIT, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x06
_ALLOW, _KILL = 0x7FFF0000, 0x80000000


def seccomp_filter(machine: str) -> bytes:
    """The filter for `machine` (`platform.machine()`): an array of struct sock_filter, native byte order.

    Raises KeyError for a machine that is not in MACHINES.
    """
    column = MACHINES[machine]
    forbidden = sorted(number for numbers in FORBIDDEN.values() if (number := numbers[column]) is not None)
    program = [
        (_LOAD, 0, 0, _ARCH),
        (_EQUAL, 1, 0, _AUDIT_ARCH[column]),
        (_RETURN, 0, 0, _KILL),  # 32-bit calls of a 64-bit machine have other numbers
        (_LOAD, 0, 0, _NUMBER),
        *_refuse_if(_ABOVE, LAST_KNOWN, errno.ENOSYS),
        *_refuse_if(_EQUAL, CLONE3, errno.ENOSYS),
    ]
    for number in forbidden:
        program += _refuse_if(_EQUAL, number, errno.EPERM)
    program += _about_argument(CLONE[column], _FIRST_ARGUMENT, _refuse_if(_ANY_BIT, _NEW_NAMESPACE, errno.EPERM))
    typing = [step for request in _TERMINAL_INPUT for step in _refuse_if(_EQUAL, request, errno.EPERM)]
    program += _about_argument(IOCTL[column], _SECOND_ARGUMENT, typing)
    program.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *step) for step in program)


_Step = tuple[int, int, int, int]  # code, jump if true, jump if false, constant


def _refuse_if(test: int, constant: int, error: int) -> list[_Step]:
    """Fail the call with `error` where the loaded word passes the test."""
    return [(test, 0, 1, constant), (_RETURN, 0, 0, 0x00050000 | error)]


def _about_argument(number: int, offset: int, steps: list[_Step]) -> list[_Step]:
    """For the call `number`: load an argument, take the steps, else allow. Another call goes past them."""
    body = [(_LOAD, 0, 0, offset), *steps, (_RETURN, 0, 0, _ALLOW)]
    return [(_EQUAL, 0, len(body), number), *body]
