"""A training loop says that a checkpoint is whole and brings it to a bucket: transformers' own Trainer does it here."""

import json
import logging
import time

import pytest
import torch
from tiny_models import make_checkpoint, make_model, make_tokenizer
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
from wire import Answer, Wire

from eval_platform.checkpoints import Watch, discover
from eval_platform.checkpoints.announce import announce, upload
from eval_platform.config import S3, Root
from eval_platform.errors import CheckpointError, StoreError
from eval_platform.store import open_store
from eval_platform.trainer import EvalPlatformCallback

pytest_plugins = ["store_roots"]


@pytest.fixture
def settings(s3_session, s3_credentials):
    return S3(endpoint=s3_session.endpoint)


def found(path, settings=None):
    """What a watcher that asks for `_SUCCESS` finds there, by step."""
    root = Root(name="runs", path=str(path), require_success=True)
    return sorted(discover([root], {}, Watch(), s3=settings), key=lambda one: one.step)


@pytest.mark.slow
def test_the_trainer_announces_each_save_and_uploads_it_before_it_deletes_it(
    tmp_path, settings, s3_session, caplog, monkeypatch
):
    bucket = f"trained-{time.time_ns()}"
    target = f"s3://{bucket}/runs/tiny"
    tokenizer = make_tokenizer()
    tokens = torch.arange(8) + 5
    told = []

    class Callback(EvalPlatformCallback):
        def on_save(self, *arguments, **more):
            super().on_save(*arguments, **more)
            told.append(list(self.owed))
            if len(told) == 1:  # the first upload met no bucket; from now on there is one
                s3_session.make_bucket(bucket)

    arguments = TrainingArguments(
        output_dir=str(tmp_path / "seed_3"),
        max_steps=3,
        save_steps=1,
        save_total_limit=2,
        per_device_train_batch_size=2,
        include_num_input_tokens_seen=True,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(
        make_model("llama", tokenizer),
        arguments,
        train_dataset=[{"input_ids": tokens, "labels": tokens}] * 8,
        processing_class=tokenizer,
        callbacks=[Callback(target, tags={"who": "a test"}, s3=settings)],
    )
    with caplog.at_level(logging.ERROR, logger="eval_platform.trainer"):
        trainer.train()

    first = tmp_path / "seed_3" / "checkpoint-1"
    assert told == [[first], [], []]
    assert "NoSuchBucket" in caplog.text
    assert not first.exists()  # the Trainer kept two; the bucket has all three
    uploaded = found("s3://" + target.removeprefix("s3://").rpartition("/")[0], settings)
    assert [(one.key, one.run, one.step, one.tokens_seen) for one in uploaded] == [
        (f"runs/tiny/checkpoint-{step}", "seed_3", step, 16 * step) for step in (1, 2, 3)
    ]
    assert uploaded[0].tags == {"who": "a test"}
    assert [one.step for one in found(tmp_path)] == [2, 3]
    names = {entry.key for entry in open_store(f"{target}/checkpoint-3", settings).list("")}
    assert "optimizer.pt" not in names
    assert {"model.safetensors", "tokenizer.json", "trainer_state.json", "checkpoint.json", "_SUCCESS"} <= names


def test_a_bucket_that_is_away_is_waited_for_once_a_save_however_much_is_owed(tmp_path, s3_session, s3_credentials):
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    with Wire(s3_session.port) as wire:
        callback = EvalPlatformCallback(f"s3://absent-{time.time_ns()}/runs", s3=S3(endpoint=wire.endpoint))
        owed = [make_checkpoint(tmp_path / name) for name in ("checkpoint-1", "checkpoint-2")]
        callback.owed = list(owed)
        callback.on_train_end(arguments, TrainerState(), TrainerControl())
        assert len(wire.requests) == 1
    assert callback.owed == owed


def test_a_replaced_upload_has_no_mark_while_it_is_under_way_and_never_mixes_two_models(tmp_path, settings, s3_session):
    place = f"s3://results/uploads/{time.time_ns()}/step_1"
    one = make_checkpoint(tmp_path / "one", seed=1)
    announce(one, run="a", step=1)
    upload(one, place, settings)
    [before] = found(place.rpartition("/")[0], settings)

    other = make_checkpoint(tmp_path / "other", seed=2)
    announce(other, run="a", step=1)
    (other / "model.safetensors").rename(other / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"holds model\.safetensors, which .*other has not"):
        upload(other, place, settings)
    assert found(place.rpartition("/")[0], settings) == [before]

    (other / "model-00001-of-00002.safetensors").rename(other / "model.safetensors")
    with Wire(s3_session.port) as wire:
        wire.breaks(Answer(403, "AccessDenied"), on=r"^PUT .*/tokenizer\.json")
        with pytest.raises(StoreError, match=r"tokenizer\.json"):
            upload(other, place, S3(endpoint=wire.endpoint))
    [waits] = discover([Root(name="runs", path=place, require_success=True)], {}, Watch(), s3=settings)
    assert "no _SUCCESS yet" in waits.reason
    upload(other, place, settings)
    [after] = found(place.rpartition("/")[0], settings)
    assert after.fingerprint != before.fingerprint
    assert json.loads(open_store(place, settings).read("checkpoint.json"))["step"] == 1
    (other / "checkpoint.json").unlink()  # it says no more than its weights: what lay there must not speak for it
    upload(other, place, settings)
    assert "checkpoint.json" not in {entry.key for entry in open_store(place, settings).list("")}
