"""What loads, what is refused, and in which words."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import ARCHITECTURES, make_checkpoint

from eval_platform.engine import EngineInfo, load
from eval_platform.errors import CheckpointError, ConfigError, classify
from eval_platform.values import RunSettings, make_request

CPU = RunSettings(device="cpu")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_info_says_what_ran(architecture: Any, tmp_path: Path) -> None:
    engine = load(make_checkpoint(tmp_path, architecture=architecture, max_length=96), CPU)
    info = engine.info
    stored = load_file(tmp_path / "model.safetensors")
    assert isinstance(info, EngineInfo)
    assert info.architecture == json.loads((tmp_path / "config.json").read_text())["architectures"][0]
    assert (info.device, info.dtype, info.max_length, info.engine_path) == ("cpu", "float32", 96, "tree")
    assert info.n_parameters == sum(weight.numel() for weight in stored.values())
    assert info.vocab_size == 512
    assert {"torch", "transformers", "tokenizers", "python"} <= set(info.versions)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_is_as_asked_and_logits_math_is_float32(dtype: str, tmp_path: Path) -> None:
    """A half-precision log-softmax over 512 tokens has steps of 2^-5 near -6; sums made in float32 do not."""
    path = make_checkpoint(tmp_path)
    request = make_request("choice", "the river is", " mountain")
    (exact,) = load(path, CPU).answer([request])
    engine = load(path, RunSettings(device="cpu", dtype=dtype))
    (rounded,) = engine.answer([request])
    assert engine.info.dtype == dtype
    assert rounded.log_likelihood == pytest.approx(exact.log_likelihood, abs=0.3)
    assert rounded.log_likelihood is not None
    assert float(torch.tensor(rounded.log_likelihood).to(getattr(torch, dtype))) != rounded.log_likelihood


def edit_config(**fields: Any) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        file = path / "config.json"
        config = json.loads(file.read_text()) | fields
        file.write_text(json.dumps(config))

    return edit


def edit_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        file = path / "model.safetensors"
        weights = load_file(file)
        change(weights)
        save_file(weights, file, metadata={"format": "pt"})

    return edit


def remove(*patterns: str) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        for pattern in patterns:
            for file in path.glob(pattern):
                file.unlink()

    return edit


def cut_weights(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def pickle_only(path: Path) -> None:
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()


DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("architecture", "spoil", "words"),
    [
        ("llama", edit_weights(lambda w: w.pop(DOWN)), f"1 weights missing: {DOWN}"),
        ("llama", edit_weights(lambda w: w.pop("lm_head.weight")), "1 weights missing: lm_head.weight"),
        ("llama", edit_weights(lambda w: w.update(extra=torch.zeros(2))), "no place for: extra"),
        ("llama", edit_weights(lambda w: w.update({DOWN: torch.zeros(3, 3)})), f"1 weights of another shape: .*{DOWN}"),
        ("llama", edit_config(num_hidden_layers=3), "9 weights missing: .* and 6 more"),
        ("llama", edit_config(num_hidden_layers=1), "9 weights the model has no place for"),
        ("llama", edit_config(model_type="hyena9"), "field model_type: 'hyena9'"),
        ("llama", edit_config(model_type="clip"), "field model_type: 'clip'"),
        (
            "llama",
            edit_config(model_type="hyena9", auto_map={"AutoConfig": "m.C", "AutoModelForCausalLM": "m.M"}),
            r"'hyena9' needs the checkpoint's own Python code\n  remedy: .*trust_remote_code",
        ),
        ("llama", edit_config(hidden_size="wide"), r"config\.json: .*field 'hidden_size'.*wide"),
        ("llama", remove("*.safetensors"), "no model could be loaded"),
        ("llama", pickle_only, "no model could be loaded"),
        ("llama", cut_weights, "no model could be loaded"),
        ("llama", remove("tokenizer*"), "no tokenizer could be loaded"),
        ("gpt2", remove("tokenizer*"), "the tokenizer .* gives no tokens"),
        ("llama", lambda path: (path / "tokenizer.json").write_text("{"), "no tokenizer could be loaded"),
        ("llama", remove("*"), r"config\.json does not exist"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused(
    architecture: Any, spoil: Callable[[Path], None], words: str, tmp_path: Path
) -> None:
    path = make_checkpoint(tmp_path, architecture=architecture)
    spoil(path)
    with pytest.raises(CheckpointError, match=words) as caught:
        load(path, CPU)
    assert str(path) in str(caught.value)
    assert "remedy" in str(caught.value)
    assert classify(caught.value) == "deterministic"


@pytest.mark.parametrize("architecture", ["gpt2", "qwen3"])
def test_a_tied_head_is_not_missing(architecture: Any, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, architecture=architecture)
    assert "lm_head.weight" not in load_file(path / "model.safetensors")
    load(path, CPU)


@pytest.mark.parametrize("device", ["tpu", "meta", "cuda:99", "no such thing"])
def test_a_device_that_is_not_there(device: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="device"):
        load(make_checkpoint(tmp_path), RunSettings(device=device))


def test_only_local_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the hub allowed, still nothing connects: a socket would raise."""
    import socket

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the engine tried to connect")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    engine = load(make_checkpoint(tmp_path), CPU)
    assert len(list(engine.answer([make_request("choice", "the", " river")]))) == 1
