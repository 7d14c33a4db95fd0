"""Runs for the tiers that do not ask every checkpoint, and for what was passed over, once nothing waits."""

import json
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import dagster as dg

from assets.results import ARRIVAL_TAG, TASKS_TAG, arrival_name
from assets.standing import Skipped, Unfinished
from eval_platform.checkpoints import hold
from eval_platform.config import Config
from eval_platform.queueing import Point, Tier, Waiting, has_ended, in_turn, points_of, was_asked
from eval_platform.store import Store, arrivals
from eval_platform.tasks import TaskLock
from eval_platform.values import Arrival
from sensors.arrivals import run_request
from sensors.queue import PASSED_TAG, TIER_TAG, of_tiers, waits
from sensors.repairs import LOOKED_AT_PER_TICK, REPAIRS_PER_TICK, is_busy

# A folder that was gone may be there again: a file server was away.
LOOK_AGAIN_SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class Look:
    """What a tick of the reconciliation sensor sees. known: keys that Dagster has."""

    instance: dg.DagsterInstance
    config: Config
    store: Store
    lock: TaskLock
    tiers: Sequence[Tier]
    unfinished: Sequence[Unfinished]
    skipped: Sequence[Skipped]
    known: Collection[str]


def later_tiers(
    look: Look, curves: Mapping[str, Sequence[Point]], memory: set[tuple[str, str]]
) -> Iterator[dg.RunRequest]:
    """The first run of a tier of every k-th checkpoint, or of a run's last, for each that it is due for.

    memory: (arrival, tier) that have had a run. What became of it is for `repairs`.
    """
    config = look.config
    waiting = [tier for tier in look.tiers if not tier.takes_all]
    if config.queue is None or not waiting:
        return
    roots = {root.name for root in config.checkpoints}
    missing = {(one.key, one.n): one.missing for one in look.unfinished}
    over = {(one.key, one.n, one.tier) for one in look.skipped}
    now, count = datetime.now(UTC), 0
    for points in curves.values():
        run = [point for point in points if point.key in look.known and point.key.partition("/")[0] in roots]
        ended = has_ended(run, config.queue.idle_minutes, now)
        for tier in waiting:
            asked = {
                point.key
                for point in run
                if point.key in config.reference_keys
                or (arrival_name(point.key, point.n), tier.name) in memory
                or (point.key, point.n, tier.name) in over
                or was_asked(tier, waiting, look.lock.tasks.keys() - missing.get((point.key, point.n), frozenset()))
            }
            for point in points_of(run, tier, asked, ended=ended):
                name = arrival_name(point.key, point.n)
                had = dg.RunsFilter(tags={ARRIVAL_TAG: name, TIER_TAG: tier.name})
                if look.instance.get_runs_count(had):
                    memory.add((name, tier.name))
                    continue
                arrival = arrivals.get(look.store, point.key, point.n)
                if arrival is None:
                    continue
                if count == REPAIRS_PER_TICK:
                    return
                count += 1
                hold(arrival, config.cache_dir)
                # What another tier has answered already is not asked again, and of this one alone: its run says so.
                tasks = tier.tasks & missing.get((point.key, point.n), frozenset())
                yield from _requests(look, [tier], arrival, tasks)


def gaps(look: Look, memory: dict[Skipped, float]) -> Iterator[dg.RunRequest]:
    """Runs for what was passed over, as many as there are slots, when nothing else waits; newest first, runs in turn.

    Not for what a person has cancelled since, nor for a checkpoint whose folder is gone. memory: when one was
    found to be of these, by the monotonic clock: so that they are not looked at in every tick.
    """
    if look.config.queue is None or not look.skipped or waits(look.instance):
        return
    missing = {(one.key, one.n): one.missing for one in look.unfinished}
    count, now = 0, time.monotonic()
    skipped = {
        f"{one.key} {one.tier}": one
        for one in look.skipped
        if now - memory.get(one, -LOOK_AGAIN_SECONDS) >= LOOK_AGAIN_SECONDS
    }
    turns = in_turn((Waiting(id, o.run, 0, o.tier, o.step, o.arrived_at) for id, o in skipped.items()), {})
    for one in (skipped[turn.id] for turn in turns[:LOOKED_AT_PER_TICK]):
        tasks = one.tasks & look.lock.tasks.keys() & missing.get((one.key, one.n), frozenset())
        if count == look.config.worker.slots:
            return
        if not tasks or one.key not in look.known or is_busy(look.instance, one.key):
            continue
        name = arrival_name(one.key, one.n)
        records = look.instance.get_run_records(dg.RunsFilter(tags={ARRIVAL_TAG: name}))
        begun = [record.dagster_run.tags for record in records if PASSED_TAG not in record.dagster_run.tags]
        # A run for other tasks says nothing: these may have come to the tier since.
        if any(tasks & set(json.loads(tags.get(TASKS_TAG, "[]"))) for tags in begun):
            memory[one] = now  # it has had its turn, and what became of it is for `repairs`; or a person cancelled it
            continue
        arrival = arrivals.get(look.store, one.key, one.n)
        if arrival is None or not _is_there(look.config, arrival):
            memory[one] = now
            continue
        count += 1
        yield from _requests(look, look.tiers, arrival, (), tasks, suffix=f"#{len(records)}")


def may_be_last(look: Look, curves: Mapping[str, Sequence[Point]]) -> list[tuple[str, int]]:
    """(key, n) of each run's newest checkpoint, where a tier may yet turn out to be due for it."""
    tasks = frozenset[str]().union(*(tier.tasks for tier in look.tiers if tier.last))
    missing = {(one.key, one.n) for one in look.unfinished if one.missing & tasks}
    newest = (max(points, key=lambda point: point.order) for points in curves.values())
    return [(point.key, point.n) for point in newest if (point.key, point.n) in missing]


def _requests(
    look: Look,
    tiers: Sequence[Tier],
    arrival: Arrival,
    tasks: Collection[str],
    gaps: Collection[str] = (),
    suffix: str = "",
) -> Iterator[dg.RunRequest]:
    for part in of_tiers(look.config, tiers, arrival.key, tasks, gaps):
        more = part.tags(arrival)
        yield run_request(arrival, look.lock, part.tasks, suffix=part.suffix + suffix, more=more)


def _is_there(config: Config, arrival: Arrival) -> bool:
    """Whether it can still be staged, so far as that can be seen from here."""
    return "://" in arrival.uri or hold(arrival, config.cache_dir) or Path(arrival.uri).is_dir()
