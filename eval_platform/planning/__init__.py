"""What will it cost, how is it shared out, when is it done? Expected seconds, from what was measured before.

`docs/planning.md` says it in words. Nothing is invented: of what nobody knows nothing is expected.
"""

import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Literal, NamedTuple

from eval_platform import warehouse
from eval_platform.checkpoints import count_parameters
from eval_platform.config import Config
from eval_platform.plan import Plan, PlannedTask
from eval_platform.planning import cost
from eval_platform.planning.history import answered, read_history
from eval_platform.planning.sharing import end_of_queue, share_out_costs
from eval_platform.planning.words import duration, planned, took
from eval_platform.store import Store, commits
from eval_platform.tasks import LockedTask
from eval_platform.values import known_sum

if TYPE_CHECKING:
    import duckdb

__all__ = [
    "Expected",
    "Model",
    "duration",
    "end_of_queue",
    "expect",
    "expected",
    "expected_seconds",
    "parameters_at",
    "planned",
    "share_out",
    "took",
]


class Model(NamedTuple):
    """What is expected of one of its checkpoints is expected of all.

    n_parameters: of its files (`parameters_at`); None: as many as the run's others have. chat: as in `RunSettings`.
    """

    run: str
    n_parameters: int | None
    chat: bool | Literal["auto"]


class Expected(NamedTuple):
    """Seconds of each task, what is not known left out; seconds to load the model, None where that is not known."""

    tasks: dict[str, float]
    load: float | None


def expect(plan: Plan, config: Config, store: Store) -> Plan:
    """The plan with what each of its tasks, and loading the model, is expected to take, where it can be told.

    What is answered already, or need only be scored anew, takes nothing; where all is, nothing is loaded.
    """
    warehouse.refresh(store, config.catalog_path)
    arrival, settings = plan.arrival, plan.settings
    model = Model(arrival.run, parameters_at(arrival.uri), settings.chat)
    with warehouse.connect(config.catalog_path, store, samples=False) as con:
        seconds, load = expected(con, [model], {task.name: task for task in plan.tasks}, limit=settings.limit)[model]
        found = answered(con, key=arrival.key, n=arrival.n, settings=settings)
    by_task = {one.task_id: one for one in found}
    asked = {one.ask_id for one in found if one.is_published}
    done = set()
    for task in plan.tasks:
        own = by_task.get(task.task_id)
        if own is None:
            is_done = not asked.isdisjoint((task.ask_id, task.base_ask_id))
        else:  # unless somebody has asked for it once more
            is_done = commits.slot(store, own.evaluation_id) == own.attempt
        if is_done:
            done.add(task.name)
    seconds |= dict.fromkeys(done, 0.0)
    load = 0.0 if len(done) == len(plan.tasks) else load
    return replace(plan, expected_seconds=seconds, expected_load_seconds=load)


def parameters_at(uri: str) -> int | None:
    """How many parameters the checkpoint in a folder has; None where it is none, or cannot be told."""
    return None if "://" in uri else count_parameters(Path(uri))


def expected(
    con: "duckdb.DuckDBPyConnection",
    models: Collection[Model],
    tasks: Mapping[str, PlannedTask | LockedTask],
    *,
    limit: int | None = None,
) -> dict[Model, Expected]:
    """What each of the tasks, by their names, is expected to take on a checkpoint of each of the models."""
    found: dict[Model, Expected] = {}
    for _, group in groupby(sorted(models, key=_asked_as), _asked_as):
        found |= _expected(con, list(group), tasks, limit)
    return found


def _asked_as(model: Model) -> str:
    return str(model.chat)


def _expected(
    con: "duckdb.DuckDBPyConnection",
    models: Sequence[Model],
    tasks: Mapping[str, PlannedTask | LockedTask],
    limit: int | None,
) -> Iterator[tuple[Model, Expected]]:
    """Of models that are asked in the same way."""
    chat = models[0].chat
    history = read_history(
        con,
        runs={model.run for model in models},
        task_ids=[task.task_id for task in tasks.values()],
        limit=limit,
        chat=None if chat == "auto" else chat,
    )
    asked = {one.run for one, _ in history.rows}
    on: dict[str | None, list[cost.Past]] = {}
    found: dict[tuple[str | None, int | None, str | None], Expected] = {}
    for model in models:
        device = history.devices.get(model.run)
        known = on[device] = on.get(device) or history.seen_on(device)
        # Runs of which nothing is known are all alike: there may be a thousand of them.
        run = model.run if model.run in asked else None
        n_parameters = model.n_parameters or (cost.parameters_of(run, known) if run else None)
        place = run, n_parameters, device
        if place not in found:
            found[place] = _of_model(run, n_parameters, known, tasks, limit)
        yield model, found[place]


def _of_model(
    run: str | None,
    n_parameters: int | None,
    known: Sequence[cost.Past],
    tasks: Mapping[str, PlannedTask | LockedTask],
    limit: int | None,
) -> Expected:
    alike = cost.alike(run, n_parameters, known)
    found: dict[str, float] = {}
    for name, task in tasks.items():
        seconds = cost.task_seconds(task.task_id, n_parameters, alike, known)
        if seconds is None and task.size is not None:
            whole = cost.new_task_seconds(task.size, n_parameters, alike)
            seconds = whole if whole is None or limit is None else whole * min(limit / task.size.items, 1.0)
        if seconds is not None:
            found[name] = seconds
    return Expected(found, cost.load_seconds(run, n_parameters, known))


def expected_seconds(plan: Plan) -> float | None:
    """What its worker is expected to take from when it loads the model; None where a part of that is not known."""
    return known_sum([plan.expected_load_seconds, *(plan.expected_seconds.get(task.name) for task in plan.tasks)])


def share_out(plan: Plan, most: int) -> list[Plan]:
    """The plans of at most so many workers, which end at about the same time; one where more would not pay.

    What is expected of nothing counts as much as the mean of the others; where nothing is known, all is one worker's.
    """
    known, load = plan.expected_seconds, plan.expected_load_seconds
    asked = [seconds for seconds in known.values() if seconds]  # what is answered already takes nothing
    if most == 1 or not asked or load is None:
        return [plan]
    usual = mean(asked)
    shards = share_out_costs([known.get(task.name, usual) for task in plan.tasks], load, most)
    together = uuid.uuid4().hex
    return [plan] if len(shards) == 1 else [_part(plan, shard, together) for shard in shards]


def _part(plan: Plan, places: Collection[int], together: str) -> Plan:
    tasks = tuple(plan.tasks[i] for i in places)
    expected: Mapping[str, float] = {
        task.name: plan.expected_seconds[task.name] for task in tasks if task.name in plan.expected_seconds
    }
    return replace(plan, tasks=tasks, expected_seconds=expected, together=together)
