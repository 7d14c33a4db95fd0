"""May we publish it? Checks and decisions."""

from eval_platform.quality.actions import recheck, release, rerun, retract, retry
from eval_platform.quality.data import check_items
from eval_platform.quality.gate import GATE_VERSION, WARNINGS, decide, hold_contradicted, judge, run_checks
from eval_platform.quality.history import History, read_history
from eval_platform.quality.suites import warm

__all__ = [
    "GATE_VERSION",
    "WARNINGS",
    "History",
    "check_items",
    "decide",
    "hold_contradicted",
    "judge",
    "read_history",
    "recheck",
    "release",
    "rerun",
    "retract",
    "retry",
    "run_checks",
    "warm",
]
