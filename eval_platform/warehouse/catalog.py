"""Is the catalog up to date, and how does it become so? The log says where to look; the store says what is true.

The catalog is a mirror on this machine: delete it and it is built anew. It is never written in place: a refresh copies
it, brings the copy up to date and renames it over the old file, so readers keep the file they opened and new readers
get the new one. Refreshers take turns by a file lock.

What may be missed: a file created more than a day after its log entry by a process that slept meanwhile, when the
catalog was built from nothing in between. `rebuild` finds it.
"""

import fcntl
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from eval_platform.errors import SchemaError, StoreError
from eval_platform.store import Store, find_record, layout, log
from eval_platform.warehouse.connection import open_catalog
from eval_platform.warehouse.listed import bundles_of, listed_for
from eval_platform.warehouse.rows import (
    OWNED,
    Reading,
    Subject,
    all_subjects,
    damaged,
    parse_subject,
    read_subject,
    read_subjects,
    subject_text,
)
from eval_platform.warehouse.schema import CATALOG_VERSION, INTERNAL, TABLES, VIEWS

if TYPE_CHECKING:
    import duckdb

# Entries of yesterday are looked at again: clocks step back, and machines disagree around midnight.
_OVERLAP_DAYS = 1
_BATCH_SUBJECTS = 2_000
# A listing shows a thousand keys. With fewer questions than this it is not worth one, however large the root may be.
_ASKED_SINGLY = 200


@dataclass(frozen=True, slots=True)
class _Look:
    """A log entry: whose records to read, and the store key (or None) that it announced and that must come yet."""

    log_key: str
    date: str
    subject: str | None
    expects: str | None


@dataclass(slots=True)
class _Known:
    """What a catalog remembers of the log."""

    refreshed_on: str
    seen: set[str]
    pending: list[_Look]
    watched: dict[str, tuple[str, str | None]]  # subject -> digest, until


@dataclass(slots=True)
class _News:
    """What a refresh has to write."""

    looks: list[_Look] = field(default_factory=list)
    readings: dict[str, Reading] = field(default_factory=dict)
    tried: set[str] = field(default_factory=set)


def refresh(store: Store, catalog: Path, *, wait_seconds: float | None = None) -> bool:
    """Bring the catalog up to date; True when it changed. The first time it is built from a full listing.

    Waits for another refresh under way: for ever, or `wait_seconds`; then False, and the catalog is as it was.
    Raises StoreError when the store cannot be read or the catalog cannot be written.
    """
    with turn(catalog, wait_seconds) as ours:
        if not ours:
            return False
        known = _remembered(store, catalog)
        if known is None:
            _build(store, catalog)
            return True
        news = _news(store, known)
        if not news.readings:
            return False
        with _successor(catalog, copy=True) as con:
            _apply(con, store, news)
        return True


def rebuild(store: Store, catalog: Path, step: Callable[[int, int], None] = lambda done, total: None) -> None:
    """Build the catalog from the store's files alone, whatever it held; `step` is told how many subjects are read.

    Raises as `refresh`.
    """
    with turn(catalog, None):
        _build(store, catalog, step)


def behind(store: Store, catalog: Path) -> bool:
    """Whether `refresh` would change the catalog: lists the recent log and reads only what is new in it."""
    known = _remembered(store, catalog)
    return known is None or bool(_news(store, known).readings)


# ------------------------------------------------------------------------------------------------ what is new


def _news(store: Store, known: _Known) -> _News:
    news = _News()
    since = _since(known.refreshed_on)
    looks = [*_entries(store, since, known.seen, news), *known.pending]
    # Asked before the subjects are read: what comes in between is then read though it counts as still awaited.
    there = _existing(store, {look.expects for look in looks if look.expects is not None})
    for look in looks:
        arrived = look.expects is None or look.expects in there
        news.looks.append(_Look(look.log_key, look.date, look.subject, None if arrived else look.expects))
        if arrived and look.subject is not None:
            news.readings.setdefault(look.subject, Reading(parse_subject(look.subject)))
            if look.expects is None:
                news.tried.add(look.subject)
    whole = [parse_subject(text) for text, reading in news.readings.items() if "problems" not in reading.rows]
    news.readings |= {subject_text(reading.subject): reading for reading in read_subjects(store, whole)}
    if any(subject.startswith("task:") for subject in news.readings):
        # Datasets are frozen just before the tasks that ask them and have no entry of their own.
        for entry in store.list("datasets/", delimiter="/"):
            subject = "dataset", entry.key.removeprefix("datasets/").rstrip("/")
            news.readings[subject_text(subject)] = read_subject(store, subject)
    for subject, (digest, until) in known.watched.items():
        if subject not in news.readings and (until is None or until >= since):
            reading = read_subject(store, parse_subject(subject))
            if reading.digest() != digest:
                news.readings[subject] = reading
    return news


def _entries(store: Store, since: str, seen: set[str], news: _News) -> Iterator[_Look]:
    """Log entries from the date `since` on that are not in `seen`; those that cannot be read become problems."""
    for day in log.dates(store):
        if day < since:
            continue
        for entry in store.list(layout.log_folder(day)):
            if entry.key in seen:
                continue
            try:
                subject, expects = _announced(log.entry(store, entry.key))
            except (SchemaError, KeyError, TypeError, ValueError) as error:
                # Where it pointed is not known, so nothing is looked at again: only a rebuild finds what it announced.
                subject = ("log", entry.key)
                said = str(error) if isinstance(error, SchemaError) else f"{entry.key} says nothing known: {error!r}"
                reason = f"{said}; what it announced may be missing here until the catalog is deleted and built anew"
                news.readings[subject_text(subject)] = damaged(subject, reason, unfinished=None)
                yield _Look(entry.key, day, None, None)
                continue
            yield _Look(entry.key, day, subject_text(subject), expects)


def _announced(entry: Mapping[str, Any]) -> tuple[Subject, str | None]:
    """(whose records, the key that is about to be created). Raises KeyError or ValueError for an unknown entry.

    A try's number is not known when it is announced, so for it the key is None: see `_watch`.
    """
    match entry["kind"]:
        case "arrival":
            return ("arrival", entry["key"]), layout.arrival(entry["key"], entry["n"])
        case "identity":
            return ("arrival", entry["key"]), layout.arrival_identity(entry["key"], entry["n"])
        case "evaluation":
            evaluation_id = entry["evaluation_id"]
            return ("evaluation", evaluation_id), layout.evaluation(evaluation_id, entry["attempt"])
        case "skipped":
            return ("arrival", entry["key"]), layout.arrival_skipped(entry["key"], entry["n"], entry["tier"])
        case "decision":
            evaluation_id = entry["evaluation_id"]
            return ("evaluation", evaluation_id), layout.decision(evaluation_id, entry["attempt"], entry["n"])
        case "pruned":
            evaluation_id = entry["evaluation_id"]
            return ("evaluation", evaluation_id), layout.evaluation_pruned(evaluation_id, entry["attempt"])
        case "task":
            return ("task", entry["name"]), layout.task_name(entry["name"], entry["n"])
        case "try" | "asked" if "evaluation_id" in entry:
            return ("evaluation", entry["evaluation_id"]), None
        case "try" | "asked":
            return ("arrival", entry["key"]), None
        case kind:
            raise ValueError(f"kind {kind!r}")


def _existing(store: Store, keys: Set[str]) -> Set[str]:
    """Those of `keys` that the store has. Where many are asked for in a bucket, what lies around them is listed."""
    if store.requests_at_once == 1:
        return {key for key in keys if _exists(store, key)}
    by_top: dict[str, list[str]] = {}
    for key in keys:
        by_top.setdefault(key.partition("/")[0], []).append(key)
    found: set[str] = set()
    for top, own in by_top.items():
        if len(own) < _ASKED_SINGLY:
            with ThreadPoolExecutor(store.requests_at_once) as pool:
                found |= {
                    key for key, is_there in zip(own, pool.map(partial(_exists, store), own), strict=True) if is_there
                }
        else:
            found |= {entry.key for entry in store.list(f"{top}/") if entry.key in keys}
    return found


def _exists(store: Store, key: str) -> bool:
    try:
        store.read(key, 0, 1)
    except KeyError:
        return False
    return True


def _since(refreshed_on: str) -> str:
    """The first date to list: a day before the last refresh, or before today when the clock has stepped back."""
    day = min(date.fromisoformat(refreshed_on), _today())
    return (day - timedelta(days=_OVERLAP_DAYS)).isoformat()


def _today() -> date:
    return datetime.now(UTC).date()


# ------------------------------------------------------------------------------------------------ reading and writing


def _remembered(store: Store, catalog: Path) -> _Known | None:
    """None when there is no catalog to go on from: absent, of another store or version, or damaged."""
    import duckdb

    if not catalog.is_file():
        return None
    try:
        con = open_catalog(catalog)
        try:
            version, root, refreshed_on = con.execute(
                "select version, root, refreshed_on from bookkeeping.meta"
            ).fetchall()[0]
            if version != CATALOG_VERSION or root != _root(store):
                return None
            since = _since(refreshed_on)
            seen = {
                key
                for (key,) in con.execute('select log_key from bookkeeping.log where "date" >= ?', [since]).fetchall()
            }
            pending = con.execute("from bookkeeping.log where expects is not null").fetchall()
            watched = con.execute("from bookkeeping.watched").fetchall()
        finally:
            con.close()
    except (duckdb.Error, IndexError):
        # Whatever is wrong with it: it is a mirror, and building it anew is the remedy.
        return None
    return _Known(
        refreshed_on, seen, [_Look(*row) for row in pending], {subject: (d, until) for subject, d, until in watched}
    )


def _build(store: Store, catalog: Path, step: Callable[[int, int], None] = lambda done, total: None) -> None:
    # The log is listed before the files: what is created meanwhile is found again by its entry.
    yesterday = (_today() - timedelta(days=_OVERLAP_DAYS)).isoformat()
    news = _News()
    looks = list(_entries(store, yesterday, set(), news))
    there = _existing(store, {look.expects for look in looks if look.expects is not None})
    for look in looks:
        arrived = look.expects is None or look.expects in there
        news.looks.append(_Look(look.log_key, look.date, look.subject, None if arrived else look.expects))
        if look.expects is None and look.subject is not None:
            news.tried.add(look.subject)
    bundles = bundles_of(store)
    subjects = sorted(all_subjects(store))  # so that the records of a batch lie close together
    with _successor(catalog, copy=False) as con:
        con.execute("create schema bookkeeping")
        for name, schema in {**TABLES, **INTERNAL}.items():
            con.register("_empty", schema.empty_table())
            con.execute(f"create table {name} as from _empty")
            con.unregister("_empty")
        for name, text in VIEWS.items():
            con.execute(f"create view {name} as {text}")
        for start in range(0, len(subjects), _BATCH_SUBJECTS):
            batch = subjects[start : start + _BATCH_SUBJECTS]
            _insert(con, read_subjects(listed_for(store, batch, bundles), batch), news.tried)
            step(start + len(batch), len(subjects))
        _apply(con, store, news)


def _apply(con: "duckdb.DuckDBPyConnection", store: Store, news: _News) -> None:
    """Write the news into the copy: each subject's rows are replaced as a whole."""
    con.execute("begin")
    readings = list(news.readings.values())
    _delete(con, readings)
    _insert(con, readings, news.tried)
    today = _today().isoformat()
    looks = pa.table(
        {
            "log_key": [look.log_key for look in news.looks],
            "date": [look.date for look in news.looks],
            "subject": [look.subject for look in news.looks],
            "expects": [look.expects for look in news.looks],
        },
        schema=INTERNAL["bookkeeping.log"],
    )
    con.register("_looks", looks)
    con.execute("delete from bookkeeping.log where log_key in (select log_key from _looks)")
    con.execute("insert into bookkeeping.log from _looks")
    con.unregister("_looks")
    con.execute('delete from bookkeeping.log where expects is null and "date" < ?', [_since(today)])
    con.execute("delete from bookkeeping.watched where until < ?", [_since(today)])
    con.execute("delete from bookkeeping.meta")
    con.execute("insert into bookkeeping.meta values (?, ?, ?)", [CATALOG_VERSION, _root(store), today])
    # A task's new definition makes stale what stood for its name, a definition that comes back makes it current.
    stale = """exists (from tasks t where t.name = evaluations.task)
        and not exists (from tasks t where t.task_id = evaluations.task_id and t.current)"""
    con.execute(f"update evaluations set stale = {stale} where stale is distinct from ({stale})")
    con.execute("commit")


def _delete(con: "duckdb.DuckDBPyConnection", readings: Iterable[Reading]) -> None:
    names: dict[str, list[str]] = {}
    texts = []
    for reading in readings:
        names.setdefault(reading.subject[0], []).append(reading.subject[1])
        texts.append(subject_text(reading.subject))
    for kind, named in names.items():
        for table, column in OWNED.get(kind, ()):
            con.execute(f"delete from {table} where {column} in (select unnest(?))", [named])
    for table in ("problems", "bookkeeping.watched"):
        con.execute(f"delete from {table} where subject in (select unnest(?))", [texts])


def _insert(con: "duckdb.DuckDBPyConnection", readings: list[Reading], tried: set[str]) -> None:
    for name, rows in _tables(readings).items():
        con.register("_rows", rows)
        con.execute(f"insert into {name} from _rows")
        con.unregister("_rows")
    watched = [row for reading in readings if (row := _watch(reading, tried)) is not None]
    if watched:
        con.executemany("insert into bookkeeping.watched values (?, ?, ?)", watched)


def _tables(readings: list[Reading]) -> dict[str, pa.Table]:
    """The readings' rows as Arrow tables; a reading with a value of the wrong type becomes a problem."""
    try:
        return _arrow(readings)
    except (pa.ArrowException, TypeError):
        for at, reading in enumerate(readings):
            try:
                _arrow([reading])
            except (pa.ArrowException, TypeError) as error:
                reason = f"a record of {reading.subject[0]} {reading.subject[1]} holds a value of another type: {error}"
                readings[at] = damaged(reading.subject, reason)
        return _arrow(readings)


def _arrow(readings: Iterable[Reading]) -> dict[str, pa.Table]:
    rows: dict[str, list[dict[str, Any]]] = {}
    for reading in readings:
        for table, own in reading.rows.items():
            rows.setdefault(table, []).extend(own)
    return {name: pa.Table.from_pylist(own, schema=TABLES[name]) for name, own in rows.items()}


def _watch(reading: Reading, tried: set[str]) -> tuple[str, str, str | None] | None:
    """The row of `bookkeeping.watched`, if the subject may change without another log entry.

    A try at work may die without a word, so it is looked at until it has ended. What has failed, or was announced and
    has left nothing yet, has an entry (a retry, a first try) whose file may still come: it is looked at for two days.
    """
    subject = subject_text(reading.subject)
    if reading.unfinished == "open":
        return subject, reading.digest(), None
    nothing_yet = not any(row.get("checkpoint_id") for rows in reading.rows.values() for row in rows)
    if subject in tried and (reading.unfinished == "failed" or nothing_yet):
        return subject, reading.digest(), _today().isoformat()
    return None


def _root(store: Store) -> str:
    """Which store a catalog mirrors: address and root id, so that a store made anew at the same place differs."""
    record = find_record(store, layout.ROOT) or {}
    return f"{store.uri}#{record.get('root_id', '')}"


@contextmanager
def _successor(catalog: Path, *, copy: bool) -> Iterator["duckdb.DuckDBPyConnection"]:
    """A connection to the next catalog, a copy of this one or empty, which takes its place at the end."""
    import duckdb

    aside = catalog.with_name(f"{catalog.name}.{uuid.uuid4().hex}.next")
    try:
        for leftover in catalog.parent.glob(f"{catalog.name}.*.next*"):  # of a refresh that was killed
            leftover.unlink(missing_ok=True)
        if copy:
            shutil.copyfile(catalog, aside)
        con = duckdb.connect(str(aside))
        try:
            con.execute("set TimeZone = 'UTC'")
            yield con
        finally:
            con.close()
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, catalog)
    except (OSError, duckdb.Error) as error:
        raise StoreError(
            f"cannot write the catalog {catalog}: {error}",
            remedy="free space or give the right to write there; the catalog is a mirror, so it may also be deleted",
        ) from error
    finally:
        for left in (aside, aside.with_name(f"{aside.name}.wal")):
            left.unlink(missing_ok=True)


@contextmanager
def turn(catalog: Path, wait_seconds: float | None) -> Iterator[bool]:
    """Hold the catalog's lock, which the system releases when a process dies; False when it was not had in time."""
    try:
        catalog.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(catalog.with_name(f"{catalog.name}.lock"), os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise StoreError(
            f"cannot lock the catalog {catalog}: {error.strerror}", remedy="give this user the right to write there"
        ) from error
    try:
        yield _locked(descriptor, wait_seconds)
    finally:
        os.close(descriptor)


def _locked(descriptor: int, wait_seconds: float | None) -> bool:
    if wait_seconds is None:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return True
    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.01)
