"""Gathers what Dagster loads: assets, checks, sensors, resources. Nothing else, and no torch."""

import dagster as dg

from assets.boards import told_boards
from assets.checks import look_at_tasks, tasks_valid
from assets.maintenance import compact_records, forget_old_runs, record_bundles, run_logs
from assets.results import EVALUATE_JOB, dataset_specs, evaluate_asset
from eval_platform.config import Config, load_config
from eval_platform.identity import content_id
from eval_platform.tasks import read_lock
from resources.evaluator import EvaluatorResource
from resources.store import StoreResource
from resources.warehouse import WarehouseResource
from sensors.alerts import alert_sensor
from sensors.arrivals import new_checkpoints_sensor
from sensors.reconciliation import reconciliation_sensor


def gather(config: Config) -> dg.Definitions:
    """The definitions for a configuration. Raises SchemaError when its lock cannot be read."""
    lock = read_lock(config.lock_path)
    said = config.engine.model_dump()
    if config.asks_chat:  # left out while it is off everywhere, so that versions from before it stay what they were
        said |= {"chat": config.chat.model_dump(), "roots": {root.name: root.chat for root in config.checkpoints}}
    settings = content_id(said)[:8]
    results = evaluate_asset(lock, lambda name: f"{lock.tasks[name].task_id[:16]}-{settings}")
    job = dg.define_asset_job(
        EVALUATE_JOB,
        selection=dg.AssetSelection.assets(results),
        tags={"eval/kind": "evaluate"},
        description="Evaluates one checkpoint on every task of the lock.",
    )
    boards = told_boards(lock)
    store = StoreResource(config_file=str(config.file or ""))
    return dg.Definitions(
        assets=dg.with_source_code_references([*dataset_specs(lock), results, boards, record_bundles, run_logs]),
        asset_checks=[tasks_valid],
        jobs=[job],
        schedules=[look_at_tasks, compact_records, forget_old_runs],
        sensors=[
            new_checkpoints_sensor(lock, config.sensor.interval_seconds),
            reconciliation_sensor(lock),
            alert_sensor(),
            dg.AutomationConditionSensorDefinition(
                "boards_follow",
                target=dg.AssetSelection.assets(boards),
                default_status=dg.DefaultSensorStatus.RUNNING,
                # SQL is up to date at once; a picture of it costs ten seconds of CPU and can wait half a minute.
                minimum_interval_seconds=30,
            ),
        ],
        resources={
            "store": store,
            "evaluator": EvaluatorResource(store=store),
            "warehouse": WarehouseResource(store=store),
        },
        # A run has one step: a process of its own for it would only cost two seconds.
        executor=dg.in_process_executor,
    )


defs = gather(load_config())
