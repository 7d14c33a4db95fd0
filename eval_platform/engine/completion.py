"""What does it go on to say? Greedy and sampled completions of padded prompts, with stop strings.

The loop and the key-value cache are transformers' own `generate`, which knows every architecture's positions, masks
and caches. Ours are the two things it asks at every step: which token comes next, and is the row finished.
"""

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from eval_platform.values import Generation

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


# What a plain generation config says of how a completion is drawn, whatever the checkpoint's says.
PLAIN: Mapping[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "temperature": None,
    "top_k": None,
    "top_p": None,
    "min_p": None,
    "typical_p": None,
    "max_length": None,
    "max_new_tokens": None,
    "max_time": None,
    "stop_strings": None,
    "remove_invalid_values": False,
    "return_dict_in_generate": False,
    "output_scores": False,
    "output_logits": False,
    "use_cache": True,
}


@dataclass(slots=True)
class Prompt:
    """A prompt's tokens, how it is completed, what its draws are seeded with, and the tokens it lost on the left."""

    owner: int
    tokens: list[int]
    settings: Generation
    seed_text: str
    truncated: int


@dataclass(slots=True)
class Completion:
    """Tokens drawn so far for one prompt, and why it ended ("" while it goes on)."""

    tokens: list[int] = field(default_factory=list)
    finish_reason: str = ""

    def add(self, token: int, ends: frozenset[int], holds_stop: "StopFinder") -> None:
        """Take the next token, and end where it is one of `ends` or completes a stop string."""
        self.tokens.append(token)
        if token in ends:
            self.finish_reason = "eos"
        elif holds_stop(self.tokens):
            self.finish_reason = "stop"


def end_tokens(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> frozenset[int]:
    """Every token that ends a completion: the generation config's (there may be several) and the tokenizer's EOS."""
    stored = cast(GenerationConfig, model.generation_config).eos_token_id
    found: list[Any] = [tokenizer.eos_token_id, *(stored if isinstance(stored, list) else [stored])]
    return frozenset(token for token in found if isinstance(token, int))


def plain_generation_config(stored: GenerationConfig) -> GenerationConfig:
    """The checkpoint's generation config without what a task decides: how long, when to stop, how to draw.

    What stays is what also shapes greedy text (repetition_penalty and its like), as it does in
    lm-evaluation-harness. remove_invalid_values goes: it would hide a NaN.
    """
    config = copy.deepcopy(stored)
    config.update(**PLAIN)
    return config


@torch.inference_mode()
def complete(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Prompt],
    ends: frozenset[int],
) -> list[Completion]:
    """Complete `prompts`, all under the same settings, in one padded batch. A row that has ended draws nothing more.

    A prompt's completion depends on its own tokens and seed only (beyond the rounding of a padded batch).
    """
    settings = prompts[0].settings
    longest = max(len(prompt.tokens) for prompt in prompts)
    # Any token pads: it is masked, and what follows a row's end is never read.
    pad = min(ends) if ends else 0
    inputs = torch.full((len(prompts), longest), pad, dtype=torch.long)
    mask = torch.zeros((len(prompts), longest), dtype=torch.long)
    # A completion goes on where a prompt ends, but an encoder's learned positions count from where it begins.
    pads_right = model.config.is_encoder_decoder
    for i, prompt in enumerate(prompts):
        first = 0 if pads_right else longest - len(prompt.tokens)
        inputs[i, first : first + len(prompt.tokens)] = torch.tensor(prompt.tokens)
        mask[i, first : first + len(prompt.tokens)] = 1

    rows = [Completion() for _ in prompts]
    draw = _Draw(rows, settings, [prompt.seed_text for prompt in prompts])
    finish = _Finish(rows, StopFinder(tokenizer, settings.stop), ends)
    config = copy.deepcopy(cast(GenerationConfig, model.generation_config))
    config.update(max_new_tokens=settings.max_new_tokens, pad_token_id=pad, eos_token_id=sorted(ends) or None)
    cast(Any, model).generate(
        inputs=inputs.to(model.device),
        attention_mask=mask.to(model.device),
        generation_config=config,
        logits_processor=LogitsProcessorList([draw]),
        stopping_criteria=StoppingCriteriaList([finish]),
    )
    for row in rows:
        row.finish_reason = row.finish_reason or "length"
    return rows


def final_text(tokenizer: "PreTrainedTokenizerBase", tokens: Sequence[int], stops: Sequence[str]) -> tuple[str, bool]:
    """The completion's text, without special tokens, up to its first stop string, and whether it held one.

    Cut at one stop string after the other, in their order, as lm-evaluation-harness 0.4.13 does
    (models/utils.py:postprocess_generated_text); its EOS text is cut at too, last.
    """
    text = str(tokenizer.decode(list(tokens), skip_special_tokens=True))
    whole = text
    for stop in stops:
        text = text.split(stop)[0] if stop else text
    stopped = len(text) < len(whole)
    if tokenizer.eos_token:
        text = text.split(str(tokenizer.eos_token))[0]
    return text, stopped


class StopFinder:
    """Says whether a growing completion holds a stop string, without decoding all of it at every token."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", stops: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stops = [stop for stop in stops if stop]
        # A token is at least one byte of text, so a stop string that a token has just completed lies within its last
        # (bytes of the stop string) tokens; a few more, because a decoder may drop a space at the start of the window.
        self._window = max((len(stop.encode()) for stop in self._stops), default=0) + 4
        self._last = {stop[-1] for stop in self._stops}
        # Where a decoder drops or moves spaces, a token may complete a stop string without showing its last character.
        self._look_always = bool(
            any(character.isspace() for character in self._last)
            or getattr(tokenizer, "clean_up_tokenization_spaces", False)
        )
        self._may_complete: dict[int, bool] = {}

    def __call__(self, tokens: Sequence[int]) -> bool:
        """Whether the text of `tokens`, special tokens included, holds a stop string near its end."""
        if not self._stops or not self._may_be_completed_by(tokens[-1]):
            return False
        # Special tokens are kept: many a task stops at one by its text ("<|im_end|>").
        tail = str(self._tokenizer.decode(list(tokens[-self._window :]), skip_special_tokens=False))
        return any(stop in tail for stop in self._stops)

    def _may_be_completed_by(self, token: int) -> bool:
        """Whether `token` shows the last character of a stop string, or some bytes of a character."""
        if self._look_always:
            return True
        if token not in self._may_complete:
            text = str(self._tokenizer.decode([token], skip_special_tokens=False))
            self._may_complete[token] = "\ufffd" in text or not self._last.isdisjoint(text)
        return self._may_complete[token]


class _Draw(LogitsProcessor):
    """Chooses each row's next token. Greedy rows keep their logits, whose argmax transformers takes.

    A sampled row's logits become -inf but for the token drawn here, so that the draw comes from a generator of the
    row's own: neither its neighbours nor the batch's order change what it draws.
    """

    def __init__(self, rows: Sequence[Completion], settings: Generation, seed_texts: Sequence[str]) -> None:
        self._rows = rows
        self._settings = settings
        self._generators = [generator(text) for text in seed_texts] if settings.temperature > 0 else []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # The maximum is NaN if any logit is, +inf if one is, -inf if nothing is left to choose.
        broken = (~scores.amax(dim=-1).isfinite()).tolist()
        for i, row in enumerate(self._rows):
            if row.finish_reason:
                continue
            if broken[i]:
                row.finish_reason = "non_finite"
            elif self._generators:
                token = sample(scores[i].float().cpu(), self._settings, self._generators[i])
                scores[i] = -torch.inf
                scores[i, token] = 0.0
        return scores


class _Finish(StoppingCriteria):
    """Collects each row's tokens and says which rows have ended."""

    def __init__(self, rows: Sequence[Completion], holds_stop: StopFinder, ends: frozenset[int]) -> None:
        self._rows = rows
        self._holds_stop = holds_stop
        self._ends = ends

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        for row, token in zip(self._rows, input_ids[:, -1].tolist(), strict=True):
            if row.finish_reason:
                continue
            row.add(token, self._ends, self._holds_stop)
        ended = torch.tensor([bool(row.finish_reason) for row in self._rows], device=input_ids.device)
        return cast(torch.BoolTensor, ended)


def generator(seed_text: str) -> torch.Generator:
    """A generator of the prompt's own, on the CPU whatever the device, so that devices draw alike."""
    seed = int.from_bytes(hashlib.sha256(seed_text.encode()).digest()[:8], "big") >> 1
    return torch.Generator(device="cpu").manual_seed(seed)


def sample(logits: torch.Tensor, settings: Generation, generator: torch.Generator) -> int:
    """Draw one token from float32 `logits` [vocabulary]: temperature, then top_k, then top_p, as transformers orders.

    top_k keeps the k largest (and their equals); top_p the smallest set of most probable tokens whose probability
    reaches p (Holtzman et al. 2020, arXiv:1904.09751), the first always. The draw inverts the cumulative
    distribution in vocabulary order at one uniform number.
    """
    logits = logits / settings.temperature
    if 0 < settings.top_k < len(logits):
        smallest = logits.topk(settings.top_k).values[-1]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    probability = logits.double().softmax(dim=-1)
    if settings.top_p < 1.0:
        ordered, order = probability.sort(descending=True, stable=True)
        # Mass before each token: a token stays while what stands before it has not reached p yet.
        before = ordered.cumsum(0) - ordered
        dropped = before >= settings.top_p
        dropped[0] = False
        probability[order[dropped]] = 0.0
    cumulative = probability.cumsum(0)
    point = torch.rand((), dtype=torch.float64, generator=generator) * cumulative[-1]
    # right=True: the first token whose cumulative probability exceeds the point, so one of probability 0 never is.
    return min(int(torch.searchsorted(cumulative, point, right=True)), len(logits) - 1)
