"""Were the instructions followed? IFEval's verifiable instructions (Zhou et al. 2023, arXiv:2311.07911)."""

from eval_platform.scoring.ifeval.scores import SCORES, ifeval
from eval_platform.scoring.ifeval.verdict import Verdict, verdict

__all__ = ["SCORES", "Verdict", "ifeval", "verdict"]
