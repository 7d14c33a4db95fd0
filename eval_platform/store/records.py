"""JSON records in the store: every one carries `schema_version`; older ones are read, newer ones refused by name."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from eval_platform.errors import SchemaError
from eval_platform.store.base import Store

SCHEMA_VERSION = 1


def encode(record: Mapping[str, Any]) -> bytes:
    """Readable JSON with the schema version. Raises ValueError for NaN: what is not a number is null here."""
    body = {"schema_version": SCHEMA_VERSION, **record}
    return (json.dumps(body, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def decode(body: bytes, key: str) -> dict[str, Any]:
    """The record under `key`. Raises SchemaError when it is not JSON or from a newer version."""
    try:
        record = json.loads(body)
        version = record["schema_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise SchemaError(f"{key} is not a record of this store: {error!r}", remedy="restore it from a copy") from error
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise SchemaError(
            f"{key} has schema version {version}; this eval-platform reads up to {SCHEMA_VERSION}",
            remedy="upgrade eval-platform on this machine",
        )
    return record


def read_record(store: Store, key: str) -> dict[str, Any]:
    """Raises KeyError when absent, SchemaError when unreadable."""
    return decode(store.read(key), key)


def find_record(store: Store, key: str) -> dict[str, Any] | None:
    """As `read_record`, None when absent."""
    try:
        return read_record(store, key)
    except KeyError:
        return None


def create_record(store: Store, key: str, record: Mapping[str, Any]) -> bool:
    """Create once; False when the key exists already."""
    return store.create(key, encode(record))


def utc_now() -> str:
    """ISO 8601 in UTC with microseconds: for people and for log names, never for deciding what is newest."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
