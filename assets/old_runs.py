"""Which runs' event logs may go? Those that have ended long ago and of which the UI shows nothing any more."""

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import dagster as dg
from dagster._core.storage.event_log.sqlite.sqlite_event_log import SqliteEventLogStorage
from dagster._core.storage.tags import PARTITION_NAME_TAG

# Of a run whose log was removed: the day. A person sees why its page is empty, and the next look passes it over.
REMOVED_TAG = "eval/log_removed"
RUNS_AT_ONCE = 200
BUSY_SECONDS = 20.0
_KEPT_TABLES = {"event_logs", "alembic_version"}

_SHOWN = {dg.DagsterEventType.ASSET_MATERIALIZATION, dg.DagsterEventType.ASSET_OBSERVATION}
_ENDED = [dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED]


@dataclass
class OldRuns:
    """What one look at the runs that ended before a day found; run ids, newest first."""

    may_go: list[str] = field(default_factory=list)
    newest_of_partition: int = 0
    shown: int = 0  # hold the newest event of an asset, in its partition
    gone_before: int = 0


def old_runs(instance: dg.DagsterInstance, keep_days: int) -> OldRuns:
    """Look at every run that ended more than `keep_days` days ago. Nothing is changed.

    Kept are the newest run of each partition, and each run from which the UI has what it shows of an asset today. Runs
    that wait or work are never looked at.
    """
    found = OldRuns()
    before = datetime.now(UTC) - timedelta(days=keep_days)
    for record in _ended(instance, before):
        run = record.dagster_run
        if REMOVED_TAG in run.tags:
            found.gone_before += 1
        elif _is_newest_of_partition(instance, run):
            found.newest_of_partition += 1
        elif _is_shown(instance, run.run_id):
            found.shown += 1
        else:
            found.may_go.append(run.run_id)
    return found


def remove_log(instance: dg.DagsterInstance, run_id: str) -> int:
    """Remove a run's events; bytes that its file shrank by, 0 where they are rows of a database.

    The run itself stays: its tags say what was asked of which arrival, by which the sensors know what is owed, and
    its run_key keeps it from being started again.
    """
    storage = instance.event_log_storage
    storage.delete_events(run_id)
    freed = _shrink(Path(storage.path_for_shard(run_id))) if isinstance(storage, SqliteEventLogStorage) else 0
    # Last: what is cut off before is looked at again the next night.
    instance.add_run_tags(run_id, {REMOVED_TAG: datetime.now(UTC).date().isoformat()})
    return freed


def _shrink(file: Path) -> int:
    """Give back what SQLite keeps of an empty log: 135 kB become 37; bytes freed.

    The file and its table of events stay: a server that has had it open takes both for granted. The other tables are
    the index's, and empty in every run's own file.
    """
    before = file.stat().st_size
    connection = sqlite3.connect(file, timeout=BUSY_SECONDS, isolation_level=None)
    try:
        found = connection.execute("select name from sqlite_master where type = 'table'").fetchall()
        for (name,) in found:
            if name not in _KEPT_TABLES and not name.startswith("sqlite_"):
                connection.execute(f'drop table "{name}"')
        connection.execute("vacuum")
        connection.execute("pragma wal_checkpoint(truncate)")
    finally:
        connection.close()
    return before - file.stat().st_size


def _ended(instance: dg.DagsterInstance, before: datetime) -> Iterator[dg.RunRecord]:
    """Runs that ended before then, newest first, a page at a time."""
    cursor = None
    while True:
        where = dg.RunsFilter(statuses=_ENDED, created_before=before)
        page = instance.get_run_records(where, limit=RUNS_AT_ONCE, cursor=cursor)
        for record in page:
            if record.end_time is not None and record.end_time < before.timestamp():
                yield record
        if len(page) < RUNS_AT_ONCE:
            return
        cursor = page[-1].dagster_run.run_id


def _is_newest_of_partition(instance: dg.DagsterInstance, run: dg.DagsterRun) -> bool:
    partition = run.tags.get(PARTITION_NAME_TAG)
    if partition is None:
        return False
    newest = instance.get_runs(dg.RunsFilter(tags={PARTITION_NAME_TAG: partition}), limit=1)
    return newest[0].run_id == run.run_id


def _is_shown(instance: dg.DagsterInstance, run_id: str) -> bool:
    """Whether the run holds the newest event of an asset, in its partition. Checks have a table of their own."""
    looked: set[tuple[str, dg.AssetKey, str | None]] = set()
    for entry in instance.all_logs(run_id, of_type=_SHOWN):
        event = entry.dagster_event
        if event is None or event.asset_key is None:
            continue
        one = (event.event_type_value, event.asset_key, event.partition)
        if one in looked:
            continue
        looked.add(one)
        where = dg.AssetRecordsFilter(
            asset_key=event.asset_key, asset_partitions=[event.partition] if event.partition is not None else None
        )
        fetch = instance.fetch_materializations if event.is_step_materialization else instance.fetch_observations
        newest = fetch(where, limit=1).records
        if newest and newest[0].run_id == run_id:
            return True
    return False
