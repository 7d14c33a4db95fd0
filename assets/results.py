"""One op per checkpoint, so one model load: `checkpoint`, one `results/<task>` a task, `summary` last."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import dagster as dg

from assets import metadata
from assets.partitions import checkpoints
from eval_platform.drive import Outcome
from eval_platform.identity import content_id
from eval_platform.store import Store, arrivals
from eval_platform.tasks import TaskLock
from eval_platform.values import Arrival
from resources.evaluator import EvaluatorResource
from resources.store import StoreResource

CHECKPOINT = dg.AssetKey("checkpoint")
SUMMARY = dg.AssetKey("summary")
GATE = "gate"
EVALUATE_JOB = "evaluate"
WAITING_TAG = "eval/waiting"


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
                group_name="results",
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
            description="What became of each task on this checkpoint: published, held or failed, and why.",
            group_name="checkpoints",
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
        op_tags={"eval/kind": "evaluate"},
    )
    def evaluate_checkpoint(
        context: dg.AssetExecutionContext, store: StoreResource, evaluator: EvaluatorResource
    ) -> Iterator[Any]:
        opened = store.open()
        arrival = _arrival(context, opened)
        selected = set(context.selected_asset_keys)
        tasks = [name for name in lock.tasks if results_key(name) in selected]
        if not tasks and SUMMARY not in selected and CHECKPOINT not in selected:
            return
        outcomes: list[Outcome] = []
        for outcome in evaluator.evaluate(
            arrival, tasks or list(lock.tasks), actor="dagster", on_message=_log_to(context)
        ):
            outcomes.append(outcome)
            if outcome.record and CHECKPOINT in selected:
                selected.discard(CHECKPOINT)
                yield _checkpoint(arrival, outcome.record)
            if results_key(outcome.task) in selected and outcome.decision is not None:
                yield from _result(context, opened, outcome)
        yield from _summary(context, arrival, outcomes, is_selected=SUMMARY in selected)
        _finish(context, outcomes)

    return evaluate_checkpoint


def _arrival(context: dg.AssetExecutionContext, store: Store) -> Arrival:
    key = context.partition_key
    asked = context.run.tags.get("eval/arrival", "").rpartition("@")[2]
    arrival = arrivals.get(store, key, int(asked)) if asked else arrivals.newest(store, key)
    if arrival is None:
        raise dg.Failure(
            f"nothing has arrived under {key}: the results root knows no such key. Write the checkpoint into a watched "
            "folder; the sensor registers it.",
            allow_retries=False,
        )
    return arrival


def _log_to(context: dg.AssetExecutionContext) -> Callable[[dict[str, Any]], None]:
    def on_message(message: dict[str, Any]) -> None:
        match message["type"]:
            case "progress" | "staging" | "slot":
                pass  # `eval-platform status` shows these; an event each would swell the event log
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


def checkpoint_metadata(arrival: Arrival, checkpoint_id: str, weights_id: str) -> dict[str, Any]:
    """What a person wants to know of a checkpoint."""
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
    return {**shown, "path": dg.MetadataValue.path(arrival.uri)}


def _result(context: dg.AssetExecutionContext, store: Store, outcome: Outcome) -> Iterator[Any]:
    decision, record = outcome.decision, outcome.record
    assert decision is not None
    key = results_key(outcome.task)
    passed, severity = metadata.check_severity(decision)
    yield dg.MaterializeResult(
        asset_key=key,
        metadata={**metadata.result_metadata(store, record, decision), "linked": outcome.linked},
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
        context.instance.report_runless_asset_event(
            dg.AssetCheckEvaluation(
                asset_key=key,
                check_name=GATE,
                passed=passed,
                severity=severity,
                metadata=metadata.check_metadata(decision),
                partition=context.partition_key,
            )
        )


def _summary(
    context: dg.AssetExecutionContext, arrival: Arrival, outcomes: list[Outcome], *, is_selected: bool
) -> Iterator[Any]:
    """Last, whatever happened: the leaderboard hangs on it."""
    known = [outcome for outcome in outcomes if outcome.record]
    version = content_id([[o.task, o.record["evaluation_id"], o.record["attempt"], o.status] for o in known])
    body = {
        "published": sum(o.status == "published" for o in outcomes),
        "held": sum(o.status == "held" for o in outcomes),
        "failed": sum(o.status == "failed" for o in outcomes),
        "tasks": dg.MetadataValue.md(metadata.outcomes_table(outcomes)),
    }
    if arrival.step is not None:
        body["step"] = arrival.step
    if is_selected:
        yield dg.MaterializeResult(asset_key=SUMMARY, metadata=body, data_version=dg.DataVersion(version))
    else:  # results/<task> was asked for alone: the board must move all the same
        yield dg.AssetMaterialization(
            SUMMARY, partition=context.partition_key, metadata=body, tags={metadata.DATA_VERSION: version}
        )


def _finish(context: dg.AssetExecutionContext, outcomes: list[Outcome]) -> None:
    """Red when something is held or failed, so that the alert fires; a task at another worker is no failure."""
    bad = [outcome for outcome in outcomes if outcome.status in {"held", "failed"}]
    if any(outcome.status == "waiting" for outcome in outcomes):
        # The reconciliation sensor looks again: it mirrors the other worker's commit, or asks for another run.
        context.instance.add_run_tags(context.run_id, {WAITING_TAG: "true"})
    if bad:
        raise dg.Failure(
            f"{context.partition_key}: "
            + "; ".join(f"{o.task} {o.status}: {' '.join(o.reasons) or 'no reason given'}" for o in bad),
            allow_retries=False,
        )
