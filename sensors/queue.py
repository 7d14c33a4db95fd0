"""Tells Dagster's queue in which order to begin what waits, and takes off it what is passed over.

What the order is, `eval_platform/queueing.py` says. Dagster begins the run with the highest `dagster/priority` first; a
run that still waits is given another number when something arrives that changes its place.
"""

import json
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import dagster as dg
from dagster._core.storage.tags import PARENT_RUN_ID_TAG, RETRY_NUMBER_TAG

from assets.results import ARRIVAL_TAG, EVALUATES, TASKS_TAG
from eval_platform import queueing
from eval_platform.config import Config
from eval_platform.queueing import BY_HAND, GAPS, Tier, Waiting
from eval_platform.store import Store, arrivals
from eval_platform.tasks import TaskLock
from eval_platform.values import Arrival

# Of a run: its training run, its tier, and where it stands by `queueing.Waiting`.
RUN_TAG, TIER_TAG, PLACE_TAG = "eval/run", "eval/tier", "eval/place"
STEP_TAG, ARRIVED_TAG = "eval/step", "eval/arrived"
# Of a cancelled run: nobody cancelled it by hand.
PASSED_TAG = "eval/passed_over"
PRIORITY_TAG = "dagster/priority"

# Of the runs that were begun, the latest say whose turn it is.
_LOOKED_BACK = 200
_BEGUN = [
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.SUCCESS,
    dg.DagsterRunStatus.FAILURE,
    dg.DagsterRunStatus.CANCELING,
    dg.DagsterRunStatus.CANCELED,
]


@dataclass(frozen=True, slots=True)
class Part:
    """Tasks that one run asks of an arrival. tier: None where there is none, or the arrival is never passed over.

    place: None where nothing is configured. suffix: what tells the run's key from the other parts'.
    """

    tasks: frozenset[str]
    tier: str | None = None
    place: int | None = None
    suffix: str = ""

    def tags(self, arrival: Arrival) -> dict[str, str]:
        """What the run must say of itself to be put in its place."""
        if self.place is None:
            return {}
        found = {
            PLACE_TAG: str(self.place),
            TIER_TAG: self.tier,
            STEP_TAG: None if arrival.step is None else str(arrival.step),
            ARRIVED_TAG: arrival.arrived_at,
        }
        return {name: value for name, value in found.items() if value is not None}


def at_once(config: Config, tiers: Sequence[Tier], lock: TaskLock, key: str) -> frozenset[str]:
    """What is asked of an arrival when it comes; the rest is asked when more is known of its run."""
    if is_apart(config, key):
        return frozenset(lock.tasks)
    return frozenset(task for tier in tiers if tier.takes_all for task in tier.tasks)


def of_tiers(
    config: Config, tiers: Sequence[Tier], key: str, tasks: Collection[str], gaps: Collection[str] = ()
) -> list[Part]:
    """The runs that ask `tasks` of an arrival, a tier each; those that ask `gaps` of it come after all others."""
    if config.queue is None:
        return [Part(frozenset({*tasks, *gaps}))] if tasks or gaps else []
    if is_apart(config, key):
        return [Part(frozenset({*tasks, *gaps}), place=0)] if tasks or gaps else []
    parts: list[Part] = []
    for names, fills_gaps in ((set(tasks), False), (set(gaps) - set(tasks), True)):
        left = names
        for tier in tiers:
            own = frozenset(tier.tasks & left)
            left = left - own
            if own:
                # Without tiers of one's own a run is called as it is without the section.
                suffix = (f"+{tier.name}" if config.queue.tiers else "") + ("+gap" if fills_gaps else "")
                parts.append(Part(own, tier.name, GAPS if fills_gaps else tier.place, suffix))
    return parts


def is_apart(config: Config, key: str) -> bool:
    """Whether everything is asked of the key, and it is never passed over: a model behind a server, or a reference."""
    return config.served_at(key) is not None or key in config.reference_keys


def in_order(
    instance: dg.DagsterInstance, config: Config, store: Store, requests: Sequence[dg.RunRequest]
) -> list[dg.RunRequest]:
    """The requests with their priorities, without those that are passed over; what waits is put in order with them.

    As they are where nothing is configured.
    """
    if config.queue is None:
        return list(requests)
    queued = {run.run_id: run for run in instance.get_runs(_waiting())}
    asked = {f"request {i}": request for i, request in enumerate(requests)}
    if not queued and not asked:
        return []
    served, begun = _begun(instance)
    order = queueing.in_turn(
        [
            *(_waits(run_id, run.tags) for run_id, run in queued.items()),
            *(_waits(one, request.tags) for one, request in asked.items()),
        ],
        served,
    )
    beyond = config.queue.skip_superseded_beyond
    over = queueing.superseded(order, beyond, begun) if beyond is not None else []
    for one, newest in over:
        assert beyond is not None
        run = queued.pop(one.id, None)
        told = run.tags if run is not None else asked.pop(one.id).tags
        reason = queueing.why_skipped(one.run, newest, beyond)
        key, _, n = told[ARRIVAL_TAG].rpartition("@")
        arrivals.record_skip(store, key, int(n), one.tier or "", json.loads(told[TASKS_TAG]), reason)
        if run is not None:
            _take_off(instance, run, reason)
    gone = {one.id for one, _ in over}
    numbers = queueing.numbers([one for one in order if one.id not in gone])
    for run_id, run in queued.items():
        if run.tags.get(PRIORITY_TAG) != str(numbers[run_id]):
            instance.add_run_tags(run_id, {PRIORITY_TAG: str(numbers[run_id])})
    return [
        request.with_replaced_attrs(tags={**request.tags, PRIORITY_TAG: str(numbers[one])})
        for one, request in asked.items()
    ]


def was_cancelled(run: dg.DagsterRun) -> bool:
    """Whether a person ended the run. What the platform takes off the queue says so of itself; what Dagster ends, for
    its time or since its process is gone, has failed."""
    return run.status == dg.DagsterRunStatus.CANCELED and PASSED_TAG not in run.tags


def waits(instance: dg.DagsterInstance) -> int:
    """How many evaluations wait in the queue."""
    return instance.get_runs_count(_waiting())


def _waiting() -> dg.RunsFilter:
    return dg.RunsFilter(tags=EVALUATES, statuses=[dg.DagsterRunStatus.QUEUED])


def _take_off(instance: dg.DagsterInstance, run: dg.DagsterRun, reason: str) -> None:
    """Cancelled as a person cancels what waits; nothing happens to a run that was begun meanwhile."""
    now = instance.get_run_by_id(run.run_id)
    if now is not None and now.status == dg.DagsterRunStatus.QUEUED:
        instance.add_run_tags(run.run_id, {PASSED_TAG: "true"})
        instance.report_run_canceled(now, message=reason)


def _waits(id: str, told: Mapping[str, str]) -> Waiting:
    """A run or a request in line, by its tags. What the sensors did not ask for was asked for by a person; what a
    person re-executes has the tags of its first run."""
    by_hand = ARRIVAL_TAG not in told or (PARENT_RUN_ID_TAG in told and RETRY_NUMBER_TAG not in told)
    place = GAPS if "dagster/backfill" in told else BY_HAND
    if not by_hand:
        place = int(told.get(PLACE_TAG, 0))  # 0: it has waited since before there was an order
    return Waiting(
        id,
        told.get(RUN_TAG, ""),
        place,
        None if by_hand else told.get(TIER_TAG),
        int(told[STEP_TAG]) if STEP_TAG in told else None,
        told.get(ARRIVED_TAG, ""),
    )


def _begun(
    instance: dg.DagsterInstance,
) -> tuple[dict[tuple[int, str], float], dict[tuple[str, str], tuple[int, str]]]:
    """((place, training run) -> when one of it was begun last, (tier, training run) -> the newest that was)."""
    served: dict[tuple[int, str], float] = {}
    newest: dict[tuple[str, str], tuple[int, str]] = {}
    where = dg.RunsFilter(tags=EVALUATES, statuses=_BEGUN)
    for record in instance.get_run_records(where, limit=_LOOKED_BACK, order_by="update_timestamp"):
        run = record.dagster_run
        if run.status == dg.DagsterRunStatus.STARTING:
            begun = time.time()
        elif record.start_time is not None:
            begun = record.start_time
        else:
            continue  # cancelled while it waited
        one = _waits(run.run_id, run.tags)
        served[one.place, one.run] = max(begun, served.get((one.place, one.run), 0.0))
        if one.tier is not None:
            at = (one.tier, one.run)
            newest[at] = max(newest.get(at, (-1, "")), one.order[:2])
    return served, newest
