"""What is answered already? Finished requests in immutable segments, so that a kill loses only the batch in hand.

Later tries of the same attempt read them; another attempt never does, so that a `rerun` truly asks again. Evaluations
that ask the same have one journal: the first attempts share what it holds, and of a later attempt each reads what its
own tries wrote (worker.py), for else the second of two reruns would be given the answers of the first. A segment is
JSON lines: a header that says whose it is, how many lines follow and their SHA-256, then one response a line.
Log-likelihoods keep their exact bits: a finite one is the shortest decimal that reads back as itself, any other
(NaN, the infinities) the hexadecimal of its eight bytes.
"""

import hashlib
import json
import math
import struct
from collections.abc import Collection, Sequence
from typing import Any

from eval_platform.errors import SchemaError, StoreError
from eval_platform.store import layout
from eval_platform.store.base import Store
from eval_platform.store.records import SCHEMA_VERSION, decode
from eval_platform.values import Response


class Journal:
    """The journal of one attempt to answer `answers_id`, written by the try `try_id`."""

    def __init__(self, store: Store, answers_id: str, attempt: int, try_id: str) -> None:
        self.store = store
        self.answers_id = answers_id
        self.attempt = attempt
        self.try_id = try_id
        self._segments = 0

    def append(self, responses: Sequence[Response]) -> None:
        """Write one segment, durable when this returns. Raises StoreError (a full disk), leaving no part of it."""
        if not responses:
            return
        n = self._segments + 1
        lines = "".join(f"{json.dumps(_row(response), separators=(',', ':'))}\n" for response in responses).encode()
        header = {
            "schema_version": SCHEMA_VERSION,
            "answers_id": self.answers_id,
            "attempt": self.attempt,
            "try": self.try_id,
            "responses": len(responses),
            "sha256": hashlib.sha256(lines).hexdigest(),
        }
        key = layout.journal_segment(self.answers_id, self.attempt, self.try_id, n)
        if not self.store.create(key, json.dumps(header).encode() + b"\n" + lines):
            raise StoreError(f"{key} exists already: two writers use one try id", remedy="start a try of its own")
        self._segments = n

    def finished(self, tries: Collection[str] | None = None) -> dict[tuple[str, int], Response]:
        """Everything that these tries of this attempt have answered, or all of its tries, by (request_id, repeat).

        A request that two tries answered has one of the two answers. Raises SchemaError, naming the segment, when one
        is torn, altered or another attempt's.
        """
        found: dict[tuple[str, int], Response] = {}
        for entry in self.store.list(layout.journal_folder(self.answers_id, self.attempt)):
            if tries is not None and layout.journal_try(entry.key) not in tries:
                continue
            try:
                responses = self._read(entry.key)
            except KeyError:  # pruned since it was listed: its requests are asked again
                continue
            for response in responses:
                found[response.request_id, response.repeat] = response
        return found

    def _read(self, key: str) -> list[Response]:
        header_line, _, lines = self.store.read(key).partition(b"\n")
        header = decode(header_line, key)
        mine = (header.get("answers_id"), header.get("attempt")) == (self.answers_id, self.attempt)
        if not mine or hashlib.sha256(lines).hexdigest() != header.get("sha256"):
            raise SchemaError(
                f"{key} is not a whole segment of attempt {self.attempt} of {self.answers_id}",
                remedy="delete that file: its requests are asked again",
            )
        return [_response(json.loads(line)) for line in lines.split(b"\n")[:-1]]


def _row(response: Response) -> list[Any]:
    """As values.Response, field by field; a list, because names on every line would be most of the file.

    What a server billed stands at the end, where there was one.
    """
    billed = [response.prompt_tokens, response.completion_tokens]
    return [
        response.request_id,
        response.repeat,
        _exact(response.log_likelihood),
        response.is_greedy,
        response.text,
        response.n_tokens,
        response.finish_reason,
        response.truncated_left_tokens,
        *(billed if billed != [None, None] else []),
    ]


def _response(row: Sequence[Any]) -> Response:
    request_id, repeat, log_likelihood, is_greedy, text, n_tokens, finish_reason, truncated, *billed = row
    if isinstance(log_likelihood, str):
        (log_likelihood,) = struct.unpack(">d", bytes.fromhex(log_likelihood))
    return Response(request_id, repeat, log_likelihood, is_greedy, text, n_tokens, finish_reason, truncated, *billed)


def _exact(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else struct.pack(">d", value).hex()
