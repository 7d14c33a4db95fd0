"""Where documents come from: local files, the hub or a generator, each to a list of plain rows (field -> JSON value).

Local rows are what `datasets.load_dataset` would make of the same file for lm-evaluation-harness, with one
difference: a field that a row lacks stays missing (there it becomes null, and the prompt says "None").
"""

import gzip
import io
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from datetime import date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any

from eval_platform.errors import TaskError
from eval_platform.identity import content_id
from eval_platform.tasks.schema import LOCAL_FORMATS, HubSource, Source, TaskFile
from eval_platform.values import Document

Row = Mapping[str, Any]


def read_documents(definition: TaskFile, folder: Path) -> tuple[list[Row], list[Row]]:
    """(rows that are asked, rows that shots are drawn from) of a task file in `folder`; the latter empty without shots.

    Raises TaskError naming the file and the remedy when one cannot be read or holds nothing.
    """
    asked = _asked(definition, folder)
    if definition.documents is not None and definition.documents.sample is not None:
        asked = _sample(asked, definition.documents.sample, definition.documents.seed)
    return asked, _shots(definition, folder, asked)


def as_documents(rows: Sequence[Row], *, subset: str | None = None, cluster: str | None = None) -> list[Document]:
    """The rows as documents. sample_id is the row's text and its number (from 1) among equal rows.

    subset, cluster: the fields that hold a document's subset and cluster; TaskError when a row lacks them.
    """
    seen: Counter[str] = Counter()
    documents = []
    for position, row in enumerate(rows):
        text = row_text(row)
        seen[text] += 1
        documents.append(
            Document(
                sample_id=content_id([text, seen[text]]),
                position=position,
                fields=row,
                subset=_label(row, subset, position) or "",
                cluster=_label(row, cluster, position),
            )
        )
    return documents


def row_text(row: Row) -> str:
    """The one JSON text of a row. Fields are sorted; what lies inside them keeps its order, which templates can see."""
    return json.dumps(
        {key: row[key] for key in sorted(row)}, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )


def _label(row: Row, field: str | None, position: int) -> str | None:
    if field is None:
        return None
    if row.get(field) is None:
        raise TaskError(
            f"document {position} has no field {field!r}, which documents.subset or documents.cluster names",
            remedy=f"give every document the field, or correct the name; it has {', '.join(row)}",
        )
    return str(row[field])


def _asked(definition: TaskFile, folder: Path) -> list[Row]:
    if definition.dataset_path is None:
        assert definition.documents is not None  # the schema asks for one of the two
        return _read_source(definition.documents, folder)
    assert definition.evaluated_split is not None
    return _read_split(definition, folder, definition.evaluated_split)


def _shots(definition: TaskFile, folder: Path, asked: list[Row]) -> list[Row]:
    if not definition.shots:
        return []
    if definition.fewshot_config.samples is not None and definition.shots_split is None:
        samples = definition.fewshot_config.samples
        return [_plain(row, f"fewshot_config.samples, number {n}") for n, row in enumerate(samples)]
    if definition.shots_split is not None:
        if definition.shots_split == definition.evaluated_split:
            return asked
        return _read_split(definition, folder, definition.shots_split)
    assert definition.documents is not None
    return asked if definition.documents.fewshot is None else _read_source(definition.documents.fewshot, folder)


def _sample(rows: list[Row], n: int, seed: int) -> list[Row]:
    """`n` of the rows, drawn without replacement, in their own order; all of them when there are no more."""
    if n >= len(rows):
        return rows
    return [rows[index] for index in sorted(random.Random(seed).sample(range(len(rows)), n))]


def _read_source(source: Source, folder: Path) -> list[Row]:
    if source.generator is not None:
        # Imported here: generators belong to the tasks that name one, not to every reader of a task.
        from eval_platform.tasks.generators import generate

        wanted = source.generator
        return [
            _plain(row, f"generator {wanted.name}, item {n}")
            for n, row in enumerate(generate(wanted.name, wanted.n, wanted.seed, wanted.split))
        ]
    if source.hub is not None:
        return _read_hub(source.hub)
    names = [source.file] if source.file is not None else source.files or []
    return [row for name in names for row in _read_file(folder / name, None)]


def _read_split(definition: TaskFile, folder: Path, split: str) -> list[Row]:
    """A split of lm-eval's `dataset_path`."""
    assert definition.dataset_path is not None
    files = definition.dataset_kwargs.data_files if definition.dataset_kwargs else None
    if definition.dataset_path not in LOCAL_FORMATS:
        revision = definition.dataset_kwargs.revision if definition.dataset_kwargs else None
        hub = HubSource(name=definition.dataset_path, config=definition.dataset_name, split=split, revision=revision)
        return _read_hub(hub)
    by_split = files if isinstance(files, dict) else {"train": files or []}
    if split not in by_split:
        raise TaskError(
            f"dataset_kwargs.data_files has no split {split!r}; it has {', '.join(by_split)}",
            remedy="name one of these as test_split (or fewshot_split), or add its file",
        )
    named = by_split[split]
    names = [named] if isinstance(named, str) else named
    return [row for name in names for row in _read_file(folder / name, definition.dataset_path)]


def _read_file(path: Path, format_: str | None) -> list[Row]:
    """The rows of one file; `format_` json, csv or parquet, or by its name when None."""
    zipped = path.suffix.lower() == ".gz"
    suffix = (path.with_suffix("") if zipped else path).suffix.lower()
    kind = format_ or _KINDS.get(suffix)
    if kind is None:
        raise TaskError(f"{path}: unknown kind of file", remedy=f"use {', '.join(_KINDS)}, each also with .gz")
    try:
        body = path.read_bytes()
        if zipped:
            body = gzip.decompress(body)
        rows = _READERS[kind](body)
    except FileNotFoundError as error:
        raise TaskError(
            f"no file of documents at {path}", remedy="paths are relative to the task file; correct it"
        ) from error
    except OSError as error:
        raise TaskError(f"{path} cannot be read: {error}", remedy="correct the path or the file's rights") from error
    except (ValueError, EOFError) as error:
        raise TaskError(f"{path} is not {kind}: {error}", remedy="mend the file") from error
    if not rows:
        raise TaskError(f"{path} holds no documents", remedy="put at least one document in, or name another file")
    return [_plain(row, f"{path}, document {n}") for n, row in enumerate(rows)]


def _read_json(body: bytes) -> list[Any]:
    """A JSON array of objects, or one object a line."""
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


_KINDS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
_READERS: Mapping[str, Callable[[bytes], list[Any]]] = {"json": _read_json, "csv": _read_csv, "parquet": _read_parquet}


def _read_hub(source: HubSource) -> list[Row]:
    where = f"dataset {source.name}" + (f" ({source.config})" if source.config else "") + f", split {source.split}"
    if source.name.startswith((".", "/", "~")):
        raise TaskError(f"{source.name} is a path, not a dataset's name", remedy="use `documents: {file: ...}`")
    try:
        import datasets
    except ImportError as error:
        raise TaskError(
            f"{where} is on the Hugging Face hub, and the package `datasets` is not installed",
            remedy="pip install datasets, or keep the documents in a local file",
        ) from error
    try:
        rows = datasets.load_dataset(source.name, source.config, split=source.split, revision=source.revision)
    except Exception as error:  # datasets and huggingface_hub raise dozens of types
        raise TaskError(
            f"{where} cannot be loaded from the Hugging Face hub: {type(error).__name__}: {error}",
            remedy="check name, split and network (HF_HUB_OFFLINE forbids it), or keep the documents in a local file",
        ) from error
    if len(rows) == 0:
        raise TaskError(f"{where} holds no documents", remedy="name another split")
    return [_plain(row, f"{where}, document {n}") for n, row in enumerate(rows)]


def _plain(row: Any, where: str) -> Row:
    """The row as JSON values, so that it has one canonical form. Raises TaskError for what has none."""
    if not isinstance(row, Mapping):
        raise TaskError(f"{where} is not an object of fields", remedy='write each document as {"field": value, ...}')
    return {str(key): _plain_value(value, f"{where}, field {key!r}") for key, value in row.items()}


def _plain_value(value: Any, where: str) -> Any:
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise TaskError(f"{where} is {value}, which is not a JSON number", remedy="use null or a text")
        return value
    if isinstance(value, list | tuple):
        return [_plain_value(part, where) for part in value]
    if isinstance(value, Mapping):
        return {str(key): _plain_value(part, where) for key, part in value.items()}
    if isinstance(value, date | datetime | time):
        return value.isoformat()
    if isinstance(value, Decimal):
        return str(value)
    raise TaskError(f"{where} is a {type(value).__name__}; only text and numbers are supported", remedy="remove it")
