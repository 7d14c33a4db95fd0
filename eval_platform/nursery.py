"""A process that has imported what a worker needs and forks workers from itself.

    python -m eval_platform.nursery <folder for its socket>

Importing torch and transformers takes 3-10 s of one core, a fork takes milliseconds. `eval-platform up` keeps one
running; `launch` asks it first and starts a worker the ordinary way when there is none, or when the one that is there
would not do the same: it has imported older code, or its environment differs in a variable that is read at import.

One Unix socket, one connection a worker, whole packets of JSON: the request, with the locked slot's descriptors beside
it; the child's answer `{"child": who it is}` or the nursery's `{"refused": why}`; later signals to pass on, and at the
end the exit code. Only the nursery signals its children, so no number of an ended process is ever used. A worker whose
nursery was killed goes on to its end, like one whose driver was killed. What is not of workers but of forks alone,
`resources/run_nursery.py` uses for Dagster's runs.

Forking is safe because nothing here computes: no OpenMP team, no CUDA context exists before the fork. Where an import
has begun to use a GPU all the same, nothing is forked.
"""

import gc
import importlib
import json
import logging
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from eval_platform.identity import ordered_id
from eval_platform.importing import collector_paused
from eval_platform.store.process import known_dead, process_record

log = logging.getLogger("eval_platform.nursery")

_SOCKET = "nursery.sock"
_PACKET_BYTES = 1 << 20
_MOST_LOCKS = 253  # of slots and their devices; so many the kernel passes on at once
_ANSWER_SECONDS = 5.0
# What no worker can be without; each takes a tenth of a second or more, and none of them starts to compute.
_MODULES = (
    "eval_platform.worker",
    "torch",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "eval_platform.engine.plain",
    "eval_platform.engine.seq2seq",
    "eval_platform.engine.tree",
    "eval_platform.engine.kernels",
    "eval_platform.engine.support",
)
# Variables that libraries read when they are loaded, so that setting them in a fork would come too late.
_READ_AT_IMPORT = (
    *("OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "BLIS_", "DNNL_", "ONEDNN_", "ATEN_", "ARROW_"),
    *("TORCH_", "PYTORCH_", "CUDA_", "NVIDIA_", "HF_", "HUGGINGFACE_", "TRANSFORMERS_", "TOKENIZERS_"),
    *("GLIBC_TUNABLES", "MALLOC_", "LD_", "PYTHONPATH", "PYTHONHOME", "PYTHONHASHSEED"),
)
_READ_LATE = frozenset({"CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"})  # when the first thing is put on a device


# ------------------------------------------------------------------------------------------------ who asks for a worker


@dataclass
class Child:
    """A worker that the nursery forked, with the part of `subprocess.Popen`'s face that `launching` uses."""

    connection: socket.socket
    record: dict[str, Any]
    returncode: int | None = None

    @property
    def pid(self) -> int:
        return int(self.record["pid"])

    def poll(self) -> int | None:
        """The exit code (negative: the signal), or None while it runs."""
        return self._look(0.0)

    def wait(self, timeout: float | None = None) -> int:
        """Raises subprocess.TimeoutExpired after `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while (code := self._look(0.1)) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("worker", timeout or 0.0)
        return code

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self._signal(signal.SIGKILL)

    def _look(self, seconds: float) -> int | None:
        if self.returncode is None:
            self.connection.settimeout(seconds)
            try:
                packet = self.connection.recv(_PACKET_BYTES)
            except (BlockingIOError, TimeoutError):
                return None
            except ConnectionError:
                packet = b""
            if packet:
                self.returncode = int(json.loads(packet)["code"])
            elif known_dead(self.record):  # the nursery is gone, and with it how the worker ended
                self.returncode = -signal.SIGKILL
            else:
                time.sleep(seconds)
        return self.returncode

    def _signal(self, number: int) -> None:
        if self.poll() is None:
            try:
                self.connection.send(str(int(number)).encode())
            except (BrokenPipeError, ConnectionError):
                if not known_dead(self.record):
                    os.kill(self.pid, number)


def fork_worker(nursery: Path, folder: Path, locks: Sequence[int], env: Mapping[str, str]) -> Child | None:
    """A worker for `folder`, forked by the nursery whose socket is in the folder `nursery`; None when there is none.

    Args:
        locks: descriptors of the locked slot and its devices; the worker holds these locks from then on.
        env: the worker's whole environment.
    """
    request = {
        "folder": str(folder.absolute()),
        "driver": process_record(os.getpid()),
        "cwd": os.getcwd(),
        "env": dict(env),
    }
    return ask(nursery, request, env, locks)


def ask(nursery: Path, request: Mapping[str, Any], env: Mapping[str, str], locks: Sequence[int] = ()) -> Child | None:
    """A fork that does what is requested; None when there is no nursery, or it would not do the same as a process that
    is started from nothing with the environment `env`."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(_ANSWER_SECONDS)
    request = {**request, "made_of": _made_of(), "read_at_import": _read_at_import(env)}
    try:
        with _short_path(nursery) as path:
            connection.connect(path)
        socket.send_fds(connection, [json.dumps(request).encode()], list(locks))
        answer = json.loads(connection.recv(_PACKET_BYTES) or b'{"refused": "it ended"}')
    except (OSError, json.JSONDecodeError):  # no nursery, or one that is ending or stuck
        connection.close()
        return None
    if "child" not in answer:  # refused, or ended before it could say who it is
        log.info("the nursery in %s does not fork: %s", nursery, answer.get("refused", answer))
        connection.close()
        return None
    return Child(connection, answer["child"])


def retire(nursery: Path) -> bool:
    """Let it end as soon as its children have. False where there is none that is ready."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(_ANSWER_SECONDS)
        try:
            with _short_path(nursery) as path:
                connection.connect(path)
            connection.send(json.dumps({"made_of": "nothing any more"}).encode())
            return bool(connection.recv(_PACKET_BYTES))
        except OSError:
            return False


# ---------------------------------------------------------------------------------------------------------- the nursery


@dataclass
class _Nursery:
    """The serving process: who listens, which children live, who wants to know of their end."""

    listener: socket.socket
    address: Path
    made_of: str
    read_at_import: dict[str, str]
    selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)
    waiting: dict[int, socket.socket] = field(default_factory=dict)  # pid -> whoever asked for it
    is_retired: bool = False

    def serve(self) -> dict[str, Any] | None:
        """Returns in every child, with its request; in the nursery itself None, once it has retired."""
        self.selector.register(self.listener, selectors.EVENT_READ, ("accept", 0))
        while not self.is_retired or self.waiting:
            for key, _ in self.selector.select():
                what, number = key.data
                if what == "accept":
                    if (request := self._accept()) is not None:
                        return request
                elif what == "ended":
                    self._ended(key.fd, number)
                else:
                    self._pass_on(key.fileobj, number)  # type: ignore[arg-type] -- what was registered is a socket
        return None

    def _accept(self) -> dict[str, Any] | None:
        """The request, in the child that is to fulfil it; None in the nursery."""
        connection, _ = self.listener.accept()
        connection.settimeout(_ANSWER_SECONDS)
        request: dict[str, Any] = {}
        locks: list[int] = []
        try:
            packet, locks, _, _ = socket.recv_fds(connection, _PACKET_BYTES, _MOST_LOCKS)
            request = json.loads(packet)
            reason = self._unfit(request)
            if reason is not None:
                connection.send(json.dumps({"refused": reason}).encode())
            pid = None if reason is not None else os.fork()
        except (OSError, ValueError, KeyError) as error:  # a stranger, or no room to fork: the others' workers go on
            log.warning("a request came to nothing: %s: %s", type(error).__name__, error)
            pid = None
        if pid == 0:
            self._leave_behind()
            # The slot is the worker's as long as its copies of the locks are open.
            return {**request, "locks": locks, "connection": connection}
        for lock in locks:
            os.close(lock)
        if pid is None:
            connection.close()
            return None
        self.waiting[pid] = connection
        self.selector.register(os.pidfd_open(pid), selectors.EVENT_READ, ("ended", pid))
        self.selector.register(connection, selectors.EVENT_READ, ("signal", pid))
        return None

    def _unfit(self, request: Mapping[str, Any]) -> str | None:
        if self.is_retired or request["made_of"] != self.made_of:
            self._retire()
            return "the installed code has changed since it started"
        theirs = request["read_at_import"]
        names = {*theirs, *self.read_at_import}
        different = {name for name in names if theirs.get(name) != self.read_at_import.get(name)}
        return f"it has other values of {', '.join(sorted(different))}" if different else None

    def _retire(self) -> None:
        """Take no more requests; `up` starts another nursery when this one has ended."""
        if not self.is_retired:
            self.is_retired = True
            self.selector.unregister(self.listener)
            self.listener.close()
            self.address.unlink()

    def _leave_behind(self) -> None:
        """In the child: what the nursery holds for others would keep them from seeing its end."""
        for key in list(self.selector.get_map().values()):
            if isinstance(key.fileobj, socket.socket):
                key.fileobj.close()
            else:
                os.close(key.fd)
        self.selector.close()

    def _ended(self, pidfd: int, pid: int) -> None:
        _, status = os.waitpid(pid, 0)
        self.selector.unregister(pidfd)
        os.close(pidfd)
        connection = self.waiting.pop(pid)
        with suppress(KeyError):  # its driver has left
            self.selector.unregister(connection)
        with suppress(OSError):
            connection.send(json.dumps({"code": os.waitstatus_to_exitcode(status)}).encode())
        connection.close()

    def _pass_on(self, connection: socket.socket, pid: int) -> None:
        """A signal from whoever asked for the worker; when that one has ended, its worker goes on."""
        if pid not in self.waiting:  # it ended in the same breath
            return
        try:
            packet = connection.recv(64)
        except OSError:
            packet = b""
        if not packet:
            self.selector.unregister(connection)
            return
        os.kill(pid, int(packet))  # it is not reaped yet, so the number is its own


def main(folder: Path) -> None:
    """Import, listen, fork; every child ends in here too, with its worker's exit code."""
    request = serve(folder, _import)
    if request is not None:
        _work(request)


def _import() -> None:
    # Asks the driver's library instead of the driver: the latter cannot be used on both sides of a fork.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    with collector_paused():
        for module in _MODULES:
            importlib.import_module(module)
    if not _forks_may_use_gpus():
        log.warning("an import began to use a GPU, which cannot go on in a fork: workers start the ordinary way")
        signal.pause()  # a nursery that ended would be started again, for nothing


def serve(folder: Path, prepare: Callable[[], None]) -> dict[str, Any] | None:
    """Do what the children need not do again, listen in `folder`, fork. Returns as `_Nursery.serve`."""
    read_at_import = _read_at_import(os.environ)
    made_of = _made_of()  # before the imports: code that changes meanwhile is refused, not served
    prepare()
    gc.collect()
    gc.freeze()  # a collection in a child would touch, and so copy, every page that holds an object
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with suppress(FileNotFoundError):
        (folder / _SOCKET).unlink()  # of a nursery that was killed
    mask = os.umask(0o077)  # whoever can connect runs code as this user
    with _short_path(folder) as path:
        listener.bind(path)
    os.umask(mask)
    listener.listen()
    log.info("ready")
    return _Nursery(listener, folder / _SOCKET, made_of, read_at_import).serve()


def begin(request: Mapping[str, Any]) -> None:
    """In a child, first: tell whoever asked who it is. Does not return when nobody waits for it any more."""
    try:
        request["connection"].send(json.dumps({"child": process_record(os.getpid())}).encode())
    except OSError:  # whoever asked has perhaps started another the ordinary way
        os._exit(0)
    request["connection"].close()


def _work(request: Mapping[str, Any]) -> NoReturn:
    """In the child: become the process that `launch` would have started."""
    from eval_platform import worker

    os.setsid()
    begin(request)
    folder = Path(request["folder"])
    output = os.open(folder / "worker.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    os.close(output)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.path[0] = request["cwd"]  # where `python -m` looks first
    sys.argv = ["eval_platform.worker", str(folder)]
    with suppress(OSError):
        Path("/proc/self/comm").write_text("eval-worker")
    worker.leave(worker.main(folder, request["driver"]))


def _read_at_import(env: Mapping[str, str]) -> dict[str, str]:
    return {name: env[name] for name in env if name.startswith(_READ_AT_IMPORT) and name not in _READ_LATE}


def _made_of() -> str:
    """The id of the code that is installed now: another when a file of ours, or a package beside it, is replaced."""
    ours = [Path(__file__).parents[1] / name for name in ("eval_platform", "assets", "resources", "sensors")]
    files = sorted(path for package in ours for path in package.rglob("*.py"))
    stamps = [f"{path}:{path.stat().st_mtime_ns}" for path in files]
    beside = {Path(entry) for entry in sys.path if entry.endswith("site-packages")}
    stamps += [f"{folder}:{folder.stat().st_mtime_ns}" for folder in sorted(beside) if folder.is_dir()]
    return ordered_id([sys.executable, sys.version, *stamps])


def _forks_may_use_gpus() -> bool:
    """Whether torch lets a fork of this process put things on a GPU: asked in a fork, where alone it is known."""
    import torch

    pid = os.fork()
    if pid == 0:
        os._exit(int(torch.cuda._is_in_bad_fork()))
    return os.waitpid(pid, 0)[1] == 0


@contextmanager
def _short_path(folder: Path) -> Iterator[str]:
    """The socket's path by way of an open folder: an address has room for 107 bytes only (unix(7))."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"/proc/self/fd/{descriptor}/{_SOCKET}"
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    main(Path(sys.argv[1]))
