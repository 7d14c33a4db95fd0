"""In place of Ray's job server, so that each moment of a job comes when a test wants it."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

NODE = {"state": "ALIVE", "resources_total": {"CPU": 8, "GPU": 4}}


class JobServer(ThreadingHTTPServer):
    """As Ray 2.60's answers. meanwhile: what happens once, by path, between its work on a request and its answer."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.jobs: dict[str, dict[str, Any]] = {}
        self.meanwhile: dict[str, Callable[[], object]] = {}
        self.refused: set[str] = set()  # ids, and "stop"
        self.proxy_is_alone = False

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, method: str, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if self.proxy_is_alone:
            return 404, "default backend - 404"
        if path.startswith("/api/v0/nodes"):
            return 200, {"data": {"result": {"result": [NODE]}}}
        job, _, verb = path.removeprefix("/api/jobs/").partition("/")
        if method == "POST" and not job:
            return self._submitted(body)
        if not job:
            return 200, list(self.jobs.values())
        if job not in self.jobs:
            return 404, f"Job {job} does not exist"
        if verb == "stop":
            if "stop" in self.refused:
                return 500, "no agent"
            self.jobs[job]["status"] = "STOPPED"
        return 200, self.jobs[job]

    def _submitted(self, body: dict[str, Any]) -> tuple[int, Any]:
        job = body["submission_id"]
        if job in self.jobs:
            return 500, f"Job with submission_id {job} already exists. Please use a different submission_id."
        if re.sub("^eval-platform-[0-9a-f]+", "", job) in self.refused:
            return 500, "No available agent to submit job, please try again later."
        self.jobs[job] = {
            "submission_id": job,
            "status": "RUNNING",
            "metadata": body["metadata"],
            "runtime_env": body["runtime_env"],
            "entrypoint": body["entrypoint"],
        }
        return 200, {"submission_id": job}


class Answers(BaseHTTPRequestHandler):
    def _answer(self) -> None:
        assert isinstance(self.server, JobServer)
        said = self.rfile.read(int(self.headers["Content-Length"] or 0))
        status, answer = self.server.answer(self.command, self.path, json.loads(said or "{}"))
        self.server.meanwhile.pop(f"{self.command} {self.path}", lambda: None)()
        self.send_response(status)
        self.end_headers()
        self.wfile.write((answer if isinstance(answer, str) else json.dumps(answer)).encode())

    do_GET = do_POST = _answer

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def job_server() -> Iterator[JobServer]:
    server = JobServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
