"""Tiny checkpoints in Hugging Face's layout, made by the safetensors library itself."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file


def make_checkpoint(folder: Path, seed: int = 0, shards: int = 1, values: int = 64) -> Path:
    """A whole checkpoint: weights (`values` float32 numbers a tensor, two tensors), config, tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(seed)
    tensors = {name: draw.standard_normal(values).astype(np.float32) for name in ("embed", "head")}
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    (folder / "generation_config.json").write_text("{}")
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    (folder / "tokenizer_config.json").write_text("{}")
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names = {name: f"model-{i:05}-of-{shards:05}.safetensors" for i, name in enumerate(tensors, 1)}
    for name, file in names.items():
        save_file({name: tensors[name]}, folder / file)
    index = {"metadata": {"total_size": 8 * values}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def make_adapter(folder: Path, base: object, seed: int = 9) -> Path:
    folder.mkdir(parents=True)
    draw = np.random.default_rng(seed)
    save_file({"lora_A": draw.standard_normal(8).astype(np.float32)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base), "r": 1}))
    return folder
