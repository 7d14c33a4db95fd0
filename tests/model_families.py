"""Which families of model are there? Tiny random checkpoints of each, made from a config with windows small enough to
matter in a prompt of some fifty tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tiny_models import make_tokenizer

VOCABULARY = 320
# Longer than every window below, and than the sequences of the engine's check at load.
MAX_LENGTH = 64

# Sizes under every name that a config has for them; a config takes those of its own attributes.
_SIZES: Mapping[str, Any] = {
    "hidden_size": 32,
    "n_embd": 32,
    "d_model": 32,
    "word_embed_proj_dim": 32,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "num_hidden_layers": 3,
    "n_layer": 3,
    "n_layers": 3,
    "num_layers": 3,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": MAX_LENGTH,
    "n_positions": MAX_LENGTH,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}


@dataclass(frozen=True, slots=True)
class Family:
    """A model type of transformers with what its config says beyond small sizes."""

    name: str
    model_type: str
    config: Mapping[str, Any] = field(default_factory=dict)


_MIXED = ("sliding_attention", "full_attention", "sliding_attention")
# Compressed queries, keys and values (multi-head latent attention): heads of values are of another size than of keys.
_LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "num_key_value_heads": 4,
}
_DEEPSEEK = {**_LATENT, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1}


def _rope(rope_type: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10000.0, **more}}


FAMILIES = (
    Family("llama", "llama", {"tie_word_embeddings": False}),
    Family("llama, tied, biases", "llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    Family("llama, linear rope", "llama", _rope("linear", factor=4.0)),
    Family(
        "llama, llama3 rope",
        "llama",
        _rope("llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16),
    ),
    Family("llama, yarn rope", "llama", _rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    Family("llama, dynamic rope", "llama", _rope("dynamic", factor=4.0)),
    Family("llama4_text", "llama4_text", {"attention_chunk_size": 16, "intermediate_size_mlp": 48}),
    Family("mistral", "mistral", {"sliding_window": 7}),
    # Wider than the sequences of the check at load, which so cannot see whether the window is minded.
    Family("mistral, wide window", "mistral", {"sliding_window": 30}),
    Family("mixtral", "mixtral", {"sliding_window": 7}),
    Family("gemma", "gemma"),
    Family(
        "gemma2",
        "gemma2",
        {
            "sliding_window": 7,
            "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "layer_types": _MIXED,
        },
    ),
    Family("gemma2, wide window", "gemma2", {"sliding_window": 30, "query_pre_attn_scalar": 8, "layer_types": _MIXED}),
    Family("gemma3_text", "gemma3_text", {"sliding_window": 7, "query_pre_attn_scalar": 8, "layer_types": _MIXED}),
    Family("gpt_oss", "gpt_oss", {"sliding_window": 7, "layer_types": _MIXED}),
    Family("gpt_oss, wide window", "gpt_oss", {"sliding_window": 30, "layer_types": _MIXED}),
    Family("qwen2", "qwen2"),
    Family("qwen2, windows", "qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    Family("qwen2_moe", "qwen2_moe"),
    Family(
        "qwen2_moe, windows", "qwen2_moe", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
    ),
    Family("qwen3", "qwen3"),
    Family("qwen3_moe", "qwen3_moe"),
    Family(
        "qwen3_next",
        "qwen3_next",
        {
            "layer_types": ("linear_attention", "full_attention", "linear_attention"),
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
    Family("phi", "phi"),
    Family("phi3", "phi3", {"sliding_window": 7}),
    Family(
        "phi3, longrope",
        "phi3",
        {
            **_rope("longrope", short_factor=[1.0] * 4, long_factor=[2.0] * 4, original_max_position_embeddings=32),
            "original_max_position_embeddings": 32,
        },
    ),
    Family("phimoe", "phimoe"),
    Family("gpt2", "gpt2"),
    Family("gpt_bigcode", "gpt_bigcode"),
    Family("gpt_neox", "gpt_neox"),
    Family("gpt_neo", "gpt_neo", {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "window_size": 7}),
    Family("gptj", "gptj", {"rotary_dim": 4}),
    Family("opt", "opt"),
    Family("bloom", "bloom"),
    Family("mpt", "mpt"),
    Family("falcon, rotary", "falcon", {"alibi": False, "multi_query": True}),
    Family("falcon, alibi", "falcon", {"alibi": True, "multi_query": True}),
    Family("falcon, grouped", "falcon", {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2}),
    Family("cohere", "cohere", {"logit_scale": 0.3}),
    Family("cohere2", "cohere2", {"logit_scale": 0.3, "sliding_window": 7, "layer_types": _MIXED}),
    Family(
        "granite",
        "granite",
        {"logits_scaling": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.7, "embedding_multiplier": 2.0},
    ),
    Family("granitemoe", "granitemoe", {"logits_scaling": 3.0}),
    Family("olmo2", "olmo2"),
    Family("olmo3", "olmo3", {"sliding_window": 7, "layer_types": _MIXED}),
    Family("olmoe", "olmoe"),
    Family("stablelm", "stablelm", {"use_qkv_bias": True}),
    Family("starcoder2", "starcoder2", {"sliding_window": 7}),
    Family("smollm3", "smollm3"),
    Family("glm4", "glm4"),
    Family("exaone4", "exaone4", {"sliding_window": 7, "layer_types": _MIXED}),
    Family("deepseek_v2", "deepseek_v2", _DEEPSEEK),
    Family("deepseek_v3", "deepseek_v3", _DEEPSEEK),
    # Picks keys only beyond as many as these: the check at load never gets there.
    Family(
        "deepseek_v32",
        "deepseek_v32",
        {**_DEEPSEEK, "index_topk": MAX_LENGTH, "index_n_heads": 4, "index_head_dim": 16},
    ),
    Family(
        "deepseek_v4",
        "deepseek_v4",
        {
            "sliding_window": 7,
            "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 40},
        },
    ),
    Family("minicpm3", "minicpm3", _LATENT),
    Family("mamba", "mamba"),
    Family("recurrent_gemma", "recurrent_gemma", {"attention_window_size": 7, "lru_width": 32}),
    Family(
        "jamba",
        "jamba",
        {"mamba_d_state": 4, "mamba_dt_rank": 4, "attn_layer_period": 3, "attn_layer_offset": 1},
    ),
    Family("bamba", "bamba", {**_MAMBA, "attn_layer_indices": [1]}),
    Family("falcon_h1", "falcon_h1", {**_MAMBA, "mamba_d_ssm": 64}),
    Family("lfm2", "lfm2", {"layer_types": ("conv", "full_attention", "conv")}),
    Family("modernbert-decoder", "modernbert-decoder", {"local_attention": 8}),
)


def make_family(folder: Path, family: Family, *, dtype: str = "float32", seed: int = 0) -> Path:
    """Write a random checkpoint of `family` with its tokenizer into `folder` and return it."""
    tokenizer = make_tokenizer(vocab=VOCABULARY, max_length=MAX_LENGTH)
    model = make_model(family, tokenizer, seed=seed)
    model.to(dtype=_dtype(dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_model(family: Family, tokenizer: Any, *, seed: int = 0) -> Any:
    """A random float32 model of `family`. Its matrices are spread widely, so that the best token is no near tie, and
    its biases, norms and sinks are no zeros or ones, so that each of them shows.
    """
    import torch
    import transformers

    known = transformers.AutoConfig.for_model(family.model_type).to_dict()
    special = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    sizes = {key: value for key, value in _SIZES.items() if key in known}
    own = {key: list(value) if isinstance(value, tuple) else value for key, value in family.config.items()}
    config = transformers.AutoConfig.for_model(family.model_type, **{**sizes, **special, **own})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                last = name.rsplit(".", 1)[-1]
                if last in ("A_log", "D", "dt_bias", "recurrent_param"):
                    continue  # of a recurrence, which grows beyond bounds when they are anything
                if parameter.dim() > 1:
                    parameter.normal_(0.0, 0.25)
                else:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def _dtype(name: str) -> Any:
    import torch

    return getattr(torch, name)
