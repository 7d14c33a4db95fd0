"""How probable are these tokens? Log-likelihoods of the last tokens of right-padded rows, in float32."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# One block of the log-softmax, in logits: 64 MiB of float32.
_BLOCK = 2**24


@dataclass(slots=True)
class Row:
    """One input to the model and the continuations scored on it, which all end at its last position.

    Each of `targets` is (owner, tokens): tokens[j] is predicted at position len(tokens_in) - len(tokens) + j.
    """

    tokens_in: tuple[int, ...]
    targets: list[tuple[int, tuple[int, ...]]]

    @property
    def first(self) -> int:
        """The first position whose logits are needed."""
        return len(self.tokens_in) - max(len(tokens) for _, tokens in self.targets)


@dataclass(frozen=True, slots=True)
class Scored:
    """Sum of log-probabilities in nats, and whether each token was the most probable one (never with a NaN)."""

    owner: int
    log_likelihood: float
    is_greedy: bool


def rows_that_fit(rows: Sequence[Row], tokens: int, logits: int, vocab_size: int) -> int:
    """How many of `rows`, longest first, fit `tokens` padded positions and `logits` output values; at least one."""
    longest, first = len(rows[0].tokens_in), rows[0].first
    size = 1
    for row in rows:
        if row is rows[0]:
            continue
        first = min(first, row.first)
        count = size + 1
        if count * longest > tokens or count * (longest - first) * vocab_size > logits:
            break
        size = count
    return size


@torch.inference_mode()
def score(model: "PreTrainedModel", rows: Sequence[Row], *, keeps_logits: bool) -> list[Scored]:
    """Score every target of every row in one forward pass.

    Padding is on the right and no mask is given, as in lm-evaluation-harness: a causal model's positions never look
    right, so padding cannot reach a target, and positions count from 0 whatever the architecture does with them.
    `keeps_logits`: the model's forward takes `logits_to_keep`, so logits are made at the needed positions only.
    """
    longest = max(len(row.tokens_in) for row in rows)
    first = min(row.first for row in rows)
    inputs = torch.zeros((len(rows), longest), dtype=torch.long)
    for i, row in enumerate(rows):
        inputs[i, : len(row.tokens_in)] = torch.tensor(row.tokens_in)
    inputs = inputs.to(model.device)
    if keeps_logits:
        kept = torch.arange(first, longest, device=model.device)
        logits = model(input_ids=inputs, use_cache=False, logits_to_keep=kept).logits
    else:
        logits = model(input_ids=inputs, use_cache=False).logits[:, first:]

    # Every (row, position, target token) that is asked for, as three flat lists.
    row_index: list[int] = []
    position: list[int] = []
    target: list[int] = []
    for i, row in enumerate(rows):
        for _, tokens in row.targets:
            start = len(row.tokens_in) - len(tokens) - first
            row_index.extend([i] * len(tokens))
            position.extend(range(start, start + len(tokens)))
            target.extend(tokens)
    log_probability, greedy = gather(logits, torch.tensor([row_index, position, target], device=logits.device))

    scored = []
    done = 0
    for row in rows:
        for owner, tokens in row.targets:
            end = done + len(tokens)
            # Summed in float64: the sum's own rounding then never shows, however long the text.
            total = float(log_probability[done:end].sum())
            scored.append(Scored(owner, total, bool(greedy[done:end].all())))
            done = end
    return scored


def gather(logits: torch.Tensor, asked: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """log_softmax(logits)[row, position, target] and whether target is the argmax, for each column of `asked` [3, n].

    logits: [rows, positions, vocabulary]. Returns float64 [n] and bool [n] on the CPU. The log-softmax is float32
    whatever the model's dtype, and made in blocks, so that no second tensor of the logits' size exists.
    """
    count = max(1, _BLOCK // logits.shape[-1])
    values, flags = [], []
    for block in asked.split(count, dim=1):
        row, position, target = block
        chosen = torch.log_softmax(logits[row, position].float(), dim=-1)
        value = chosen.gather(1, target[:, None])[:, 0]
        values.append(value.cpu().double())
        # argmax of a row with NaN is some index; that is no prediction.
        flags.append(((chosen.argmax(dim=-1) == target) & ~value.isnan()).cpu())
    return torch.cat(values), torch.cat(flags)
