"""Is it whole, what may go, where else may it be? A results root looked over, thinned out, and carried elsewhere."""

from eval_platform.keeping.harness import TakenOver, Told, take_over
from eval_platform.keeping.prune import Candidate, Chosen, Keep, choose, prune
from eval_platform.keeping.rebuild import announce_again, rebuild
from eval_platform.keeping.transfer import Moved, Said, transfer
from eval_platform.keeping.verify import Finding, Verified, verify

__all__ = [
    "Candidate",
    "Chosen",
    "Finding",
    "Keep",
    "Moved",
    "Said",
    "TakenOver",
    "Told",
    "Verified",
    "announce_again",
    "choose",
    "prune",
    "rebuild",
    "take_over",
    "transfer",
    "verify",
]
