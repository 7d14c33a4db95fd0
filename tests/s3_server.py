"""A real S3 server for tests: moto behind HTTP on a free port of 127.0.0.1, in a process of its own.

moto's server is not atomic where it matters most: it looks whether a key exists and stores the body in two steps, with
threads in between (`MOTO_AS_IT_IS=1` shows two winners of one key). Amazon's, Ceph's and MinIO's are; so requests that
write under a condition take turns here.
"""

import json
import os
import subprocess
import sys
import threading
import urllib.request
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

# moto asks for none of its own, but the client has to sign with something.
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "AKIATESTTESTTESTTEST",
    "AWS_SECRET_ACCESS_KEY": "test-secret-that-is-never-printed",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
}
# Names a server that runs already, of whom CREDENTIALS may make buckets: what ceph_gateway.py starts.
REAL_SERVER = "TEST_S3_SERVER"
# Names a file of lines [bucket, key, body]: what moto holds from the start. So many by requests would take minutes.
FILLED_WITH = "MOTO_FILLED_WITH"
# moto looks at every key of a bucket for each page that it lists; with this it has an index, as real servers have. For
# buckets to which nothing is added.
INDEXED = "MOTO_INDEXED"


@dataclass(frozen=True)
class S3Server:
    """Where the server listens: http://127.0.0.1:<port>. moto: it asks for no credentials, and knows all of S3."""

    endpoint: str
    moto: bool = True
    pid: int | None = None  # of moto's process

    @property
    def port(self) -> int:
        return int(self.endpoint.rpartition(":")[2])

    def make_bucket(self, name: str) -> None:
        """By hand, so that a test that makes a bucket does not depend on the client under test."""
        request = AWSRequest("PUT", f"{self.endpoint}/{name}", headers={"x-amz-content-sha256": "UNSIGNED-PAYLOAD"})
        who = Credentials(CREDENTIALS["AWS_ACCESS_KEY_ID"], CREDENTIALS["AWS_SECRET_ACCESS_KEY"])
        S3SigV4Auth(who, "s3", CREDENTIALS["AWS_DEFAULT_REGION"]).add_auth(request)
        signed = urllib.request.Request(request.url, headers=dict(request.headers), method="PUT")
        urllib.request.urlopen(signed, timeout=30).close()


@contextmanager
def s3_server(**environment: str) -> Iterator[S3Server]:
    """Start it, and stop it at the end; it also ends by itself when this process does."""
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **CREDENTIALS, **environment},
        start_new_session=True,  # Ctrl-C is for us; who is asked by others must be the last to go
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield S3Server(json.loads(process.stdout.readline())["endpoint"], pid=process.pid)
    finally:
        process.stdin.close()
        process.wait(30)
        process.stdout.close()


class _TurnsForConditions:
    """A WSGI application that serves one conditional write at a time."""

    def __init__(self, app: Callable[..., Iterable[bytes]]) -> None:
        self.app = app
        self.turn = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if "HTTP_IF_NONE_MATCH" not in environ or environ["REQUEST_METHOD"] != "PUT":
            return self.app(environ, start_response)
        with self.turn:
            return list(self.app(environ, start_response))


def _fill(file: Path) -> None:
    from moto.core import DEFAULT_ACCOUNT_ID
    from moto.s3.models import s3_backends

    backend = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
    with file.open(encoding="utf-8") as lines:
        for bucket, key, body in map(json.loads, lines):
            if bucket not in backend.buckets:
                backend.create_bucket(bucket, "us-east-1")
            backend.put_object(bucket, key, body.encode("latin-1"), disable_notification=True)


def _pages_by_index() -> None:
    from moto.s3.models import S3Backend

    indices: dict[str, list[str]] = {}

    def list_objects_v2(
        self: Any,
        bucket: Any,
        prefix: str | None,
        delimiter: str | None,
        continuation_token: str | None,
        start_after: str | None,
        max_keys: int,
    ) -> tuple[list[Any], bool, str | None]:
        if bucket.name not in indices:
            indices[bucket.name] = sorted(bucket.keys)
        names = indices[bucket.name]
        prefix = prefix or ""
        after = bytes.fromhex(continuation_token).decode() if continuation_token else start_after or ""
        at = max(bisect_left(names, prefix), bisect_right(names, after))
        page: list[str] = []
        while at < len(names) and names[at].startswith(prefix) and len(page) <= max_keys:
            head, slash, _ = names[at][len(prefix) :].partition(delimiter) if delimiter else (names[at], "", "")
            if slash:
                folder = f"{prefix}{head}{slash}"
                at = bisect_left(names, f"{prefix}{head}{chr(ord(slash) + 1)}", at)
                if folder > after:
                    page.append(folder)
            else:
                page.append(names[at])
                at += 1
        more, page = len(page) > max_keys, page[:max_keys]
        return [bucket.keys.get(name, name) for name in page], more, page[-1].encode().hex() if more else None

    S3Backend.list_objects_v2 = list_objects_v2


def _serve() -> None:
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"  # connections are kept, as real servers keep them

        def log(self, type: str, message: str, *args: Any) -> None:
            pass

    if filled_with := os.environ.get(FILLED_WITH):
        _fill(Path(filled_with))
    if os.environ.get(INDEXED):
        _pages_by_index()
    app = DomainDispatcherApplication(create_backend_app)
    wrapped = app if os.environ.get("MOTO_AS_IT_IS") else _TurnsForConditions(app)
    server = make_server("127.0.0.1", 0, wrapped, threaded=True, request_handler=Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(json.dumps({"endpoint": f"http://127.0.0.1:{server.server_port}"}), flush=True)
    sys.stdin.read()  # until the parent closes it, or dies


if __name__ == "__main__":
    _serve()
