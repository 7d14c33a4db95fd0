"""What happened lately? "Look here" entries, each written before the file that it announces.

A crash between the two leaves a look too many, never one too few. Entries say where to look, not what is true, so a
reader takes those of a date as a set: their order is a clock's, and clocks step.
"""

import uuid
from collections.abc import Container, Iterable
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from eval_platform.store import layout
from eval_platform.store.base import Store
from eval_platform.store.records import create_record, read_record, utc_now

Kind = Literal["arrival", "identity", "task", "try", "evaluation", "decision", "asked", "pruned"]


def write(store: Store, kind: Kind, **fields: Any) -> str:
    """Announce what is about to be created; returns the entry's key. `fields` name the subject (JSON values).

    Raises StoreError when it cannot be written: then what it announces must not be written either.
    """
    now = utc_now()
    date, _, clock = now.removesuffix("Z").partition("T")
    key = layout.log_entry(date, clock.replace(":", ""), uuid.uuid4().hex[:12])
    create_record(store, key, {**fields, "kind": kind, "time": now})
    return key


def dates(store: Store) -> list[str]:
    """UTC dates (YYYY-MM-DD) that have entries, ascending."""
    return [entry.key.removeprefix(layout.LOG).rstrip("/") for entry in store.list(layout.LOG, delimiter="/")]


def recent_dates() -> list[str]:
    """Yesterday, today and tomorrow (UTC): what an incremental reader lists.

    Tomorrow, because another machine's clock may be ahead of this one around midnight.
    """
    today = datetime.now(UTC).date()
    return [(today + timedelta(days=days)).isoformat() for days in (-1, 0, 1)]


def read(store: Store, days: Iterable[str], seen: Container[str] = ()) -> list[dict[str, Any]]:
    """The entries of these UTC dates, as written, each with its own key as `log_key`; those in `seen` are not read.

    Raises StoreError and SchemaError as reading records does.
    """
    return [
        {**read_record(store, entry.key), "log_key": entry.key}
        for day in sorted(set(days))
        for entry in store.list(layout.log_folder(day))
        if entry.key not in seen
    ]
