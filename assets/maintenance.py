"""What keeps a results root quick to read: in a bucket, the small records of a day are copied into one object."""

from typing import Any

import dagster as dg

from eval_platform.store.bundles import bundle
from resources.store import StoreResource

BUNDLES = dg.AssetKey("record_bundles")


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
