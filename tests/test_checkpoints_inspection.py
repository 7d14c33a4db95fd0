"""Which folder is a whole checkpoint, and what is said about one that is not."""

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
from checkpoint_factory import make_adapter, make_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from eval_platform.checkpoints import inspect
from eval_platform.checkpoints.bases import base_address
from eval_platform.checkpoints.files import list_folder, role
from eval_platform.checkpoints.headers import MAX_HEADER_BYTES, BadHeader, tensor_names


def header_file(path: Path, header: object, data: bytes = b"") -> Path:
    body = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(body)) + body + data)
    return path


@pytest.mark.parametrize("shards", [1, 2])
def test_a_whole_checkpoint_is_complete(tmp_path, shards):
    found = inspect(make_checkpoint(tmp_path / "c", shards=shards))
    assert (found.complete, found.reason, found.kind) == (True, "", "transformers")
    assert found.listing.size == sum(file.stat().st_size for file in (tmp_path / "c").iterdir())


def test_every_truncation_of_the_weights_waits(tmp_path):
    folder = make_checkpoint(tmp_path, values=4)
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for length in range(len(whole)):
        file.write_bytes(whole[:length])
        found = inspect(folder)
        assert not found.complete
        assert not found.refused, length
        assert found.reason.startswith("model.safetensors: ")
    file.write_bytes(whole)
    assert inspect(folder).complete


def test_a_truncated_shard_says_which_and_by_how_much(tmp_path):
    folder = make_checkpoint(tmp_path, shards=2)
    shard = folder / "model-00002-of-00002.safetensors"
    size = shard.stat().st_size
    with shard.open("r+b") as file:
        file.truncate(size - 1)
    assert inspect(folder).reason == f"model-00002-of-00002.safetensors: {size - 1} of {size} bytes"


def test_shards_allocated_ahead_are_not_whole_before_their_header_is_written(tmp_path):
    folder = make_checkpoint(tmp_path)
    file = folder / "model.safetensors"
    size = file.stat().st_size
    file.write_bytes(b"\0" * size)
    found = inspect(folder)
    assert (found.complete, found.refused) == (False, False)
    assert "header is not written yet" in found.reason


def test_a_longer_file_than_its_header_accounts_for_is_refused(tmp_path):
    folder = make_checkpoint(tmp_path)
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"x")
    found = inspect(folder)
    assert found.refused
    assert "its header accounts for" in found.reason


def tensor(start, stop):
    return {"dtype": "U8", "shape": [1], "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b"not json", "not JSON"),
        (b"[" * 200_000, "not JSON"),
        (b"\xff\xfe{}", "not JSON"),
        ([], "not a JSON object"),
        ({"a": tensor(-4, 4)}, "data_offsets"),
        ({"a": tensor(4, 0)}, "data_offsets"),
        ({"a": tensor(0, 4.0)}, "data_offsets"),
        ({"a": tensor(0, True)}, "data_offsets"),
        ({"a": {"data_offsets": [0]}}, "data_offsets"),
        ({"a": 1}, "data_offsets"),
        ({"a": tensor(0, 3), "b": tensor(2, 4)}, "overlaps"),
        ({"a": tensor(0, 1), "b": tensor(2, 4)}, "hole"),
        ({"a": tensor(2, 4)}, "hole"),
    ],
)
def test_hostile_headers_are_refused(tmp_path, header, reason):
    file = header_file(tmp_path / "x.safetensors", header, b"1234")
    with pytest.raises(BadHeader, match=reason) as caught:
        tensor_names(file)
    assert caught.value.final


def test_a_header_length_beyond_the_format_is_refused_without_reading_it(tmp_path):
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}")
    with pytest.raises(BadHeader, match="announces a header") as caught:
        tensor_names(file)
    assert caught.value.final


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shapes=st.lists(st.integers(0, 5), min_size=1, max_size=4), cut=st.integers(-12, 3))
def test_our_word_on_a_file_is_the_safetensors_librarys(tmp_path, shapes, cut):
    file = tmp_path / "x.safetensors"
    file.unlink(missing_ok=True)
    save_file({f"t{i}": np.zeros(n, np.float32) for i, n in enumerate(shapes)}, file)
    whole = file.read_bytes()
    file.write_bytes(whole + b"\0" * cut if cut >= 0 else whole[:cut])
    try:
        with safe_open(file, "numpy") as opened:
            theirs = set(opened.keys())
    except SafetensorError:
        theirs = None
    try:
        ours = set(tensor_names(file))
    except BadHeader:
        ours = None
    assert ours == theirs


def test_an_index_naming_a_missing_shard_waits_for_it(tmp_path):
    folder = make_checkpoint(tmp_path, shards=2)
    (folder / "model-00001-of-00002.safetensors").unlink()
    found = inspect(folder)
    assert found.reason == "model.safetensors.index.json names model-00001-of-00002.safetensors, which is missing"
    assert not found.refused


def test_shards_without_their_index_wait_for_it(tmp_path):
    folder = make_checkpoint(tmp_path, shards=2)
    (folder / "model.safetensors.index.json").unlink()
    found = inspect(folder)
    assert "no model.safetensors.index.json yet" in found.reason
    assert not found.refused


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        ("{", "not JSON"),
        ("[]", "must be a JSON object"),
        ("{}", "field weight_map"),
        ('{"weight_map": {"embed": 3}}', "field weight_map"),
        ('{"weight_map": {"embed": "../x.safetensors"}}', "no safetensors file of this folder"),
        ('{"weight_map": {"tail": "model-00001-of-00002.safetensors"}}', "does not hold it"),
    ],
)
def test_a_wrong_index_is_refused_by_name(tmp_path, index, reason):
    folder = make_checkpoint(tmp_path, shards=2)
    (folder / "model.safetensors.index.json").write_text(index)
    found = inspect(folder)
    assert found.refused
    assert found.reason.startswith("model.safetensors.index.json")
    assert reason in found.reason


def test_pickle_only_is_refused_with_the_remedy(tmp_path):
    folder = make_checkpoint(tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    found = inspect(folder)
    assert found.refused
    assert "pytorch_model.bin" in found.reason
    assert "safe_serialization=True" in found.reason


def test_pickle_beside_safetensors_is_neither_used_nor_in_the_way(tmp_path):
    folder = make_checkpoint(tmp_path)
    (folder / "pytorch_model.bin").write_bytes(b"x")
    found = inspect(folder)
    assert found.complete
    assert "pytorch_model.bin" not in found.listing.defining


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00" * 20])
def test_a_config_that_is_no_json_object_is_refused_by_name(tmp_path, text):
    folder = make_checkpoint(tmp_path)
    (folder / "config.json").write_text(text)
    found = inspect(folder)
    assert found.refused
    assert found.reason.startswith("config.json ")


def test_no_config_yet_waits(tmp_path):
    folder = make_checkpoint(tmp_path)
    (folder / "config.json").unlink()
    found = inspect(folder)
    assert (found.reason, found.refused) == ("no config.json yet", False)


TOKENIZERS = {
    "tokenizer.json": ["tokenizer.json"],
    "sentencepiece": ["tokenizer.model"],
    "byte pairs": ["vocab.json", "merges.txt"],
    "word pieces": ["vocab.txt"],
    "tiktoken": ["qwen.tiktoken"],
    "mistral": ["tekken.json"],
}


@pytest.mark.parametrize("files", TOKENIZERS.values(), ids=TOKENIZERS)
def test_each_kind_of_tokenizer_is_one(tmp_path, files):
    folder = make_checkpoint(tmp_path)
    (folder / "tokenizer.json").unlink()
    assert "tokenizer.save_pretrained" in inspect(folder).reason
    for name in files:
        assert inspect(folder).refused
        (folder / name).write_text("{}")
    assert inspect(folder).complete


def test_a_byte_tokenizer_needs_no_file(tmp_path):
    folder = make_checkpoint(tmp_path)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    assert inspect(folder).complete


def test_what_defines_a_model_and_what_does_not():
    defining = {
        "weights": ["model.safetensors", "adapter_model.safetensors", "model-00001-of-00002.safetensors"],
        "index": ["model.safetensors.index.json"],
        "config": ["config.json", "generation_config.json", "adapter_config.json"],
        "tokenizer": ["tokenizer.json", "merges.txt", "chat_template.jinja", "additional_chat_templates/rag.jinja"],
        "processor": ["preprocessor_config.json"],
        "code": ["modeling_own.py"],
    }
    for expected, names in defining.items():
        assert {name: role(name) for name in names} == dict.fromkeys(names, expected)
    nothing = [
        *("optimizer.pt", "optimizer.safetensors", "scheduler.pt", "trainer_state.json", "training_args.bin"),
        *("rng_state_0.pth", "checkpoint.json", "_SUCCESS", "README.md", "train.log"),
        *("pytorch_model.bin", "sub/model.safetensors", "sub/x.jinja"),
    ]
    assert {name: role(name) for name in nothing} == dict.fromkeys(nothing, None)


def test_symbolic_links_to_files_are_followed_and_those_to_folders_are_not(tmp_path):
    # The hub's cache: snapshots/<revision>/<name> -> ../../blobs/<hash>
    blobs = make_checkpoint(tmp_path / "blobs")
    snapshot = tmp_path / "snapshots" / "r"
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    templates = tmp_path / "elsewhere"
    templates.mkdir()
    (templates / "secret.jinja").write_text("x")
    (snapshot / "additional_chat_templates").symlink_to(templates)
    assert inspect(snapshot).complete
    assert list_folder(snapshot).defining == list_folder(blobs).defining
    (blobs / "model.safetensors").unlink()
    assert inspect(snapshot).reason.startswith("no weights yet")


def test_an_adapter_needs_its_base_by_content(tmp_path):
    base = make_checkpoint(tmp_path / "base")
    found = inspect(make_adapter(tmp_path / "a", base))
    assert (found.complete, found.kind, found.base) == (True, "adapter", str(base))


@pytest.mark.parametrize(
    ("named", "at", "address"),
    [
        ("../base", "/runs/a/step_1", "/runs/a/base"),
        ("./base", "s3://bucket/a/step_1", "s3://bucket/a/step_1/base"),
        ("../../base", "s3://bucket/a/step_1", "s3://bucket/base"),
        ("s3://other/base/", "/runs/a", "s3://other/base"),
        ("/models/base", "hf://me/adapter@0", "/models/base"),
        ("meta-llama/Llama-3.2-1B", "/runs/a", "hf://meta-llama/Llama-3.2-1B"),
        ("gpt2@607a30d", "/runs/a", "hf://gpt2@607a30d"),
        (("org/model", "step1000"), "/runs/a", "hf://org/model@step1000"),
        (None, "/runs/a", "absolute path"),
        ("a/b/c", "/runs/a", "absolute path"),
        ("../../../base", "s3://bucket/a/step_1", "out of the bucket"),
        ("../base", "hf://me/adapter@0", "nothing lies beside a repository"),
        (("org/model", "a b"), "/runs/a", "field revision"),
    ],
)
def test_where_an_adapters_base_is(named, at, address):
    name, revision = named if isinstance(named, tuple) else (named, None)
    config = {"base_model_name_or_path": name, "revision": revision}
    if "://" in address or address.startswith("/"):
        assert base_address(config, at) == address
        return
    with pytest.raises(ValueError, match=address):
        base_address(config, at)


def test_an_adapter_whose_base_cannot_be_used_is_refused(tmp_path):
    assert "is not there" in inspect(make_adapter(tmp_path / "a", tmp_path / "none")).reason
    base = make_checkpoint(tmp_path / "base")
    (base / "tokenizer.json").unlink()
    assert "no tokenizer" in inspect(make_adapter(tmp_path / "b", base)).reason
    stacked = inspect(make_adapter(tmp_path / "c", tmp_path / "a"))
    assert "no full model" in stacked.reason
    assert stacked.refused


def test_pickled_adapter_is_refused(tmp_path):
    folder = make_adapter(tmp_path / "a", make_checkpoint(tmp_path / "base"))
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert "pickle weights only" in inspect(folder).reason


def test_the_fingerprint_changes_with_what_defines_the_model_only(tmp_path):
    folder = make_checkpoint(tmp_path / "c")
    before = list_folder(folder)
    (folder / "optimizer.pt").write_bytes(b"x")
    (folder / "trainer_state.json").write_text("{}")
    (folder / "train.log").write_text("x")
    after = list_folder(folder)
    assert after.fingerprint == before.fingerprint
    assert after.activity != before.activity
    (folder / "chat_template.jinja").write_text("x")
    assert list_folder(folder).fingerprint != before.fingerprint


def test_a_log_that_grows_is_no_activity(tmp_path):
    folder = make_checkpoint(tmp_path / "c")
    before = list_folder(folder).activity
    (folder / "train.log").write_text("x")
    (folder / "events.out.tfevents.1").write_bytes(b"x")
    assert list_folder(folder).activity == before


def test_an_empty_or_foreign_folder_is_not_complete(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    assert not inspect(tmp_path).complete
    shutil.rmtree(tmp_path)
    with pytest.raises(FileNotFoundError):
        inspect(tmp_path)
