"""What does one file of a store say, and is it whole by itself? Judged by its name and its bytes alone."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from eval_platform.errors import SchemaError
from eval_platform.identity import ordered_id
from eval_platform.store import Store, layout, log
from eval_platform.store.bundles import copies
from eval_platform.store.parquet import read_parquet
from eval_platform.store.records import decode
from eval_platform.tasks.snapshots import frozen_rows

_RECORDS = ("root.json", "roots/", "arrivals/", "tasks/", "evaluations/", "decisions/", "tries/", "leases/", "answers/")
_ASK_AGAIN = "delete it: its requests are asked again, if anyone still needs them"
_ANNOUNCE_AGAIN = "delete it, and `eval-platform rebuild` announces again what it announced"


@dataclass(frozen=True, slots=True)
class Body:
    """record: of JSON. sha256: of that and of Parquet. rows: of Parquet. sample_ids: the id over them in order, of
    prompts. copies: of a bundle, key -> SHA-256 of each record in it.

    problem: why it is not what its name says; foreign: because it is no file of a store at all.
    """

    record: dict[str, Any] | None = None
    sha256: str | None = None
    rows: int | None = None
    sample_ids: str | None = None
    copies: Mapping[str, str] = field(default_factory=dict)
    problem: str | None = None
    remedy: str | None = None
    foreign: bool = False


def read_body(store: Store, key: str) -> Body | None:
    """None when the file is gone. Raises StoreError when the storage fails; damage is told in `problem`."""
    try:
        body = store.read(key)
    except KeyError:
        return None
    return judge(store, key, body)


def judge(store: Store, key: str, body: bytes) -> Body:
    """What `body`, read from `key`, says; damage is told in `problem`. Raises StoreError when the storage fails."""
    try:
        return _judged(store, key, body)
    except SchemaError as error:
        return Body(problem=str(error).partition("\n")[0], remedy=error.remedy)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return Body(problem=f"it is not of the kind that its name says: {error!r}")


def _judged(store: Store, key: str, body: bytes) -> Body:
    top = key.partition("/")[0]
    name = key.rpartition("/")[2]
    if top == "journal":
        return _segment(key, body)
    if top == "datasets" and name == "documents.parquet":
        frozen_rows(store, key.split("/")[1])  # raises SchemaError when their id is another
        return Body()
    if top in ("samples", "prompts") and name.endswith(".parquet"):
        return _parquet(top, body)
    if top == "bundles":
        return Body(copies={one: hashlib.sha256(record).hexdigest() for one, record in copies(key, body)})
    if top == "log":
        return _entry(key, body)
    if top == "leases" and name.endswith(".beat"):
        decode(body, key)
        return Body()
    if key.startswith(_RECORDS) or top == "datasets":
        record = decode(body, key)
        if top == "tasks" and "/by-name/" not in key and key != layout.task(record.get("task_id", "")):
            return Body(problem=f"it defines task {record.get('task_id')}")
        return Body(record=record if top != "leases" else None, sha256=hashlib.sha256(body).hexdigest())
    return Body(problem="it is no file of a results root", remedy="move it elsewhere", foreign=True)


def _entry(key: str, body: bytes) -> Body:
    """A log entry says in its body what its name says: readers go by the name."""
    named = log.by_name(key)
    try:
        record = decode(body, key)
    except SchemaError as error:
        return Body(named, problem=str(error).partition("\n")[0], remedy=_ANNOUNCE_AGAIN)
    if named is not None and any(record.get(name) != value for name, value in named.items()):
        return Body(named, problem="its name says something else than its body", remedy=_ANNOUNCE_AGAIN)
    return Body(record)


def _parquet(top: str, body: bytes) -> Body:
    try:
        table = read_parquet(body, columns=["sample_id"])
    except (pa.ArrowException, OSError, KeyError) as error:
        return Body(problem=f"it is no whole Parquet file: {error}")
    ids = ordered_id(table.column("sample_id").to_pylist()) if top == "prompts" else None
    return Body(sha256=hashlib.sha256(body).hexdigest(), rows=table.num_rows, sample_ids=ids)


def _segment(key: str, body: bytes) -> Body:
    """A journal's segment carries the hash of its lines, and whose it is."""
    first, _, lines = body.partition(b"\n")
    header = decode(first, key)
    _, answers_id, attempt, try_id, _ = key.split("/")
    mine = (header["answers_id"], str(header["attempt"]), header["try"]) == (answers_id, attempt, try_id)
    rows = [json.loads(line) for line in lines.split(b"\n")[:-1]] if mine else []
    if not mine or hashlib.sha256(lines).hexdigest() != header["sha256"] or len(rows) != header["responses"]:
        return Body(problem="it is not a whole segment of its journal", remedy=_ASK_AGAIN)
    return Body()
