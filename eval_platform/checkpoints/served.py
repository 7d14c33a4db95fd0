"""A served model as a checkpoint: it arrives by being configured, and nothing of it is staged."""

from eval_platform.checkpoints.discovery import Found
from eval_platform.served import ServedModel, served_id
from eval_platform.values import Checkpoint, Served


def as_found(entry: ServedModel) -> Found:
    """The model of a `[[served]]` entry, as a watched folder's checkpoint would be found. Nobody is asked."""
    served = entry.identity
    return Found(
        key=entry.key,
        # With "://" always, which is what tells it from a folder.
        uri=entry.endpoint or f"{entry.provider}://{entry.model}",
        fingerprint=served_id(served),
        run=entry.run or entry.name,
        step=entry.step,
        tokens_seen=entry.tokens_seen,
        tags={"provider": entry.provider, "model": entry.model, "as_of": served.as_of},
        served=served,
    )


def as_checkpoint(served: Served) -> Checkpoint:
    """What is known of it without asking."""
    return Checkpoint(served_id(served), None, None, "served")
