"""Is a safetensors file whole? Its header says how long it must be, so no tensor is read.

Format: https://huggingface.co/docs/safetensors (8 bytes little-endian header length, JSON header, data).
"""

import json
from pathlib import Path
from typing import Any

MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit


class BadHeader(Exception):
    """Why a file is no whole safetensors file. `final`: its bytes are wrong, waiting alone will not mend it."""

    def __init__(self, reason: str, *, final: bool) -> None:
        super().__init__(reason)
        self.final = final


def tensor_names(path: Path) -> frozenset[str]:
    """The tensors in a whole safetensors file.

    Raises BadHeader when the file is shorter than its header says (still being copied), or when header and data
    contradict each other; OSError when it cannot be read.
    """
    return frozenset(read_header(path))


def read_header(path: Path) -> dict[str, Any]:
    """name -> dtype, shape and offsets, of a whole file; raises as `tensor_names` does."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length == 0:
            # A zero length is what a file allocated ahead shows before its first byte is written.
            raise BadHeader(f"{size:,} bytes, its header is not written yet", final=False)
        if length > MAX_HEADER_BYTES:
            raise BadHeader(f"announces a header of {length:,} bytes; it is no safetensors file", final=True)
        if 8 + length > size:
            raise BadHeader(f"{size:,} bytes, shorter than its header ({8 + length:,})", final=False)
        body = file.read(length)
    if not body.strip(b"\0"):
        raise BadHeader(f"{size:,} bytes, its header is not written yet", final=False)
    try:
        header = json.loads(body)
    except (ValueError, RecursionError) as error:  # RecursionError: nested deeper than any header is
        raise BadHeader(f"its header is not JSON: {error}", final=True) from error
    if not isinstance(header, dict):
        raise BadHeader("its header is not a JSON object", final=True)
    header.pop("__metadata__", None)
    spans = sorted(_span(name, entry) for name, entry in header.items())
    end = 0
    for start, stop, name in spans:
        if start != end:
            kind = "overlaps the tensor before it" if start < end else "leaves a hole before it"
            raise BadHeader(f"tensor {name!r} {kind} in the header's offsets", final=True)
        end = stop
    expected = 8 + length + end
    if size < expected:
        raise BadHeader(f"{size:,} of {expected:,} bytes", final=False)
    if size > expected:
        raise BadHeader(f"{size:,} bytes, but its header accounts for {expected:,}", final=True)
    return header


def _span(name: str, entry: Any) -> tuple[int, int, str]:
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(type(offset) is int for offset in offsets)
        or not 0 <= offsets[0] <= offsets[1]
    ):
        raise BadHeader(f"tensor {name!r} has data_offsets {offsets!r:.80} in the header", final=True)
    return offsets[0], offsets[1], name
