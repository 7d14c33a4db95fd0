"""Tiny random Hugging Face checkpoints with a trained byte-level BPE tokenizer, made in well under a second.

The weights are random but sharpened (a larger spread than transformers' default), so that the best token is not a
coin toss between near ties and greedy flags mean something.
"""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal

Architecture = Literal["llama", "gpt2", "qwen3", "gpt_neox"]
ARCHITECTURES: tuple[Architecture, ...] = ("llama", "gpt2", "qwen3", "gpt_neox")

BOS, EOS, PAD, UNK = "<s>", "</s>", "<pad>", "<unk>"

_TEXT = """the of and to in a is that it was for on are as with his they at be this from have or by one had not but
what all were when we there can an your which their said if do will each about how up out them then she many some so
these would other into has more her two like him see time could no make than first been its who now people my made
over did down only way find use may water long little very after words called just where most know Question: Answer:
Yes No True False A. B. C. D. Paris London river mountain seven twelve 0 1 2 3 4 5 6 7 8 9 10 42 100 + - * / = ( ) [ ]
copy sort compare add bracket larger smaller equal naïve café Größe 東京 мир"""


def _corpus() -> Iterator[str]:
    words = _TEXT.split()
    # A fixed linear congruential walk over the words: no global random state is touched, and it never changes.
    state = 12345
    for _ in range(300):
        line = []
        for _ in range(12):
            state = (1103515245 * state + 12345) % 2**31
            line.append(words[state % len(words)])
        yield " ".join(line) + ".\n"


@cache
def _tokenizer_json(vocab: int, adds_bos: bool) -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
        )
    return tokenizer.to_str()


def make_tokenizer(
    *, vocab: int = 512, max_length: int = 256, adds_bos: bool = False, bos: bool = True, eos: bool = True
) -> Any:
    """A `PreTrainedTokenizerFast` over a byte-level BPE; with `adds_bos` it puts BOS before every text, as Llama's.

    `bos` and `eos` say whether it names these tokens as its own.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_tokenizer_json(vocab, adds_bos)),
        bos_token=BOS if bos else None,
        eos_token=EOS if eos else None,
        pad_token=PAD,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def make_metaspace_tokenizer(*, vocab: int = 400, max_length: int = 256) -> Any:
    """As SentencePiece makes them for Llama 2 and T5: spaces are part of the tokens ("▁the"), one is put before a text,
    what is unknown falls back to bytes, and BOS stands before every text.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    # Words apart while it learns only: a Llama 2 tokenizer merges within the whole text.
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", BOS, EOS, PAD, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.pre_tokenizer = None
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        unk_token="<unk>",
        pad_token=PAD,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def make_model(architecture: Architecture, tokenizer: Any, *, seed: int = 0, max_length: int = 256) -> Any:
    """A random float32 model of the named architecture: 2 layers, hidden size 32, 4 heads."""
    import torch
    import transformers

    special = {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": max_length,
        "initializer_range": 0.3,
    }
    config: Any
    if architecture == "llama":
        config = transformers.LlamaConfig(**special, **sizes, num_key_value_heads=2, tie_word_embeddings=False)
    elif architecture == "qwen3":
        config = transformers.Qwen3Config(
            **special, **sizes, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True
        )
    elif architecture == "gpt_neox":
        config = transformers.GPTNeoXConfig(**special, **sizes, tie_word_embeddings=False)
    elif architecture == "gpt2":
        config = transformers.GPT2Config(
            **special, n_embd=32, n_layer=2, n_head=4, n_positions=max_length, initializer_range=0.3
        )
    else:
        raise ValueError(f"no tiny model of architecture {architecture!r}; known: {', '.join(ARCHITECTURES)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def make_checkpoint(
    folder: Path,
    *,
    seed: int = 0,
    architecture: Architecture = "llama",
    vocab: int = 512,
    max_length: int = 256,
    adds_bos: bool = False,
    nan: bool = False,
) -> Path:
    """Write a checkpoint as `save_pretrained` does and return `folder`. With `nan`, one weight matrix is all NaN."""
    import torch

    tokenizer = make_tokenizer(vocab=vocab, max_length=max_length, adds_bos=adds_bos)
    model = make_model(architecture, tokenizer, seed=seed, max_length=max_length)
    if nan:
        with torch.no_grad():
            next(
                p for name, p in model.named_parameters() if p.dim() == 2 and ("layers." in name or ".h." in name)
            ).fill_(float("nan"))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@cache
def _seq2seq_tokenizer_json() -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    # T5's places: padding is token 0, the end is token 1.
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=[PAD, EOS, UNK], unk_token=UNK, show_progress=False
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", pair=f"$A {EOS} $B {EOS}", special_tokens=[(EOS, tokenizer.token_to_id(EOS))]
    )
    return tokenizer.to_str()


def make_seq2seq_checkpoint(
    folder: Path,
    *,
    architecture: Literal["t5", "flan_t5", "bart", "m2m_100"] = "t5",
    seed: int = 0,
    max_length: int = 48,
    nan: bool = False,
) -> Path:
    """A random float32 encoder-decoder, 2 layers a side, with a SentencePiece-style tokenizer that adds EOS as T5's.

    flan_t5 is a T5 with gated layers and a head of its own. With `nan`, the decoder's first weight matrix is all NaN.
    """
    import torch
    import transformers
    from tokenizers import Tokenizer

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_seq2seq_tokenizer_json()),
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        model_max_length=max_length,
    )
    special: dict[str, Any] = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 1}
    sides = {
        f"{side}_{what}": size
        for side in ("encoder", "decoder")
        for what, size in {"layers": 2, "attention_heads": 4, "ffn_dim": 64}.items()
    }
    config: Any
    if architecture in ("t5", "flan_t5"):
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "n_positions": max_length}
        how = {} if architecture == "t5" else {"tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"}
        config = transformers.T5Config(**special, **sizes, **how, decoder_start_token_id=0, initializer_factor=1.0)
    else:
        kind = transformers.BartConfig if architecture == "bart" else transformers.M2M100Config
        config = kind(
            **special,
            **sides,
            bos_token_id=1,
            decoder_start_token_id=1,
            forced_eos_token_id=None,
            d_model=32,
            max_position_embeddings=max_length,
            init_std=0.3,
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForSeq2SeqLM.from_config(config, dtype=torch.float32).eval()
        if architecture == "flan_t5":
            model.lm_head.weight = torch.nn.Parameter(0.3 * torch.randn_like(model.lm_head.weight))
    if nan:
        with torch.no_grad():
            next(p for name, p in model.named_parameters() if p.dim() == 2 and "decoder" in name).fill_(float("nan"))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
