"""How does a training loop say that a checkpoint is whole, and bring it to a bucket?

    announce(folder, run="llama-7b", step=1000)              # checkpoint.json, then _SUCCESS
    upload(folder, "s3://training/runs/llama-7b/step_1000")  # the files of the model, _SUCCESS last

For transformers' Trainer `eval_platform.trainer.EvalPlatformCallback` calls both. Nothing here imports torch.
"""

import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

from eval_platform.checkpoints.description import DESCRIBING
from eval_platform.checkpoints.files import SUCCESS, list_folder, role
from eval_platform.config import S3
from eval_platform.errors import CheckpointError
from eval_platform.store import open_store

_UPLOADS_AT_ONCE = 4


def announce(
    folder: Path,
    *,
    run: str,
    step: int | None = None,
    tokens_seen: int | None = None,
    tags: Mapping[str, str] | None = None,
) -> None:
    """Write `checkpoint.json` beside the weights, then `_SUCCESS`: nothing of this save may be written after it.

    Raises OSError when the folder cannot be written, FileNotFoundError when it is not there.
    """
    record = {
        "run": run,
        "step": step,
        "tokens_seen": tokens_seen,
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "tags": dict(tags or {}),
    }
    # Renamed into place, so that no watcher reads half of it.
    aside = folder / ".checkpoint.json"
    aside.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    os.replace(aside, folder / "checkpoint.json")
    # Made anew: a mark that is older than another file of the save proves nothing (`Listing.sealed`).
    (folder / SUCCESS).unlink(missing_ok=True)
    (folder / SUCCESS).touch()


def upload(folder: Path, target: str, s3: S3 | None = None) -> None:
    """Copy the checkpoint in `folder` to s3://bucket/path, `_SUCCESS` last (written there also if `folder` has none).

    What goes there is what the platform looks at: the files that define the model, and what says run and step; not
    the optimizer. A save that was uploaded there before is replaced, its `_SUCCESS` going first. Where S3 is found is
    said by the usual AWS settings and by `s3`.

    Raises CheckpointError when `folder` holds no model, or `target` holds files of a model that this one has not (two
    checkpoints in one place would be taken for one); StoreError when the bucket cannot be read or written.
    """
    names = [name for name in list_folder(folder).files if role(name) or name in DESCRIBING]
    if not any(role(name) == "weights" for name in names):
        raise CheckpointError(f"{folder} holds no safetensors weights", remedy="give the folder of a checkpoint")
    store = open_store(target, s3)
    there = {entry.key for entry in store.list("", delimiter="/")}
    if foreign := sorted(name for name in there if role(name) and name not in names):
        raise CheckpointError(
            f"{target} holds {', '.join(foreign[:3])}, which {folder} has not",
            remedy="upload to a place of its own, or delete what is there",
        )
    if SUCCESS in there:
        store.delete(SUCCESS)
    for name in there.intersection(DESCRIBING).difference(names):
        store.delete(name)  # the run and step of what lay there before
    with ThreadPoolExecutor(_UPLOADS_AT_ONCE) as pool:
        for _ in pool.map(lambda name: store.put(name, folder / name), names):
            pass
    store.put(SUCCESS, b"")
