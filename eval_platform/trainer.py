"""One line for transformers' Trainer: every checkpoint it saves says what it is and that it is whole.

    Trainer(..., callbacks=[EvalPlatformCallback()])                            # the output folder is watched
    Trainer(..., callbacks=[EvalPlatformCallback("s3://training/runs/llama")])  # checkpoints go to a bucket

Other training loops call the plain functions of `eval_platform.checkpoints.announce`.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from eval_platform.checkpoints.announce import announce, upload
from eval_platform.config import S3
from eval_platform.errors import EvalPlatformError, StoreError

log = logging.getLogger(__name__)


class EvalPlatformCallback(TrainerCallback):
    """Writes `checkpoint.json` (run, step, tokens) and `_SUCCESS` into every checkpoint; uploads it where told.

    upload_to: s3://bucket/path, under which every checkpoint gets a folder of its own name. The upload ends before
    training goes on, so that `save_total_limit` deletes nothing that is still being read. run: default, the Trainer's
    `run_name`, else the name of its output folder.

    A training run is worth more than one evaluation of it: what cannot be uploaded is told in the log and tried again
    at the next save and at the end, as long as the Trainer keeps it. `owed` are the folders not uploaded yet.
    """

    def __init__(
        self,
        upload_to: str | None = None,
        *,
        run: str | None = None,
        tags: Mapping[str, str] | None = None,
        s3: S3 | None = None,
    ) -> None:
        self.upload_to = upload_to.rstrip("/") if upload_to else None
        self.run = run
        self.tags = dict(tags or {})
        self.s3 = s3
        self.owed: list[Path] = []

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        folder = _saved(args, state)
        announce(
            folder,
            run=self.run or _run_name(args),
            step=state.global_step,
            # The Trainer says 0 when it was not asked to count (`include_num_input_tokens_seen`).
            tokens_seen=state.num_input_tokens_seen or None,
            tags=self.tags,
        )
        if self.upload_to is not None:
            self.owed.append(folder)
            self._upload_owed()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._upload_owed()

    def _upload_owed(self) -> None:
        """Newest first, and no further than the bucket answers: each folder would wait for it as long, and training
        with it."""
        still: list[Path] = []
        answers = True
        for folder in reversed(self.owed):
            if not folder.is_dir():
                log.error("%s was deleted before it could be uploaded to %s", folder, self.upload_to)
                continue
            try:
                if answers:
                    upload(folder, f"{self.upload_to}/{folder.name}", self.s3)
                    continue
            except EvalPlatformError as error:
                log.error("%s is not uploaded, and so not evaluated yet: %s", folder, error)
                answers = not isinstance(error, StoreError)
            still.append(folder)
        self.owed = still[::-1]


def _saved(args: TrainingArguments, state: TrainerState) -> Path:
    """The folder that the Trainer has just written."""
    name = f"checkpoint-{state.global_step}"
    output = Path(str(args.output_dir))
    if not state.is_hyper_param_search:
        return output / name
    # Each trial has a folder of its own below the output folder; its name depends on who searches.
    return max(output.glob(f"run-*/{name}"), key=lambda folder: folder.stat().st_mtime_ns)


def _run_name(args: TrainingArguments) -> str:
    output = str(args.output_dir)
    return args.run_name if args.run_name and args.run_name != output else Path(output).resolve().name
