"""Are the task files right? A broken one never keeps the code location from loading, so somebody must look."""

import dagster as dg

from assets.boards import LEADERBOARD
from eval_platform.errors import EvalPlatformError
from eval_platform.tasks import check_tasks
from resources.store import StoreResource


@dg.asset_check(
    asset=LEADERBOARD,
    name="tasks_valid",
    description="Whether every configured task file can be read and rendered; what it asks is frozen in the lock.",
)
def tasks_valid(store: StoreResource) -> dg.AssetCheckResult:
    """One line a broken file: which field, and the remedy. The tasks go on standing for what the lock says."""
    try:
        errors: list[EvalPlatformError] = list(check_tasks(store.config().tasks))
    except EvalPlatformError as error:  # a folder that is not there
        errors = [error]
    return dg.AssetCheckResult(
        passed=not errors,
        metadata={"errors": dg.MetadataValue.md("\n".join(f"- {error}" for error in errors) or "none")},
    )


look_at_tasks = dg.ScheduleDefinition(
    name="look_at_tasks",
    target=dg.AssetSelection.checks(tasks_valid),
    cron_schedule="0 * * * *",
    default_status=dg.DefaultScheduleStatus.RUNNING,
    description="Looks at the task files every hour.",
)
