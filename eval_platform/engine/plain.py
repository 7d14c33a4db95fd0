"""The plain engine: length-sorted padded batches through transformers. Slow where prompts share much; the reference."""

import inspect
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eval_platform.engine.batching import run_batches
from eval_platform.engine.completion import (
    Completion,
    Prompt,
    complete,
    end_tokens,
    final_text,
    plain_generation_config,
)
from eval_platform.engine.encoding import (
    encode,
    encode_pair,
    encode_prompt,
    model_input,
    prefix_token,
    rolling_windows,
)
from eval_platform.engine.face import EngineInfo
from eval_platform.engine.likelihood import Row, Scored, rows_that_fit, score
from eval_platform.errors import CheckpointError, TaskError
from eval_platform.values import Generation, Request, Response, RunSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

# Padded positions in one forward pass. On two CPU cores 2,048 was 10-15 % faster than 1,024, and 256 slower still.
_BATCH_TOKENS = {"cpu": 2048, "cuda": 16384}
# Logits that one forward pass may put out: 512 MiB in float32.
_LOGITS = 2**27
# Decoding is bound by reading the weights once a step, so its batches may be wider than scoring's.
_DECODING_FACTOR = 8
_DECODING_ROWS = 64
# With these the rotary frequencies are fixed (transformers' modeling_rope_utils.dynamic_rope_update); "dynamic" and
# "longrope" choose them by the longest row of the batch, and an unknown kind may.
_FIXED_ROPE = {"default", "linear", "llama3", "yarn", "proportional"}


@dataclass(slots=True)
class _Pending:
    """A request being scored: parts still to come, and what the finished ones gave."""

    request: Request
    n_tokens: int
    truncated: int
    parts: int
    scored: list[Scored]


class PlainEngine:
    """Answers through one model and tokenizer; see `face.Engine` for what it promises."""

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        settings: RunSettings,
        versions: Mapping[str, str],
    ) -> None:
        if settings.max_length is None:
            raise ValueError("settings must be resolved before an engine is made of them")
        self._model = model
        self._tokenizer = tokenizer
        self._seed = settings.seed
        self._max_length = settings.max_length
        self._batch_tokens = settings.batch_tokens or _BATCH_TOKENS.get(model.device.type, _BATCH_TOKENS["cpu"])
        parameters = inspect.signature(model.forward).parameters
        self._keeps_logits = "logits_to_keep" in parameters
        text_config: Any = model.config.get_text_config()
        fixed_rope = _rope_types(text_config.to_dict()) <= _FIXED_ROPE
        # Rows of different length may share a batch when nothing but a row's own tokens decides its numbers.
        self._mixes_rows = fixed_rope
        # Without position ids (recurrent models, ALiBi) left padding is not promised to be invisible.
        self._mixes_prompts = fixed_rope and "position_ids" in parameters
        self._vocab_size = int(text_config.vocab_size)
        self._warned = False
        if model.generation_config is not None:
            model.generation_config = plain_generation_config(model.generation_config)
            self._ends = end_tokens(model, tokenizer)
        else:
            self._ends = frozenset()
        self._info = EngineInfo(
            device=str(model.device),
            dtype=str(model.dtype).removeprefix("torch."),
            max_length=self._max_length,
            engine_path="plain",
            n_parameters=model.num_parameters(),
            numerics_version=1,
            versions=dict(versions),
            architecture=type(model).__name__,
            vocab_size=self._vocab_size,
        )

    @property
    def info(self) -> EngineInfo:
        return self._info

    def answer(self, requests: Sequence[Request]) -> Iterator[Response]:
        """See `face.Engine.answer`. Everything is encoded, and refused where it must be, before the first forward."""
        scoring = [request for request in requests if request.kind != "generate"]
        generating = [request for request in requests if request.kind == "generate"]
        pending, rows = self._rows(scoring)
        prompts = self._prompts(generating)
        yield from self._score(pending, rows)
        for settings, group in prompts.items():
            yield from self._complete(generating, settings, group)

    # -- log-likelihoods

    def _rows(self, requests: Sequence[Request]) -> tuple[list[_Pending], list[Row]]:
        """Encode and cut `requests`. Those with the same input share one row, whatever part of it each has scored."""
        pending: list[_Pending] = []
        rows: dict[tuple[int, ...], Row] = {}

        def add(tokens_in: list[int], targets: list[int]) -> None:
            key = tuple(tokens_in)
            rows.setdefault(key, Row(key, [])).targets.append((len(pending), tuple(targets)))

        for request in requests:
            if request.kind == "rolling":
                tokens = encode(self._tokenizer, request.context)
                self._refuse_unknown_tokens(tokens, request)
                windows = list(rolling_windows(tokens, prefix_token(self._tokenizer), self._max_length))
                for tokens_in, targets in windows:
                    add(tokens_in, targets)
                pending.append(_Pending(request, len(tokens), 0, len(windows), []))
            else:
                context, targets = self._pair(request)
                tokens_in, truncated = model_input(context, targets, self._max_length)
                add(tokens_in, targets)
                pending.append(_Pending(request, len(targets), truncated, 1, []))
        # Longest first, so that memory runs out at once or never; then by tokens, so that the order is one.
        return pending, sorted(rows.values(), key=lambda row: (-len(row.tokens_in), row.tokens_in))

    def _pair(self, request: Request) -> tuple[list[int], list[int]]:
        if request.continuation is None:
            raise TaskError(
                f"{_name(request)} is a choice without a continuation", remedy="give every choice a text to score"
            )
        context, continuation = encode_pair(self._tokenizer, request.context, request.continuation)
        if not continuation:
            raise TaskError(
                f"{_name(request)}: its continuation {request.continuation!r} adds no token to its context, "
                "so it has no log-likelihood",
                remedy="give every choice a text of its own, and separate it from its context (target_delimiter)",
            )
        if len(continuation) > self._max_length:
            raise TaskError(
                f"{_name(request)}: its continuation has {len(continuation)} tokens, "
                f"more than the model's window of {self._max_length}",
                remedy="shorten the choice, or ask this task of models with a longer window only",
            )
        self._refuse_unknown_tokens(context + continuation, request)
        return context, continuation

    def _score(self, pending: Sequence[_Pending], rows: Sequence[Row]) -> Iterator[Response]:
        for entry in pending:
            if not entry.parts:  # an empty document: no token, probability one
                yield self._scored_response(entry)

        def take(rest: Sequence[Row], share: float) -> int:
            size = rows_that_fit(rest, int(self._batch_tokens * share), int(_LOGITS * share), self._vocab_size)
            return size if self._mixes_rows else _same_length([len(row.tokens_in) for row in _head(rest, size)])

        def run(batch: list[Row]) -> list[Scored]:
            return score(self._model, batch, keeps_logits=self._keeps_logits)

        for _, scored in run_batches(rows, run, take):
            for part in scored:
                entry = pending[part.owner]
                entry.scored.append(part)
                if len(entry.scored) == entry.parts:
                    yield self._scored_response(entry)

    def _scored_response(self, entry: _Pending) -> Response:
        request = entry.request
        # fsum is exact, so the order in which windows came back cannot show.
        values = [part.log_likelihood for part in entry.scored]
        total = math.fsum(values) if all(math.isfinite(value) for value in values) else sum(values)
        if not math.isfinite(total):
            self._warn_once(request)
        return Response(
            request_id=request.request_id,
            repeat=request.repeat,
            log_likelihood=total,
            is_greedy=all(part.is_greedy for part in entry.scored) if request.kind == "choice" else None,
            n_tokens=entry.n_tokens,
            finish_reason="scored",
            truncated_left_tokens=entry.truncated,
        )

    # -- completions

    def _prompts(self, requests: Sequence[Request]) -> dict[Generation, list[tuple[Prompt, int]]]:
        """Encoded prompts and how many tokens each lost on the left, longest first, by generation settings."""
        groups: dict[Generation, list[tuple[Prompt, int]]] = {}
        for owner, request in enumerate(requests):
            settings = request.settings
            if settings is None:
                raise TaskError(f"{_name(request)} asks for a completion without settings", remedy="set max_new_tokens")
            room = self._max_length - settings.max_new_tokens
            if settings.max_new_tokens < 1 or room < 1:
                raise TaskError(
                    f"{_name(request)} asks for {settings.max_new_tokens} new tokens; "
                    f"the model's window of {self._max_length} must hold at least one prompt token beside them",
                    remedy=f"set the task's max_gen_toks between 1 and {self._max_length - 1}",
                )
            tokens = encode_prompt(self._tokenizer, request.context)
            self._refuse_unknown_tokens(tokens, request)
            # The seed is the request's content: the same question draws the same, wherever it stands in a batch.
            seed_text = f"{self._seed}:{request.request_id}:{request.repeat}"
            prompt = Prompt(owner, tokens[-room:], seed_text)
            groups.setdefault(settings, []).append((prompt, max(0, len(tokens) - room)))
        for group in groups.values():
            group.sort(key=lambda pair: (-len(pair[0].tokens), pair[0].tokens, pair[0].seed_text))
        return groups

    def _complete(
        self, requests: Sequence[Request], settings: Generation, group: Sequence[tuple[Prompt, int]]
    ) -> Iterator[Response]:
        def take(rest: Sequence[tuple[Prompt, int]], share: float) -> int:
            longest = len(rest[0][0].tokens) + settings.max_new_tokens
            size = min(int(self._batch_tokens * _DECODING_FACTOR * share) // longest, int(_DECODING_ROWS * share))
            size = max(1, min(size, len(rest)))
            return size if self._mixes_prompts else _same_length([len(p.tokens) for p, _ in _head(rest, size)])

        def run(batch: list[tuple[Prompt, int]]) -> list[Completion]:
            return complete(self._model, self._tokenizer, [prompt for prompt, _ in batch], settings, self._ends)

        for batch, completions in run_batches(group, run, take):
            for (prompt, truncated), completion in zip(batch, completions, strict=True):
                yield self._completed_response(requests[prompt.owner], settings, completion, truncated)

    def _completed_response(
        self, request: Request, settings: Generation, completion: Completion, truncated: int
    ) -> Response:
        text, stopped = final_text(self._tokenizer, completion.tokens, settings.stop)
        reason = completion.finish_reason
        broken = reason == "non_finite"
        if broken:
            self._warn_once(request)
        elif stopped:
            reason = "stop"
        return Response(
            request_id=request.request_id,
            repeat=request.repeat,
            log_likelihood=math.nan if broken else None,
            is_greedy=False if broken else None,
            text=text,
            n_tokens=len(completion.tokens),
            finish_reason=reason,
            truncated_left_tokens=truncated,
        )

    # -- both

    def _refuse_unknown_tokens(self, tokens: Sequence[int], request: Request) -> None:
        worst = max(tokens, default=0)
        if worst >= self._vocab_size:
            token = self._tokenizer.convert_ids_to_tokens(worst)
            raise CheckpointError(
                f"{_name(request)}: the tokenizer gives token {worst} ({token!r}), "
                f"but the model knows {self._vocab_size} tokens",
                remedy="save the checkpoint with the tokenizer it was trained with",
            )

    def _warn_once(self, request: Request) -> None:
        if not self._warned:
            self._warned = True
            _log.warning("the model's output is not finite, first seen for %s", _name(request))


def _name(request: Request) -> str:
    start = request.context if len(request.context) <= 60 else request.context[:57] + "..."
    return f"request {request.request_id} ({request.kind}, context {start!r})"


def _head(rest: Sequence[Any], size: int) -> list[Any]:
    return [rest[i] for i in range(size)]


def _same_length(lengths: Sequence[int]) -> int:
    return next((i for i, length in enumerate(lengths) if length != lengths[0]), len(lengths))


def _rope_types(config: Mapping[str, Any]) -> set[str]:
    """Every rope_type named anywhere in a model config (some models have one per kind of layer)."""
    found: set[str] = set()
    for key, value in config.items():
        if key == "rope_type" and isinstance(value, str):
            found.add(value)
        elif isinstance(value, Mapping):
            found |= _rope_types(value)
    return found
