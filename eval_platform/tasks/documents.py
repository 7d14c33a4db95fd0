"""Where documents come from: files, the hub, the catalogue or a generator, each to plain rows (field -> JSON value).

Local rows are what `datasets.load_dataset` would make of the same file for lm-evaluation-harness, with one
difference: a field that a row lacks stays missing (there it becomes null, and the prompt says "None").
"""

import json
import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any

from eval_platform.errors import NoData, TaskError
from eval_platform.identity import content_id
from eval_platform.tasks import hub, s3
from eval_platform.tasks.files import read_rows
from eval_platform.tasks.schema import TaskFile
from eval_platform.tasks.sources import LOCAL_FORMATS, HubSource, Source
from eval_platform.tasks.templates import inside
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


def as_documents(rows: Sequence[Row], *, subset: Sequence[str] = (), cluster: str | None = None) -> list[Document]:
    """The rows as documents. sample_id is the row's text and its number (from 1) among equal rows.

    subset, cluster: the fields that hold a document's subset and cluster; TaskError when a row lacks them. Of several
    subset fields a document's subset is its value of the first.
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
                subset=next(iter([_label(row, field, position) or "" for field in subset]), ""),
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
        return [plain_row(row, f"fewshot_config.samples, number {n}") for n, row in enumerate(samples)]
    if definition.shots_split is not None:
        if definition.shots_split == definition.evaluated_split:
            return asked
        return _read_split(definition, folder, definition.shots_split)
    assert definition.documents is not None
    source = definition.documents.shots_source
    return asked if source is None else _read_source(source, folder)


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
            plain_row(row, f"generator {wanted.name}, item {n}")
            for n, row in enumerate(generate(wanted.name, wanted.n, wanted.seed, wanted.split))
        ]
    if source.hub is not None:
        return _from_hub(source.hub)
    if source.dataset is not None:
        # Imported here: most tasks name no dataset, and each dataset's module is imported only when it is named.
        from eval_platform.tasks import catalogue

        named = source.dataset
        rows = catalogue.read(named.name, named.split, named.config)
        return [plain_row(row, f"dataset {named.name}, {named.split}, row {n}") for n, row in enumerate(rows)]
    names = [source.file] if source.file is not None else source.files or []
    return [row for name in names for row in read_file_rows(name, folder, None)]


def _read_split(definition: TaskFile, folder: Path, split: str) -> list[Row]:
    """A split of lm-eval's `dataset_path`."""
    assert definition.dataset_path is not None
    files = definition.dataset_kwargs.data_files if definition.dataset_kwargs else None
    if definition.dataset_path not in LOCAL_FORMATS:
        revision = definition.dataset_kwargs.revision if definition.dataset_kwargs else None
        hub = HubSource(name=definition.dataset_path, config=definition.dataset_name, split=split, revision=revision)
        return _from_hub(hub)
    by_split = files if isinstance(files, dict) else {"train": files or []}
    if split not in by_split:
        raise TaskError(
            f"dataset_kwargs.data_files has no split {split!r}; it has {', '.join(by_split)}",
            remedy="name one of these as test_split (or fewshot_split), or add its file",
        )
    named = by_split[split]
    names = [named] if isinstance(named, str) else named
    return [row for name in names for row in read_file_rows(name, folder, definition.dataset_path)]


def read_file_rows(name: str, folder: Path, format_: str | None) -> list[Row]:
    """The rows of one file in `folder` or on S3; `format_` json, csv or parquet, or by its name when None."""
    if name.startswith(s3.SCHEME):
        rows = read_rows(name, s3.read_object(name), format_)
        if not rows:
            raise TaskError(f"{name} holds no documents", remedy="put at least one document in, or name another file")
        return [plain_row(row, f"{name}, document {n}") for n, row in enumerate(rows)]
    path = folder / name
    try:
        rows = read_rows(path.name, path.read_bytes(), format_)
    except FileNotFoundError as error:
        raise TaskError(
            f"no file of documents at {path}", remedy="paths are relative to the task file; correct it"
        ) from error
    except OSError as error:
        raise TaskError(f"{path} cannot be read: {error}", remedy="correct the path or the file's rights") from error
    except TaskError as error:
        raise inside(f"{path.parent}/", error) from error
    if not rows:
        raise TaskError(f"{path} holds no documents", remedy="put at least one document in, or name another file")
    return [plain_row(row, f"{path}, document {n}") for n, row in enumerate(rows)]


def _from_hub(source: HubSource) -> list[Row]:
    if source.name.startswith((".", "/", "~")):
        raise TaskError(f"{source.name} is a path, not a dataset's name", remedy="use `documents: {file: ...}`")
    where = hub.told(source.name, source.config, source.split)
    try:
        rows = hub.read(source.name, source.config, source.split, source.revision)
    except hub.Unreachable as error:
        way = f"{hub.remedy(source.name)}, or keep the documents in a local file"
        raise NoData(source.name, [str(error)], remedy=way) from error
    return [plain_row(row, f"{where}, document {n}") for n, row in enumerate(rows)]


def plain_row(row: Any, where: str) -> Row:
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
