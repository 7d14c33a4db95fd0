"""An HTTP front on 127.0.0.1 for a real server behind it, which breaks the requests that it is told to break."""

import re
import socket
import struct
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class Cut:
    """The connection is reset: after `up` bytes of the request's body, or after `down` bytes of the answer.

    Where it is the answer that is cut, the server has carried the request out.
    """

    up: int | None = None
    down: int | None = None


@dataclass(frozen=True)
class Answer:
    """In place of the server: an error as S3 has it."""

    status: int
    code: str
    message: str = "said by the test"

    def as_http(self) -> bytes:
        xml = f"<?xml version='1.0'?><Error><Code>{self.code}</Code><Message>{self.message}</Message></Error>".encode()
        head = f"HTTP/1.1 {self.status} x\r\nContent-Type: application/xml\r\nContent-Length: {len(xml)}\r\n"
        return head.encode() + b"Connection: close\r\n\r\n" + xml


@dataclass(frozen=True)
class Success:
    """In place of the server: everything is well."""

    def as_http(self) -> bytes:
        return b'HTTP/1.1 200 OK\r\nETag: "0"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n'


@dataclass(frozen=True)
class Hang:
    """Nothing is said for so many seconds, then the connection is closed."""

    seconds: float


Fault = Cut | Answer | Success | Hang


class Wire:
    """`with Wire(port) as wire`: what goes to `wire.endpoint` goes to 127.0.0.1:port, one connection a request."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.requests: list[str] = []  # request line and headers, as they came
        self._faults: list[tuple[re.Pattern[str], Fault]] = []
        self._listening = socket.create_server(("127.0.0.1", 0), backlog=64)
        self._turn = threading.Lock()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._listening.getsockname()[1]}"

    def breaks(self, fault: Fault, *, times: int = 1, on: str = "") -> None:
        """The next `times` requests whose line ("PUT /bucket/key HTTP/1.1") has `on` in it, a regular expression."""
        with self._turn:
            self._faults += [(re.compile(on), fault)] * times

    def heals(self) -> None:
        """Nothing is broken any more."""
        with self._turn:
            self._faults.clear()

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listening.accept()
            except OSError:  # closed
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        # Either side may be gone at any time here; that is what the tests are about.
        with client, suppress(OSError):
            head, body = _until_blank_line(client)
            if not head:
                return
            fault = self._fault_for(head)
            if b"100-continue" in head.lower():
                client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            length = int((re.search(rb"(?i)content-length: *(\d+)", head) or [b"", b"0"])[1])
            cut_at = fault.up if isinstance(fault, Cut) and fault.up is not None else None
            wanted = length if cut_at is None else min(length, cut_at)
            while len(body) < wanted and (more := client.recv(1 << 16)):
                body += more
            match fault:
                case Hang():
                    time.sleep(fault.seconds)
                case Answer() | Success():
                    client.sendall(fault.as_http())
                case _:
                    self._forward(client, head, body[:wanted], fault)

    def _fault_for(self, head: bytes) -> Fault | None:
        text = head.decode("latin-1")
        with self._turn:
            self.requests.append(text)
            line = text.partition("\r\n")[0]
            for at, (pattern, fault) in enumerate(self._faults):
                if pattern.search(line):
                    del self._faults[at]
                    return fault
        return None

    def _forward(self, client: socket.socket, head: bytes, body: bytes, fault: Cut | None) -> None:
        head = re.sub(rb"(?i)\r\n(connection|expect):[^\r]*", b"", head)
        head = head.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
        with socket.create_connection(("127.0.0.1", self.port)) as server:
            server.sendall(head + body)
            if fault is not None and fault.up is not None:
                _reset(client)
                return
            left = fault.down if fault is not None else None
            while answer := server.recv(1 << 16):
                if left is not None and len(answer) > left:
                    client.sendall(answer[:left])
                    _reset(client)
                    while server.recv(1 << 16):  # so that the server is done when the client tries again
                        pass
                    return
                client.sendall(answer)
                left = None if left is None else left - len(answer)


def _until_blank_line(client: socket.socket) -> tuple[bytes, bytes]:
    got = b""
    while b"\r\n\r\n" not in got:
        more = client.recv(1 << 16)
        if not more:
            return b"", b""
        got += more
    head, _, body = got.partition(b"\r\n\r\n")
    return head + b"\r\n\r\n", body


def _reset(connection: socket.socket) -> None:
    """Close with RST, not FIN."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
