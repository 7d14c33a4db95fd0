"""Content is identity: every id is the SHA-256 of canonical JSON, first 32 hex digits."""

import hashlib
import json
import re
from collections.abc import Iterable
from typing import Any

ID_LENGTH = 32
_OUTSIDE = re.compile(r"[^A-Za-z0-9._/-]")


def canonical_json(value: Any) -> bytes:
    """One byte string per value: sorted keys, no white space, UTF-8, no NaN.

    Raises ValueError for NaN and infinities, TypeError for what JSON does not have.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def content_id(value: Any) -> str:
    """The id of `value`: 32 hex digits."""
    return hashlib.sha256(canonical_json(value)).hexdigest()[:ID_LENGTH]


def ordered_id(values: Iterable[Any]) -> str:
    """The id of a sequence too long to hold as one JSON text: each value's canonical JSON and a newline, in order."""
    digest = hashlib.sha256()
    for value in values:
        digest.update(canonical_json(value))
        digest.update(b"\n")
    return digest.hexdigest()[:ID_LENGTH]


def escape_key(text: str) -> str:
    """Characters outside `[A-Za-z0-9._/-]` become `=XX` per UTF-8 byte, so that a key is a legal partition and path."""
    return _OUTSIDE.sub(lambda m: "".join(f"={byte:02X}" for byte in m.group().encode()), text)


def unescape_key(key: str) -> str:
    """The inverse of `escape_key`."""
    raw = re.sub(rb"=([0-9A-F]{2})", lambda m: bytes([int(m.group(1), 16)]), key.encode())
    return raw.decode()
