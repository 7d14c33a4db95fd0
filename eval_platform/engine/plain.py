"""The plain engine: length-sorted padded batches through transformers. Slow where prompts share much; the reference."""

import inspect
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any

import torch

from eval_platform.engine.batching import run_batches
from eval_platform.engine.completion import Completion, Prompt, complete, end_tokens, plain_generation_config
from eval_platform.engine.face import EngineInfo, TokenScore
from eval_platform.engine.likelihood import Row, Scored, rows_that_fit, score
from eval_platform.engine.memory import best_tokens
from eval_platform.engine.reading import Reader, name
from eval_platform.values import Request, Response, RunSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

# Logits that one forward pass may put out: 512 MiB in float32.
LOGITS = 2**27
# Decoding is bound by reading the weights once a step, so its batches may be wider than scoring's.
_DECODING_FACTOR = 8
_DECODING_ROWS = 64
# In the names of modules to which tokens before a prompt show, masked or not.
_PLACE_DEPENDENT = ("Compressor", "Indexer", "Recurrent")
# With these the rotary frequencies are fixed (transformers' modeling_rope_utils.dynamic_rope_update); "dynamic" and
# "longrope" choose them by the longest row of the batch, and an unknown kind may.
FIXED_ROPE = {"default", "linear", "llama3", "yarn", "proportional"}


class PlainEngine:
    """Answers through one model and tokenizer; see `face.Engine` for what it promises."""

    _reader_type = Reader

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        settings: RunSettings,
        info: EngineInfo,
    ) -> None:
        self._info = info
        self._model = model
        self._tokenizer = tokenizer
        self._batch_tokens = settings.batch_tokens or best_tokens(model.device)
        parameters = inspect.signature(model.forward).parameters
        self._keeps_logits = "logits_to_keep" in parameters
        text_config: Any = model.config.get_text_config()
        fixed_rope = rope_types(text_config.to_dict()) <= FIXED_ROPE
        # Rows of different length may share a batch when nothing but a row's own tokens decides its numbers.
        self._mixes_rows = fixed_rope
        # Without position ids (ALiBi), with a state, or with keys that are picked or summed up by their place, left
        # padding is not promised to be invisible.
        padding_shows = any(word in type(m).__name__ for m in model.modules() for word in _PLACE_DEPENDENT)
        self._mixes_prompts = fixed_rope and "position_ids" in parameters and not padding_shows
        self._vocab_size = info.vocab_size
        self._reader = self._reader_type(
            tokenizer, info.max_length, info.vocab_size, seed=settings.seed, rolling_stride=settings.rolling_stride
        )
        self._warned = False
        if model.generation_config is not None:
            model.generation_config = plain_generation_config(model.generation_config)
            self._ends = end_tokens(model, tokenizer)
        else:
            self._ends = frozenset()

    @property
    def info(self) -> EngineInfo:
        return self._info

    def answer(self, requests: Sequence[Request]) -> Iterator[Response]:
        """See `face.Engine.answer`. Everything is encoded, and refused where it must be, before the first forward."""
        scoring = [request for request in requests if request.kind != "generate"]
        generating = [request for request in requests if request.kind == "generate"]
        pending, rows = self._reader.rows(scoring)
        prompts = self._reader.prompts(generating)
        for entry in pending:
            if not entry.parts:  # an empty document: no token, probability one
                yield self._reader.scored(entry)
        for part in self._score(rows):
            entry = pending[part.owner]
            entry.scored.append(part)
            if entry.is_complete:
                yield self._finite_or_said(entry.request, self._reader.scored(entry))
        for prompt, completion in self._complete(prompts):
            request = generating[prompt.owner]
            yield self._finite_or_said(request, self._reader.completed(request, prompt, completion))

    def remembering(self) -> AbstractContextManager[None]:
        """See `face.Engine.remembering`. Here nothing is kept."""
        return nullcontext()

    def token_scores(self, request: Request, alternatives: int = 0) -> list[TokenScore]:
        """See `face.Engine.token_scores`."""
        found = []
        for tokens_in, targets in self._reader.windows(request):
            log_probability = torch.log_softmax(self._target_logits(tokens_in, targets).float(), dim=-1).cpu()
            likeliest = log_probability.topk(min(alternatives, log_probability.shape[-1]))
            for i, token in enumerate(targets):
                value = float(log_probability[i, token])
                others = zip(likeliest.indices[i].tolist(), likeliest.values[i].tolist(), strict=True)
                # The maximum is NaN if any is, and no token equals it then.
                is_greedy = value == float(log_probability[i].max())
                told = tuple((self._text_of(other), other_value) for other, other_value in others)
                found.append(TokenScore(token, self._text_of(token), value, is_greedy, told))
        return found

    @torch.inference_mode()
    def _target_logits(self, tokens_in: Sequence[int], targets: Sequence[int]) -> torch.Tensor:
        """[targets, vocabulary]"""
        ids = torch.tensor([list(tokens_in)], device=self._model.device)
        return self._model(input_ids=ids, use_cache=False).logits[0, len(tokens_in) - len(targets) :]

    def _text_of(self, token: int) -> str:
        return str(self._tokenizer.decode([token], skip_special_tokens=False))

    def _score(self, rows: Sequence[Row]) -> Iterator[Scored]:
        """Every target of every row, in any order."""
        # Longest first, so that memory runs out at once or never; then by tokens, so that the order is one.
        rows = sorted(rows, key=lambda row: (-len(row.tokens_in), row.tokens_in))

        def take(rest: Sequence[Row], share: float) -> int:
            size = rows_that_fit(rest, int(self._batch_tokens * share), int(LOGITS * share), self._vocab_size)
            return size if self._mixes_rows else same_length([len(row.tokens_in) for row in islice(rest, size)])

        def run(batch: list[Row]) -> list[Scored]:
            return score(self._model, batch, keeps_logits=self._keeps_logits)

        for _, scored in run_batches(rows, run, take):
            yield from scored

    def _complete(self, prompts: Sequence[Prompt]) -> Iterator[tuple[Prompt, Completion]]:
        """Every prompt's completion, in any order."""

        def take(rest: Sequence[Prompt], share: float) -> int:
            longest = len(rest[0].tokens) + rest[0].settings.max_new_tokens
            size = min(int(self._batch_tokens * _DECODING_FACTOR * share) // longest, int(_DECODING_ROWS * share))
            size = max(1, min(size, len(rest)))
            return size if self._mixes_prompts else same_length([len(p.tokens) for p in islice(rest, size)])

        def run(batch: list[Prompt]) -> list[Completion]:
            return complete(self._model, self._tokenizer, batch, self._ends)

        # A batch is drawn under one setting.
        ordered = sorted(prompts, key=lambda p: (repr(p.settings), -len(p.tokens), p.tokens, p.seed_text))
        for _, group in groupby(ordered, key=lambda p: p.settings):
            for batch, completions in run_batches(list(group), run, take):
                yield from zip(batch, completions, strict=True)

    def _finite_or_said(self, request: Request, response: Response) -> Response:
        value = response.log_likelihood
        if value is not None and not math.isfinite(value) and not self._warned:
            self._warned = True
            where = self._first_broken()
            _log.warning(
                "the model's output is not finite%s, first seen for %s", where and f" in {where}", name(request)
            )
        return response

    def _first_broken(self) -> str:
        """Where in the model a number was not finite first, if that is known."""
        return ""


def same_length(lengths: Sequence[Any]) -> int:
    """How many of `lengths` equal the first, up to the first that doesn't."""
    return next((i for i, length in enumerate(lengths) if length != lengths[0]), len(lengths))


def rope_types(config: Mapping[str, Any]) -> set[str]:
    """Every rope_type named anywhere in a model config (some models have one per kind of layer)."""
    found: set[str] = set()
    for key, value in config.items():
        if key == "rope_type" and isinstance(value, str):
            found.add(value)
        elif isinstance(value, Mapping):
            found |= rope_types(value)
    return found
