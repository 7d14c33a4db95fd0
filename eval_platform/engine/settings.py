"""Which dtype and window does a checkpoint run with? Read from its JSON files only, without torch."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from eval_platform.errors import CheckpointError, ConfigError
from eval_platform.values import RunSettings

DTYPES = ("float32", "bfloat16", "float16")
DEFAULT_MAX_LENGTH = 2048  # lm-evaluation-harness's, where neither config nor tokenizer says a length
# lm-evaluation-harness 0.4.13 models/utils.py:resolve_max_length asks in this order.
_LENGTH_FIELDS = ("n_positions", "max_position_embeddings", "n_ctx")
# transformers writes int(1e30) for "no limit"; nothing near it is a window.
_NO_LIMIT = 10**15


def resolve_settings(settings: RunSettings, path: Path) -> RunSettings:
    """`settings` with nothing left open for the checkpoint at `path`: dtype, max_length, quantization and chat as they
    run.

    dtype "auto" is config.json's `dtype` (or `torch_dtype`), else float32. max_length None is the model's window as
    lm-evaluation-harness finds it. chat "auto" is whether the tokenizer has a chat template. The device stays as it
    was given: it is no part of identity.
    Raises CheckpointError when the checkpoint's files do not say something usable, ConfigError when `settings` asks
    for what this engine does not have.
    """
    _refuse_unsupported(settings)
    config_file = path / "config.json"
    config = read_json_object(config_file)
    text_config = _text_config(config)
    method = _quantization(config, config_file)
    if settings.quantization not in (None, method):
        raise ConfigError(
            f"quantization {settings.quantization!r} was asked for, but {config_file} says {method!r}",
            remedy="quantize the checkpoint itself and leave the setting out; the engine runs what is stored",
        )
    window = _window(text_config, config_file, path / "tokenizer_config.json")
    if settings.max_length is not None and settings.max_length > window:
        raise ConfigError(
            f"max_length {settings.max_length} is longer than the model's window of {window} tokens ({config_file})",
            remedy=f"set [engine] max_length to at most {window}, or leave it out",
        )
    window = settings.max_length or window
    if settings.rolling_stride is not None and settings.rolling_stride > window:
        raise ConfigError(
            f"rolling_stride {settings.rolling_stride} is longer than the window of {window} tokens",
            remedy="set [engine] rolling_stride to at most that, or leave it out",
        )
    chat = _chat(settings, path)
    return replace(
        settings,
        chat=chat,
        system_prompt=settings.system_prompt if chat else None,
        shots_as_turns=settings.shots_as_turns if chat else None,
        dtype=_dtype(settings.dtype, config, text_config, config_file),
        max_length=window,
        quantization=method,
    )


def _chat(settings: RunSettings, path: Path) -> bool:
    if settings.chat is False:
        return False
    there = has_chat_template(path)
    if settings.chat is True and not there:
        raise CheckpointError(
            f"{path / 'tokenizer_config.json'}: the tokenizer has no chat template, and a chat was asked for",
            remedy="save one with it (chat_template.jinja), or ask without: --no-chat, or [chat] apply = false",
        )
    return there


def has_chat_template(path: Path) -> bool:
    """Whether the tokenizer at `path` has a chat template, in a file of its own or in tokenizer_config.json."""
    if (path / "chat_template.jinja").is_file():
        return True
    file = path / "tokenizer_config.json"
    return file.is_file() and bool(read_json_object(file).get("chat_template"))


def read_json_object(file: Path) -> dict[str, Any]:
    """The JSON object in `file`. Raises CheckpointError when it is absent or something else."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} does not exist", remedy="save the model with save_pretrained") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is not JSON: {error}", remedy="write the checkpoint again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} holds no JSON object", remedy="write the checkpoint again")
    return value


def _refuse_unsupported(settings: RunSettings) -> None:
    # A setting that is hashed into settings_id but changes nothing would be a lie.
    if settings.backend != "transformers":
        raise ConfigError(f"unknown back end {settings.backend!r}", remedy="use 'transformers'")
    if settings.chat is False and (settings.system_prompt is not None or settings.shots_as_turns is not None):
        raise ConfigError(
            "system_prompt and shots_as_turns are part of a conversation, and chat is off",
            remedy="set [chat] apply = true (or give --chat), or leave them out",
        )
    if settings.dtype != "auto" and settings.dtype not in DTYPES:
        raise ConfigError(f"unknown dtype {settings.dtype!r}", remedy=f"use auto, {', '.join(DTYPES)}")


def loading_dtype(asked: str, path: Path) -> str | None:
    """The dtype that the checkpoint at `path` is loaded in; None where its weights are quantized, and stay as stored.

    As `resolve_settings` finds it, and raising as it does.
    """
    config_file = path / "config.json"
    config = read_json_object(config_file)
    if _quantization(config, config_file) is not None:
        return None
    return _dtype(asked, config, _text_config(config), config_file)


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    """What it says of the language model, where that is a part of a larger one."""
    text_config = config.get("text_config")
    return text_config if isinstance(text_config, dict) else config


def _dtype(asked: str, config: Mapping[str, Any], text_config: Mapping[str, Any], file: Path) -> str:
    if asked != "auto":
        return asked
    for source in (config, text_config):
        for field in ("dtype", "torch_dtype"):
            stored = source.get(field)
            if stored is None:
                continue
            name = str(stored).removeprefix("torch.")
            if name not in DTYPES:
                raise CheckpointError(
                    f"{file}: field {field}: {stored!r} is no dtype the engine runs in ({', '.join(DTYPES)})",
                    remedy="set [engine] dtype to one of them",
                )
            return name
    return "float32"


def _window(config: Mapping[str, Any], file: Path, tokenizer_file: Path) -> int:
    for field in _LENGTH_FIELDS:
        if config.get(field) is not None:
            return _length(config[field], field, file)
    if tokenizer_file.is_file():
        stored = read_json_object(tokenizer_file).get("model_max_length")
        if stored is not None:
            length = _length(stored, "model_max_length", tokenizer_file)
            if length < _NO_LIMIT:
                return length
    return DEFAULT_MAX_LENGTH


def _length(value: Any, field: str, file: Path) -> int:
    # json reads 1e30 as a float, which is how some tokenizers write "no limit".
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 2 or value != value // 1:
        raise CheckpointError(
            f"{file}: field {field}: {value!r} is no length of a window (a whole number of tokens, at least 2)",
            remedy="mend the file, or set [engine] max_length once it is mended",
        )
    return int(value)


def _quantization(config: Mapping[str, Any], file: Path) -> str | None:
    stored = config.get("quantization_config")
    if stored is None:
        return None
    method = stored.get("quant_method") if isinstance(stored, dict) else None
    if not isinstance(method, str):
        raise CheckpointError(
            f"{file}: field quantization_config: it names no quant_method", remedy="write the checkpoint again"
        )
    return method
