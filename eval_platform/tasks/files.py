"""From the bytes of a file to rows: JSON, JSON Lines, CSV, Parquet or plain text, each also gzipped."""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import Any

from eval_platform.errors import TaskError


def read_rows(name: str, body: bytes, format_: str | None) -> list[Any]:
    """The rows in `body`, the bytes of a file called `name`; `format_` json, csv or parquet, or by the name when None.

    A text is one row: its field `text` is the whole of it.

    Raises TaskError for an unknown kind, or a body that is not of its kind.
    """
    path = PurePosixPath(name)
    zipped = path.suffix.lower() == ".gz"
    suffix = (path.with_suffix("") if zipped else path).suffix.lower()
    kind = format_ or _KINDS.get(suffix)
    if kind is None:
        raise TaskError(f"{name}: unknown kind of file", remedy=f"use {', '.join(_KINDS)}, each also with .gz")
    try:
        return _READERS[kind](gzip.decompress(body) if zipped else body)
    except OSError as error:  # a file that is no gzip
        raise TaskError(f"{name} cannot be read: {error}", remedy="compress the file anew") from error
    except (ValueError, EOFError, zlib.error) as error:
        raise TaskError(f"{name} is not {kind}: {error}", remedy="mend the file") from error


def read_json(body: bytes) -> list[Any]:
    """A JSON array of objects, or one object a line. Raises ValueError naming the line."""
    text = body.decode("utf-8-sig")
    if text.lstrip().startswith("["):
        return json.loads(text)
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):  # not splitlines: U+2028 may stand inside a text
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number}: {error}") from error
    return rows


def _read_csv(body: bytes) -> list[Any]:
    """As `datasets` reads CSV: pandas finds the types, and what it takes for missing becomes null."""
    import pandas
    import pyarrow as pa

    if not body.strip():
        return []
    try:
        frame = pandas.read_csv(io.BytesIO(body))
    except (pandas.errors.ParserError, pandas.errors.EmptyDataError) as error:
        raise ValueError(str(error)) from error
    return pa.Table.from_pandas(frame, preserve_index=False).to_pylist()


def _read_parquet(body: bytes) -> list[Any]:
    from eval_platform.store.parquet import read_parquet

    return read_parquet(body).to_pylist()


def _read_text(body: bytes) -> list[Any]:
    # Not one row a line, as lm-evaluation-harness's `text`: a line without those before it is another question.
    text = body.decode("utf-8-sig")
    return [{"text": text}] if text.strip() else []


_KINDS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
_READERS: Mapping[str, Callable[[bytes], list[Any]]] = {
    "json": read_json,
    "csv": _read_csv,
    "parquet": _read_parquet,
    "text": _read_text,
}
