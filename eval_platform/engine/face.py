"""The engine's face: what every way of running a model offers."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from eval_platform.values import Request, Response


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """What ran: recorded with every evaluation, never hashed. max_length in tokens, vocab_size in logits per position.

    numerics_version rises when a change of ours may move log-likelihoods; comparisons across it are flagged.
    """

    device: str
    dtype: str
    max_length: int
    engine_path: str  # "plain" | "tree" | "tree+plain": completions took the plain path
    n_parameters: int
    numerics_version: int
    versions: Mapping[str, str]
    architecture: str
    vocab_size: int


@dataclass(frozen=True, slots=True)
class TokenScore:
    """One scored token after all before it: log-probability in nats; alternatives are the likeliest tokens there.

    text is the token's own (a part of a character shows as U+FFFD). alternatives: (text, log-probability), best first.
    """

    token: int
    text: str
    log_probability: float
    is_greedy: bool
    alternatives: tuple[tuple[str, float], ...] = ()


class Engine(Protocol):
    """A loaded checkpoint that answers."""

    @property
    def info(self) -> EngineInfo: ...

    def answer(self, requests: Sequence[Request]) -> Iterator[Response]:
        """Answer every request once, in any order, each as soon as it is known; an empty sequence gives nothing.

        choice: log_likelihood of the continuation after the context (nats, natural logarithm, summed over n_tokens
        continuation tokens) and is_greedy, whether every one of them was the most probable token.
        rolling: log_likelihood of all n_tokens tokens of `context`; is_greedy is None.
        generate: text up to the first stop string, n_tokens drawn (a final end-of-sequence token included),
        finish_reason "stop", "eos" or "length".

        A NaN is a value here: log_likelihood NaN with is_greedy False, and for completions, whose log_likelihood is
        otherwise None, log_likelihood NaN and finish_reason "non_finite" with the text drawn before.

        Raises, when iterated: TaskError for a request that no answer exists for (empty continuation, longer than
        the model's window), naming it, before anything is computed; CheckpointError for a tokenizer that cannot
        encode it for this model; MemoryError when a single request does not fit.
        """
        ...

    def remembering(self) -> AbstractContextManager[None]:
        """Within, completions are kept for what goes on from them: of a later request that begins with an earlier
        prompt and its answer (the next turn of a conversation) only what is new is computed. What is kept is bounded
        by a share of the free memory, and freed at the end. It changes no answer beyond rounding; an engine for which
        there is nothing to keep computes everything anew.
        """
        ...

    def token_scores(self, request: Request, alternatives: int = 0) -> list[TokenScore]:
        """What each scored token of a choice or rolling request adds to its log-likelihood, and the `alternatives`
        likeliest tokens at its place. For a person who looks: one forward of its own, nothing shared.

        Raises as `answer` does, and TaskError for a request to generate, which has no token to score.
        """
        ...
