"""What do we ask? Task files -> documents -> prompts -> requests, frozen so that a name's meaning is never in doubt."""

from eval_platform.tasks.building import build_task, load_task, validate_file
from eval_platform.tasks.chat import Chat
from eval_platform.tasks.compare import LockDifference, TaskDifference, compare_locks, compare_tasks
from eval_platform.tasks.fitting import fit_shots
from eval_platform.tasks.lint import Finding, lint
from eval_platform.tasks.lock import LockedTask, SkippedTask, TaskLock, read_lock
from eval_platform.tasks.render import prompts_id, render
from eval_platform.tasks.requirements import package_versions
from eval_platform.tasks.scaffold import new_task_file
from eval_platform.tasks.schema import TaskFile
from eval_platform.tasks.selection import bundled_tasks, library_tasks
from eval_platform.tasks.show import show_prompt
from eval_platform.tasks.size import Size, characters
from eval_platform.tasks.snapshots import write_prompts
from eval_platform.tasks.suite import Suite, find_suite, shipped_suites
from eval_platform.tasks.sync import SyncReport, check_tasks, sync_tasks
from eval_platform.tasks.task import Task

__all__ = [
    "Chat",
    "Finding",
    "LockDifference",
    "LockedTask",
    "Size",
    "SkippedTask",
    "Suite",
    "SyncReport",
    "Task",
    "TaskDifference",
    "TaskFile",
    "TaskLock",
    "build_task",
    "bundled_tasks",
    "characters",
    "check_tasks",
    "compare_locks",
    "compare_tasks",
    "find_suite",
    "fit_shots",
    "library_tasks",
    "lint",
    "load_task",
    "new_task_file",
    "package_versions",
    "prompts_id",
    "read_lock",
    "render",
    "shipped_suites",
    "show_prompt",
    "sync_tasks",
    "validate_file",
    "write_prompts",
]
