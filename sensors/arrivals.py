"""A new checkpoint in a watched folder -> an arrival, a partition and a run, in one tick."""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import datetime

import dagster as dg

from assets.partitions import checkpoints
from assets.results import ARRIVAL_TAG, CHECKPOINT, EVALUATE_JOB, SUMMARY, TASKS_TAG, arrival_name, results_key
from eval_platform import queueing
from eval_platform.checkpoints import Found, Watch, as_found, discover, hold
from eval_platform.config import Config
from eval_platform.store import Store, arrivals, open_root, register_root, watcher_id
from eval_platform.tasks import TaskLock
from eval_platform.values import Arrival, Incomplete
from resources.store import StoreResource
from sensors.queue import at_once, in_order, of_tiers

# For listing the folders of a bucket: with thousands of runs a tick would take longer than Dagster lets it.
_PATIENCE_SECONDS = 1.0


def run_request(
    arrival: Arrival, lock: TaskLock, tasks: Collection[str], *, suffix: str = "", more: Mapping[str, str] | None = None
) -> dg.RunRequest:
    """A run for one arrival on `tasks`. run_keys last for ever, so that a repair needs another: `suffix`.

    more: tags beyond those that every run has.
    """
    name = arrival_name(arrival.key, arrival.n)
    selection = None
    if set(tasks) != set(lock.tasks):
        selection = [CHECKPOINT, *(results_key(task) for task in sorted(tasks)), SUMMARY]
    return dg.RunRequest(
        run_key=name + suffix,
        partition_key=arrival.key,
        asset_selection=selection,
        tags={
            ARRIVAL_TAG: name,
            TASKS_TAG: json.dumps(sorted(tasks)),
            "eval/run": arrival.run,
            "eval/kind": "evaluate",
            # Newest first once a queue stands: people wait for the latest number. A repair keeps its place.
            "dagster/priority": str(int(datetime.fromisoformat(arrival.arrived_at).timestamp()))
            if arrival.arrived_at
            else "0",
            **(more or {}),
        },
    )


@dataclass
class _Memory:
    """What this process has seen in the store and what never changes there; it only saves requests."""

    is_open: bool = False  # the results root, whose layout we know
    roots: set[tuple[str, str]] = field(default_factory=set)  # registered: name, path
    fingerprints: dict[tuple[str, int], str] = field(default_factory=dict)  # of an arrival: key, n


def new_checkpoints_sensor(lock: TaskLock, interval_seconds: int) -> dg.SensorDefinition:
    """Looks at every root in each tick (a listing, never an event) and at some known folders again."""
    memory = _Memory()

    @dg.sensor(
        name="new_checkpoints",
        job_name=EVALUATE_JOB,
        minimum_interval_seconds=interval_seconds,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Finds complete checkpoints in the watched folders, numbers their arrival and asks for a run.",
    )
    def new_checkpoints(context: dg.SensorEvaluationContext, store: StoreResource) -> dg.SensorResult | dg.SkipReason:
        if not lock.tasks:
            return dg.SkipReason("there is nothing to ask yet: run `eval-platform tasks sync`")
        config, opened = store.config(), store.open()
        if not memory.is_open:
            open_root(opened)
            memory.is_open = True
        for root in config.roots:
            if (root.name, root.path) not in memory.roots:
                register_root(opened, root.name, root.path)
                memory.roots.add((root.name, root.path))
        tiers = queueing.tiers(config.queue, config.suites, lock)
        cursor = json.loads(context.cursor or "{}")
        watch = Watch.from_json(cursor.get("watch"))
        keys = sorted(context.instance.get_dynamic_partitions(str(checkpoints.name)))
        sweep = _sweep(keys, cursor.get("position", ""), config.sensor.sweep_per_tick)
        changing = {key for key in keys if key in watch} - set(sweep)
        known = dict.fromkeys(keys, "")
        for some in (sweep, changing):  # not together: the sweep's lie side by side
            known |= _fingerprints(opened, some, memory.fingerprints)

        found: list[Found] = []
        waiting: list[Incomplete] = []
        for candidate in discover(config.roots, known, watch, sweep, config.s3, _PATIENCE_SECONDS):
            if isinstance(candidate, Incomplete):
                waiting.append(candidate)
            elif (beside := config.beside_reference(candidate.key)) is not None:
                waiting.append(Incomplete(candidate.key, candidate.uri, beside, refused=True))
            else:
                found.append(candidate)
        position = _swept_to(sweep, watch.left, cursor.get("position", ""))
        found += _configured(config, opened, known)
        watcher = watcher_id(config.state_dir)
        requests, events, added = [], [], []
        for one in _in_turn(found):
            if len(events) >= config.sensor.new_per_tick:
                break
            arrival, is_new = arrivals.register(opened, watcher=watcher, **asdict(one))
            if one.key not in known:
                # Also when another watcher, or a tick that was cut off, has numbered it: then Dagster lacks it.
                added.append(one.key)
            elif not is_new:
                continue  # another watcher's arrival, or a sweep of what has not changed
            # A trainer may delete the folder while the run waits in the queue.
            held = hold(arrival, config.cache_dir)
            for part in of_tiers(config, tiers, arrival.key, at_once(config, tiers, lock, arrival.key)):
                requests.append(run_request(arrival, lock, part.tasks, suffix=part.suffix, more=part.tags(arrival)))
            events.append(
                dg.AssetObservation(
                    CHECKPOINT,
                    partition=arrival.key,
                    description=f"arrival {arrival.n}; " + _hold_told(arrival, held=held),
                )
            )
        cursor = {
            "watch": watch.to_json(),
            "position": position,
            "known": len(known),
            "backlog": len(found) - len(events),
            "waiting": [f"{w.key}: {w.reason}" for w in waiting[:20]],
        }
        skip = None
        if requests:  # what waits has kept its order else
            requests = in_order(context.instance, config, opened, requests)
        if not requests:
            skip = "no new checkpoint" + "".join(f"; {w.key} waits: {w.reason}" for w in waiting[:5])
        return dg.SensorResult(
            run_requests=requests,
            skip_reason=skip,
            cursor=json.dumps(cursor),
            dynamic_partitions_requests=[checkpoints.build_add_request(added)] if added else None,
            asset_events=events,
        )

    return new_checkpoints


def _fingerprints(store: Store, keys: Collection[str], remembered: dict[tuple[str, int], str]) -> dict[str, str]:
    """key -> fingerprint of its newest arrival, of those that the store knows."""
    newest = arrivals.newest_numbers(store, keys)
    new = [one for one in newest.items() if one not in remembered]
    with ThreadPoolExecutor(store.requests_at_once) as pool:
        for one, arrival in zip(new, pool.map(lambda one: arrivals.get(store, *one), new), strict=True):
            if arrival is not None:
                remembered[one] = arrival.fingerprint
    return {one[0]: remembered[one] for one in newest.items() if one in remembered}


def _configured(config: Config, store: Store, known: Collection[str]) -> list[Found]:
    """The `[[served]]` models that the store or Dagster does not know as they are configured. No server is asked."""
    found = []
    for one in (as_found(entry) for entry in config.served):
        newest = arrivals.newest(store, one.key)
        if one.key not in known or newest is None or newest.fingerprint != one.fingerprint:
            found.append(one)
    return found


def _hold_told(arrival: Arrival, *, held: bool) -> str:
    if arrival.served is not None:
        return "a served model"
    if "://" in arrival.uri:
        return "downloaded when its turn comes"
    return "held by hard links" if held else "not held: copied later"


def _in_turn(found: Iterable[Found]) -> list[Found]:
    """Newest step first within a run, the runs taking turns, so that one run's backlog never keeps another waiting."""
    by_run: dict[str, list[Found]] = {}
    for one in sorted(found, key=lambda f: -(f.step if f.step is not None else -1)):
        by_run.setdefault(one.run, []).append(one)
    ranked = [(rank, run, one) for run, group in by_run.items() for rank, one in enumerate(group)]
    return [one for _, _, one in sorted(ranked, key=lambda entry: entry[:2])]


def _sweep(keys: Sequence[str], position: str, count: int) -> list[str]:
    """The next `count` known keys after `position`, then from the first again: every folder has its turn.

    They follow one another in order, so that few listings of a bucket show them all.
    """
    return ([key for key in keys if key > position] or list(keys))[:count]


def _swept_to(sweep: Sequence[str], left: Collection[str], position: str) -> str:
    """The last key before the first that there was no time for."""
    for key in sweep:
        if key in left:
            break
        position = key
    return position
