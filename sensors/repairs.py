"""Runs that are owed: what a crash dropped, what was left to another worker, what a person asked for again."""

import json
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta

import dagster as dg

from assets.results import ARRIVAL_TAG, EVALUATES, GOING_ON, TASKS_TAG, arrival_name, results_key
from assets.standing import Skipped, Unfinished
from eval_platform import queueing
from eval_platform.checkpoints import hold, release_other_holds
from eval_platform.config import Config
from eval_platform.plan import not_asked
from eval_platform.queueing import Tier
from eval_platform.served import ROOT as SERVED_ROOT
from eval_platform.store import Store, arrivals, commits, layout, log, tries
from eval_platform.tasks import TaskLock
from sensors.arrivals import run_request
from sensors.queue import PASSED_TAG, TIER_TAG, Part, at_once, is_apart, of_tiers, was_cancelled

REPAIRS_PER_TICK = 25
LOOKED_AT_PER_TICK = 200
FIRST_REPAIR_SECONDS = 15.0
LONGEST_REPAIR_SECONDS = 3600.0
RERUN_TAG = "eval/rerun"
# Of a run that changed its state so lately that a tick may not have seen it yet, whatever the clocks say.
RECENT_SECONDS = 600.0


@dataclass
class Repairs:
    """What this process has looked at already; it only saves work."""

    # Arrivals that lack tasks nobody has asked for: with `on_task_change = new_only` they stay so.
    settled: dict[str, Unfinished] = field(default_factory=dict)
    looked: set[str] = field(default_factory=set)  # log entries


def is_busy(instance: dg.DagsterInstance, key: str, *, queued: bool = True) -> bool:
    """Whether a run for the key works, or waits where `queued`."""
    statuses = [one for one in GOING_ON if queued or one != dg.DagsterRunStatus.QUEUED]
    where = dg.RunsFilter(tags={"dagster/partition": key}, statuses=statuses)
    return instance.get_runs_count(where) > 0


def _under_way(instance: dg.DagsterInstance, config: Config, lock: TaskLock, key: str) -> frozenset[str]:
    """Tasks that runs for the key are about to answer: all, where a run is; but of one that waits in a queue with tiers
    its own, since it may wait for days and must keep nothing else waiting."""
    runs = instance.get_runs(dg.RunsFilter(tags={"dagster/partition": key}, statuses=GOING_ON))
    if runs and (config.queue is None or any(run.status != dg.DagsterRunStatus.QUEUED for run in runs)):
        return frozenset(lock.tasks)
    return frozenset(task for run in runs for task in _asked_of(run, lock))


def repairs(
    instance: dg.DagsterInstance,
    config: Config,
    store: Store,
    lock: TaskLock,
    unfinished: Sequence[Unfinished],
    known: set[str],
    memory: Repairs,
    tiers: Sequence[Tier],
    skipped: Collection[Skipped] = (),
) -> Iterator[dg.RunRequest]:
    """Runs for newest arrivals that have none, or whose runs ended without a result or a final failure of a task.

    What is asked of an arrival is what its runs were asked for, and what a changed task makes due (`_due`). Each
    further run of an arrival waits twice as long. What was passed over is nobody's due: it has its turn when nothing
    waits. What a person cancelled is nobody's due either, until a person has it run again.
    """
    over: dict[tuple[str, int], frozenset[str]] = {}
    for each in skipped:
        over[each.key, each.n] = over.get((each.key, each.n), frozenset()) | each.tasks
    recently = datetime.now(UTC) - timedelta(seconds=RECENT_SECONDS)
    for record in instance.get_run_records(dg.RunsFilter(updated_after=recently)):
        memory.settled.pop(record.dagster_run.tags.get(ARRIVAL_TAG, ""), None)
    roots = {root.name for root in config.roots}
    later = {tier.name for tier in tiers if not tier.takes_all}  # a run of these is not an arrival's first
    looked = count = 0
    for one in unfinished:
        name = arrival_name(one.key, one.n)
        if one.key not in known or memory.settled.get(name) == one:
            continue
        is_served = config.served_at(one.key) is not None
        if one.key.startswith(f"{SERVED_ROOT}/") and not is_served:
            continue  # configured no more: how it is asked stands nowhere else
        if looked == LOOKED_AT_PER_TICK or count == REPAIRS_PER_TICK:
            return
        looked += 1
        under_way = _under_way(instance, config, lock, one.key)
        if under_way >= one.missing:
            continue
        records = [
            record
            for record in instance.get_run_records(dg.RunsFilter(tags={ARRIVAL_TAG: name}))
            if RERUN_TAG not in record.dagster_run.tags
        ]
        if any(_will_be_retried(record, records) for record in records):
            continue
        passed = over.get((one.key, one.n), frozenset())
        asked, cancelled = _wanted([record.dagster_run for record in records], lock)
        had_first = any(record.dagster_run.tags.get(TIER_TAG) not in later for record in records)
        if not had_first and (is_served or one.key.partition("/")[0] in roots):
            # `eval-platform run` asks its own checkpoints what it was told to ask, no more.
            asked |= at_once(config, tiers, lock, one.key) - passed - cancelled
        impossible = not_asked(config, lock, store, one.key).keys()
        due = _due(config, tiers, one) - passed - cancelled
        owed = (asked | due) & one.missing - impossible - under_way
        if not owed and under_way:
            continue
        if not owed:
            memory.settled[name] = one
            continue
        if _too_soon(records):
            continue
        arrival = arrivals.get(store, one.key, one.n)
        if arrival is None:
            continue
        count += 1
        hold(arrival, config.cache_dir)  # the tick that registered it may have been cut off before
        # Of a first run everything is asked: what is answered already costs nothing, and is shown.
        tasks = owed if records else (asked - impossible - under_way) | owed
        again = f"#{len(records)}" if records else ""
        # What its runs were asked for keeps its place; what is due only since it changed comes after all others.
        for part in of_tiers(config, tiers, one.key, tasks & asked, tasks - asked):
            yield run_request(arrival, lock, part.tasks, suffix=part.suffix + again, more=part.tags(arrival))


def release_holds(
    instance: dg.DagsterInstance,
    config: Config,
    held: Collection[str],
    unfinished: Sequence[Unfinished],
    memory: Repairs,
    also: Collection[tuple[str, int]] = (),
) -> None:
    """Let go of checkpoints that nothing waits for any more: superseded, failed for good, or done.

    held: the holds there were before the catalog was asked; a worker lets go only of what it finished. also: arrivals
    (key, n) that may be asked for more.
    """
    if not held:
        return
    wanted = {(one.key, one.n) for one in unfinished if memory.settled.get(arrival_name(one.key, one.n)) != one}
    wanted.update(also)
    for run in instance.get_runs(dg.RunsFilter(statuses=GOING_ON)):
        key, _, n = run.tags.get(ARRIVAL_TAG, "").rpartition("@")
        if key:
            wanted.add((key, int(n)))
    release_other_holds(config.cache_dir, held, wanted)


def reruns(
    instance: dg.DagsterInstance,
    config: Config,
    store: Store,
    lock: TaskLock,
    known: set[str],
    since: str | None,
    memory: Repairs,
) -> tuple[list[dg.RunRequest], str]:
    """(runs for the attempts that a person opened and nobody has answered yet, the date to look from next time).

    since: the date (UTC) from which attempts may still be open; None: yesterday.
    """
    recent = log.recent_dates()
    days = [day for day in log.dates(store) if day >= (since or recent[0])]
    found: list[dg.RunRequest] = []
    open_since = recent[0]
    for entry in log.read(store, days, memory.looked):
        opened = (entry["evaluation_id"], entry["attempt"]) if entry.get("action") == "rerun" else None
        if opened is None or commits.read(store, *opened) is not None:
            memory.looked.add(entry["log_key"])
            continue
        evaluation_id, attempt = opened
        before = commits.read(store, evaluation_id, attempt - 1)
        if before is None or commits.slot(store, evaluation_id) != attempt:
            continue  # announced, and not opened (yet)
        open_since = min(open_since, entry["time"][:10])
        arrival = arrivals.get(store, before["key"], before["arrival"])
        task = next((name for name, locked in lock.tasks.items() if locked.task_id == before["task_id"]), None)
        if arrival is None or arrival.key not in known or task is None:
            continue
        if task in _under_way(instance, config, lock, arrival.key):
            continue
        subjects = tries.evaluation_subject(evaluation_id, attempt), tries.arrival_subject(arrival)
        if any(tries.state(store, subject) is not None for subject in subjects):
            continue  # failed for good, until `retry`
        name = f"{evaluation_id}-{attempt}"
        records = list(instance.get_run_records(dg.RunsFilter(tags={RERUN_TAG: name})))
        if records and was_cancelled(records[0].dagster_run):
            continue
        if _too_soon(records) or any(_will_be_retried(record, records) for record in records):
            continue
        part = Part(frozenset([task]), place=None if config.queue is None else queueing.BY_HAND)
        suffix = f"#rerun-{name}#{len(records)}"
        asked = run_request(arrival, lock, part.tasks, suffix=suffix, more=part.tags(arrival))
        found.append(asked.with_replaced_attrs(tags={**asked.tags, RERUN_TAG: name}))
    folders = tuple(layout.log_folder(day) for day in days)
    memory.looked = {key for key in memory.looked if key.startswith(folders)}
    return found, (date.fromisoformat(open_since) - timedelta(days=1)).isoformat()


def _due(config: Config, tiers: Sequence[Tier], one: Unfinished) -> frozenset[str]:
    """Tasks that a new definition makes due: those that need scoring only, always; the others if so configured, and if
    their tier asks this checkpoint: each does, or another task of it was asked. A reference is asked everything."""
    if one.key in config.reference_keys:
        return one.missing
    if config.tasks.on_task_change != "backfill":
        return one.answered
    if is_apart(config, one.key):
        return one.missing
    answered = {task for tier in tiers for task in tier.tasks} - one.missing
    asks = [tier.tasks for tier in tiers if tier.takes_all or queueing.was_asked(tier, tiers, answered)]
    return one.answered | one.missing & frozenset[str]().union(*asks)


def record_cancelled(instance: dg.DagsterInstance, store: Store, lock: TaskLock, since: str | None) -> str:
    """Remember in the results root which runs a person cancelled since then, so that `status` does not call their tasks
    queued; returns the time from which to look next. since: ISO 8601; None: always.
    """
    # A state that changed while a tick looked is seen by the next.
    next_time = (datetime.now(UTC) - timedelta(seconds=RECENT_SECONDS)).isoformat()
    after = None if since is None else datetime.fromisoformat(since)
    where = dg.RunsFilter(tags=EVALUATES, statuses=[dg.DagsterRunStatus.CANCELED], updated_after=after)
    for run in instance.get_runs(where):
        key, _, n = run.tags.get(ARRIVAL_TAG, "").rpartition("@")
        tasks = _asked_of(run, lock)
        if key and tasks and was_cancelled(run):
            tier = f"{queueing.CANCELLED}{run.run_id[:8]}"
            arrivals.record_skip(store, key, int(n), tier, tasks, queueing.why_cancelled(run.run_id))
    return next_time


def _wanted(runs: Sequence[dg.DagsterRun], lock: TaskLock) -> tuple[set[str], set[str]]:
    """(tasks that the runs of an arrival were asked for, tasks that a person cancelled): the newest of a task's says.

    runs: newest first. One that was passed over says nothing.
    """
    asked: set[str] = set()
    cancelled: set[str] = set()
    for run in runs:
        own = set(_asked_of(run, lock)) - asked - cancelled
        if was_cancelled(run):
            cancelled |= own
        elif PASSED_TAG not in run.tags or run.status != dg.DagsterRunStatus.CANCELED:
            asked |= own
    return asked, cancelled


def _asked_of(run: dg.DagsterRun, lock: TaskLock) -> list[str]:
    """Tasks of the lock that a run was asked for."""
    if TASKS_TAG in run.tags:
        return [task for task in json.loads(run.tags[TASKS_TAG]) if task in lock.tasks]
    if run.asset_selection is None:
        return list(lock.tasks)
    return [task for task in lock.tasks if results_key(task) in run.asset_selection]


def _will_be_retried(record: dg.RunRecord, records: Sequence[dg.RunRecord]) -> bool:
    """Dagster itself starts a crashed run again, and has not done so yet."""
    run = record.dagster_run
    if run.status != dg.DagsterRunStatus.FAILURE or run.tags.get("dagster/will_retry") != "true":
        return False
    return not any(other.dagster_run.parent_run_id == run.run_id for other in records)


def _too_soon(records: Sequence[dg.RunRecord]) -> bool:
    if not records:
        return False
    wait = min(FIRST_REPAIR_SECONDS * 2 ** min(len(records) - 1, 16), LONGEST_REPAIR_SECONDS)
    ended = max((record.end_time or 0.0) for record in records)
    # A time that is yet to come is another clock's: it says nothing.
    return 0 <= time.time() - ended < wait
