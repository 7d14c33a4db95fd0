"""Train a small language model on this machine and drop its checkpoints one after another while it learns.

    python demo/train.py --out demo/checkpoints/first

Everything that makes the model is here: a byte-level BPE tokenizer, a Llama of about one million parameters, and
training examples from `eval_platform.tasks.generators` (their train split: the tasks ask the test split). The loss
is taken on answers only, and on all of a text. Checkpoint 0 has learnt nothing; the last answers most of it.
Same seed, steps and machine: same weights.
"""

import argparse
import json
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from eval_platform.checkpoints.announce import upload
from eval_platform.tasks.generators import GENERATORS, item_text, split_of

END = "<|endoftext|>"
VOCABULARY = 768
CONTEXT = 4096  # five shots of MMLU or GSM8K in so small a vocabulary
SKILLS = tuple(name for name in GENERATORS if name != "text")
STEPS = 1000
CHECKPOINTS = 8  # enough for a curve; to evaluate one takes two cores half a minute
BATCH = 32  # questions in a step
TEXTS = 8  # documents in a step of text
TEXT_EVERY = 8
LEARNING_RATE = 2e-3
WARMUP_SHARE = 0.05
IGNORED = -100  # torch's cross entropy leaves these targets out


@dataclass(frozen=True)
class Batch:
    """Token ids and their targets, both (examples, longest example), padded on the right, targets not shifted."""

    tokens: torch.Tensor
    targets: torch.Tensor
    n_tokens: int


def draw(name: str, rng: random.Random) -> dict[str, str]:
    """One item of the train split."""
    while True:
        item = GENERATORS[name](rng)
        if split_of(item_text(item)) == "train":
            return item


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `VOCABULARY` tokens. Every digit is a token of its own, with or without a space before it."""
    rng = random.Random(seed)
    lines = Path(__file__).with_name("english.txt").read_text(encoding="utf-8").splitlines()
    for _ in range(200):
        for skill in SKILLS:
            item = draw(skill, rng)
            lines.append(f"{item['question']} {item['answer']}")
        lines.append(draw("text", rng)["text"])
        lines.append(" 0 1 2 3 4 5 6 7 8 9")  # no question has a number that starts with 0
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    split = pre_tokenizers.Split(words, behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A Llama of about 1.1 million parameters with random weights."""
    torch.manual_seed(seed)
    end = tokenizer.get_vocab()[END]
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        initializer_range=128**-0.5,  # the usual 0.02 is for wide models; here it would cost most of the training time
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=end,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(bos_token_id=end, eos_token_id=end, pad_token_id=end, do_sample=False)
    return model


def question_batch(rng: random.Random, tokenizer: PreTrainedTokenizerFast) -> Batch:
    """`BATCH` questions, as evenly over the skills as it goes; the answers and the end after them are targets."""
    items = [draw(SKILLS[i % len(SKILLS)], rng) for i in range(BATCH)]
    prompts = _encode(tokenizer, [item["question"] for item in items])
    answers = _encode(tokenizer, [f" {item['answer']}{END}" for item in items])
    return _pad([(ask + say, [IGNORED] * len(ask) + say) for ask, say in zip(prompts, answers, strict=True)])


def text_batch(rng: random.Random, tokenizer: PreTrainedTokenizerFast) -> Batch:
    """`TEXTS` documents, each between two ends, since perplexity is asked after the end of another document."""
    texts = [f"{END}{draw('text', rng)['text']}{END}" for _ in range(TEXTS)]
    return _pad([(ids, [IGNORED, *ids[1:]]) for ids in _encode(tokenizer, texts)])


def _encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch(texts)]


def _pad(examples: list[tuple[list[int], list[int]]]) -> Batch:
    longest = max(len(tokens) for tokens, _ in examples)
    tokens = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in examples])
    targets = torch.tensor([ids + [IGNORED] * (longest - len(ids)) for _, ids in examples])
    return Batch(tokens, targets, sum(len(ids) for ids, _ in examples))


def batches(rng: random.Random, tokenizer: PreTrainedTokenizerFast, steps: int) -> Iterator[Batch]:
    for step in range(steps):
        yield (text_batch if step % TEXT_EVERY == TEXT_EVERY - 1 else question_batch)(rng, tokenizer)


def loss_of(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """Mean cross entropy over the targets, in nats. Logits are computed only where there is one.

    Padding is on the right, so causal attention never sees it and no mask is needed.
    """
    hidden = model.model(input_ids=batch.tokens, use_cache=False).last_hidden_state[:, :-1]
    targets = batch.targets[:, 1:]
    wanted = targets != IGNORED
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[wanted]), targets[wanted])


def learning_rate_at(step: int, steps: int) -> float:
    """Linear warm-up, then linear decay to zero, as a share of `LEARNING_RATE`."""
    warmup = max(1, round(steps * WARMUP_SHARE))
    return min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))


def write_checkpoint(
    folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, *, run: str, step: int, tokens_seen: int
) -> None:
    """Written aside under a hidden name, then renamed, `_SUCCESS` last: nobody ever sees half of it."""
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    record = {
        "run": run,
        "step": step,
        "tokens_seen": tokens_seen,
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "tags": {"trainer": "demo"},
    }
    (aside / "checkpoint.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    aside.rename(folder)
    (folder / "_SUCCESS").touch()


def train(
    out: Path,
    *,
    run: str,
    seed: int = 0,
    steps: int = STEPS,
    n_checkpoints: int = CHECKPOINTS,
    on_checkpoint: Callable[[Path], None] | None = None,
) -> list[Path]:
    """Train for `steps` steps and write `n_checkpoints` (at least 2) folders `out/step_<step>`, step 0 first.

    Returns the folders in order; `on_checkpoint` is called with each when it is complete. Raises ValueError for
    fewer than 2 checkpoints or fewer steps than are needed to tell them apart, FileExistsError when `out` already
    holds checkpoints.
    """
    if n_checkpoints < 2 or steps < n_checkpoints - 1:
        raise ValueError(
            f"{n_checkpoints} checkpoints in {steps} steps: ask for at least 2, and a step between any two"
        )
    if any(out.glob("step_*")):
        raise FileExistsError(f"{out} already holds checkpoints; remove them or choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(seed)
    model = make_model(tokenizer, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_at(step, steps))
    due = {round(i * steps / (n_checkpoints - 1)) for i in range(n_checkpoints)}
    started, tokens_seen, written = time.monotonic(), 0, []

    def checkpoint(step: int, loss: float | None) -> None:
        folder = out / f"step_{step:05d}"
        write_checkpoint(folder, model, tokenizer, run=run, step=step, tokens_seen=tokens_seen)
        written.append(folder)
        learnt = "untrained" if loss is None else f"loss {loss:.3f}"
        seconds = time.monotonic() - started
        print(f"{run}  step {step:>5}/{steps}  {tokens_seen:>8,} tokens  {learnt}  {seconds:5.1f} s", flush=True)
        if on_checkpoint:
            on_checkpoint(folder)

    checkpoint(0, None)
    model.train()
    for step, batch in enumerate(batches(random.Random(f"{seed}"), tokenizer, steps), start=1):
        loss = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        tokens_seen += batch.n_tokens
        if step in due:
            checkpoint(step, loss.item())
    return written


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder that gets one folder per checkpoint")
    parser.add_argument("--run", help="name of the run (default: the name of --out)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--checkpoints", type=int, default=CHECKPOINTS)
    parser.add_argument("--upload", help="s3://bucket/path that gets every checkpoint when it is whole")
    options = parser.parse_args()
    logging.disable_progress_bar()  # one bar per checkpoint written says nothing
    # One thread: matrices this small gain little from a second, and lose much more where the two wait for each other
    # on cores that the evaluations need too.
    torch.set_num_threads(1)
    try:
        train(
            options.out,
            run=options.run or options.out.resolve().name,
            seed=options.seed,
            steps=options.steps,
            n_checkpoints=options.checkpoints,
            on_checkpoint=(lambda folder: upload(folder, f"{options.upload}/{folder.name}"))
            if options.upload
            else None,
        )
    except (ValueError, FileExistsError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
