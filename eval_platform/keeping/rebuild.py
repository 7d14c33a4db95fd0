"""What if the catalog or the log is lost? Both are made again from the files alone."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from eval_platform import warehouse
from eval_platform.errors import SchemaError
from eval_platform.keeping.together import Step, each, quietly
from eval_platform.store import Store, layout, log
from eval_platform.store.announcements import announce, announcement, unannounced


def rebuild(store: Store, catalog: Path, step: Step = quietly) -> int:
    """Announce anew what no log entry points at, then build the catalog from nothing; returns how many were announced.

    Raises StoreError when the store or the catalog fails.
    """
    announced = announce_again(store, step)
    warehouse.rebuild(store, catalog, partial(step, "building the catalog"))
    return announced


def announce_again(store: Store, step: Step = quietly) -> int:
    """Write a log entry, of today, for every file that none announces; returns how many.

    So that every reader of the log (other machines' catalogs, Dagster) looks at it once more. Safe to repeat.
    """
    entries = [entry.key for entry in store.list(layout.LOG)]
    told = list(_read(store, entries, step))
    found = [entry.key for entry in store.list("") if announcement(entry.key) is not None]
    missing = unannounced(found, told)
    for done, _ in enumerate(each(store, partial(announce, store), missing), 1):
        step("writing the log", done, len(missing))
    return len(missing)


def _read(store: Store, keys: list[str], step: Step) -> Iterator[dict[str, Any]]:
    """The entries that can be read; what one that cannot be announced is announced again."""

    def read(key: str) -> dict[str, Any]:
        try:
            return log.entry(store, key)
        except SchemaError:
            return {}

    for done, entry in enumerate(each(store, read, keys), 1):
        step("reading the log", done, len(keys))
        yield entry
