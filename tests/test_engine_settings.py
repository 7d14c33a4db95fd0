"""Which dtype and window a checkpoint runs with, from its JSON files."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eval_platform.engine import resolve_settings
from eval_platform.errors import CheckpointError, ConfigError
from eval_platform.values import RunSettings


def checkpoint(folder: Path, config: dict[str, Any], tokenizer: dict[str, Any] | None = None) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    if tokenizer is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return folder


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "float16"}, "float16"),
        ({"dtype": "float32", "torch_dtype": "float16"}, "float32"),
        ({"dtype": None, "text_config": {"dtype": "bfloat16"}}, "bfloat16"),
        ({}, "float32"),
    ],
)
def test_dtype_is_the_checkpoints(tmp_path: Path, config: dict[str, Any], expected: str) -> None:
    assert resolve_settings(RunSettings(), checkpoint(tmp_path, config)).dtype == expected


def test_a_dtype_asked_for_wins(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, {"dtype": "float8_e4m3fn"})
    assert resolve_settings(RunSettings(dtype="float32"), path).dtype == "float32"
    with pytest.raises(CheckpointError, match=r"config\.json: field dtype: 'float8_e4m3fn'"):
        resolve_settings(RunSettings(), path)


# (config.json, tokenizer_config.json, window) as lm-evaluation-harness resolves it: the second test asks it.
WINDOWS: list[tuple[dict[str, Any], dict[str, Any] | None, int]] = [
    ({"n_positions": 128, "n_ctx": 64}, {"model_max_length": 32}, 128),
    ({"max_position_embeddings": 512, "n_ctx": 64}, None, 512),
    ({"n_positions": 100, "max_position_embeddings": 200}, None, 100),
    ({"n_ctx": 64}, None, 64),
    ({"max_position_embeddings": 1200, "text_config": {"max_position_embeddings": 300}}, None, 300),
    ({}, {"model_max_length": 77}, 77),
    ({}, {"model_max_length": 10**30}, 2048),
    ({}, {"model_max_length": 1000000000000000019884624838656}, 2048),
    ({}, {}, 2048),
    ({}, None, 2048),
]


@pytest.mark.parametrize(("config", "tokenizer", "expected"), WINDOWS)
def test_window(tmp_path: Path, config: dict[str, Any], tokenizer: dict[str, Any] | None, expected: int) -> None:
    path = checkpoint(tmp_path, config, tokenizer)
    assert resolve_settings(RunSettings(), path).max_length == expected


@pytest.mark.parametrize(("config", "tokenizer", "expected"), WINDOWS)
def test_window_is_what_lm_eval_finds(config: dict[str, Any], tokenizer: dict[str, Any] | None, expected: int) -> None:
    from types import SimpleNamespace

    utils = pytest.importorskip("lm_eval.models.utils")
    fields = {key: SimpleNamespace(**value) if isinstance(value, dict) else value for key, value in config.items()}
    stored = (tokenizer or {}).get("model_max_length")
    if stored == 10**30:  # it knows only transformers' own spelling of "no limit" and takes this one for a window
        expected = stored
    # A transformers tokenizer without the field has TOKENIZER_INFINITY, which lm-evaluation-harness reads as unset.
    length = utils.TOKENIZER_INFINITY if stored is None else stored
    assert utils.resolve_max_length(SimpleNamespace(**fields), SimpleNamespace(model_max_length=length)) == expected


def test_a_shorter_window_may_be_asked_for_but_no_longer_one(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, {"max_position_embeddings": 512})
    assert resolve_settings(RunSettings(max_length=100), path).max_length == 100
    with pytest.raises(ConfigError, match=r"max_length 513 .* 512 tokens"):
        resolve_settings(RunSettings(max_length=513), path)


def test_a_stride_no_longer_than_the_window_and_part_of_the_identity_only_when_set(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, {"max_position_embeddings": 512})
    strided = resolve_settings(RunSettings(rolling_stride=512), path).identity()
    assert strided.pop("rolling_stride") == 512
    assert strided == resolve_settings(RunSettings(), path).identity()
    with pytest.raises(ConfigError, match=r"rolling_stride 101 .* 100 tokens"):
        resolve_settings(RunSettings(rolling_stride=101, max_length=100), path)


@pytest.mark.parametrize("value", [0, -1, 1, "many", 2.5, True, [512]])
def test_a_window_that_is_no_length(tmp_path: Path, value: Any) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json: field max_position_embeddings"):
        resolve_settings(RunSettings(), checkpoint(tmp_path, {"max_position_embeddings": value}))


@pytest.mark.parametrize(("text", "words"), [("{", "not JSON"), ("[1]", "no JSON object"), (None, "does not exist")])
def test_a_config_that_cannot_be_read(tmp_path: Path, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=rf"config\.json .*{words}"):
        resolve_settings(RunSettings(), tmp_path)


def test_quantization_is_what_is_stored(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, {"quantization_config": {"quant_method": "fp8"}})
    assert resolve_settings(RunSettings(), path).quantization == "fp8"
    assert resolve_settings(RunSettings(quantization="fp8"), path).quantization == "fp8"
    with pytest.raises(ConfigError, match="'int4' was asked for"):
        resolve_settings(RunSettings(quantization="int4"), path)
    with pytest.raises(CheckpointError, match="quantization_config"):
        resolve_settings(RunSettings(), checkpoint(tmp_path, {"quantization_config": {}}))


@pytest.mark.parametrize(
    "settings",
    [
        RunSettings(backend="vllm"),
        RunSettings(shots_as_turns=True),
        RunSettings(system_prompt="hi"),
        RunSettings(dtype="int8"),
    ],
)
def test_what_would_be_hashed_but_not_done_is_refused(tmp_path: Path, settings: RunSettings) -> None:
    with pytest.raises(ConfigError):
        resolve_settings(settings, checkpoint(tmp_path, {}))


def test_resolving_twice_changes_nothing_and_gives_an_identity(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, {"dtype": "bfloat16", "max_position_embeddings": 512})
    once = resolve_settings(RunSettings(device="auto"), path)
    assert resolve_settings(once, path) == once
    recorded_only = {"device": "cuda:3", "batch_tokens": 7, "engine_path": "plain", "deterministic": True}
    assert once.identity() == replace(once, **recorded_only).identity()


def test_importing_the_engine_imports_no_torch() -> None:
    code = "import sys, eval_platform.engine; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
