"""Which model is it? Find, complete?, identify, bring to local disk."""

from eval_platform.checkpoints.discovery import Found, discover, locate
from eval_platform.checkpoints.hashing import Progress
from eval_platform.checkpoints.identification import Identity, identify, tokenizer_id
from eval_platform.checkpoints.inspection import Inspection, Tensor, count_parameters, inspect, model_tensors
from eval_platform.checkpoints.served import as_checkpoint, as_found
from eval_platform.checkpoints.sketching import sketched
from eval_platform.checkpoints.staging import (
    held,
    hold,
    release,
    release_hold,
    release_other_holds,
    stage,
    verify_unchanged,
)
from eval_platform.checkpoints.watch import Watch

__all__ = [
    "Found",
    "Identity",
    "Inspection",
    "Progress",
    "Tensor",
    "Watch",
    "as_checkpoint",
    "as_found",
    "count_parameters",
    "discover",
    "held",
    "hold",
    "identify",
    "inspect",
    "locate",
    "model_tensors",
    "release",
    "release_hold",
    "release_other_holds",
    "sketched",
    "stage",
    "tokenizer_id",
    "verify_unchanged",
]
