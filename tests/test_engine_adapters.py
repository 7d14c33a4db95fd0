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
from eval_platform.errors import CheckpointChanged, CheckpointError
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
        CheckpointChanged, match=r"runs/step_7: adapter_config.json: the base model s3://.*no config.json"
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
            ({}, {"model.layers.0.self_attn.q_proj.training": (1,)}, "the base has nothing there"),
            ({}, {"model.layers.0.self_attn.q_proj.lora_A": (3, 32)}, "the same factor is there twice"),
            (
                {},
                {
                    "model.layers.0.mlp.up_proj.lora_A.weight": (0, 32),
                    "model.layers.0.mlp.up_proj.lora_B.weight": (64, 0),
                },
                "do not multiply",
            ),
            ({"alpha_pattern": {"(": 1}}, {}, "field alpha_pattern must map regular expressions to numbers: missing"),
            ({"rank_pattern": ["v_proj"]}, {}, "field rank_pattern must map regular expressions to numbers: no JSON"),
        )
    ):
        folder = tmp_path / str(n) / "adapter"
        make_lora(folder, str(base), **config)
        tensors = load_file(folder / "adapter_model.safetensors")
        tensors |= {f"base_model.model.{name}": torch.zeros(shape) for name, shape in change.items()}
        save_file(tensors, folder / "adapter_model.safetensors")
        with pytest.raises(CheckpointError, match=told):
            merge(model, folder)


def test_all_that_peft_saves_finds_its_place(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    small: dict[str, Any] = {"vocab_size": 40, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 8}
    model = GPT2LMHeadModel(GPT2Config(**small, tie_word_embeddings=False))
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    draw = torch.Generator().manual_seed(5)
    shapes = {
        "transformer.h.0.attn.c_attn.lora_A.weight": (2, 16),  # of a Conv1D, whose weight is [in, out]
        "transformer.h.0.attn.c_attn.lora_B.weight": (48, 2),
        "transformer.wte.lora_embedding_A": (3, 40),
        "transformer.wte.lora_embedding_B": (16, 3),
        "transformer.h.0.attn.c_attn.base_layer.bias": (48,),  # bias = "all"
        "lm_head.weight": (40, 16),  # modules_to_save
    }
    held = {name: torch.randn(*shape, generator=draw) for name, shape in shapes.items()}
    folder = tmp_path / "c" / "adapter"
    make_lora(
        folder,
        "base",
        rank_pattern={r"h\.\d+\.attn\.c_attn": 2},
        alpha_pattern={"wte": 12},
        bias="all",
        fan_in_fan_out=True,
        modules_to_save=["lm_head"],
    )
    tensors = {f"base_model.model.{name}": value for name, value in held.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    merge(model, folder)
    a, b, embedding_a, embedding_b, bias, head = held.values()
    expected["transformer.h.0.attn.c_attn.weight"] += ALPHA / 2 * (b @ a).T
    expected["transformer.wte.weight"] += 12 / RANK * (embedding_b @ embedding_a).T
    expected |= {"transformer.h.0.attn.c_attn.bias": bias, "lm_head.weight": head}
    torch.testing.assert_close(dict(model.state_dict()), expected)

    tied = GPT2LMHeadModel(GPT2Config(**small))
    with pytest.raises(CheckpointError, match="the base uses this weight twice"):
        merge(tied, folder)
