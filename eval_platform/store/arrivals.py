"""Which checkpoints arrived, and how often? Each key's arrivals are numbered 1, 2, 3; the highest n is the newest.

Fingerprints hold modification times, and two machines may see one folder's times differently (NFS, a copy). So every
watcher has an id and compares what it sees with what it last stood by itself: without that, two watchers who see one
folder differently would take turns registering it for ever.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from eval_platform.errors import CheckpointChanged, StoreError
from eval_platform.store import layout, log
from eval_platform.store.base import Store
from eval_platform.store.records import create_record, find_record, read_record, utc_now
from eval_platform.values import Arrival, Checkpoint, Served

_LISTED_TOGETHER = 4  # keys; of fewer each is listed on its own


@dataclass(frozen=True, slots=True)
class Identity:
    """What an arrival's bytes turned out to be."""

    checkpoint_id: str
    weights_id: str | None  # None: a served model's weights are not seen


def register(
    store: Store,
    *,
    key: str,
    uri: str,
    fingerprint: str,
    run: str,
    watcher: str,
    step: int | None = None,
    tokens_seen: int | None = None,
    tags: Mapping[str, str] | None = None,
    served: Mapping[str, Any] | None = None,
) -> tuple[Arrival, bool]:
    """(the arrival that this sighting is, whether it was new). served: the fields of `values.Served`, of such a model.

    New when the fingerprint differs from the key's newest arrival's and from the one that `watcher` last registered or
    adopted. Adopting another watcher's arrival is remembered beside it, so that A, B, A is three arrivals whoever
    registered the B. Of two processes registering at once one creates the number; the other looks again.
    Raises StoreError when the store cannot be written.
    """
    tried = 0
    while True:
        newest_one = newest(store, key)
        if newest_one is not None and newest_one.fingerprint == fingerprint:
            if newest_one.watcher != watcher:
                # Created again and again at no cost: an existing file is left as it is.
                create_record(store, layout.arrival_seen(key, newest_one.n, watcher), {})
            return newest_one, False
        own = _own_last(store, key, watcher)
        if own is not None and own.fingerprint == fingerprint:
            return own, False
        n = newest_one.n + 1 if newest_one else 1
        if n == tried:
            raise StoreError(
                f"cannot number the arrival of {key}: {layout.arrival(key, n)} exists but is not listed",
                remedy="a network file system may list late: it is tried again at the next look",
            )
        arrival = Arrival(
            key=key,
            n=n,
            fingerprint=fingerprint,
            uri=uri,
            run=run,
            step=step,
            tokens_seen=tokens_seen,
            tags=dict(tags or {}),
            arrived_at=utc_now(),
            watcher=watcher,
            served=Served(**served) if served else None,
        )
        log.write(store, "arrival", key=key, n=n)
        if create_record(store, layout.arrival(key, n), arrival_record(arrival)):
            return arrival, True
        tried = n


def arrival_record(arrival: Arrival) -> dict[str, Any]:
    """As JSON; a checkpoint of files says nothing of `served`, so that what read it before does so still."""
    record = asdict(arrival)
    if arrival.served is None:
        del record["served"]
    return record


def read_arrival(record: Mapping[str, Any]) -> Arrival:
    """The inverse of `arrival_record`."""
    served = record.get("served")
    return Arrival(**{**record, "served": Served(**served) if served else None})


def newest(store: Store, key: str) -> Arrival | None:
    """The key's arrival with the highest n; None when it never arrived."""
    found = layout.newest_numbered(store, layout.arrival_folder(key))
    return _read(store, found[1]) if found else None


def get(store: Store, key: str, n: int) -> Arrival | None:
    """The n-th arrival of `key`, or None."""
    try:
        return _read(store, layout.arrival(key, n))
    except KeyError:
        return None


def history(store: Store, key: str) -> list[Arrival]:
    """Every arrival of `key`, n ascending."""
    return [_read(store, store_key) for _, store_key in sorted(layout.numbers(store, layout.arrival_folder(key)))]


def numbers(store: Store) -> dict[str, int]:
    """Every key with its newest n, from one listing and no read (arrivals never change, so callers may cache them)."""
    highest: dict[str, int] = {}
    for entry in store.list(layout.ARRIVALS):
        found = layout.parse_arrival(entry.key)
        if found:
            key, n = found
            highest[key] = max(n, highest.get(key, 0))
    return highest


def newest_numbers(store: Store, keys: Collection[str]) -> dict[str, int]:
    """The newest n of each of `keys` that has arrived.

    Many keys that lie close together (a part of them all, in order) cost a bucket few requests: what lies from the
    first to the last is listed, a thousand files at a time.
    """
    if store.requests_at_once == 1 or len(keys) < _LISTED_TOGETHER:
        found = ((key, layout.newest_numbered(store, layout.arrival_folder(key))) for key in keys)
        return {key: newest_one[0] for key, newest_one in found if newest_one}
    wanted = set(keys)
    folders = [layout.arrival_folder(key) for key in wanted]
    last, highest = max(folders), dict[str, int]()
    for entry in store.list(layout.ARRIVALS, after=min(folders)):
        if entry.key > last and not entry.key.startswith(last):
            break
        arrival = layout.parse_arrival(entry.key)
        if arrival and arrival[0] in wanted:
            highest[arrival[0]] = max(arrival[1], highest.get(arrival[0], 0))
    return highest


def keys(store: Store) -> list[str]:
    """Every key that ever arrived, sorted."""
    return sorted(numbers(store))


def record_identity(store: Store, arrival: Arrival, checkpoint: Checkpoint) -> None:
    """Remember what the arrival's bytes are.

    Raises CheckpointChanged when it was identified as something else before: its files changed though their
    fingerprint did not.
    """
    found = Identity(checkpoint.checkpoint_id, checkpoint.weights_id)
    known = identity(store, arrival.key, arrival.n)
    if known is None:
        log.write(store, "identity", key=arrival.key, n=arrival.n)
        record = {**asdict(found), "kind": checkpoint.kind}
        if create_record(store, layout.arrival_identity(arrival.key, arrival.n), record):
            return
        known = identity(store, arrival.key, arrival.n)
    if known != found and checkpoint.kind == "adapter":
        raise CheckpointChanged(
            f"arrival {arrival.n} of {arrival.key} was identified as {known}, and now as {found}: "
            "the base model that its adapter_config.json names is another one than before, or its files changed while "
            "their sizes and times stayed",
            remedy="bring the base back, or touch one of the adapter's files, so that it arrives again",
        )
    if known != found:
        raise CheckpointChanged(
            f"arrival {arrival.n} of {arrival.key} was identified as {known}, and now as {found}: "
            "its files changed while their sizes and times stayed",
            remedy="touch one of its files, so that it arrives again",
        )


def record_skip(store: Store, key: str, n: int, tier: str, tasks: Collection[str], reason: str) -> bool:
    """Remember that the n-th arrival of `key` was passed over in its turn for these tasks, or that its run for them was
    cancelled (`queueing.CANCELLED` in place of a tier); False when it was before.

    It says nothing of the checkpoint, and nothing stands in the way of asking it later.
    """
    if find_record(store, layout.arrival_skipped(key, n, tier)) is not None:
        return False
    log.write(store, "skipped", key=key, n=n, tier=tier)
    record = {"tier": tier, "tasks": sorted(tasks), "reason": reason, "time": utc_now()}
    return create_record(store, layout.arrival_skipped(key, n, tier), record)


def identity(store: Store, key: str, n: int) -> Identity | None:
    """What the n-th arrival of `key` is; None until a worker has staged it."""
    record = find_record(store, layout.arrival_identity(key, n))
    return Identity(record["checkpoint_id"], record["weights_id"]) if record else None


def _read(store: Store, store_key: str) -> Arrival:
    record = read_record(store, store_key)
    del record["schema_version"]
    return read_arrival(record)


def _own_last(store: Store, key: str, watcher: str) -> Arrival | None:
    """The newest arrival that `watcher` registered or adopted."""
    folder = layout.arrival_folder(key)
    adopted = {n for n, _ in layout.numbers(store, folder, suffix=f".seen-{watcher}.json")}
    arrivals = ((n, _read(store, found)) for n, found in _descending(store, folder))
    return next((arrival for n, arrival in arrivals if n in adopted or arrival.watcher == watcher), None)


def _descending(store: Store, folder: str) -> Iterator[tuple[int, str]]:
    yield from sorted(layout.numbers(store, folder), reverse=True)
