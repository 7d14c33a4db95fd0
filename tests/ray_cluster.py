"""A real Ray for tests: two nodes on free ports of 127.0.0.1 with GPUs that are none, in a temporary folder.

    python -m tests.ray_cluster            (`make test-ray`) the tests of the launcher, on such a cluster
    python -m tests.ray_cluster COMMAND    any command, on a cluster that ends with it (RAY_API_SERVER_ADDRESS)

Each node is a process of its own that starts Ray's; the scheduling, the job server and the devices' assignment are
Ray's own. It wants a token, as Ray's clusters do. Whatever happens, what was started ends with this process: nodes are
killed when their parent dies, jobs by process id.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil

from tests import servers

REAL_CLUSTER = "REAL_RAY"  # set where the tests of the launcher are to start clusters
HEAD, OTHER = "head", "other"
# Each node has a resource of its own name, by which a job is sent there.
NODES: dict[str, dict[str, Any]] = {
    HEAD: {"num_cpus": 4, "num_gpus": 4, "resources": {HEAD: 100}},
    OTHER: {"num_cpus": 2, "num_gpus": 1, "resources": {OTHER: 100}},
}
PATIENCE_S = 90
START_TIMEOUT_S = 20  # Ray fails a job that has waited for so long
_OF = "RAY_TESTS_NODE"  # in the environment of all that a node starts: which one it is
_SETTINGS = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # else it takes another address of this machine in place of 127.0.0.1
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_JOB_START_TIMEOUT_SECONDS": str(START_TIMEOUT_S),
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "5",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_AUTH_MODE": "token",
}


class ClusterError(Exception):
    """The cluster cannot be had; says why, and what to do."""


@dataclass
class Cluster:
    """`address` is its job server's."""

    folder: Path
    address: str
    token: str
    gcs: str
    running: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """By which Ray's own programs find it."""
        return {"RAY_API_SERVER_ADDRESS": self.address, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}

    def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """What the job server answers to a GET, or with a body to a POST. Raises ClusterError."""
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        try:
            with urllib.request.urlopen(
                urllib.request.Request(self.address + path, data, headers), timeout=30
            ) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise ClusterError(f"{path}: {error.code} {error.read().decode()}") from error
        except (OSError, ValueError) as error:
            raise ClusterError(f"{path}: {error}") from error

    def jobs(self) -> dict[str, str]:
        """The state of every job, by its id, in the order in which they were submitted."""
        told = sorted(self.ask("/api/jobs/"), key=lambda one: one["start_time"])
        return {one["submission_id"]: one["status"] for one in told if one["submission_id"]}

    def nodes(self) -> list[dict[str, Any]]:
        listed = self.ask("/api/v0/nodes?detail=1")["data"]["result"]["result"]
        return [one for one in listed if one["state"] == "ALIVE"]

    def start_node(self, name: str, *within: str) -> None:
        """Begun by the command `within`; returns when jobs can be had."""
        before = len(self.nodes()) if self.running else 0
        agent, export = servers.free_ports(2)
        wanted = {
            **NODES[name],
            "gcs_address": self.gcs,
            "dashboard": self.address,
            "dashboard_agent_listen_port": agent,
            "metrics_export_port": export,
            "temp_dir": str(self.folder / "ray"),
        }
        environment = {**os.environ, **_SETTINGS, **self.environment, _OF: f"{self.folder}/{name}"}
        environment.pop("RAY_API_SERVER_ADDRESS")
        command = [*within, sys.executable, "-m", "tests.ray_cluster", "--node", json.dumps(wanted)]
        root = Path(__file__).resolve().parent.parent
        self.running[name] = servers.start(command, cwd=root, env=environment, out=self.folder / f"{name}.out")
        self.until(lambda: len(self.nodes()) > before, f"node {name}")

    def kill_node(self, name: str) -> None:
        """kill -9 of all that it is and has started, as when the power fails; returns when the head has noticed."""
        before = len(self.nodes())
        self._kill(name)
        self.until(lambda: len(self.nodes()) < before, "the end of a node")

    def _kill(self, name: str) -> None:
        self.running[name].kill()
        self.running.pop(name).wait(30)
        mark = f"{self.folder}/{name}"
        found = [one for one in psutil.process_iter(["environ"]) if (one.info["environ"] or {}).get(_OF, "") == mark]
        for one in found:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(found, timeout=30)

    def until(self, ready: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                if ready():
                    return
                problem = ""
            except ClusterError as error:
                problem = str(error)
            ended = [name for name, process in self.running.items() if process.poll() is not None]
            if ended or time.monotonic() > deadline:
                said = "".join(file.read_text(errors="replace")[-2000:] for file in self.folder.glob("*.out"))
                raise ClusterError(f"{what} does not come: {problem}; the nodes say: {said or 'nothing'}")
            time.sleep(0.1)

    def end(self) -> None:
        for name in list(self.running)[::-1]:
            self._kill(name)


def why_not() -> str | None:
    """Why no cluster can be started here; None where one can."""
    return None if find_spec("ray") else "no Ray here: `make test-ray` installs it"


@contextmanager
def ray_cluster() -> Iterator[Cluster]:
    """A cluster of this process's own. Raises ClusterError."""
    reason = why_not()
    if reason is not None:
        raise ClusterError(reason)
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as made:
        gcs, dashboard = servers.free_ports(2)
        address = f"http://127.0.0.1:{dashboard}"
        cluster = Cluster(Path(made), address, secrets.token_hex(32), f"127.0.0.1:{gcs}")
        try:
            for name in NODES:
                cluster.start_node(name)
            yield cluster
        finally:
            cluster.end()


def _be_node(wanted: dict[str, Any]) -> None:
    """Start Ray's processes of a node, and stay; whoever ends this ends them."""
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    dashboard = wanted.pop("dashboard")
    is_head = HEAD in wanted["resources"]
    common = {
        **wanted,
        "node_ip_address": "127.0.0.1",
        "object_store_memory": 80 * 2**20,
        "min_worker_port": 0,
        "max_worker_port": 0,
        "include_log_monitor": False,
    }
    if is_head:
        port = int(dashboard.rpartition(":")[2])
        gcs_port = int(common.pop("gcs_address").rpartition(":")[2])
        params = RayParams(
            **common,
            gcs_server_port=gcs_port,
            include_dashboard=True,
            dashboard_host="127.0.0.1",
            dashboard_port=port,
        )
    else:
        params = RayParams(**common, node_manager_port=0)
    Node(params, head=is_head, shutdown_at_exit=False, spawn_reaper=True)
    signal.pause()


def main(command: list[str]) -> int:
    """The command's exit code; 2 where there is no cluster."""
    servers.end_on_sigterm()
    reason = why_not()
    if reason is not None:
        print(reason, file=sys.stderr)
        return 2
    if not command:
        tests = [sys.executable, "-m", "pytest", "-q", str(Path(__file__).parent / "test_ray.py")]
        return subprocess.run(tests, env={**os.environ, REAL_CLUSTER: "1"}, check=False).returncode
    try:
        with ray_cluster() as cluster:
            return subprocess.run(command, env={**os.environ, **cluster.environment}, check=False).returncode
    except ClusterError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    if sys.argv[1:2] == ["--node"]:
        _be_node(json.loads(sys.argv[2]))
    sys.exit(main(sys.argv[1:]))
