"""Mirrors into Dagster what happened outside its runs, and asks for what is owed (`repairs.py`).

Dagster mirrors the store: releases, CLI runs, rescoring, links and other platforms' commits all happen without it.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import dagster as dg

from assets import metadata
from assets.partitions import checkpoints
from assets.results import (
    CHECKPOINT,
    EVALUATE_JOB,
    GATE,
    SUMMARY,
    checkpoint_metadata,
    dataset_key,
    results_key,
)
from assets.standing import (
    Skipped,
    Standing,
    Unfinished,
    marks,
    queue,
    reference_scores,
    standing,
    unfinished,
)
from eval_platform import queueing
from eval_platform.checkpoints import held
from eval_platform.config import Config
from eval_platform.queueing import Point
from eval_platform.store import Store, arrivals, commits, decisions
from eval_platform.tasks import TaskLock
from resources.store import StoreResource
from resources.warehouse import WarehouseResource
from sensors.queue import in_order
from sensors.repairs import Repairs, is_busy, record_cancelled, release_holds, repairs, reruns
from sensors.tiers import Look, gaps, later_tiers, may_be_last

MIRRORED_KEYS_PER_TICK = 25


@dataclass
class _Memory:
    """What this process has seen. It only saves work: Dagster's own records decide, and a restart forgets it."""

    catalog: tuple[int, ...] = ()
    marks: dict[str, str] = field(default_factory=dict)
    unfinished: list[Unfinished] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    curves: dict[str, list[Point]] = field(default_factory=dict)
    asked: set[tuple[str, str]] = field(default_factory=set)  # arrival, tier that it has had a run of
    settled: dict[Skipped, float] = field(default_factory=dict)  # passed over, not to be taken up -> when seen
    shown: dict[str, str] = field(default_factory=dict)  # key -> mark that Dagster shows
    datasets: dict[str, str] = field(default_factory=dict)
    repairs: Repairs = field(default_factory=Repairs)


def reconciliation_sensor(lock: TaskLock) -> dg.SensorDefinition:
    """Runs every 15 s. Asks the catalog only when it has changed."""
    memory = _Memory()

    @dg.sensor(
        name="reconciliation",
        job_name=EVALUATE_JOB,
        minimum_interval_seconds=15,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Asks for runs that a crash dropped; shows what was evaluated, released or retracted elsewhere.",
    )
    def reconciliation(
        context: dg.SensorEvaluationContext, store: StoreResource, warehouse: WarehouseResource
    ) -> dg.SensorResult | dg.SkipReason:
        if not lock.tasks:
            return dg.SkipReason("there is nothing to ask yet: run `eval-platform tasks sync`")
        config, opened, instance = store.config(), store.open(), context.instance
        holds = held(config.cache_dir)
        _look(memory, config, warehouse, lock)
        known = set(instance.get_dynamic_partitions(str(checkpoints.name)))
        cursor = json.loads(context.cursor or "{}")

        events: list[Any] = list(_datasets(instance, lock, memory.datasets))
        mirrored = _unseen(instance, memory, queued=config.queue is None)
        lines = reference_scores(warehouse) if mirrored else {}
        for key, results in standing(warehouse, lock, mirrored).items():
            if results:
                events += _mirror(instance, opened, key, results, memory.marks[key], lines)
        added = sorted(set(mirrored) - known)
        known.update(added)

        cursor["cancelled_since"] = record_cancelled(instance, opened, lock, cursor.get("cancelled_since"))
        tiers = queueing.tiers(config.queue, config.suites, lock)
        requests = list(
            repairs(instance, config, opened, lock, memory.unfinished, known, memory.repairs, tiers, memory.skipped)
        )
        asked_again, cursor["reruns_since"] = reruns(
            instance, config, opened, lock, known, cursor.get("reruns_since"), memory.repairs
        )
        requests += asked_again
        look = Look(instance, config, opened, lock, tiers, memory.unfinished, memory.skipped, known)
        requests += later_tiers(look, memory.curves, memory.asked)
        if not requests:
            requests += gaps(look, memory.settled)
        requests = in_order(instance, config, opened, requests)
        release_holds(instance, config, holds, memory.unfinished, memory.repairs, may_be_last(look, memory.curves))
        return dg.SensorResult(
            run_requests=requests,
            asset_events=events,
            dynamic_partitions_requests=[checkpoints.build_add_request(added)] if added else None,
            skip_reason=None if requests or events else "Dagster shows what the results root holds",
            cursor=json.dumps(cursor),
        )

    return reconciliation


def _look(memory: _Memory, config: Config, warehouse: WarehouseResource, lock: TaskLock) -> None:
    """Ask the catalog again if it is another than last time: every refresh that finds news replaces the file."""
    warehouse.refresh()
    state = config.catalog_path.stat()
    seen = (state.st_ino, state.st_mtime_ns, state.st_size)
    if seen == memory.catalog:
        return
    memory.marks = marks(warehouse, lock)
    memory.unfinished = unfinished(warehouse, lock)
    if config.queue is not None:
        memory.curves, memory.skipped = queue(warehouse)
    memory.catalog = seen


def _unseen(instance: dg.DagsterInstance, memory: _Memory, *, queued: bool) -> list[str]:
    """Keys of which Dagster shows something else than what stands, what was decided last first.

    queued: leave those alone that a queued run will report; with `[queue]` that may be long from now.
    """
    differ = [key for key, mark in memory.marks.items() if memory.shown.get(key) != mark]
    if not differ:
        return []
    # One question for all keys; Dagster's own staleness page asks the same.
    latest = instance.event_log_storage.get_latest_tags_by_partition(
        SUMMARY,
        dg.DagsterEventType.ASSET_MATERIALIZATION,
        [metadata.DATA_VERSION],
        asset_partitions=differ if len(differ) <= MIRRORED_KEYS_PER_TICK else None,
    )
    found: list[str] = []
    for key in differ:
        if len(found) == MIRRORED_KEYS_PER_TICK:
            break
        if latest.get(key, {}).get(metadata.DATA_VERSION) == memory.marks[key]:
            memory.shown[key] = memory.marks[key]
        elif not is_busy(instance, key, queued=queued):  # else its own run reports it
            found.append(key)
    return found


def _tags(instance: dg.DagsterInstance, key: dg.AssetKey, partition: str | None) -> Mapping[str, str]:
    """The tags of the newest materialization; empty when there is none."""
    where = dg.AssetRecordsFilter(asset_key=key, asset_partitions=[partition] if partition else None)
    records = instance.fetch_materializations(where, limit=1).records
    if not records or records[0].asset_materialization is None:
        return {}
    return records[0].asset_materialization.tags or {}


def _mirror(
    instance: dg.DagsterInstance,
    store: Store,
    key: str,
    results: list[Standing],
    mark: str,
    lines: Mapping[str, Mapping[str, float]],
) -> Iterator[Any]:
    """Events for what Dagster does not show of a key; `summary` last, so that what a crash cuts off is still owed.

    lines: task -> name of a reference -> its score.
    """
    arrival = arrivals.get(store, key, results[0].n)
    if arrival is None:
        raise RuntimeError(f"{key}@{results[0].n}: the catalog knows an arrival that the store has lost")
    for one in results:
        record = commits.read(store, one.evaluation_id, one.attempt)
        decision = decisions.standing(store, one.evaluation_id, one.attempt)
        if record is None or decision is None:
            raise RuntimeError(f"{key}, {one.task}: the catalog knows what the store has lost: {one.evaluation_id}")
        if one is results[0] and _tags(instance, CHECKPOINT, key).get(metadata.DATA_VERSION) != record["checkpoint_id"]:
            yield dg.AssetMaterialization(
                CHECKPOINT,
                partition=key,
                metadata=checkpoint_metadata(arrival, record["checkpoint_id"], record["weights_id"]),
                tags={metadata.DATA_VERSION: record["checkpoint_id"]},
            )
        tags = metadata.result_tags(record, decision)
        shown = _tags(instance, results_key(one.task), key)
        if all(shown.get(name) == value for name, value in tags.items()):
            continue
        yield dg.AssetMaterialization(
            results_key(one.task),
            partition=key,
            description=f"{decision.action} by {decision.actor}",
            metadata=metadata.result_metadata(store, record, decision, lines.get(one.task, {})),
            tags=tags,
        )
        metadata.report_check(instance, dg.AssetCheckKey(results_key(one.task), GATE), key, decision)
    yield dg.AssetMaterialization(
        SUMMARY,
        partition=key,
        description="mirrored from the results root",
        metadata=metadata.summary_metadata(arrival, [metadata.standing_line(one) for one in results]),
        tags={metadata.DATA_VERSION: mark},
    )


def _datasets(instance: dg.DagsterInstance, lock: TaskLock, shown: dict[str, str]) -> Iterator[dg.AssetMaterialization]:
    """The snapshots that `tasks sync` froze, so that lineage begins where the questions come from."""
    for name, task in lock.tasks.items():
        if shown.get(name) == task.dataset_id:
            continue
        if _tags(instance, dataset_key(name), None).get(metadata.DATA_VERSION) == task.dataset_id:
            shown[name] = task.dataset_id
            continue
        yield dg.AssetMaterialization(
            dataset_key(name),
            metadata={"dataset_id": task.dataset_id, "dagster/row_count": task.n_documents},
            tags={metadata.DATA_VERSION: task.dataset_id},
        )
