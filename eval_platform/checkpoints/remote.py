"""What lies at an address that is no folder: in a bucket, or on the Hugging Face hub?"""

from dataclasses import replace

from eval_platform.checkpoints.buckets import Source, bucket_listing, inspect_bucket
from eval_platform.checkpoints.hub import folder_at, judge, recent_revisions
from eval_platform.checkpoints.inspection import Inspection
from eval_platform.config import S3, hub_address
from eval_platform.errors import EvalPlatformError
from eval_platform.store.s3 import S3Store


def source_at(uri: str, s3: S3) -> Source:
    """The objects below s3://bucket/path, or the files of hf://org/model@revision as it is now.

    Raises as `hub.commit_of`.
    """
    return folder_at(uri) if uri.startswith("hf://") else S3Store(uri, s3)


def look_at_base(found: Inspection, s3: S3) -> Inspection:
    """`found`, not complete where its base lies elsewhere than in a folder and cannot be used."""
    if found.base is None or "://" not in found.base:
        return found
    try:
        reason = _unfit(found.base, s3)
    except EvalPlatformError as error:
        refused = error.class_ == "deterministic"
        return replace(found, reason=f"adapter_config.json: the base model: {error}", refused=refused, base=None)
    if not reason:
        return found
    return replace(found, reason=f"adapter_config.json: {reason}", refused=True, base=None)


def _unfit(base: str, s3: S3) -> str:
    if (address := hub_address(base)) is not None:  # remembered: each adapter that waits asks in every look
        repository, revision = address
        [one] = recent_revisions(repository, revision or "main", ())
        return unfit(base, judge(repository, one.commit)[1])
    source = source_at(base, s3)
    listing = bucket_listing(source, "")
    if not listing.defining:
        return f"there is no base model at {base}; bring it there, or name another place"
    below = inspect_bucket(source, listing, base)
    return unfit(base, below)


def unfit(base: str, below: Inspection) -> str:
    """Why what was found at `base` can be no adapter's base; "" when it can."""
    if below.kind == "adapter":
        return f"the base {base} is no full model (no config.json)"
    return f"the base model {base} cannot be used: {below.reason}" if below.reason else ""
