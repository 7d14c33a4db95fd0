"""Many small records in one object, so that a machine that has seen nothing reads a bucket in few requests.

A bundle is a copy: the records stay where they are and stay the truth. Readers list the records themselves, and take
from a bundle the body of a key that is listed; so a key stands in a listing once, whoever bundles meanwhile, and what
is in no bundle yet is read by itself. Only what is created once and never changed is bundled.

    bundles/<id>.parquet    columns key and body, sorted by key
"""

import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from eval_platform.errors import SchemaError
from eval_platform.store import layout
from eval_platform.store.base import Store
from eval_platform.store.records import decode

# What a catalog is built from. Leases change; samples and prompts are large and read by need.
_BUNDLED = (layout.ARRIVALS, "decisions/", "evaluations/", "tries/")
WITHOUT_IT = "delete it: the records themselves are then read"
AT_LEAST = 500  # fewer are not worth an object of their own
AT_MOST = 20_000  # some 60 MB before compression
_SCHEMA = pa.schema({"key": pa.string(), "body": pa.binary()})


class Bundles:
    """Every bundle of a store, kept compressed: a tenth of the records' own size.

    Raises StoreError when the store cannot be read, SchemaError, naming it, when one is no bundle.
    """

    def __init__(self, store: Store) -> None:
        keys = [entry.key for entry in store.list(layout.BUNDLES)]
        with ThreadPoolExecutor(store.requests_at_once) as pool:
            files = zip(keys, pool.map(partial(_found, store), keys), strict=True)
            self._files = [(key, file) for key, file in files if file is not None]

    def between(self, first: str, last: str) -> Iterator[tuple[str, bytes]]:
        """(key, body) of the bundled records from the folder `first` to the folder `last`, that one included."""
        end = last + "\U0010ffff"
        for key, file in self._files:
            for number in range(file.num_row_groups):
                bounds = file.metadata.row_group(number).column(0).statistics
                if bounds is not None and (bounds.max < first or bounds.min > end):
                    continue
                with _named(key):
                    group = file.read_row_group(number)
                kept = group.filter((pc.field("key") >= first) & (pc.field("key") <= end))
                yield from zip(kept["key"].to_pylist(), kept["body"].to_pylist(), strict=True)

    def keys(self) -> set[str]:
        """Every key that is bundled."""
        found: set[str] = set()
        for key, file in self._files:
            with _named(key):
                found.update(file.read(columns=["key"])["key"].to_pylist())
        return found


def copies(key: str, body: bytes) -> Iterator[tuple[str, bytes]]:
    """(key, body) of every record in the bundle `body`. Raises SchemaError, naming `key`, when it is none."""
    file = _opened(key, body)
    with _named(key):
        table = file.read()
    yield from zip(table["key"].to_pylist(), table["body"].to_pylist(), strict=True)


def _opened(key: str, body: bytes) -> pq.ParquetFile:
    with _named(key):
        file = pq.ParquetFile(pa.BufferReader(body))
    if not set(_SCHEMA.names) <= set(file.schema_arrow.names):
        raise SchemaError(f"{key} has not the columns of a bundle", remedy="delete it, or upgrade eval-platform")
    return file


def _found(store: Store, key: str) -> pq.ParquetFile | None:
    """None when it was deleted since it was listed, which anybody may do."""
    try:
        return _opened(key, store.read(key))
    except KeyError:
        return None


@contextmanager
def _named(key: str) -> Iterator[None]:
    """What is wrong with the bundle `key` is a SchemaError that names it."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise SchemaError(f"{key} is no bundle of records: {error}", remedy=WITHOUT_IT) from error


def bundle(store: Store) -> int:
    """Bundle the records that are in no bundle yet, if there are enough of them; returns how many were.

    Two that do it at once bundle some records twice, which costs space and changes nothing for readers. What cannot be
    read as a record is left out: whoever mends it is then seen. Raises StoreError.
    """
    known = Bundles(store).keys()
    new = sorted(entry.key for top in _BUNDLED for entry in store.list(top) if entry.key not in known)
    done = 0
    for start in range(0, len(new), AT_MOST):
        keys = new[start : start + AT_MOST]
        if len(keys) < AT_LEAST:
            break
        with ThreadPoolExecutor(store.requests_at_once) as pool:
            read = [one for one in pool.map(lambda key: (key, _sound(store, key)), keys) if one[1] is not None]
        sink = pa.BufferOutputStream()
        columns = dict(zip(_SCHEMA.names, zip(*read, strict=True), strict=True))
        pq.write_table(pa.table(columns, schema=_SCHEMA), sink, compression="zstd", row_group_size=1000)
        store.create(layout.bundle(uuid.uuid4().hex), sink.getvalue().to_pybytes())
        done += len(read)
    return done


def _sound(store: Store, key: str) -> bytes | None:
    """The record's bytes; None when it is deleted meanwhile, or is none that can be read."""
    try:
        body = store.read(key)
        decode(body, key)
    except (KeyError, SchemaError):
        return None
    return body
