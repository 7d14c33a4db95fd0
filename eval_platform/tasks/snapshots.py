"""What is frozen in the store: the documents of a task, and the prompts that were made of them."""

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from eval_platform.errors import SchemaError
from eval_platform.identity import ordered_id
from eval_platform.store import Store, create_record, layout
from eval_platform.store.parquet import read_parquet
from eval_platform.tasks.documents import Row, as_documents, row_text
from eval_platform.tasks.render import prompts_id
from eval_platform.values import Document, Item

_DOCUMENTS = pa.schema([("sample_id", pa.string()), ("position", pa.int64()), ("document", pa.string())])
_PROMPTS = pa.schema(
    [
        ("sample_id", pa.string()),
        ("position", pa.int64()),
        ("prompt", pa.string()),
        ("choices", pa.list_(pa.string())),
        ("target", pa.string()),
        ("shots_used", pa.int64()),
    ]
)


def dataset_id(rows: Sequence[Row]) -> str:
    """The id of a snapshot: its rows, in order."""
    return ordered_id(row_text(row) for row in rows)


def freeze_documents(store: Store, documents: Sequence[Document], card: Mapping[str, Any]) -> str:
    """Keep the snapshot unless it is kept already; returns its dataset_id.

    datasets/<id>/documents.parquet has a row a document: sample_id, position, document (its fields as JSON text);
    dataset.json has `card` (source, licence, citation) and counts.
    """
    identity = dataset_id([document.fields for document in documents])
    table = pa.table(
        {
            "sample_id": [document.sample_id for document in documents],
            "position": [document.position for document in documents],
            "document": [row_text(document.fields) for document in documents],
        },
        schema=_DOCUMENTS,
    )
    store.create(layout.dataset_documents(identity), _parquet(table))
    fields = sorted(set().union(*(document.fields for document in documents)))
    create_record(
        store, layout.dataset_card(identity), {**card, "dataset_id": identity, "n": len(documents), "fields": fields}
    )
    return identity


def frozen_rows(store: Store, identity: str) -> list[Row]:
    """The rows of a snapshot, in order. Raises KeyError when it was never frozen, SchemaError when it was altered."""
    key = layout.dataset_documents(identity)
    try:
        table = read_parquet(store.read(key), columns=["position", "document"])
        rows = [json.loads(text) for text in table.sort_by("position").column("document").to_pylist()]
    except (pa.ArrowException, ValueError) as error:
        raise SchemaError(f"{key} cannot be read: {error}", remedy="restore it from a copy") from error
    if dataset_id(rows) != identity:
        raise SchemaError(f"{key} is not what was frozen: its rows have another id", remedy="restore it from a copy")
    return rows


def frozen_ids(store: Store, identity: str) -> list[str]:
    """The sample_ids of a snapshot, in order. Raises KeyError and SchemaError as `frozen_rows` does."""
    return [document.sample_id for document in as_documents(frozen_rows(store, identity))]


def write_prompts(store: Store, items: Sequence[Item]) -> str:
    """Keep prompts and targets once for all checkpoints; returns the prompts_id. A target that is no text is JSON."""
    identity = prompts_id(items)
    table = pa.table(
        {
            "sample_id": [item.document.sample_id for item in items],
            "position": [item.document.position for item in items],
            "prompt": [item.prompt for item in items],
            "choices": [list(item.choices) for item in items],
            "target": [
                item.target if isinstance(item.target, str) else json.dumps(item.target, ensure_ascii=False)
                for item in items
            ],
            "shots_used": [item.shots_used for item in items],
        },
        schema=_PROMPTS,
    )
    store.create(layout.prompts(identity), _parquet(table))
    return identity


def _parquet(table: pa.Table) -> bytes:
    body = io.BytesIO()
    pq.write_table(table, body, compression="zstd")
    return body.getvalue()
