"""What is asked, in tokens? Requests to rows and prompts for the model, and what came of them to responses."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from eval_platform.engine.completion import Completion, Prompt, final_text
from eval_platform.engine.encoding import (
    Tokens,
    encode_pairs,
    encode_prompts,
    encode_texts,
    model_input,
    prefix_token,
    rolling_windows,
)
from eval_platform.engine.likelihood import Row, Scored
from eval_platform.errors import CheckpointError, TaskError
from eval_platform.values import Request, Response

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(slots=True)
class Pending:
    """A request being scored: parts still to come, and what the finished ones gave."""

    request: Request
    n_tokens: int
    truncated: int
    parts: int
    scored: list[Scored] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        return len(self.scored) == self.parts


class Reader:
    """Turns requests into tokens, and refuses those that no answer exists for before anything is computed."""

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        max_length: int,
        vocab_size: int,
        *,
        seed: int,
        rolling_stride: int | None,
    ) -> None:
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._vocab_size = vocab_size
        self._seed = seed
        self._rolling_stride = rolling_stride

    def rows(self, requests: Sequence[Request]) -> tuple[list[Pending], list[Row]]:
        """`requests` to score, and the distinct inputs they need: one row serves every request with its input.

        A row's targets name their owner by its place in the first list.
        """
        pairs = [self._texts(request) for request in requests if request.kind == "choice"]
        encoded_pairs = iter(self._encode_pairs(pairs))
        documents = encode_texts(self._tokenizer, [r.context for r in requests if r.kind == "rolling"])
        pending: list[Pending] = []
        rows: dict[tuple[int, ...], Row] = {}
        for request in requests:
            if request.kind == "rolling":
                tokens = documents[request.context]
                windows = self._rolling(request, tokens)
                entry = Pending(request, len(tokens), 0, len(windows))
            else:
                window, truncated = self._choice(request, *next(encoded_pairs))
                windows = [window]
                entry = Pending(request, len(window[1]), truncated, 1)
            for tokens_in, targets in windows:
                key = tuple(tokens_in)
                rows.setdefault(key, Row(key, [])).targets.append((len(pending), tuple(targets)))
            pending.append(entry)
        return pending, list(rows.values())

    def windows(self, request: Request) -> list[tuple[Tokens, Tokens]]:
        """(what the model reads, the tokens scored) of each part of a request to score, in the order of its text."""
        if request.kind == "generate":
            raise TaskError(
                f"{name(request)} asks for a completion, which has no token to score", remedy="ask a choice or a text"
            )
        if request.kind == "rolling":
            return self._rolling(request, encode_texts(self._tokenizer, [request.context])[request.context])
        (pair,) = self._encode_pairs([self._texts(request)])
        return [self._choice(request, *pair)[0]]

    def prompts(self, requests: Sequence[Request]) -> list[Prompt]:
        """`requests` to complete; a prompt names its owner by its place in `requests`."""
        prompts = []
        texts = [request.context for request in requests]
        for owner, (request, tokens) in enumerate(zip(requests, self._encode_prompts(texts), strict=True)):
            settings = request.settings
            if settings is None:
                raise TaskError(f"{name(request)} asks for a completion without settings", remedy="set max_new_tokens")
            most = self._most_new_tokens()
            if not 1 <= settings.max_new_tokens <= most:
                raise TaskError(
                    f"{name(request)} asks for {settings.max_new_tokens} new tokens; the model, whose window is "
                    f"{self._max_length} tokens, can give 1 to {most}",
                    remedy=f"set the task's max_gen_toks between 1 and {most}",
                )
            room = self._room(settings.max_new_tokens)
            self._refuse_unknown_tokens(tokens, request)
            # The seed is the request's content: the same question draws the same, wherever it stands in a batch.
            seed_text = f"{self._seed}:{request.request_id}:{request.repeat}"
            prompts.append(Prompt(owner, tokens[-room:], settings, seed_text, max(0, len(tokens) - room)))
        return prompts

    def scored(self, entry: Pending) -> Response:
        """The response to a request all of whose parts are scored."""
        # fsum is exact, so the order in which windows came back cannot show.
        values = [part.log_likelihood for part in entry.scored]
        total = math.fsum(values) if all(math.isfinite(value) for value in values) else sum(values)
        request = entry.request
        return Response(
            request_id=request.request_id,
            repeat=request.repeat,
            log_likelihood=total,
            is_greedy=all(part.is_greedy for part in entry.scored) if request.kind == "choice" else None,
            n_tokens=entry.n_tokens,
            finish_reason="scored",
            truncated_left_tokens=entry.truncated,
        )

    def completed(self, request: Request, prompt: Prompt, completion: Completion) -> Response:
        """The response to a request whose completion has ended."""
        text, stopped = final_text(self._tokenizer, completion.tokens, prompt.settings.stop)
        reason = completion.finish_reason
        broken = reason == "non_finite"
        if stopped and not broken:
            reason = "stop"
        return Response(
            request_id=request.request_id,
            repeat=request.repeat,
            log_likelihood=math.nan if broken else None,
            is_greedy=False if broken else None,
            text=text,
            n_tokens=len(completion.tokens),
            finish_reason=reason,
            truncated_left_tokens=prompt.truncated,
        )

    def _rolling(self, request: Request, tokens: Tokens) -> list[tuple[Tokens, Tokens]]:
        self._refuse_unknown_tokens(tokens, request)
        return list(self._windows(tokens))

    def _choice(self, request: Request, context: Tokens, targets: Tokens) -> tuple[tuple[Tokens, Tokens], int]:
        """((what the model reads, the tokens scored), context tokens cut off)."""
        self._refuse_unscorable(request, context, targets)
        tokens_in, truncated = self._input(context, targets)
        return (tokens_in, targets), truncated

    # Where context and continuation go in a decoder-only model; see seq2seq.py for the other kind.

    def _encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[Tokens, Tokens]]:
        return encode_pairs(self._tokenizer, pairs)

    def _encode_prompts(self, texts: Sequence[str]) -> list[Tokens]:
        return encode_prompts(self._tokenizer, texts)

    def _input(self, context: Tokens, continuation: Tokens) -> tuple[Tokens, int]:
        """What the model reads, and how many context tokens were cut off on the left."""
        return model_input(context, continuation, self._max_length)

    def _windows(self, tokens: Tokens) -> Iterator[tuple[Tokens, Tokens]]:
        """(what the model reads, the tokens scored) of each window of a document."""
        return rolling_windows(tokens, prefix_token(self._tokenizer), self._max_length, self._rolling_stride)

    def _most_new_tokens(self) -> int:
        return self._max_length - 1  # at least one prompt token beside them

    def _room(self, max_new_tokens: int) -> int:
        """How many prompt tokens fit beside the new ones."""
        return self._max_length - max_new_tokens

    def _texts(self, request: Request) -> tuple[str, str]:
        if request.continuation is None:
            raise TaskError(
                f"{name(request)} is a choice without a continuation", remedy="give every choice a text to score"
            )
        return request.context, request.continuation

    def _refuse_unscorable(self, request: Request, context: list[int], continuation: list[int]) -> None:
        if not continuation:
            raise TaskError(
                f"{name(request)}: its continuation {request.continuation!r} adds no token to its context, "
                "so it has no log-likelihood",
                remedy="give every choice a text of its own, and separate it from its context (target_delimiter)",
            )
        if len(continuation) > self._max_length:
            raise TaskError(
                f"{name(request)}: its continuation has {len(continuation)} tokens, "
                f"more than the model's window of {self._max_length}",
                remedy="shorten the choice, or ask this task of models with a longer window only",
            )
        self._refuse_unknown_tokens(context, request)
        self._refuse_unknown_tokens(continuation, request)

    def _refuse_unknown_tokens(self, tokens: Sequence[int], request: Request) -> None:
        worst = max(tokens, default=0)
        if worst >= self._vocab_size:
            token = self._tokenizer.convert_ids_to_tokens(worst)
            raise CheckpointError(
                f"{name(request)}: the tokenizer gives token {worst} ({token!r}), "
                f"but the model knows {self._vocab_size} tokens",
                remedy="save the checkpoint with the tokenizer it was trained with",
            )


def name(request: Request) -> str:
    """A request as an error or the log names it."""
    start = request.context if len(request.context) <= 60 else request.context[:57] + "..."
    return f"request {request.request_id} ({request.kind}, context {start!r})"
