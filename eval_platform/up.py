"""`eval-platform up`: Dagster's code server, daemon and web server over the configured folders, and the nurseries.

They are processes of their own, started with this interpreter; what they are is written to `<state>/up.json`, so
that a later `up` ends what a power cut or a kill -9 left of them, by process id. A server that dies is started again.
"""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from eval_platform import launching, nursery
from eval_platform.config import Config
from eval_platform.errors import EvalPlatformError
from eval_platform.instance import postgres_place, write_instance
from eval_platform.store.process import known_dead, process_record, same_machine

START_SECONDS = 120.0
STOP_SECONDS = 9.0
# A code server waits for its runs to end, which may take hours. A run that takes longer than this is ended with it: its
# worker then leaves by itself with what it has journalled, and the next `up` goes on from there.
RUNS_SECONDS = 5.0


@dataclass
class Platform:
    """A running platform; `url` is the web server's."""

    config: Config
    url: str
    commands: dict[str, list[str]]
    env: dict[str, str]
    lock: IO[bytes]
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str) -> None:
        env = {**launching.WORKER_ENV, **self.env} if name == "nursery" else self.env
        logs = self.config.state_dir / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        with (logs / f"{name}.log").open("ab") as output:
            self.processes[name] = subprocess.Popen(
                self.commands[name],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is ours to pass on, in order
                env=env,
                cwd=self.config.folder,
            )
        self._remember()

    def revive(self) -> list[str]:
        """Start again what has died; returns the names."""
        dead = [name for name, process in self.processes.items() if process.poll() is not None]
        for name in dead:
            self.start(name)
        return dead

    def stop(self) -> None:
        """End the servers, what starts work first and what work hangs on last; then the workers they started."""
        run_nursery = self.processes.get("run_nursery")
        if run_nursery is not None and not nursery.retire(self.config.dagster_home):
            run_nursery.terminate()  # it is importing, and has no children yet
        for name in ("daemon", "webserver", "code_server", "nursery"):
            process = self.processes.get(name)
            if process is not None and process.poll() is None:
                process.send_signal(signal.SIGINT if name == "daemon" else signal.SIGTERM)
        now = time.monotonic()
        patience = dict.fromkeys(self.processes, STOP_SECONDS)
        for name in patience.keys() & {"code_server", "run_nursery"}:
            patience[name] = min(RUNS_SECONDS, STOP_SECONDS)
        for name in sorted(patience, key=lambda name: patience[name]):
            process = self.processes[name]
            try:
                process.wait(max(0.1, now + patience[name] - time.monotonic()))
            except subprocess.TimeoutExpired:
                # With all that hangs on it.
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                _until_gone(process.pid)  # a run that is still on its way out has no orphan yet
        # Runs end with the servers; without them a worker would go on for nobody to see.
        launching.stop_orphans(self.config)
        _up_file(self.config).unlink(missing_ok=True)

    def _remember(self) -> None:
        body = {
            "url": self.url,
            "processes": {name: process_record(process.pid) for name, process in self.processes.items()},
        }
        aside = _up_file(self.config).with_suffix(".tmp")
        aside.write_text(json.dumps(body, indent=1), encoding="utf-8")
        os.replace(aside, _up_file(self.config))


def _up_file(config: Config) -> Path:
    return config.state_dir / "up.json"


def running(config: Config) -> dict[str, Any] | None:
    """The platform of this configuration that runs on this machine: `{"url", "processes"}`, or None."""
    try:
        body: dict[str, Any] = json.loads(_up_file(config).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return body if any(_lives(process) for process in body["processes"].values()) else None


def _lives(process: dict[str, Any]) -> bool:
    """Certainly alive: after a restart of the machine the same number is another's, and not ours to end."""
    return same_machine(process) and not known_dead(process)


@contextmanager
def platform(config: Config, say: Callable[[str], None] = lambda text: None) -> Iterator[Platform]:
    """Start the platform, wait until the web server answers, and stop it at the end.

    Raises EvalPlatformError when one runs already, when the state folder or DAGSTER_HOME in it cannot be written, when
    a team's PostgreSQL cannot be used, or when it does not come up; the error names the folder, the server or the log.
    """
    try:
        config.state_dir.mkdir(parents=True, exist_ok=True)
        lock = (config.state_dir / "up.lock").open("ab")
    except OSError as error:
        raise _unwritable(config.state_dir, error) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        found = running(config)
        raise EvalPlatformError(
            f"a platform already runs on {config.state_dir}" + (f" at {found['url']}" if found else ""),
            remedy="stop it first, or give this one another `state` folder",
        ) from None
    with lock:
        _end_leftovers(config, say)
        postgres_place()  # a server that is not there is told before anything starts, not by a log
        ports = {"code_server": _free_port(), "webserver": config.ui.port or _free_port()}
        try:
            write_instance(config)
            (config.dagster_home / "workspace.yaml").write_text(_workspace(ports["code_server"]), encoding="utf-8")
        except OSError as error:
            raise _unwritable(config.dagster_home, error) from error
        one = Platform(
            config,
            f"http://{config.ui.host}:{ports['webserver']}",
            _commands(config, ports),
            _environment(config),
            lock,
        )
        # A service manager's stop is SIGTERM: it must end the children as Ctrl-C does, not leave them behind.
        before = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            one.start("code_server")
            _wait(one, "code_server", lambda: _listens(ports["code_server"]))
            one.start("daemon")
            one.start("webserver")
            _wait(one, "webserver", lambda: _answers(f"{one.url}/server_info"))
            _must_have_loaded(one)
            for name in one.commands.keys() & {"nursery", "run_nursery"}:
                one.start(name)  # not waited for: until it is ready workers and runs start without it
            yield one
        finally:
            one.stop()
            signal.signal(signal.SIGTERM, before)


def _unwritable(folder: Path, error: OSError) -> EvalPlatformError:
    return EvalPlatformError(
        f"cannot keep Dagster's home and this machine's state in {folder}: {error.strerror} ({error.filename})",
        remedy="give this user the right to write there, or set `state` in eval_platform.toml (or "
        "$EVAL_PLATFORM_STATE) to another folder",
    )


def reload_code_location(config: Config) -> bool:
    """Tell a running platform that the lock changed. False when none runs here."""
    found = running(config)
    if found is None:
        return False
    query = 'mutation { reloadRepositoryLocation(repositoryLocationName: "eval_platform") { __typename } }'
    try:
        kind = _graphql(found["url"], query)["reloadRepositoryLocation"]["__typename"]
    except (urllib.error.URLError, TimeoutError) as error:
        raise EvalPlatformError(
            f"the platform at {found['url']} did not reload the tasks: {error}", remedy="restart `eval-platform up`"
        ) from error
    if kind != "WorkspaceLocationEntry":
        raise EvalPlatformError(
            f"the platform at {found['url']} could not reload the tasks: {kind}",
            remedy=f"see {config.state_dir / 'logs' / 'code_server.log'}",
        )
    return True


def _graphql(url: str, query: str) -> dict[str, Any]:
    body = json.dumps({"query": query}).encode()
    request = urllib.request.Request(f"{url}/graphql", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["data"]


def _must_have_loaded(one: Platform) -> None:
    """A web server answers also when our definitions did not load; then nothing would ever be evaluated."""
    query = (
        "{ workspaceOrError { ... on Workspace { locationEntries { locationOrLoadError "
        "{ __typename ... on PythonError { message } } } } } }"
    )
    for entry in _graphql(one.url, query)["workspaceOrError"]["locationEntries"]:
        found = entry["locationOrLoadError"] or {"__typename": "nothing", "message": "not loaded"}
        if found["__typename"] != "RepositoryLocation":
            raise EvalPlatformError(
                f"Dagster cannot load eval_platform.definitions: {found.get('message', '').strip()}",
                remedy=f"see {one.config.state_dir / 'logs' / 'code_server.log'}",
            )


def _commands(config: Config, ports: dict[str, int]) -> dict[str, list[str]]:
    python = sys.executable
    code = str(ports["code_server"])
    found = {
        # One code server for both others, so that a reload after `tasks sync` reaches the sensors too.
        "code_server": [
            *(python, "-m", "dagster", "code-server", "start", "-h", "127.0.0.1", "-p", code),
            *("-m", "eval_platform.definitions", "--location-name", "eval_platform", "--log-level", "warning"),
            "--use-python-environment-entry-point",
        ],
        "daemon": [python, "-m", "dagster._daemon", "run", "-w", str(config.dagster_home / "workspace.yaml")],
        "webserver": [
            *(python, "-m", "dagster_webserver", "-w", str(config.dagster_home / "workspace.yaml")),
            *("-h", config.ui.host, "-p", str(ports["webserver"])),
        ],
    }
    if config.worker.nursery and sys.platform == "linux":
        found["run_nursery"] = [python, "-m", "resources.run_nursery", str(config.dagster_home)]
        if config.worker.launcher == "subprocess":
            found["nursery"] = [python, "-m", "eval_platform.nursery", str(config.state_dir)]
    return found


def _workspace(port: int) -> str:
    server = {"host": "127.0.0.1", "port": port, "location_name": "eval_platform"}
    return json.dumps({"load_from": [{"grpc_server": server}]}) + "\n"  # JSON is YAML


def _environment(config: Config) -> dict[str, str]:
    found = {
        **os.environ,
        "DAGSTER_HOME": str(config.dagster_home),
        "DAGSTER_DISABLE_TELEMETRY": "1",
        "PYTHONUNBUFFERED": "1",
    }
    if config.file is not None:
        found["EVAL_PLATFORM_CONFIG"] = str(config.file)
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False


def _until_gone(group: int) -> None:
    """Wait until no process of the group is left, at most STOP_SECONDS; the group's leader has been waited for."""
    deadline = time.monotonic() + STOP_SECONDS
    with suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(group, 0)
            time.sleep(0.05)


def _wait(one: Platform, name: str, ready: Callable[[], bool]) -> None:
    log = one.config.state_dir / "logs" / f"{name}.log"
    deadline = time.monotonic() + START_SECONDS
    while not ready():
        ended = one.processes[name].poll() is not None
        if ended or time.monotonic() > deadline:
            words = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
            what = "ended" if ended else f"did not answer in {START_SECONDS:.0f} s"
            raise EvalPlatformError(
                f"Dagster's {name} {what}; its log ends:\n{words}",
                remedy=f"see {log}; `eval-platform doctor` looks for what is missing",
            )
        time.sleep(0.2)


def _end_leftovers(config: Config, say: Callable[[str], None]) -> None:
    """What an `up` that was killed left running: two daemons on one DAGSTER_HOME would quarrel."""
    found = running(config)
    if found is None:
        return
    for name, process in found["processes"].items():
        if not _lives(process):
            continue
        say(f"ending the {name} that an earlier `up` left (process {process['pid']})")
        with suppress(ProcessLookupError):  # it ended by itself meanwhile
            os.kill(process["pid"], signal.SIGTERM)
            deadline = time.monotonic() + STOP_SECONDS
            while not known_dead(process) and time.monotonic() < deadline:
                time.sleep(0.1)
            if not known_dead(process):
                os.kill(process["pid"], signal.SIGKILL)
