"""What would one request at a time answer? The engine's answers by whole forwards of transformers, without batch,
cache or tree; and what a tree may compute at most, by plain sets.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval_platform.engine import Engine, decoding, load
from eval_platform.engine.encoding import (
    encode_pairs,
    encode_prompts,
    encode_texts,
    model_input,
    prefix_token,
    rolling_windows,
)
from eval_platform.values import Generation, Request, Response, RunSettings


@dataclass
class Subject:
    """A checkpoint as the engine sees it and as transformers alone does."""

    path: Path
    engine: Engine
    model: Any
    tokenizer: Any
    engine_path: str

    @property
    def window(self) -> int:
        return self.engine.info.max_length

    def with_budget(self, batch_tokens: int) -> Engine:
        return load(self.path, RunSettings(device="cpu", batch_tokens=batch_tokens, engine_path=self.engine_path))


def subject(path: Path, engine_path: str, *, dtype: str = "auto") -> Subject:
    """`engine_path` "auto" takes whichever path the engine takes; any other must be the one it took."""
    engine = load(path, RunSettings(device="cpu", engine_path=engine_path, dtype=dtype))
    assert engine_path in ("auto", engine.info.engine_path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, engine.info.dtype)).eval()
    return Subject(path, engine, model, AutoTokenizer.from_pretrained(path), engine_path)


def ask(engine: Engine, requests: Sequence[Request]) -> dict[tuple[str, int], Response]:
    responses = list(engine.answer(requests))
    assert len(responses) == len(requests)
    answered = {(response.request_id, response.repeat): response for response in responses}
    assert set(answered) == {(request.request_id, request.repeat) for request in requests}
    return answered


def log_likelihood(value: Response) -> float:
    assert value.log_likelihood is not None
    return value.log_likelihood


def tolerance(n_tokens: int) -> float:
    return max(1e-4, 1e-5 * n_tokens)


# -- scoring


def by_hand(tiny: Subject, tokens_in: list[int], targets: list[int]) -> tuple[float, bool, float]:
    """(log-likelihood, greedy, smallest gap between the two best logits) of targets at the end of tokens_in."""
    with torch.no_grad():
        logits = tiny.model(torch.tensor([tokens_in]), use_cache=False).logits
    logits = logits[0, len(tokens_in) - len(targets) :].double()
    log_probability = logits - logits.exp().sum(-1, keepdim=True).log()
    best = logits.topk(2).values
    total = sum(float(log_probability[i, token]) for i, token in enumerate(targets))
    return total, logits.argmax(-1).tolist() == targets, float((best[:, 0] - best[:, 1]).min())


def inputs_of(tiny: Subject, request: Request) -> list[tuple[list[int], list[int]]]:
    """(input, targets) of every window that a request to be scored needs."""
    if request.kind == "rolling":
        tokens = encode_texts(tiny.tokenizer, [request.context])[request.context]
        return list(rolling_windows(tokens, prefix_token(tiny.tokenizer), tiny.window))
    assert request.continuation is not None
    ((context, continuation),) = encode_pairs(tiny.tokenizer, [(request.context, request.continuation)])
    return [(model_input(context, continuation, tiny.window)[0], continuation)]


def check_scored(tiny: Subject, request: Request, response: Response) -> float:
    """Asserts that `response` is right; returns how far its log-likelihood is from the one by hand, in nats."""
    parts = [by_hand(tiny, *window) for window in inputs_of(tiny, request)]
    n_tokens = sum(len(targets) for _, targets in inputs_of(tiny, request))
    error = abs(log_likelihood(response) - sum(part[0] for part in parts))
    assert error <= tolerance(n_tokens), f"{error:.2e} nats off over {n_tokens} tokens"
    assert response.n_tokens == n_tokens
    assert response.finish_reason == "scored"
    if request.kind == "rolling":
        assert response.is_greedy is None
        return error
    ((_, greedy, gap),) = parts
    if gap > tolerance(1):
        assert response.is_greedy == greedy
    assert request.continuation is not None
    ((context, continuation),) = encode_pairs(tiny.tokenizer, [(request.context, request.continuation)])
    assert response.truncated_left_tokens == model_input(context, continuation, tiny.window)[1]
    return error


# -- completions


def greedy_by_hand(tiny: Subject, prompt: list[int], settings: Generation) -> tuple[str, str]:
    """(text, finish_reason) by whole forwards without a cache, looking at the whole text after every token."""
    drawn: list[int] = []
    for _ in range(settings.max_new_tokens):
        with torch.no_grad():
            token = int(tiny.model(torch.tensor([prompt + drawn]), use_cache=False).logits[0, -1].argmax())
        drawn.append(token)
        if token == tiny.tokenizer.eos_token_id:
            return text_of(tiny, drawn[:-1]), "eos"
        # Looked for with special tokens in their own words, as lm-evaluation-harness looks; the answer is without them.
        whole, text = str(tiny.tokenizer.decode(drawn)), text_of(tiny, drawn)
        if any(stop in whole for stop in settings.stop):
            return text[: min((text.index(stop) for stop in settings.stop if stop in text), default=len(text))], "stop"
    return text_of(tiny, drawn), "length"


def text_of(tiny: Subject, drawn: list[int]) -> str:
    return str(tiny.tokenizer.decode(drawn, skip_special_tokens=True))


def prompt_of(tiny: Subject, request: Request) -> list[int]:
    """The tokens that a completion of `request` starts from."""
    assert request.settings is not None
    (tokens,) = encode_prompts(tiny.tokenizer, [request.context])
    return tokens[-(tiny.window - request.settings.max_new_tokens) :]


def check_completed(tiny: Subject, request: Request, response: Response) -> None:
    assert request.settings is not None
    assert (response.text, response.finish_reason) == greedy_by_hand(tiny, prompt_of(tiny, request), request.settings)


# -- what has to be computed


def distinct_prefixes(sequences: Iterable[Sequence[int]]) -> int:
    """Token positions of a tree of `sequences` in which nothing stands twice."""
    return len({tuple(sequence[: i + 1]) for sequence in sequences for i in range(len(sequence))})


def distinct_targets(rows: Iterable[tuple[Sequence[int], Sequence[int]]]) -> int:
    """Of (input, targets): positions of the same tree after which some target is asked for."""
    return len({tuple(tokens_in[: len(tokens_in) - i]) for tokens_in, targets in rows for i in range(len(targets))})


@contextmanager
def counted(engine: Any) -> Iterator[dict[str, int]]:
    """What a tree engine computes within, filled in at the end."""
    before = dict(engine.counters)
    found: dict[str, int] = {}
    yield found
    found.update({key: value - before[key] for key, value in engine.counters.items()})


# -- an engine under other limits


@contextmanager
def running_with(tiny: Subject, *, budget: int = 2048, min_shared: int = 1) -> Iterator[Any]:
    """The engine with other limits than it would choose for a model of this size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny.engine, "_budget", budget)
        patch.setattr(tiny.engine, "_min_shared", min_shared)
        yield tiny.engine


@contextmanager
def decoding_with(tiny: Subject, *, slots: int, least_shared: int = 4, budget: int = 2048) -> Iterator[Any]:
    """As `running_with`, with completions in few slots and short beginnings shared."""
    with pytest.MonkeyPatch.context() as patch, running_with(tiny, budget=budget) as engine:
        patch.setitem(decoding._SLOTS, "cpu", slots)
        patch.setattr(decoding, "_LEAST_SHARED", least_shared)
        yield engine
