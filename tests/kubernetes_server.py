"""An API server of Kubernetes' for tests: the requests that the launcher makes, answered over HTTP as a real one does.

It keeps jobs and pods, and is job controller and kubelet in one where a test says so: `runs` makes the pod of every Job
a process of this machine, with the files that its downward API volumes ask for, and what it prints on either stream as
the pod's log. Otherwise a test puts pods there in whatever state it needs. What it does not know: admission, defaults,
watches, and all that a real cluster does in between.
"""

import json
import os
import re
import signal
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml
from servers import AS_IN_A_CONTAINER

from eval_platform.launching import manifests

TOKEN = "a-token-that-is-never-printed"
NAMESPACE = "evals"
NODE = "gpu-node-1"
Json = dict[str, Any]

_REASONS = {400: "BadRequest", 401: "Unauthorized", 403: "Forbidden", 404: "NotFound", 409: "AlreadyExists"}


def status(code: int, message: str) -> Json:
    """What stands in the body of a refusal."""
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": message,
        "reason": _REASONS.get(code, "InternalError"),
        "code": code,
    }


@dataclass
class ApiServer:
    """`refusals`: (method, pattern of the path) -> status and message, asked before anything is done."""

    folder: Path
    jobs: dict[str, Json] = field(default_factory=dict)
    pods: dict[str, Json] = field(default_factory=dict)
    logs: dict[str, list[tuple[float, str]]] = field(default_factory=dict)
    events: list[Json] = field(default_factory=list)
    nodes: list[Json] = field(default_factory=list)
    refusals: dict[tuple[str, str], tuple[int, str]] = field(default_factory=dict)
    requests: list[tuple[str, str, Json]] = field(default_factory=list)  # method, path, query
    bodies: list[Json] = field(default_factory=list)
    command: Sequence[str] | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    processes: dict[str, subprocess.Popen[str]] = field(default_factory=dict)
    is_away: bool = False
    log_late: float = 0.0  # seconds between a question for a log and what its node then takes for now
    endpoint: str = ""
    _turn: threading.RLock = field(default_factory=threading.RLock)

    # ------------------------------------------------------------------------------------------------ what tests say

    def runs(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """From now on every Job's pod is this program, behind it the container's arguments."""
        self.command, self.environment = command, environment

    def pod(self, job: str, phase: str, *, name: str = "", node: str = NODE, **more: Any) -> str:
        """Put a pod of this job there, or in place of the one of that name. more: of its status."""
        with self._turn:
            name = name or f"{job}-{uuid.uuid4().hex[:5]}"
            old = self.pods.get(name)
            metadata = old["metadata"] if old else _metadata(name, self.jobs[job]["spec"]["template"]["metadata"])
            metadata["labels"] = {**metadata["labels"], "batch.kubernetes.io/job-name": job}
            spec = {**self.jobs[job]["spec"]["template"]["spec"], **({"nodeName": node} if node else {})}
            self.pods[name] = {"metadata": metadata, "spec": spec, "status": {"phase": phase, **more}}
            return name

    def prints(self, pod: str, *lines: str) -> None:
        with self._turn:
            self.logs.setdefault(pod, []).extend((time.time(), line) for line in lines)

    def job_ends(self, job: str, kind: str, reason: str = "", message: str = "") -> None:
        with self._turn:
            condition = {"type": kind, "status": "True", "reason": reason, "message": message}
            self.jobs[job]["status"] = {"conditions": [condition]}

    def tells(self, about: Json, reason: str, message: str, *, kind: str = "Warning", at: str = "") -> None:
        """An event, seen last at this moment."""
        told = {"uid": about["metadata"]["uid"], "name": about["metadata"]["name"]}
        event = {
            "metadata": _metadata("event", {}),
            "involvedObject": told,
            "type": kind,
            "lastTimestamp": at or _now(),
        }
        self.events.append({**event, "reason": reason, "message": message})

    # ------------------------------------------------------------------------------------------------ what it answers

    def answer(self, method: str, path: str, query: Json, body: Json) -> tuple[int, Json | str]:
        for (its_method, pattern), refusal in self.refusals.items():
            if method == its_method and re.search(pattern, path):
                return refusal[0], status(*refusal)
        _, _, *parts = path.split("/")  # "", "api" or "apis", ...
        match parts:
            case ["v1", "nodes"]:
                return 200, {"kind": "NodeList", "items": self.nodes}
            case ["v1", "namespaces", _, "events"]:
                uid = _selected(query["fieldSelector"])["involvedObject.uid"]
                found = [one for one in self.events if one["involvedObject"]["uid"] == uid]
                return 200, {"kind": "EventList", "items": found}
            case ["v1", "namespaces", namespace, *rest] | ["batch", "v1", "namespaces", namespace, *rest]:
                if namespace != NAMESPACE and method == "POST":
                    return 404, status(404, f'namespaces "{namespace}" not found')
                with self._turn:
                    return self._of_namespace(method, rest, query, body)
        return 404, status(404, "the server could not find the requested resource")

    def _of_namespace(self, method: str, rest: list[str], query: Json, body: Json) -> tuple[int, Json | str]:
        match method, rest:
            case "POST", ["jobs"]:
                return self._make(body)
            case "GET", ["jobs" | "pods" as kind]:
                wanted = _selected(query.get("labelSelector", ""))
                there = self.jobs if kind == "jobs" else self.pods
                return 200, {"kind": "List", "items": [one for one in list(there.values()) if _has_labels(one, wanted)]}
            case _, ["jobs", name, *_] if name not in self.jobs:
                return 404, status(404, f'jobs.batch "{name}" not found')
            case _, ["pods", name, *_] if name not in self.pods:
                return 404, status(404, f'pods "{name}" not found')
            case "GET", ["jobs", name]:
                return 200, self.jobs[name]
            case "DELETE", ["jobs", name]:
                assert {**query, **body}["propagationPolicy"] == "Foreground"  # else its pods may outlive it
                self.jobs[name]["metadata"]["deletionTimestamp"] = _now()
                self._collect()
                return 200, status(200, "")
            case "DELETE", ["pods", name]:
                self._end(name, float({**query, **body}["gracePeriodSeconds"]))
                return 200, self.pods.get(name, {})
            case "GET", ["pods", name, "log"]:
                return self._log(name, query)
        return 405, status(405, "the server does not allow this method on the requested resource")

    def _make(self, job: Json) -> tuple[int, Json]:
        name = job["metadata"]["name"]
        if name in self.jobs:
            return 409, status(409, f'jobs.batch "{name}" already exists')
        self.bodies.append(json.loads(json.dumps(job)))
        job["metadata"] = _metadata(name, job["metadata"])
        self.jobs[name] = {**job, "status": {}}
        if self.command is not None:
            self._begin(name, self.command)
        return 201, job

    def _log(self, name: str, query: Json) -> tuple[int, Json | str]:
        (state,) = (one["state"] for one in self.pods[name]["status"].get("containerStatuses", [{"state": {}}]))
        if not state.keys() & {"running", "terminated"}:
            return 400, status(400, f'container "worker" in pod "{name}" is waiting to start: ContainerCreating')
        now = time.time() + self.log_late
        since = now - int(query["sinceSeconds"]) if "sinceSeconds" in query else 0.0
        return 200, "".join(f"{_moment(at)} {line}\n" for at, line in self.logs.get(name, []) if at >= since)

    def _collect(self) -> None:
        """What a job that is deleted owns goes first, then it."""
        for name, job in list(self.jobs.items()):
            if "deletionTimestamp" in job["metadata"]:
                own = [
                    pod for pod, one in self.pods.items() if _has_labels(one, {"batch.kubernetes.io/job-name": name})
                ]
                for pod in own:
                    self._end(pod, float(job["spec"]["template"]["spec"].get("terminationGracePeriodSeconds", 30)))
                if not any(pod in self.pods for pod in own):
                    del self.jobs[name]

    def _end(self, pod: str, grace: float) -> None:
        """SIGTERM, after the grace SIGKILL; a pod that is no process is gone at once, unless its node is."""
        metadata = self.pods[pod]["metadata"]
        is_told = "deletionTimestamp" in metadata
        metadata.setdefault("deletionTimestamp", _now())
        metadata["deletionGracePeriodSeconds"] = int(min(grace, metadata.get("deletionGracePeriodSeconds", grace)))
        process = self.processes.get(pod)
        if process is not None:
            if not is_told:
                process.terminate()
            timer = threading.Timer(grace, process.kill)
            timer.daemon = True
            timer.start()
        elif self.pods[pod]["spec"].get("nodeName") != "a-node-that-is-lost":
            del self.pods[pod]

    # ------------------------------------------------------------------------------------------------ the kubelet

    def _begin(self, job: str, command: Sequence[str]) -> None:
        pod = self.pod(job, "Running", containerStatuses=[{"name": "worker", "state": {"running": {}}}])
        spec = self.pods[pod]["spec"]
        (container,) = spec["containers"]
        arguments = list(container["args"])
        for volume in spec["volumes"]:
            if "downwardAPI" in volume:
                (mount,) = (one for one in container["volumeMounts"] if one["name"] == volume["name"])
                folder = tempfile.mkdtemp(prefix="downward-api-", dir=self.folder)
                for item in volume["downwardAPI"]["items"]:
                    key = re.fullmatch(r"metadata\.annotations\['(.*)'\]", item["fieldRef"]["fieldPath"])
                    assert key is not None
                    Path(folder, item["path"]).write_text(self.pods[pod]["metadata"]["annotations"][key[1]])
                os.chmod(folder, 0o500)  # as it is mounted: to be read
                arguments = [folder if one == mount["mountPath"] else one for one in arguments]
        said = {one["name"]: one["value"] for one in container["env"]}
        environment = {"PATH": os.environ["PATH"], **self.environment, **said}
        process = subprocess.Popen(
            [*AS_IN_A_CONTAINER, *command, *arguments],
            env=environment,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.processes[pod] = process
        threading.Thread(target=self._wait, args=(job, pod, process), daemon=True).start()

    def _wait(self, job: str, pod: str, process: "subprocess.Popen[str]") -> None:
        assert process.stdout is not None
        assert process.stderr is not None
        streams = [threading.Thread(target=self._copy, args=(pod, one)) for one in (process.stdout, process.stderr)]
        for one in streams:
            one.start()
        for one in streams:
            one.join()
        code = process.wait()
        ended = {"exitCode": code if code >= 0 else 128 - code, "reason": "Completed" if code == 0 else "Error"}
        states = [{"name": "worker", "state": {"terminated": ended}}]
        for phase in ("Running", "Succeeded" if code == 0 else "Failed"):  # each is to be seen alone, and the Job's end
            self.pod(job, phase, name=pod, containerStatuses=states)
            time.sleep(0.1)
        with self._turn:
            if "deletionTimestamp" not in self.pods[pod]["metadata"]:
                self.job_ends(job, *(["Complete"] if code == 0 else ["Failed", "BackoffLimitExceeded"]))
                return
        time.sleep(0.3)  # until the kubelet has told that it has ended, and the pod is forgotten
        with self._turn:
            del self.pods[pod]
            self._collect()

    def _copy(self, pod: str, stream: Iterator[str]) -> None:
        for line in stream:
            self.prints(pod, line.removesuffix("\n"))


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def _moment(at: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at)) + f".{int(at % 1 * 1e9):09d}Z"


def _metadata(name: str, given: Mapping[str, Any]) -> Json:
    made = {"name": name, "namespace": NAMESPACE, "uid": str(uuid.uuid4()), "creationTimestamp": _now()}
    return {"labels": {}, "annotations": {}, **given, **made}


def _selected(selector: str) -> dict[str, str]:
    return dict(one.split("=", 1) for one in selector.split(",") if one)


def _has_labels(one: Json, wanted: Mapping[str, str]) -> bool:
    return wanted.items() <= one["metadata"]["labels"].items()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: "_Server"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _serve(self) -> None:
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
        api = self.server.api
        api.requests.append((self.command, url.path, query))
        if api.is_away:
            self.close_connection = True
            return
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            code, said = 401, status(401, "Unauthorized")
        else:
            code, said = api.answer(self.command, url.path, query, body)
        text = said if isinstance(said, str) else json.dumps(said)
        self.send_response(code)
        self.send_header("Content-Type", "text/plain" if isinstance(said, str) else "application/json")
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    do_GET = do_POST = do_DELETE = _serve


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    api: ApiServer


@contextmanager
def api_server(folder: Path) -> Iterator[ApiServer]:
    """One on a free port of 127.0.0.1; `folder`/kubeconfig leads there. Its pods end with it."""
    http = _Server(("127.0.0.1", 0), _Handler)
    api = ApiServer(folder, endpoint=f"http://127.0.0.1:{http.server_port}")
    http.api = api
    threading.Thread(target=http.serve_forever, args=(0.05,), daemon=True).start()
    write_kubeconfig(folder / "kubeconfig", api.endpoint)
    try:
        yield api
    finally:
        for process in api.processes.values():
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        http.shutdown()
        http.server_close()


def manifest_that_mounts(folder: Path) -> Path:
    """A manifest beside the folder, whose pods see it as by a shared volume."""
    job = yaml.safe_load(manifests.OWN_MANIFEST.read_text())
    pod = job["spec"]["template"]["spec"]
    pod["volumes"].append({"name": "shared", "persistentVolumeClaim": {"claimName": "shared"}})
    pod["containers"][0]["volumeMounts"].append({"name": "shared", "mountPath": str(folder)})
    manifest = folder.with_suffix(".yaml")
    manifest.write_text(yaml.safe_dump(job))
    return manifest


def write_kubeconfig(file: Path, endpoint: str, token: str = TOKEN) -> None:
    one = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "tests", "cluster": {"server": endpoint}}],
        "users": [{"name": "tests", "user": {"token": token}}],
        "contexts": [{"name": "tests", "context": {"cluster": "tests", "user": "tests", "namespace": NAMESPACE}}],
        "current-context": "tests",
    }
    file.write_text(yaml.safe_dump(one))
