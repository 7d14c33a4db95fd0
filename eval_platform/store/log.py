"""What happened lately? "Look here" entries, each written before the file that it announces.

A crash between the two leaves a look too many, never one too few. Entries say where to look, not what is true, so a
reader takes those of a date as a set: their order is a clock's, and clocks step.

An entry says all it says in its name too, so that in a bucket one listing reads a thousand of them. Where that would be
too long for a file name (and in entries from before names said it) the body is read.
"""

import re
import uuid
from collections.abc import Container, Iterable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

from eval_platform.identity import escape_key, unescape_key
from eval_platform.store import layout
from eval_platform.store.base import Store
from eval_platform.store.records import create_record, read_record, utc_now

Kind = Literal["arrival", "identity", "task", "try", "evaluation", "decision", "asked", "pruned", "skipped"]

_LONGEST_NAME = 200  # bytes; file systems take 255
_NUMBERS = ("attempt", "n")  # the fields that are no text
_TELLING = re.compile(
    r"log/(?P<date>[^/]+)/(?P<h>\d\d)(?P<m>\d\d)(?P<s>[\d.]+)-(?P<id>[0-9a-f]+)(?P<fields>(\+[a-z_]+=[^+/]*)+)\.json"
)


def write(store: Store, kind: Kind, **fields: Any) -> str:
    """Announce what is about to be created; returns the entry's key. `fields` name the subject (JSON values).

    Raises StoreError when it cannot be written: then what it announces must not be written either.
    """
    now = utc_now()
    date, _, clock = now.removesuffix("Z").partition("T")
    time, entry_id = clock.replace(":", ""), uuid.uuid4().hex[:12]
    told = _as_name({"kind": kind, **fields})
    key = layout.log_entry(date, time, entry_id + told)
    if len(key.rpartition("/")[2]) > _LONGEST_NAME:
        key = layout.log_entry(date, time, entry_id)
    create_record(store, key, {**fields, "kind": kind, "time": now})
    return key


def entry(store: Store, key: str) -> dict[str, Any]:
    """What the entry `key` says, from its name where that tells. Raises as `read_record`."""
    told = by_name(key)
    return read_record(store, key) if told is None else told


def by_name(key: str) -> dict[str, Any] | None:
    """What the name of the entry `key` says; None where its body has to be read."""
    match = _TELLING.fullmatch(key)
    if match is None:
        return None
    told = [field.partition("=") for field in match["fields"].split("+")[1:]]
    if not all(value.isdecimal() for name, _, value in told if name in _NUMBERS):
        return None
    try:
        fields = {name: int(value) if name in _NUMBERS else unescape_key(value) for name, _, value in told}
    except UnicodeDecodeError:  # `=FF`: not one of our names
        return None
    return {**fields, "time": f"{match['date']}T{match['h']}:{match['m']}:{match['s']}Z"}


def _as_name(fields: Mapping[str, Any]) -> str:
    return "".join(f"+{name}={escape_key(str(value)).replace('/', '=2F')}" for name, value in fields.items())


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
    """The entries of these UTC dates, each with its own key as `log_key`; those in `seen` are not read.

    Raises StoreError and SchemaError as reading records does.
    """
    return [
        {**entry(store, listed.key), "log_key": listed.key}
        for day in sorted(set(days))
        for listed in store.list(layout.log_folder(day))
        if listed.key not in seen
    ]
