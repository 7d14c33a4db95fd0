"""What can no engine avoid computing? Unique tokens and needed rows of the head, and the seconds they must take.

Counted here by itself, token by token, so that it is a check on the engine and not its echo.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from eval_platform.engine import encoding
from eval_platform.values import Request

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Matrices:
    """A model's matrix products: those of the layers, by shape, and the head's.

    layers: (outputs, inputs) -> how many. Embeddings are looked up, not multiplied; biases and norms are left out
    (under a thousandth). Attention's own products are not in it either: they depend on the lengths.
    """

    layers: Mapping[tuple[int, int], int]
    head: tuple[int, int]

    @property
    def layer_weights(self) -> int:
        """Weights that every token is multiplied with."""
        return sum(outputs * inputs * count for (outputs, inputs), count in self.layers.items())

    @property
    def head_weights(self) -> int:
        """Weights that every needed row is multiplied with: hidden x vocabulary."""
        return self.head[0] * self.head[1]


@dataclass(frozen=True, slots=True)
class Work:
    """Positions to compute: input_tokens if nothing is shared, unique_tokens if every common beginning is.

    head_rows: distinct positions whose logits are asked for.
    """

    input_tokens: int
    unique_tokens: int
    head_rows: int

    def flops(self, matrices: Matrices) -> int:
        """2 x weights for each unique token and each needed row of the head (a multiplication and an addition)."""
        return 2 * (self.unique_tokens * matrices.layer_weights + self.head_rows * matrices.head_weights)


@dataclass(frozen=True, slots=True)
class Decoding:
    """What is drawn after the prompts: tokens fed back into the model, and at least how many steps that takes."""

    tokens: int
    steps: int

    def flops(self, matrices: Matrices) -> int:
        """2 x weights, the head's included, for each token fed back."""
        return 2 * self.tokens * (matrices.layer_weights + matrices.head_weights)

    def bytes_read(self, matrices: Matrices, bytes_per_weight: int) -> int:
        """Every weight once a step."""
        return self.steps * (matrices.layer_weights + matrices.head_weights) * bytes_per_weight


def floor_seconds(
    work: Work,
    decoding: Decoding,
    matrices: Matrices,
    *,
    matrix_rate: float,
    memory_rate: float,
    bytes_per_weight: int,
) -> tuple[float, float]:
    """(scoring and prefill, decoding) in seconds, at matrix_rate FLOP/s and memory_rate bytes/s.

    A step of decoding both multiplies and reads; at the least it takes the longer of the two.
    """
    drawn = max(decoding.flops(matrices) / matrix_rate, decoding.bytes_read(matrices, bytes_per_weight) / memory_rate)
    return work.flops(matrices) / matrix_rate, drawn


def count_work(inputs: Iterable[tuple[Sequence[int], int]]) -> Work:
    """The work of (tokens that the model reads, how many of their last positions' logits are needed)."""
    # A position is its token and the position before it, so equal beginnings are equal positions.
    positions: dict[tuple[int, int], int] = {}
    rows: set[int] = set()
    total = 0
    for tokens, needed in inputs:
        total += len(tokens)
        path = []
        before = -1
        for token in tokens:
            before = positions.setdefault((before, token), len(positions))
            path.append(before)
        rows.update(path[len(path) - needed :])
    return Work(total, len(positions), len(rows))


def decoding_of(drawn: Iterable[int]) -> Decoding:
    """The decoding of completions with so many tokens. The first comes from the prompt, the last isn't fed back.

    All samples at once would take as many steps as the longest needs.
    """
    fed = [max(0, tokens - 1) for tokens in drawn]
    return Decoding(sum(fed), max(fed, default=0))


def inputs_of(
    requests: Sequence[Request], tokenizer: "PreTrainedTokenizerBase", max_length: int
) -> list[tuple[list[int], int]]:
    """What the model reads for `requests` in a window of `max_length`, and how many last positions are asked for.

    A prompt to be completed is one input, of which the last position is needed; see `decoding_of` for the rest.
    """
    inputs: list[tuple[list[int], int]] = []
    choices = [(r.context, r.continuation or "") for r in requests if r.kind == "choice"]
    for context, targets in encoding.encode_pairs(tokenizer, choices):
        read, _ = encoding.model_input(context, targets, max_length)
        inputs.append((read, len(targets)))
    documents = [r.context for r in requests if r.kind == "rolling"]
    tokens_of = encoding.encode_texts(tokenizer, documents)
    for document in documents:
        prefix = encoding.prefix_token(tokenizer)
        for read, targets in encoding.rolling_windows(tokens_of[document], prefix, max_length):
            inputs.append((read, len(targets)))
    completions = [(r.context, r.settings) for r in requests if r.kind == "generate"]
    prompts = encoding.encode_prompts(tokenizer, [context for context, _ in completions])
    for prompt, (_, settings) in zip(prompts, completions, strict=True):
        room = max_length - (settings.max_new_tokens if settings else 0)
        inputs.append((prompt[-room:], 1))
    return inputs
