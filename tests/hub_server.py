"""The Hugging Face hub's API as far as huggingface_hub uses it, on 127.0.0.1, over repositories made by a test.

Answers as the hub's documentation and huggingface_hub's own client have them: refs, revision, tree (in pages), resolve
with a redirect to another address for what is in LFS, X-Repo-Commit, ETag, Range, X-Error-Code.
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

PAGE = 4  # files told in one page of a tree
TOKEN = "hf_test_token_that_is_never_printed"


@dataclass
class Repository:
    """branches, tags: name -> commit; commits: commit -> {path: content}. access: "", "private" or "gated"."""

    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    access: str = ""

    def push(self, branch: str, folder: Path, **changed: bytes) -> str:
        """The files of `folder` as the branch's new commit; `changed` by name, "__" for a dot."""
        files = {one.relative_to(folder).as_posix(): one.read_bytes() for one in folder.rglob("*") if one.is_file()}
        files |= {name.replace("__", "."): body for name, body in changed.items()}
        text = "".join(f"{name} {hashlib.sha1(body).hexdigest()}" for name, body in sorted(files.items()))
        commit = hashlib.sha1(f"{branch}{len(self.commits)}{text}".encode()).hexdigest()
        self.commits[commit] = files
        self.branches[branch] = commit
        return commit

    def commit_of(self, revision: str) -> str | None:
        named = self.branches | self.tags
        return named.get(revision, revision if revision in self.commits else None)


@dataclass
class Hub:
    """What is served, and what was asked: request line and headers.

    instead: part of a path -> (body, headers) that are told in its place, as somebody might who is no hub.
    """

    endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    instead: dict[str, tuple[bytes, dict[str, str]]] = field(default_factory=dict)
    corrupt: bool = False  # weights come with a byte changed
    endless: bool = False  # weights come whole whatever was asked for, and never end
    sent: int = 0  # bytes of what never ends

    def asked(self, part: str) -> list[str]:
        return [path for path, _ in self.requests if part in path]


def _oid(body: bytes) -> str:
    return hashlib.sha1(f"blob {len(body)}\0".encode() + body).hexdigest()


def _is_lfs(path: str) -> bool:
    return path.endswith((".safetensors", ".bin"))


@contextmanager
def hub_server() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            hub.requests.append((self.path, {key.lower(): value for key, value in self.headers.items()}))
            where = urlsplit(self.path)
            for part, (told, headers) in hub.instead.items():
                if part in self.path:
                    self._answer(200, told, headers)
                    return
            parts = unquote(where.path).strip("/").split("/")
            if parts[0] == "lfs":  # the store behind the hub: knows no token, and content alone
                assert "Authorization" not in self.headers
                every = (
                    body
                    for one in hub.repositories.values()
                    for files in one.commits.values()
                    for body in files.values()
                )
                body = next(body for body in every if hashlib.sha256(body).hexdigest() == parts[1])
                self._content(body[:-1] + bytes([body[-1] ^ 1]) if hub.corrupt and len(body) > 1000 else body, {})
                return
            if parts[0] == "api":
                name, rest = "/".join(parts[2:4]), parts[4:]
            else:
                name, rest = "/".join(parts[:2]), parts[2:]
            repository = hub.repositories.get(name)
            known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            if repository is None or (repository.access == "private" and not known):
                self._error(401, "RepoNotFound")
            elif repository.access == "gated" and not known and rest[0] != "refs":
                self._error(403, "GatedRepo")
            elif rest[0] == "refs":
                told = {
                    kind: [{"name": n, "ref": f"refs/{git}/{n}", "targetCommit": c} for n, c in named.items()]
                    for kind, git, named in (
                        ("branches", "heads", repository.branches),
                        ("tags", "tags", repository.tags),
                    )
                }
                self._json({**told, "converts": []})
            else:
                revision = unquote(where.path).split(f"/{rest[0]}/", 1)[1]
                if rest[0] != "revision":
                    revision = rest[1]
                commit = repository.commit_of(revision)
                if commit is None:
                    self._error(404, "RevisionNotFound")
                elif rest[0] == "revision":
                    self._json({"id": name, "sha": commit})
                elif rest[0] == "tree":
                    self._tree(repository.commits[commit], "/".join(rest[2:]), parse_qs(where.query))
                else:
                    self._resolve(repository.commits[commit].get("/".join(rest[2:])), "/".join(rest[2:]), commit)

        def _tree(self, files: dict[str, bytes], below: str, query: dict[str, list[str]]) -> None:
            prefix = f"{below}/" if below else ""
            told: dict[str, dict[str, Any]] = {}
            for path, body in sorted(files.items()):
                if not path.startswith(prefix):
                    continue
                if "/" in path.removeprefix(prefix):
                    folder = prefix + path.removeprefix(prefix).split("/")[0]
                    told[folder] = {"type": "directory", "oid": "0" * 40, "size": 0, "path": folder}
                    continue
                told[path] = {"type": "file", "oid": _oid(body), "size": len(body), "path": path}
                if _is_lfs(path):
                    digest = hashlib.sha256(body).hexdigest()
                    told[path]["lfs"] = {"oid": digest, "size": len(body), "pointerSize": 130}
            at = int(query.get("cursor", ["0"])[0])
            page = list(told.values())[at : at + PAGE]
            link = f'<{hub.endpoint}{urlsplit(self.path).path}?cursor={at + PAGE}>; rel="next"'
            self._json(page, {"Link": link} if at + PAGE < len(told) else {})

        def _resolve(self, body: bytes | None, path: str, commit: str) -> None:
            if body is None:
                self._error(404, "EntryNotFound")
                return
            if not _is_lfs(path):
                self._content(body, {"X-Repo-Commit": commit, "ETag": f'"{_oid(body)}"'})
                return
            digest = hashlib.sha256(body).hexdigest()
            self._answer(
                302,
                b"",
                {
                    # Another origin, as the store behind the hub is one: no token may go there.
                    "Location": f"{hub.endpoint.replace('127.0.0.1', 'localhost')}/lfs/{digest}?X-Amz-Signature=s3cr3t",
                    "X-Repo-Commit": commit,
                    "X-Linked-Etag": f'"{digest}"',
                    "X-Linked-Size": str(len(body)),
                },
            )

        def _content(self, body: bytes, headers: dict[str, str]) -> None:
            if hub.endless and len(body) > 1000:
                self._for_ever(body)
                return
            asked = self.headers.get("Range")
            if asked is None:
                self._answer(200, body, headers)
                return
            first, last = (int(number) for number in asked.removeprefix("bytes=").split("-"))
            told = {**headers, "Content-Range": f"bytes {first}-{last}/{len(body)}"}
            self._answer(206, body[first : last + 1], told)

        def _for_ever(self, body: bytes) -> None:
            self.close_connection = True
            self.send_response(200)
            self.end_headers()
            with suppress(OSError):
                while hub.sent < 1 << 28:
                    self.wfile.write(body)
                    hub.sent += len(body)
                    body = bytes(1 << 20)

        def _json(self, value: object, headers: dict[str, str] | None = None) -> None:
            self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

        def _error(self, status: int, code: str) -> None:
            self._answer(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

        def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            if self.headers.get("Connection") == "close":
                self.send_header("Connection", "close")
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
