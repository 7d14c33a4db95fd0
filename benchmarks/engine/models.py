"""Which models are measured? Random ones of known shapes with a trained tokenizer, made here and kept in a folder.

The weights are random, drawn wider than transformers' default, so that the best token is no coin toss between near
ties. `python -m benchmarks.engine` makes what it needs; nothing is downloaded.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.engine.texts import documents, sentences

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

VOCABULARY = 32_768
WINDOW = 4_096
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
_SPECIAL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "dtype": "float32",
}
_SIZES: dict[str, Any] = {
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "max_position_embeddings": WINDOW,
    "initializer_range": 0.06,
}


def _llama24m() -> "PreTrainedConfig":
    from transformers import LlamaConfig

    return LlamaConfig(**_SPECIAL, **_SIZES, num_key_value_heads=4, intermediate_size=1408, tie_word_embeddings=False)


def _llama120m() -> "PreTrainedConfig":
    from transformers import LlamaConfig

    return LlamaConfig(
        **_SPECIAL,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        intermediate_size=2048,
        max_position_embeddings=WINDOW,
        initializer_range=0.05,
        tie_word_embeddings=False,
    )


def _llama1b() -> "PreTrainedConfig":
    return _large(hidden_size=2048, num_hidden_layers=16, num_attention_heads=32, intermediate_size=8192)


def _llama8b() -> "PreTrainedConfig":
    return _large(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, intermediate_size=14336)


def _large(**sizes: Any) -> "PreTrainedConfig":
    """Llama 3's shapes, for a GPU; the vocabulary is ours."""
    from transformers import LlamaConfig

    return LlamaConfig(
        **{**_SPECIAL, "dtype": "bfloat16"},
        **sizes,
        num_key_value_heads=8,
        max_position_embeddings=WINDOW,
        initializer_range=0.03,
        tie_word_embeddings=False,
    )


def _gpt2() -> "PreTrainedConfig":
    from transformers import GPT2Config

    return GPT2Config(**_SPECIAL, n_embd=512, n_layer=8, n_head=8, n_positions=WINDOW, initializer_range=0.06)


def _qwen3() -> "PreTrainedConfig":
    from transformers import Qwen3Config

    # Heads of 128 whatever the hidden size, and a norm on queries and keys, are what Qwen3 is about.
    return Qwen3Config(
        **_SPECIAL,
        **_SIZES,
        num_key_value_heads=4,
        head_dim=128,
        intermediate_size=1024,
        tie_word_embeddings=True,
    )


def _pythia() -> "PreTrainedConfig":
    from transformers import GPTNeoXConfig

    return GPTNeoXConfig(**_SPECIAL, **_SIZES, intermediate_size=2048, tie_word_embeddings=False)


def _gemma2() -> "PreTrainedConfig":
    from transformers import Gemma2Config

    # The window is one that the ten-shot and the perplexity rows outgrow. Gemma's head is tied, but its embeddings are
    # scaled up so much that a tied random model answers every token with itself.
    return Gemma2Config(
        **_SPECIAL,
        **_SIZES,
        num_key_value_heads=4,
        head_dim=64,
        intermediate_size=1408,
        sliding_window=512,
        query_pre_attn_scalar=64,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        tie_word_embeddings=False,
    )


MODELS: dict[str, Callable[[], "PreTrainedConfig"]] = {
    "llama24m": _llama24m,
    "llama120m": _llama120m,
    "llama1b": _llama1b,
    "llama8b": _llama8b,
    "gpt2": _gpt2,
    "qwen3": _qwen3,
    "pythia": _pythia,
    "gemma2": _gemma2,
}


def model_folder(name: str, work: Path) -> Path:
    """The checkpoint `name` below `work`, made on first use: config, weights in the config's dtype, tokenizer."""
    folder = work / "models" / name
    if folder.is_dir():
        return folder
    import torch
    from transformers import AutoModelForCausalLM

    config = MODELS[name]()
    dtype = getattr(torch, str(config.dtype).removeprefix("torch."))
    # The large ones take minutes to draw on a CPU.
    device = "cuda" if dtype == torch.bfloat16 and torch.cuda.is_available() else "cpu"
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with _half_made(folder) as half:
        model.save_pretrained(half)
        for file in tokenizer_folder(work).iterdir():
            shutil.copy(file, half)
    return folder


def tokenizer_folder(work: Path) -> Path:
    """A byte-level BPE of VOCABULARY tokens over the real texts, made on first use. Takes about a minute."""
    folder = work / "tokenizer"
    if folder.is_dir():
        return folder
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=24,
        show_progress=False,
    )
    texts = documents()
    # The prose of the workloads, in which prompts are built from these sentences, stands beside the texts themselves.
    prose = prose_sentences(work)
    tokenizer.train_from_iterator([*texts, *prose], trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=WINDOW,
        clean_up_tokenization_spaces=False,
    )
    with _half_made(folder) as half:
        wrapped.save_pretrained(half)
    return folder


def prose_sentences(work: Path) -> list[str]:
    """Sentences to build prompts from, found in the real texts on first use."""
    file = work / "sentences.json"
    if not file.is_file():
        work.mkdir(parents=True, exist_ok=True)
        half = file.with_suffix(".half")
        half.write_text(json.dumps(sentences(documents())), encoding="utf-8")
        half.rename(file)
    return json.loads(file.read_text(encoding="utf-8"))


@contextmanager
def _half_made(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes its name only when all is there."""
    half = folder.with_name(f"{folder.name}.half")
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir(parents=True)
    yield half
    half.rename(folder)
