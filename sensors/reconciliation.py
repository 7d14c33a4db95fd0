"""Repairs what a crash dropped, and mirrors into Dagster what happened outside its runs.

Dagster mirrors the store: releases, CLI runs, rescoring, links and other platforms' commits all happen without it.
"""

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import dagster as dg

from assets import metadata
from assets.partitions import checkpoints
from assets.results import (
    CHECKPOINT,
    EVALUATE_JOB,
    GATE,
    SUMMARY,
    WAITING_TAG,
    checkpoint_metadata,
    dataset_key,
    results_key,
)
from eval_platform.config import Config
from eval_platform.identity import content_id
from eval_platform.store import Store, arrivals, commits, decisions, log
from eval_platform.tasks import TaskLock, read_lock
from resources.store import StoreResource
from resources.warehouse import WarehouseResource
from sensors.arrivals import run_request

MIRRORED_PER_TICK = 200
REPAIRS_PER_TICK = 25
FIRST_REPAIR_SECONDS = 15.0
LONGEST_REPAIR_SECONDS = 3600.0

_RUNNING = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]

# Every decision on every key that has the evaluated checkpoint under it: what Dagster should know.
_STANDING = """
    select a.key, a.n, e.task, e.evaluation_id, e.attempt, d.n as decision
    from arrivals a
    join evaluations e on e.checkpoint_id = a.checkpoint_id
    join (select evaluation_id, attempt, max(n) as n from decisions group by all) d
      on d.evaluation_id = e.evaluation_id and d.attempt = e.attempt
    where not e.stale and e.item_limit is null
      and a.n = (select max(b.n) from arrivals b where b.key = a.key)
      and e.attempt = (
        select max(f.attempt) from evaluations f join decisions g using (evaluation_id, attempt)
        where f.evaluation_id = e.evaluation_id
      )
    order by a.key, e.task
"""

# Newest arrivals with a task that has neither a commit nor a final failure.
_UNFINISHED = """
    select a.key, a.n
    from arrivals a
    where a.n = (select max(b.n) from arrivals b where b.key = a.key) and not a.failed
      and (
        select count(distinct e.task) from evaluations e
        where e.checkpoint_id = a.checkpoint_id and not e.stale and e.item_limit is null
          and e.task in ({tasks})
      ) < {count}
    order by a.key, a.n
"""


@dataclass(frozen=True)
class _Standing:
    key: str
    n: int
    task: str
    evaluation_id: str
    attempt: int
    decision: int

    @property
    def mark(self) -> str:
        return f"{self.evaluation_id}.{self.attempt}#{self.decision}"


def reconciliation_sensor() -> dg.SensorDefinition:
    """Runs every 15 s. Cheap when nothing happened: the store's log says so."""
    looked: set[str] = set()  # log entries already looked at for reruns; a run_key is asked for once in any case
    mirrored: dict[tuple[str, str], str] = {}  # (key, task) -> mark; only saves look-ups, Dagster's own record decides

    @dg.sensor(
        name="reconciliation",
        job_name=EVALUATE_JOB,
        minimum_interval_seconds=15,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Asks for runs that a crash dropped; shows what was evaluated, released or retracted elsewhere.",
    )
    def reconciliation(
        context: dg.SensorEvaluationContext, store: StoreResource, warehouse: WarehouseResource
    ) -> dg.SensorResult:
        config, opened = store.config(), store.open()
        lock = read_lock(config.lock_path)
        known = set(context.instance.get_dynamic_partitions(str(checkpoints.name)))
        standing = [_Standing(**row) for row in warehouse.query(_STANDING).to_pylist() if row["task"] in lock.tasks]

        events: list[Any] = list(_datasets(context.instance, lock))
        added: list[str] = []
        touched: set[str] = set()
        for one in standing:
            if mirrored.get((one.key, one.task)) == one.mark:
                continue
            if len(events) >= MIRRORED_PER_TICK:
                break
            if _dagster_knows(context.instance, one):
                mirrored[one.key, one.task] = one.mark
                continue
            if _busy(context.instance, one.key):
                continue  # its own run reports it
            if one.key not in known:
                added.append(one.key)
                known.add(one.key)
            events += _mirror(opened, one, is_first=one.key not in touched)
            touched.add(one.key)
        for key in sorted(touched):
            marks = [one.mark for one in standing if one.key == key]
            events.append(
                dg.AssetMaterialization(
                    SUMMARY,
                    partition=key,
                    description="mirrored from the results root",
                    tags={metadata.DATA_VERSION: content_id(marks)},
                )
            )
        repairs = [
            *_repairs(context.instance, config, opened, lock, warehouse, known),
            *_reruns(opened, lock, known, looked),
        ]
        skip = None if repairs or events else "Dagster shows what the results root holds"
        return dg.SensorResult(
            run_requests=repairs,
            asset_events=events,
            dynamic_partitions_requests=[checkpoints.build_add_request(sorted(set(added)))] if added else None,
            skip_reason=skip if not repairs else None,
            cursor=json.dumps({"standing": len(standing), "mirrored": len(events), "repairs": len(repairs)}),
        )

    return reconciliation


def _latest(instance: dg.DagsterInstance, key: dg.AssetKey, partition: str | None) -> Mapping[str, str]:
    """The tags of the newest materialization; empty when there is none."""
    where = dg.AssetRecordsFilter(asset_key=key, asset_partitions=[partition] if partition else None)
    records = instance.fetch_materializations(where, limit=1).records
    if not records or records[0].asset_materialization is None:
        return {}
    return records[0].asset_materialization.tags or {}


def _dagster_knows(instance: dg.DagsterInstance, one: _Standing) -> bool:
    tags = _latest(instance, results_key(one.task), one.key)
    version = f"{one.evaluation_id}.{one.attempt}"
    return tags.get(metadata.DATA_VERSION) == version and tags.get(metadata.DECISION_TAG) == str(one.decision)


def _busy(instance: dg.DagsterInstance, key: str) -> bool:
    where = dg.RunsFilter(tags={"dagster/partition": key}, statuses=_RUNNING)
    return instance.get_runs_count(where) > 0


def _mirror(store: Store, one: _Standing, *, is_first: bool) -> Iterator[Any]:
    record = commits.read(store, one.evaluation_id, one.attempt)
    decision = decisions.standing(store, one.evaluation_id, one.attempt)
    arrival = arrivals.get(store, one.key, one.n)
    if record is None or decision is None or arrival is None:
        raise RuntimeError(f"{one.key}, {one.task}: the catalog knows what the store has lost: {one.mark}")
    if is_first:
        yield dg.AssetMaterialization(
            CHECKPOINT,
            partition=one.key,
            metadata=checkpoint_metadata(arrival, record["checkpoint_id"], record["weights_id"]),
            tags={metadata.DATA_VERSION: record["checkpoint_id"]},
        )
    yield dg.AssetMaterialization(
        results_key(one.task),
        partition=one.key,
        description=f"{decision.action} by {decision.actor}",
        metadata=metadata.result_metadata(store, record, decision),
        tags=metadata.result_tags(record, decision),
    )
    passed, severity = metadata.check_severity(decision)
    yield dg.AssetCheckEvaluation(
        asset_key=results_key(one.task),
        check_name=GATE,
        passed=passed,
        severity=severity,
        metadata=metadata.check_metadata(decision),
        partition=one.key,
    )


def _datasets(instance: dg.DagsterInstance, lock: TaskLock) -> Iterator[dg.AssetMaterialization]:
    """The snapshots that `tasks sync` froze, so that lineage begins where the questions come from."""
    for name, task in lock.tasks.items():
        if _latest(instance, dataset_key(name), None).get(metadata.DATA_VERSION) != task.dataset_id:
            yield dg.AssetMaterialization(
                dataset_key(name),
                metadata={"dataset_id": task.dataset_id, "dagster/row_count": task.n_documents},
                tags={metadata.DATA_VERSION: task.dataset_id},
            )


def _repairs(
    instance: dg.DagsterInstance,
    config: Config,
    store: Store,
    lock: TaskLock,
    warehouse: WarehouseResource,
    known: set[str],
) -> Iterator[dg.RunRequest]:
    """Runs for arrivals that none has, or whose last one crashed or left tasks to another worker."""
    count = 0
    if not lock.tasks:
        return
    names = ", ".join("'" + name.replace("'", "''") + "'" for name in lock.tasks)
    rows = warehouse.query(_UNFINISHED.format(tasks=names, count=len(lock.tasks)))
    for row in rows.to_pylist():
        if row["key"] not in known or count >= REPAIRS_PER_TICK:
            continue
        arrival = arrivals.get(store, row["key"], row["n"])
        if arrival is None:
            continue
        runs = instance.get_run_records(dg.RunsFilter(tags={"eval/arrival": f"{arrival.key}@{arrival.n}"}), limit=50)
        if runs:
            last = runs[0]
            status = last.dagster_run.status
            crashed = (
                status == dg.DagsterRunStatus.FAILURE and last.dagster_run.tags.get("dagster/will_retry") != "true"
            )
            left = status == dg.DagsterRunStatus.SUCCESS and last.dagster_run.tags.get(WAITING_TAG) == "true"
            if not (crashed or left):
                continue
            wait = min(FIRST_REPAIR_SECONDS * 2 ** (len(runs) - 1), LONGEST_REPAIR_SECONDS)
            if last.end_time is None or time.time() - last.end_time < wait:
                continue
        count += 1
        yield run_request(arrival, repair=len(runs))


def _reruns(store: Store, lock: TaskLock, known: set[str], looked: set[str]) -> Iterator[dg.RunRequest]:
    """Runs for the attempts that a person opened and nobody has answered yet."""
    for entry in log.read(store, log.recent_dates(), looked):
        if entry["kind"] != "asked" or entry.get("action") != "rerun":
            looked.add(entry["log_key"])
            continue
        evaluation_id, attempt = entry["evaluation_id"], entry["attempt"]
        before = commits.read(store, evaluation_id, attempt - 1)
        if before is None or commits.read(store, evaluation_id, attempt) is not None:
            continue
        arrival = arrivals.get(store, before["key"], before["arrival"])
        if arrival is None or arrival.key not in known or before["task"] not in lock.tasks:
            continue
        yield dg.RunRequest(
            run_key=f"{arrival.key}@{arrival.n}#rerun-{evaluation_id}-{attempt}",
            partition_key=arrival.key,
            asset_selection=[results_key(before["task"])],
            tags=run_request(arrival).tags,
        )
