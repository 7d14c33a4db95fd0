"""What can be read of an arrival's model before it is staged: its configuration and its files' headers, no weights."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from eval_platform.checkpoints.inspection import inspect
from eval_platform.checkpoints.staging import held_folder
from eval_platform.config import S3
from eval_platform.errors import EvalPlatformError
from eval_platform.values import Arrival

log = logging.getLogger(__name__)


@contextmanager
def sketched(arrival: Arrival, cache: Path, s3: S3) -> Iterator[Path | None]:
    """A folder that shows the arrival's model to whoever reads no tensor; of an adapter its base model.

    None where it cannot be looked at now: whoever stages it says why. Of a bucket, or the hub, it costs a listing and
    a request or two for each file of weights.
    """
    held = held_folder(arrival, cache)
    with ExitStack() as until_looked:
        try:
            folder = _folder(str(held) if held.is_dir() else arrival.uri, s3, until_looked)
            if (folder / "adapter_config.json").exists():
                base = inspect(folder, at=arrival.uri).base
                folder = None if base is None else _folder(base, s3, until_looked)
        except (EvalPlatformError, OSError, KeyError) as error:  # KeyError: an object is no longer what was listed
            log.info("%s cannot be looked at now: %s", arrival.uri, error)
            folder = None
        yield folder


def _folder(address: str, s3: S3, until_looked: ExitStack) -> Path:
    if "://" not in address:
        return Path(address)
    from eval_platform.checkpoints.buckets import bucket_listing, sketch  # botocore, only for what lies elsewhere
    from eval_platform.checkpoints.remote import source_at

    source = source_at(address, s3)
    return until_looked.enter_context(sketch(source, bucket_listing(source, "")))
