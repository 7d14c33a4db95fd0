"""Are the task files right? A broken one never keeps the code location from loading, so somebody must look."""

import dagster as dg

from assets.boards import LEADERBOARD
from eval_platform.errors import EvalPlatformError
from eval_platform.tasks import SkippedTask, check_tasks, read_lock
from resources.store import StoreResource


@dg.asset_check(
    asset=LEADERBOARD,
    name="tasks_valid",
    description="Whether every configured task file can be read and rendered; what it asks is frozen in the lock.",
)
def tasks_valid(store: StoreResource) -> dg.AssetCheckResult:
    """One line a broken file: which field, and the remedy. The tasks go on standing for what the lock says.

    A task that is skipped for want of data is no fault; it is listed beside them.
    """
    config = store.config()
    skipped: dict[str, SkippedTask] = {}
    try:
        errors: list[EvalPlatformError] = list(check_tasks(config.tasks, config.suites))
        skipped = dict(read_lock(config.lock_path).skipped)
    except EvalPlatformError as error:  # a folder that is not there
        errors = [error]
    return dg.AssetCheckResult(
        passed=not errors,
        metadata={
            "errors": dg.MetadataValue.md("\n".join(f"- {error}" for error in errors) or "none"),
            "skipped: no data": dg.MetadataValue.md(
                "\n".join(f"- {name}: {task.reason}" for name, task in skipped.items()) or "none"
            ),
        },
    )


look_at_tasks = dg.ScheduleDefinition(
    name="look_at_tasks",
    target=dg.AssetSelection.checks(tasks_valid),
    cron_schedule="0 * * * *",
    default_status=dg.DefaultScheduleStatus.RUNNING,
    description="Looks at the task files every hour.",
)
