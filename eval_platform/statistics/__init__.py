"""How sure are we? Standard errors and intervals."""

from eval_platform.statistics.bootstrap import bootstrap_estimate
from eval_platform.statistics.estimate import CONFIDENCE, Estimate
from eval_platform.statistics.macro import macro_estimate
from eval_platform.statistics.mean import mean_estimate
from eval_platform.statistics.ratio import ratio_estimate

__all__ = ["CONFIDENCE", "Estimate", "bootstrap_estimate", "macro_estimate", "mean_estimate", "ratio_estimate"]
