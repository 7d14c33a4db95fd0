"""A new checkpoint in a watched folder -> an arrival, a partition and a run, in one tick."""

import json
import time
from dataclasses import asdict

import dagster as dg

from assets.partitions import checkpoints
from assets.results import CHECKPOINT, EVALUATE_JOB
from eval_platform.checkpoints import Found, Watch, discover, hold
from eval_platform.store import arrivals, register_root, watcher_id
from eval_platform.values import Arrival, Incomplete
from resources.store import StoreResource


def run_request(arrival: Arrival, *, repair: int = 0, priority: int | None = None) -> dg.RunRequest:
    """One run for one arrival. run_keys last for ever, so that a repair needs another."""
    name = f"{arrival.key}@{arrival.n}"
    return dg.RunRequest(
        run_key=f"{name}#{repair}" if repair else name,
        partition_key=arrival.key,
        tags={
            "eval/arrival": name,
            "eval/run": arrival.run,
            "eval/kind": "evaluate",
            # Newest first once a queue stands: people wait for the latest number.
            "dagster/priority": str(priority if priority is not None else int(time.time())),
        },
    )


def new_checkpoints_sensor(interval_seconds: int) -> dg.SensorDefinition:
    """Looks at every root in each tick (a listing, never an event) and at some known folders again."""

    @dg.sensor(
        name="new_checkpoints",
        job_name=EVALUATE_JOB,
        minimum_interval_seconds=interval_seconds,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description="Finds complete checkpoints in the watched folders, numbers their arrival and asks for a run.",
    )
    def new_checkpoints(context: dg.SensorEvaluationContext, store: StoreResource) -> dg.SensorResult:
        config, opened = store.config(), store.open()
        for root in config.checkpoints:
            register_root(opened, root.name, root.path)
        cursor = json.loads(context.cursor or "{}")
        watch = Watch.from_json(cursor.get("watch"))
        keys = sorted(context.instance.get_dynamic_partitions(str(checkpoints.name)))
        sweep, position = _sweep(keys, cursor.get("position", ""), config.sensor.sweep_per_tick)
        known = dict.fromkeys(keys, "")
        for key in sweep:
            newest = arrivals.newest(opened, key)
            known[key] = newest.fingerprint if newest else ""

        found: list[Found] = []
        waiting: list[Incomplete] = []
        for candidate in discover(config.checkpoints, known, watch, sweep):
            if isinstance(candidate, Found):
                found.append(candidate)
            else:
                waiting.append(candidate)
        found.sort(key=lambda f: (f.run, -(f.step or 0)))
        taken = found[: config.sensor.new_per_tick]
        watcher = watcher_id(config.state_dir)
        requests, events, added = [], [], []
        for one in taken:
            arrival, is_new = arrivals.register(opened, watcher=watcher, **asdict(one))
            if one.key not in known:
                added.append(one.key)
            elif not is_new:
                continue  # another watcher's arrival, or a sweep of what has not changed
            # A trainer may delete the folder while the run waits in the queue.
            held = hold(arrival, config.cache_dir)
            requests.append(run_request(arrival))
            events.append(
                dg.AssetObservation(
                    CHECKPOINT,
                    partition=arrival.key,
                    description=f"arrival {arrival.n}; " + ("held by hard links" if held else "not held: copied later"),
                )
            )
        cursor = {
            "watch": watch.to_json(),
            "position": position,
            "known": len(known),
            "backlog": len(found) - len(taken),
            "waiting": [f"{w.key}: {w.reason}" for w in waiting[:20]],
        }
        skip = None
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


def _sweep(keys: list[str], position: str, count: int) -> tuple[list[str], str]:
    """The next `count` known keys after `position`, going round; so every folder is looked at again in turn."""
    if not keys:
        return [], ""
    later = [key for key in keys if key > position]
    chosen = (later + keys)[: min(count, len(keys))]
    return chosen, chosen[-1]
