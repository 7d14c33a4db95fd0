"""One op per checkpoint, so one model load: `checkpoint`, one `results/<task>` a task, `summary` last."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dagster as dg

from assets import metadata
from assets.partitions import checkpoints
from assets.standing import marks, reference_scores, standing
from eval_platform import planning
from eval_platform.drive import Outcome
from eval_platform.errors import EvalPlatformError
from eval_platform.identity import content_id
from eval_platform.store import Store, arrivals
from eval_platform.tasks import TaskLock
from eval_platform.values import Arrival
from resources.evaluator import EvaluatorResource
from resources.run_launcher import process_tag
from resources.store import StoreResource
from resources.warehouse import WarehouseResource

CHECKPOINT = dg.AssetKey("checkpoint")
SUMMARY = dg.AssetKey("summary")
GATE = "gate"
EVALUATE_JOB = "evaluate"
# Of every run that evaluates; `[worker] slots` limits how many there are at once.
EVALUATES = {"eval/kind": "evaluate"}
GOING_ON = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]
# Of a run: which arrival (`<key>@<n>`), and which tasks it was asked for (a JSON list).
ARRIVAL_TAG = "eval/arrival"
TASKS_TAG = "eval/tasks"


def arrival_name(key: str, n: int) -> str:
    return f"{key}@{n}"


def results_key(task: str) -> dg.AssetKey:
    return dg.AssetKey(["results", task])


def dataset_key(task: str) -> dg.AssetKey:
    return dg.AssetKey(["datasets", task])


def dataset_specs(lock: TaskLock) -> list[dg.AssetSpec]:
    """The frozen snapshots of the tasks' documents; `eval-platform tasks sync` makes them, not Dagster."""
    return [
        dg.AssetSpec(
            dataset_key(name),
            description=f"The {task.n_documents} documents of {name}, frozen and hashed by `eval-platform tasks sync`.",
            group_name="datasets",
            kinds={"parquet"},
            metadata={"dataset_id": task.dataset_id},
        )
        for name, task in lock.tasks.items()
    ]


def evaluate_asset(lock: TaskLock, code_version: Callable[[str], str]) -> dg.AssetsDefinition:
    """The op that evaluates one checkpoint on the lock's tasks. `code_version` of a task: its id and the settings."""
    specs = [
        dg.AssetSpec(
            CHECKPOINT,
            description="A model that arrived in a watched folder, identified by the hash of what defines it.",
            group_name="checkpoints",
            partitions_def=checkpoints,
            kinds={"huggingface"},
            owners=["team:training"],
        ),
        *(
            dg.AssetSpec(
                results_key(name),
                deps=[CHECKPOINT, dataset_key(name)],
                description=f"{task.about or name}\n\nPrimary metric: {task.primary_metric}; "
                f"chance: {task.chance if task.chance is not None else 'none'}.",
                group_name=task.suites[0] if task.suites else "results",
                partitions_def=checkpoints,
                code_version=code_version(name),
                kinds={"torch", "parquet"},
                owners=["team:evaluation"],
                metadata={"task_id": task.task_id, "primary metric": task.primary_metric},
            )
            for name, task in lock.tasks.items()
        ),
        dg.AssetSpec(
            SUMMARY,
            deps=[results_key(name) for name in lock.tasks],
            description="What became of each task on this checkpoint: published, held or failed, and why."
            + ("" if lock.tasks else "\n\nThere are no tasks yet: run `eval-platform tasks sync`."),
            group_name="boards",  # with the checkpoints the graph of groups would have a circle
            partitions_def=checkpoints,
            owners=["team:evaluation"],
        ),
    ]

    @dg.multi_asset(
        name="evaluate_checkpoint",
        specs=specs,
        can_subset=True,
        check_specs=[
            dg.AssetCheckSpec(
                GATE,
                asset=results_key(name),
                partitions_def=checkpoints,
                description="The decision that stands between a result and every board: published or held, and why.",
            )
            for name in lock.tasks
        ],
        op_tags=EVALUATES,
    )
    def evaluate_checkpoint(
        context: dg.AssetExecutionContext,
        store: StoreResource,
        evaluator: EvaluatorResource,
        warehouse: WarehouseResource,
    ) -> Iterator[Any]:
        opened = store.open()
        selected = set(context.selected_asset_keys)
        tasks = [name for name in lock.tasks if results_key(name) in selected]
        if not tasks and SUMMARY not in selected and CHECKPOINT not in selected:
            return
        arrival = _arrival(context, opened)
        tags = {ARRIVAL_TAG: arrival_name(arrival.key, arrival.n), **process_tag(context.run_id)}
        context.instance.add_run_tags(context.run_id, tags)
        outcomes: list[Outcome] = []
        logs: list[str] = []
        try:
            for outcome in evaluator.evaluate(
                arrival,
                tasks or list(lock.tasks),
                actor="dagster",
                on_message=_log_to(context, logs),
                others=_others(context),
            ):
                outcomes.append(outcome)
                if not _is_newest(opened, arrival):
                    continue
                if outcome.record and CHECKPOINT in selected:
                    selected.discard(CHECKPOINT)
                    yield _checkpoint(arrival, outcome.record)
                if results_key(outcome.task) in selected and outcome.decision is not None:
                    yield from _result(context, opened, outcome, reference_scores(warehouse).get(outcome.task, {}))
        except EvalPlatformError as error:  # its message is meant for people, a stack of calls would hide it
            raise dg.Failure(str(error), allow_retries=False) from error
        if _is_newest(opened, arrival):
            yield from _summary(context, warehouse, lock, arrival, outcomes, is_selected=SUMMARY in selected)
            _finish(context, outcomes, logs)
        else:
            # The partition is the newest arrival's: it shows what that one scored, and alerts for it alone. If the
            # newest turns out to be no model, the reconciliation sensor shows this one.
            context.log.warning(f"{context.partition_key} has arrived anew since: {_told(outcomes)}")

    return evaluate_checkpoint


def _arrival(context: dg.AssetExecutionContext, store: Store) -> Arrival:
    key = context.partition_key
    asked = context.run.tags.get(ARRIVAL_TAG, "").rpartition("@")[2]
    arrival = arrivals.get(store, key, int(asked)) if asked else arrivals.newest(store, key)
    if arrival is None:
        raise dg.Failure(
            f"nothing has arrived under {key}: the results root knows no such key. Write the checkpoint into a watched "
            "folder; the sensor registers it.",
            allow_retries=False,
        )
    return arrival


def _is_newest(store: Store, arrival: Arrival) -> bool:
    return arrivals.newest_numbers(store, [arrival.key]).get(arrival.key, arrival.n) == arrival.n


def _others(context: dg.AssetExecutionContext) -> int:
    """How many other evaluations go on or wait, each of which wants a worker."""
    where = dg.RunsFilter(tags=EVALUATES, statuses=GOING_ON)
    return len(set(context.instance.get_run_ids(where)) - {context.run_id})


def _log_to(context: dg.AssetExecutionContext, logs: list[str]) -> Callable[[dict[str, Any]], None]:
    """What the run's page shows of its workers. `logs` is told where their logs lie."""

    waited_for: set[str] = set()

    def on_message(message: dict[str, Any]) -> None:
        match message["type"]:
            case "slot" if message["reason"] not in waited_for:
                waited_for.add(message["reason"])
                context.log.info(message["reason"])
            case "progress" | "staging" | "slot":
                pass  # `eval-platform status` shows these; an event each would swell the event log
            case "log":
                print(message["text"], end="", flush=True)  # Dagster keeps it as the run's standard output
            case "launched":
                logs.append(str(Path(message["folder"]) / "worker.log"))
                context.log.info(f"a worker was started; what it prints is this run's stdout and {logs[-1]}")
            case "planned":
                context.log.info(planning.planned(message, datetime.now(UTC)))
            case "took":
                context.log.info(planning.took(message["shards"]))
            case "failed":
                context.log.error(f"{message['task'] or 'checkpoint'} failed ({message['class']}): {message['reason']}")
            case _:
                context.log.info(", ".join(f"{k}: {v}" for k, v in message.items() if k != "engine"))

    return on_message


def _checkpoint(arrival: Arrival, record: Mapping[str, Any]) -> dg.MaterializeResult[Any]:
    return dg.MaterializeResult(
        asset_key=CHECKPOINT,
        metadata=checkpoint_metadata(arrival, record["checkpoint_id"], record["weights_id"]),
        data_version=dg.DataVersion(record["checkpoint_id"]),
    )


def checkpoint_metadata(arrival: Arrival, checkpoint_id: str, weights_id: str | None) -> dict[str, Any]:
    """What a person wants to know of a checkpoint, or of a served model."""
    found: dict[str, Any] = {
        "run": arrival.run,
        "step": arrival.step,
        "tokens_seen": arrival.tokens_seen,
        "arrival": arrival.n,
        "arrived at": arrival.arrived_at,
        "checkpoint_id": checkpoint_id,
        "weights_id": weights_id,
    }
    shown = {name: value for name, value in found.items() if value is not None}
    if arrival.served is not None:
        return {**shown, **arrival.tags, "endpoint": arrival.uri}
    return {**shown, "path": dg.MetadataValue.path(arrival.uri)}


def _result(
    context: dg.AssetExecutionContext, store: Store, outcome: Outcome, references: Mapping[str, float]
) -> Iterator[Any]:
    decision, record = outcome.decision, outcome.record
    assert decision is not None
    key = results_key(outcome.task)
    passed, severity = metadata.check_severity(decision)
    yield dg.MaterializeResult(
        asset_key=key,
        metadata={**metadata.result_metadata(store, record, decision, references), "linked": outcome.linked},
        data_version=dg.DataVersion(metadata.data_version(record)),
        tags={metadata.DECISION_TAG: str(decision.n)},
    )
    if dg.AssetCheckKey(key, GATE) in context.selected_asset_check_keys:
        yield dg.AssetCheckResult(
            asset_key=key,
            check_name=GATE,
            passed=passed,
            severity=severity,
            metadata=metadata.check_metadata(decision),
        )
    else:  # someone selected the asset without its check; the decision was made all the same
        metadata.report_check(
            context.instance, dg.AssetCheckKey(key, GATE), context.partition_key, decision, context.run_id
        )


def _summary(
    context: dg.AssetExecutionContext,
    warehouse: WarehouseResource,
    lock: TaskLock,
    arrival: Arrival,
    outcomes: list[Outcome],
    *,
    is_selected: bool,
) -> Iterator[Any]:
    """Last, whatever happened: the leaderboard hangs on it."""
    key = context.partition_key
    warehouse.refresh()
    lines = {one.task: metadata.standing_line(one) for one in standing(warehouse, lock, [key])[key]}
    for outcome in outcomes:
        if outcome.status in {"failed", "waiting", "skipped"}:
            lines[outcome.task] = metadata.Line(outcome.task, outcome.status, None, outcome.reasons)
    body = metadata.summary_metadata(arrival, list(lines.values()))
    version = marks(warehouse, lock).get(key) or content_id("nothing stands")
    if is_selected:
        yield dg.MaterializeResult(asset_key=SUMMARY, metadata=body, data_version=dg.DataVersion(version))
    else:  # results/<task> was asked for alone: the board must move all the same
        yield dg.AssetMaterialization(SUMMARY, partition=key, metadata=body, tags={metadata.DATA_VERSION: version})


def _finish(context: dg.AssetExecutionContext, outcomes: list[Outcome], logs: Sequence[str]) -> None:
    """Red when something is held or failed, so that the alert fires; a task at another worker is no failure."""
    bad = [outcome for outcome in outcomes if outcome.status in {"held", "failed"}]
    if bad:
        names = ["worker's log", *(f"worker's log {i}" for i in range(2, len(logs) + 1))]
        shown = {name: dg.MetadataValue.path(log) for name, log in zip(names, logs, strict=False)}
        raise dg.Failure(f"{context.partition_key}: {_told(bad)}", metadata=shown, allow_retries=False)


def _told(outcomes: list[Outcome]) -> str:
    return "; ".join(
        f"{o.task} {o.status}" + (f": {' '.join(o.reasons) or 'no reason given'}" if o.status != "published" else "")
        for o in outcomes
    )
