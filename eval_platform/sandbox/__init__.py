"""Does this program do what it should, without doing anything else? A model's Python, run where it can do no harm."""

from eval_platform.sandbox.batch import describe, run_programs
from eval_platform.sandbox.verdict import MODES, Limits, Mode, Program, Reason, Verdict

__all__ = ["MODES", "Limits", "Mode", "Program", "Reason", "Verdict", "describe", "run_programs"]
