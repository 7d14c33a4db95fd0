"""What keeps things quick and small: in a bucket the small records of a day are copied into one object, and event logs
of old runs, of which the UI shows nothing any more, are removed."""

from typing import Any

import dagster as dg
from pydantic import Field

from assets.old_runs import old_runs, remove_log
from eval_platform.store.bundles import bundle
from resources.store import StoreResource

BUNDLES = dg.AssetKey("record_bundles")
RUN_LOGS = dg.AssetKey("run_logs")
LISTED = 50


@dg.asset(
    key=BUNDLES,
    group_name="maintenance",
    kinds={"parquet"},
    owners=["team:evaluation"],
    description="Copies of the results root's small records, many in one object, from which a machine that has seen "
    "nothing builds its catalog in few requests. The records themselves stay. A root in a folder has none.",
)
def record_bundles(store: StoreResource) -> dg.MaterializeResult[Any]:
    """Bundle what is in no bundle yet. Safe at any time: readers go by the records that are listed."""
    opened = store.open()
    is_folder = opened.requests_at_once == 1
    return dg.MaterializeResult(
        metadata={"root": opened.uri, "records bundled": 0 if is_folder else bundle(opened)},
    )


compact_records = dg.ScheduleDefinition(
    name="compact_records",
    target=dg.AssetSelection.assets(BUNDLES),
    cron_schedule="20 3 * * *",
    default_status=dg.DefaultScheduleStatus.RUNNING,
    description="Bundles the small records of a results root in a bucket every night.",
)


class RunLogsConfig(dg.Config):
    """Without `remove` it is a look: what would go is listed, and nothing is changed."""

    keep_days: int = Field(default=90, ge=1, description="runs that ended later than this many days ago are left alone")
    remove: bool = Field(default=False, description="remove the logs; otherwise they are only listed")


@dg.asset(
    key=RUN_LOGS,
    group_name="maintenance",
    owners=["team:evaluation"],
    description="What Dagster remembers of each run. The event logs of old runs go, but for the newest run of each "
    "partition and those that hold what the UI shows of an asset. The runs themselves stay, and so does every result.",
)
def run_logs(context: dg.AssetExecutionContext, config: RunLogsConfig) -> dg.MaterializeResult[Any]:
    """Look, list, and remove only where that was asked for. Safe at any time, also twice at once."""
    found = old_runs(context.instance, config.keep_days)
    freed = sum(remove_log(context.instance, run_id) for run_id in found.may_go) if config.remove else 0
    more = len(found.may_go) - LISTED
    return dg.MaterializeResult(
        metadata={
            "removed" if config.remove else "would be removed": len(found.may_go),
            "runs": dg.MetadataValue.md(
                "\n".join(f"- {run_id}" for run_id in found.may_go[:LISTED])
                + (f"\n- and {more} more" if more > 0 else "")
                or "none"
            ),
            "kept: newest of their partition": found.newest_of_partition,
            "kept: shown in the UI": found.shown,
            "removed before": found.gone_before,
            "MB freed": round(freed / 1e6, 1),
        },
    )


forget_old_runs = dg.ScheduleDefinition(
    name="forget_old_runs",
    target=dg.AssetSelection.assets(RUN_LOGS),
    cron_schedule="50 3 * * *",
    run_config=dg.RunConfig(ops={RUN_LOGS.to_python_identifier(): RunLogsConfig(remove=True)}),
    default_status=dg.DefaultScheduleStatus.RUNNING,
    description="Removes the event logs of runs that ended 90 days ago and of which the UI shows nothing any more.",
)
