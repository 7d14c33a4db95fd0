"""What is evaluated? One commit file per slot: whoever creates it first is right, everyone else adopts it.

A slot is (evaluation_id, attempt). Attempt 1 is open from the start; a rerun opens the next.
"""

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from eval_platform.errors import EvalPlatformError, SamplesPruned, SchemaError, StoreError
from eval_platform.store import layout, log, tries
from eval_platform.store.base import Store
from eval_platform.store.leases import Lease
from eval_platform.store.records import create_record, find_record, utc_now

if TYPE_CHECKING:
    import pyarrow as pa


def slot(store: Store, evaluation_id: str) -> int:
    """The attempt that is open, or else the last one: the highest that was committed or asked for, at least 1."""
    listed = store.list(layout.evaluation_folder(evaluation_id), delimiter="/")
    numbered = [found for entry in listed if (found := layout.numbered(entry.key))]
    return max([1, *(n for n, suffix in numbered if suffix in (".json", ".asked.json"))])


def attempts(store: Store, evaluation_id: str) -> list[int]:
    """The committed attempts, ascending."""
    return sorted(n for n, _ in layout.numbers(store, layout.evaluation_folder(evaluation_id)))


def open_rerun(store: Store, evaluation_id: str, actor: str, reason: str) -> int:
    """Open the next attempt and return its number.

    Raises EvalPlatformError while the last one is not committed: it is still open, and two open slots would both run.
    """
    last = slot(store, evaluation_id)
    opened = last + 1
    if last in attempts(store, evaluation_id):
        log.write(store, "asked", action="rerun", evaluation_id=evaluation_id, attempt=opened)
        record = {"actor": actor, "reason": reason, "time": utc_now()}
        if create_record(store, layout.evaluation_asked(evaluation_id, opened), record):
            return opened
        last = opened
    raise EvalPlatformError(
        f"attempt {last} of evaluation {evaluation_id} is open and has no result yet",
        remedy="wait for it; if it has failed, `eval-platform retry` tries it again",
    )


def commit(store: Store, evaluation: Mapping[str, Any], lease: Lease) -> bool:
    """Create the slot's commit from the record that docs/architecture.md lists. False when the slot is not ours.

    False means that the lease was lost or another try has committed: discard this result and adopt the other (which
    may still be on its way: `read` says). Raises ValueError when the record holds NaN (null is what cannot be
    computed) or the lease is another evaluation's (a shard's lease commits nothing), StoreError when the store fails.
    """
    evaluation_id, attempt = evaluation["evaluation_id"], evaluation["attempt"]
    if lease.name != evaluation_id:
        raise ValueError(f"lease {lease.name} does not commit evaluation {evaluation_id}")
    if not lease.held() or read(store, evaluation_id, attempt) is not None:
        return False
    # First what must never be missed, last what makes it true: a crash in between leaves a look too many.
    pointer = {"try": evaluation["try"], "time": utc_now()}
    create_record(store, layout.answers(evaluation["answers_id"], evaluation_id, attempt), pointer)
    log.write(store, "evaluation", evaluation_id=evaluation_id, attempt=attempt)
    return create_record(store, layout.evaluation(evaluation_id, attempt), evaluation)


def read(store: Store, evaluation_id: str, attempt: int) -> dict[str, Any] | None:
    """The commit as it was recorded; None while the slot is open."""
    return find_record(store, layout.evaluation(evaluation_id, attempt))


def answered(store: Store, answers_id: str) -> list[tuple[str, int]]:
    """The committed (evaluation_id, attempt) whose answers are those of `answers_id`, sorted."""
    folder = layout.answers_folder(answers_id)
    names = [entry.key.removeprefix(folder).removesuffix(".json") for entry in store.list(folder, delimiter="/")]
    slots = [(evaluation_id, int(attempt)) for evaluation_id, _, attempt in (name.rpartition("-") for name in names)]
    # A pointer precedes its commit: after a crash in between there is only the pointer.
    return sorted(one for one in slots if read(store, *one) is not None)


def write_samples(store: Store, evaluation_id: str, try_id: str, table: "pa.Table") -> dict[str, Any]:
    """Write a try's samples as Parquet; returns `{"key", "sha256", "rows"}` for its commit."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    body = sink.getvalue().to_pybytes()
    key = layout.samples(evaluation_id, try_id)
    if not store.create(key, body):
        raise StoreError(f"{key} exists already: two writers use one try id", remedy="start a try of its own")
    return {"key": key, "sha256": hashlib.sha256(body).hexdigest(), "rows": table.num_rows}


def read_samples(store: Store, record: Mapping[str, Any]) -> "pa.Table":
    """The samples that the commit `record` names.

    Raises SamplesPruned when they were removed on purpose, StoreError when they are not there, SchemaError when their
    bytes are not those that were committed.
    """
    from eval_platform.store.parquet import read_parquet

    named = record["samples"]
    try:
        body = store.read(named["key"])
    except KeyError:
        told = tombstone(store, record["evaluation_id"], record["attempt"])
        if told is not None:
            raise SamplesPruned(
                f"the samples of attempt {record['attempt']} of evaluation {record['evaluation_id']} were pruned by "
                f"{told['actor']} at {told['time']} ({told['rule']})",
                remedy="its scores stand; only `eval-platform rerun` asks the model again",
            ) from None
        raise StoreError(
            f"{named['key']}, the samples of evaluation {record['evaluation_id']}, is not in {store.uri}",
            remedy="restore it from a copy, or `eval-platform rerun` the evaluation",
        ) from None
    if hashlib.sha256(body).hexdigest() != named["sha256"]:
        raise SchemaError(
            f"{named['key']} is not what evaluation {record['evaluation_id']} committed: its SHA-256 differs",
            remedy="restore it from a copy, or `eval-platform rerun` the evaluation",
        )
    return read_parquet(body)


def prune_samples(store: Store, record: Mapping[str, Any], *, actor: str, rule: str) -> None:
    """Remove the samples that the commit `record` names, and what its own tries have journalled. The commit stands.

    Other evaluations of the same answers (a task that is scored otherwise, or repeats more) journal in the same place:
    what a try of theirs has answered is hours of work that nothing else keeps.

    The tombstone comes first, so that a crash leaves samples too many and never a gap without a reason; pruning again
    goes on where it stopped. Raises StoreError when the store fails.
    """
    evaluation_id, attempt = record["evaluation_id"], record["attempt"]
    log.write(store, "pruned", evaluation_id=evaluation_id, attempt=attempt)
    told = {"samples": record["samples"], "actor": actor, "rule": rule, "time": utc_now()}
    create_record(store, layout.evaluation_pruned(evaluation_id, attempt), told)
    segments = [entry.key for entry in store.list(layout.journal_folder(record["answers_id"], attempt))]
    own = {record["try"]}
    if any(layout.journal_try(key) not in own for key in segments):
        own |= tries.ids(store, tries.evaluation_subject(evaluation_id, attempt))
    for key in segments:
        if layout.journal_try(key) in own:
            store.delete(key)
    store.delete(record["samples"]["key"])  # last: while it is there the work is known to be unfinished


def tombstone(store: Store, evaluation_id: str, attempt: int) -> dict[str, Any] | None:
    """Who pruned the attempt's samples, when and by which rule; None while they are kept."""
    return find_record(store, layout.evaluation_pruned(evaluation_id, attempt))
