"""What people look at: the leaderboard and the learning curves, made from what is published."""

from typing import Any

import dagster as dg

from assets.results import SUMMARY
from eval_platform import report
from eval_platform.identity import content_id
from eval_platform.tasks import TaskLock
from resources.store import StoreResource
from resources.warehouse import WarehouseResource

LEADERBOARD = dg.AssetKey("leaderboard")
LEARNING_CURVES = dg.AssetKey("learning_curves")


def told_boards(lock: TaskLock) -> dg.AssetsDefinition:
    """The boards, their leaderboard saying which tasks have no asset because their data cannot be had."""
    if not lock.skipped:
        return boards
    lines = "\n".join(f"- {name}: no data: {task.reason}" for name, task in lock.skipped.items())
    told = f"Skipped, and so without an asset; `eval-platform tasks list` says how to get what is missing:\n{lines}"
    return boards.map_asset_specs(
        lambda spec: (
            spec.replace_attributes(description=f"{spec.description}\n\n{told}") if spec.key == LEADERBOARD else spec
        )
    )


@dg.multi_asset(
    name="boards",
    pool="publish",
    specs=[
        dg.AssetSpec(
            key,
            deps=[dg.AssetDep(SUMMARY, partition_mapping=dg.AllPartitionMapping())],
            description=description,
            group_name="boards",
            kinds={"duckdb"},
            owners=["team:evaluation"],
            # Not eager(): that waits for all partitions. Nothing here is requested by automation upstream, so no
            # update can be lost or doubled (measured: docs/log.md).
            automation_condition=dg.AutomationCondition.any_deps_updated(),
        )
        for key, description in (
            (LEADERBOARD, "Every published checkpoint's primary score on every task, with its 95 % interval."),
            (LEARNING_CURVES, "Every published score over the steps of its run."),
        )
    ],
)
def boards(context: dg.AssetExecutionContext, store: StoreResource, warehouse: WarehouseResource) -> Any:
    """Both boards, from one look at the catalog."""
    warehouse.refresh()
    board = warehouse.query("select * from leaderboard order by run, step, key, task")
    curves = warehouse.query("select * from learning_curves where subset = '' order by run, task, metric, step")
    yield dg.MaterializeResult(
        asset_key=LEADERBOARD,
        metadata={
            "dagster/row_count": board.num_rows,
            "checkpoints": len(set(board["key"].to_pylist())),
            "leaderboard": dg.MetadataValue.md(report.leaderboard_markdown(board)),
            "ask": dg.MetadataValue.md('`eval-platform sql "select * from leaderboard"`'),
        },
        data_version=dg.DataVersion(content_id([board["evaluation_id"].to_pylist(), board["value"].to_pylist()])),
    )
    folder = store.config().state_dir / "plots"
    picture = report.learning_curves_png(board, folder / "learning_curves.png", store.config().reference_keys)
    yield dg.MaterializeResult(
        asset_key=LEARNING_CURVES,
        metadata={
            "dagster/row_count": curves.num_rows,
            "curves": dg.MetadataValue.md(report.embedded_picture(picture, "learning curves")),
            "picture": dg.MetadataValue.path(str(picture)),
        },
        data_version=dg.DataVersion(content_id([curves["evaluation_id"].to_pylist(), curves["metric"].to_pylist()])),
    )
