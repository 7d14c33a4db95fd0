"""A LoRA adapter answers as the model into which it is merged; what would be another model is refused by name."""

import json
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_checkpoint

from eval_platform.checkpoints import Found, Watch, discover, release, stage, tokenizer_id
from eval_platform.config import S3, Root
from eval_platform.engine import load
from eval_platform.engine.adapters import merge
from eval_platform.errors import CheckpointError
from eval_platform.store.s3 import S3Store
from eval_platform.values import Arrival, Generation, Incomplete, RunSettings, make_request

pytest_plugins = ["store_roots"]

CPU = RunSettings(device="cpu")
PLAIN = RunSettings(device="cpu", engine_path="plain")
RANK, ALPHA = 3, 6
REQUESTS = [
    make_request("choice", "the river is", " a mountain"),
    make_request("choice", "Question: what is 7 + 12?", " 19"),
    make_request("generate", "Paris is", settings=Generation(max_new_tokens=8)),
]
_LAYERS = {  # of a Llama of tests/tiny_models.py: [out, in]
    "model.layers.0.self_attn.q_proj": (32, 32),
    "model.layers.1.self_attn.v_proj": (16, 32),
    "model.layers.1.mlp.down_proj": (32, 64),
}


def make_lora(folder: Path, base: str, **config: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """An adapter as peft's save_pretrained writes it; module -> (A, B)."""
    folder.mkdir(parents=True)
    draw = torch.Generator().manual_seed(4)
    factors = {
        name: (torch.randn(RANK, inner, generator=draw), torch.randn(outer, RANK, generator=draw))
        for name, (outer, inner) in _LAYERS.items()
    }
    tensors = {
        f"base_model.model.{name}.lora_{side}.weight": factor
        for name, pair in factors.items()
        for side, factor in zip("AB", pair, strict=True)
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    about = {"base_model_name_or_path": base, "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK}
    about |= {"lora_alpha": ALPHA, "lora_dropout": 0.05, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps({**about, **config}))
    return factors


def make_merged(base: Path, folder: Path, factors: dict[str, tuple[torch.Tensor, torch.Tensor]], scale: float) -> Path:
    """The definition (arXiv 2106.09685, section 4.1), written as a whole checkpoint."""
    folder.mkdir()
    for file in base.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(base / "model.safetensors")
    for name, (a, b) in factors.items():
        weights[f"{name}.weight"] = weights[f"{name}.weight"] + scale * (b @ a)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def nothing(done: int, total: int) -> None:
    pass


def answers(path: Path, settings: RunSettings = PLAIN) -> list[tuple[Any, ...]]:
    found = {one.request_id: one for one in load(path, settings).answer(REQUESTS)}
    kept = [found[request.request_id] for request in REQUESTS]
    return [(one.log_likelihood and round(one.log_likelihood, 3), one.is_greedy, one.text) for one in kept]


def arrived(found: Found | Incomplete) -> Arrival:
    assert isinstance(found, Found)
    return Arrival(n=1, **asdict(found))


def test_an_adapter_and_its_base_in_buckets_answer_as_the_merged_model(
    tmp_path: Path, s3_session: Any, s3_credentials: None
) -> None:
    settings = S3(endpoint=s3_session.endpoint)
    bucket = S3Store(f"s3://results/adapters {uuid.uuid4().hex}", settings)
    base = make_checkpoint(tmp_path / "base", seed=1)
    factors = make_lora(tmp_path / "runs" / "step_7", "../../base", use_rslora=True)
    merged = make_merged(base, tmp_path / "merged", factors, ALPHA / RANK**0.5)
    (tmp_path / "runs" / "step_7" / "chat_template.jinja").write_text("{{ messages }}")
    for file in (tmp_path / "runs").rglob("*"):
        if file.is_file():
            bucket.put(f"runs/{file.relative_to(tmp_path / 'runs').as_posix()}", file.read_bytes())
    root = [Root(name="r", path=f"{bucket.uri}/runs", quiet_seconds=0)]

    [waits] = discover(root, {}, Watch(), (), settings)
    assert isinstance(waits, Incomplete)
    assert waits.reason == (
        f"adapter_config.json: there is no base model at {bucket.uri}/base; bring it there, or name another place"
    )
    for file in base.iterdir():
        bucket.put(f"base/{file.name}", file.read_bytes())
    [found] = discover(root, {}, Watch(), (), settings)
    told: list[tuple[int, int]] = []
    staged = stage(arrived(found), tmp_path / "cache", lambda *at: told.append(at), s3=settings)
    files = [file for top in (base, tmp_path / "runs") for file in top.rglob("*") if file.is_file()]
    # Every byte comes once, and is read once more.
    assert told[-1] == (2 * sum(file.stat().st_size for file in files),) * 2
    assert staged.path is not None
    assert answers(staged.path, CPU) == answers(merged) != answers(base)

    # The same adapter over the same base, both in folders: one checkpoint.
    [local] = discover([Root(name="l", path=str(tmp_path / "runs"), quiet_seconds=0)], {}, Watch())
    here = stage(arrived(local), tmp_path / "cache", nothing)
    assert (here.checkpoint_id, here.weights_id) == (staged.checkpoint_id, staged.weights_id)
    assert tokenizer_id(staged.path) != tokenizer_id(base)  # its own chat template is over the base's
    # Another base is another checkpoint.
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, tmp_path / "other.safetensors", metadata={"format": "pt"})
    bucket.put("base/model.safetensors", (tmp_path / "other.safetensors").read_bytes())
    other = stage(arrived(found), tmp_path / "cache", nothing, s3=settings)
    assert other.checkpoint_id != staged.checkpoint_id
    bucket.delete("base/config.json")
    with pytest.raises(
        CheckpointError, match=r"runs/step_7: adapter_config.json: the base model s3://.*no config.json"
    ):
        stage(arrived(found), tmp_path / "new", nothing, s3=settings)
    for one in (staged, here, other):
        release(one)


def test_an_adapter_that_cannot_be_merged_exactly_is_refused(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", seed=1)
    model = __import__("transformers").AutoModelForCausalLM.from_pretrained(base)
    tensors: dict[str, torch.Tensor] = {}
    for n, (config, change, told) in enumerate(
        (
            ({"peft_type": "IA3"}, {}, "field peft_type: 'IA3' is no LORA"),
            ({"use_dora": True}, {}, "field use_dora"),
            ({"init_lora_weights": "pissa_niter_4"}, {}, "may have changed the base model's weights too"),
            ({"rank_pattern": {"v_proj": 8}}, {}, "v_proj: its rank is 3, and adapter_config.json says another"),
            ({}, {"model.layers.9.self_attn.q_proj.lora_A.weight": (3, 32)}, "the base model has no such module"),
            ({}, {"model.layers.0.self_attn.q_proj.lora_magnitude_vector": (32,)}, "the base has nothing there"),
            ({}, {"model.embed_tokens.weight": (600, 32)}, r"\(600, 32\), and the base's is \(512, 32\)"),
            ({}, {"model.layers.0.self_attn.k_proj.lora_A.weight": (3, 32)}, "only one of lora_A and lora_B"),
            ({}, {"model.embed_tokens.base_layer.weight": (9, 32)}, r"\(9, 32\), and the base's is \(512, 32\)"),
        )
    ):
        folder = tmp_path / str(n) / "adapter"
        make_lora(folder, str(base), **config)
        tensors = load_file(folder / "adapter_model.safetensors")
        tensors |= {f"base_model.model.{name}": torch.zeros(shape) for name, shape in change.items()}
        save_file(tensors, folder / "adapter_model.safetensors")
        with pytest.raises(CheckpointError, match=told):
            merge(model, folder)
