"""A torch distributed checkpoint: its converted `hf/` folder is the checkpoint, its own folder says the step."""

import uuid

import pytest
from checkpoint_factory import make_checkpoint

from eval_platform.checkpoints import Found, Watch, discover, locate
from eval_platform.config import S3, Root
from eval_platform.errors import CheckpointError
from eval_platform.store.s3 import S3Store
from eval_platform.values import Incomplete

pytest_plugins = ["store_roots"]


def nothing(done, total):
    pass


def shards(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for name in (".metadata", "__0_0.distcp", "__1_0.distcp"):
        (folder / name).write_bytes(b"x")


@pytest.fixture
def runs(tmp_path):
    """One converted, one not; and transformers' Trainer with FSDP, one converted and one not."""
    top = tmp_path / "runs"
    for name in ("a/step_1000", "a/step_2000", "b/checkpoint-5/pytorch_model_fsdp_0", "b/checkpoint-5/optimizer_0"):
        shards(top / name)
    for name in ("b/checkpoint-6/pytorch_model_fsdp_0", "b/checkpoint-6/optimizer_0"):
        shards(top / name)
        (top / "b" / "checkpoint-6" / "config.json").write_text("{}")
    make_checkpoint(top / "a" / "step_1000" / "hf")
    make_checkpoint(top / "b" / "checkpoint-5" / "hf")
    (top / "a" / "config.json").write_text("{}")  # the training's own
    return top


def summary(seen):
    seen = list(seen)
    found = {one.key: (one.run, one.step) for one in seen if isinstance(one, Found)}
    held = {one.key: one for one in seen if isinstance(one, Incomplete)}
    return found, held


def check(found, held, uri):
    assert found == {"r/a/step_1000/hf": ("a", 1000), "r/b/checkpoint-5/hf": ("b", 5)}
    assert set(held) == {"r/a/step_2000", "r/b/checkpoint-6/pytorch_model_fsdp_0"}
    assert f"{uri}/a/step_2000/hf" in held["r/a/step_2000"].reason
    assert "save it as safetensors" in held["r/a/step_2000"].reason
    assert not any(one.refused for one in held.values())  # it may be converted yet


def test_the_converted_copy_is_the_checkpoint_and_its_parent_says_the_step(runs, tmp_path):
    root = Root(name="r", path=str(runs), quiet_seconds=0)
    seen = list(discover([root], {}, Watch()))
    check(*summary(seen), runs)
    known = {one.key: one.fingerprint for one in seen if isinstance(one, Found)}
    found, held = summary(discover([root], known, Watch()))
    assert (found, set(held)) == ({}, {"r/a/step_2000", "r/b/checkpoint-6/pytorch_model_fsdp_0"})
    pattern = root.model_copy(update={"pattern": "{run}/step_{step}"})
    assert summary(discover([pattern], {}, Watch()))[0]["r/a/step_1000/hf"] == ("a", 1000)
    by_hand = locate(runs / "a" / "step_1000", [root], tmp_path / "cache", nothing)
    assert (by_hand.key, by_hand.step) == ("r/a/step_1000/hf", 1000)
    with pytest.raises(CheckpointError, match="torch distributed checkpoint without its converted copy"):
        locate(runs / "a" / "step_2000", [root], tmp_path / "cache", nothing)


def test_in_a_bucket_as_in_a_folder(runs, tmp_path, s3_session, s3_credentials):
    settings = S3(endpoint=s3_session.endpoint)
    bucket = S3Store(f"s3://results/layouts {uuid.uuid4().hex}", settings)
    for file in runs.rglob("*"):
        if file.is_file():
            bucket.put(file.relative_to(runs).as_posix(), file.read_bytes())
    root = Root(name="r", path=bucket.uri, quiet_seconds=0)
    check(*summary(discover([root], {}, Watch(), (), settings)), bucket.uri)
    by_hand = locate(f"{bucket.uri}/a/step_1000", [root], tmp_path, nothing, settings)
    assert (by_hand.key, by_hand.step) == ("r/a/step_1000/hf", 1000)
    with pytest.raises(CheckpointError, match="torch distributed checkpoint without its converted copy"):
        locate(f"{bucket.uri}/a/step_2000", [root], tmp_path, nothing, settings)
