"""The GPU's attention on a CPU: its layouts of sequences and keys, with torch's kernel written out in its place.

The kernel itself was checked on a GPU against the same plain text (docs/log.md); what is ours are the layouts.
"""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from engine_oracle import Subject, ask, check_completed, check_scored, counted, decoding_with, running_with, subject
from hypothesis import given
from hypothesis import strategies as st
from model_families import FAMILIES, make_family
from test_engine_families import COMPLETED, SCORED
from test_engine_remembering import conversations, same
from test_engine_tree import MIN_SHARED, PLAIN, PROMPTS, REQUESTS, WINDOW, flat, settings
from tiny_models import make_checkpoint
from torch import Tensor

from eval_platform.engine import packed, varlen
from eval_platform.engine.attention import Slots
from eval_platform.engine.packed import PackedModel
from eval_platform.values import Generation, make_request


def flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    q_ends: Tensor,
    k_ends: Tensor,
    most_q: int,
    most_k: int,
    *,
    scale: float,
    causal: bool,
    window: int | None = None,
    used: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What the kernel computes, one sequence after the other."""
    output, lse = torch.full_like(query, torch.nan), torch.full((query.shape[1], query.shape[0]), torch.nan)
    group = query.shape[1] // key.shape[1]
    for i, (a, b) in enumerate(itertools.pairwise(q_ends.tolist())):
        first, last = k_ends[i : i + 2].tolist()
        assert b - a <= most_q
        assert last - first <= most_k
        if used is not None:
            last = first + int(used[i])
        assert last > first, "of no keys the kernel makes no softmax"
        keys, values = (states[first:last].repeat_interleave(group, 1) for states in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query[a:b], keys).float() * scale
        behind = torch.arange(b - a)[:, None] + (last - first) - (b - a) - torch.arange(last - first)[None]
        if causal:
            scores.masked_fill_(behind < 0, -torch.inf)
        if window is not None:
            scores.masked_fill_(behind >= window, -torch.inf)
        lse[:, a:b] = scores.logsumexp(-1)
        output[a:b] = torch.einsum("hqk,khd->qhd", scores.softmax(-1).to(values.dtype), values)
    return output, lse


@pytest.fixture(scope="module", autouse=True)
def as_on_a_gpu() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "_GPUS", ("cpu",))
        patch.setattr(varlen, "flash", flash)
        yield


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return subject(make_checkpoint(tmp_path_factory.mktemp("llama"), max_length=WINDOW), "tree")


@settings(PLAIN, max_examples=25)
@given(requests=REQUESTS, budget=st.integers(3, 400), min_shared=MIN_SHARED, gathered=st.integers(1, 300))
def test_scores_are_those_of_one_request_at_a_time(
    llama: Subject, requests: list, budget: int, min_shared: int, gathered: int
) -> None:
    with pytest.MonkeyPatch.context() as patch, running_with(llama, budget=budget, min_shared=min_shared) as engine:
        patch.setattr(varlen, "_GATHERED", gathered)
        answered = ask(engine, requests)
    for request in requests:
        check_scored(llama, request, answered[request.request_id, 0])


@settings(PLAIN, max_examples=15)
@given(
    prompts=PROMPTS,
    slots=st.integers(1, 4),
    least_shared=st.integers(1, 40),
    budget=st.integers(1, 100),
    draws=st.sampled_from([0, 0, 3]),
    stop=st.sampled_from([(), ("a",)]),
)
def test_completions_are_those_of_one_prompt_at_a_time(
    llama: Subject, prompts: list[str], slots: int, least_shared: int, budget: int, draws: int, stop: tuple[str, ...]
) -> None:
    """Where none is drawn, a step is begun before what the last one said is looked at."""
    lengths = [Generation(1 + i, stop=stop) for i in range(len(prompts))]
    requests = flat([make_request("generate", text, settings=one) for text, one in zip(prompts, lengths, strict=True)])
    drawn = Generation(5, temperature=1.0)
    samples = [make_request("generate", prompts[0], settings=drawn, repeat=k) for k in range(draws)]
    with decoding_with(llama, slots=slots, least_shared=least_shared, budget=budget) as engine:
        answered = ask(engine, [*requests, *samples])
        alone = [ask(engine, [sample])[sample.request_id, sample.repeat] for sample in samples]
    for request in requests:
        check_completed(llama, request, answered[request.request_id, 0])
    assert [answered[sample.request_id, sample.repeat] for sample in samples] == alone


@pytest.mark.parametrize(
    "name",
    ["gpt2", "mistral", "mistral, wide window", "qwen3", "gemma3_text", "gpt_oss", "gpt_oss, wide window", "mixtral"],
)
@pytest.mark.parametrize("budget", [7, 50, 2048])
def test_a_family_has_right_numbers(name: str, budget: int, tmp_path: Path) -> None:
    (family,) = (family for family in FAMILIES if family.name == name)
    model = subject(make_family(tmp_path, family), "tree")
    with running_with(model, budget=budget) as engine:
        scored = ask(engine, SCORED)
    for request in SCORED:
        check_scored(model, request, scored[request.request_id, 0])
    with decoding_with(model, slots=3, budget=budget) as engine:
        completed = ask(engine, COMPLETED)
    for request in COMPLETED:
        check_completed(model, request, completed[request.request_id, 0])


def test_further_turns_are_answered_as_without_a_memory(tmp_path: Path) -> None:
    model = subject(make_checkpoint(tmp_path, max_length=160), "tree")
    with decoding_with(model, slots=3, budget=40) as engine:
        with counted(engine) as cold:
            asked, expected = conversations(engine)
        with engine.remembering(), counted(engine) as warm:
            again, answers = conversations(engine)
    assert again == asked
    assert all(same(other[key], one[key]) for one, other in zip(expected, answers, strict=True) for key in one)
    assert warm["forward_tokens"] < 0.7 * cold["forward_tokens"]


def test_what_the_kernel_does_not_do_goes_the_plain_path(tmp_path: Path) -> None:
    (family,) = (family for family in FAMILIES if family.name == "gemma2")
    assert subject(make_family(tmp_path, family), "auto").engine_path == "auto"
    model = subject(make_family(tmp_path, family), "auto")
    assert model.engine.info.engine_path == "plain"


def test_a_row_that_is_not_finite_is_seen(llama: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    through = PackedModel._through

    def ruined(self: PackedModel, tokens: Tensor, a_pass: object) -> tuple:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                varlen, "flash", lambda q, *_, **__: (torch.full_like(q, torch.nan), q.new_zeros(q.shape[1::-1]))
            )
            return through(self, tokens, a_pass)  # type: ignore[arg-type]

    monkeypatch.setattr(PackedModel, "_through", ruined)
    request = make_request("choice", "the river", " is")
    (answer,) = llama.engine.answer([request])
    assert answer.log_likelihood != answer.log_likelihood
    completed = make_request("generate", "the river", settings=Generation(3))
    (answer,) = llama.engine.answer([completed])
    assert answer.finish_reason == "non_finite"

    monkeypatch.undo()
    monkeypatch.setattr(llama.engine._packed, "first_broken", "")  # type: ignore[attr-defined]
    monkeypatch.setattr(llama.engine._head, "_scale", math.inf)  # type: ignore[attr-defined]
    (answer,) = llama.engine.answer([completed])
    assert answer.finish_reason == "non_finite"
    assert llama.engine._first_broken() == "a completion's logits"  # type: ignore[attr-defined]


def test_a_recorded_step_serves_only_the_slots_it_was_recorded_over(
    llama: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next slots often lie at the address of the last ones, in another shape."""
    model = llama.engine._packed  # type: ignore[attr-defined]
    monkeypatch.setattr(PackedModel, "_record", lambda _self, rows, slots: (rows, id(slots)))
    memory = torch.zeros(64)
    first, second = (Slots(keys=[memory.view(2, 1, length, -1)]) for length in (4, 8))
    assert first.keys[0].data_ptr() == second.keys[0].data_ptr()
    asked = [(2, first), (1, first), (2, first), (2, second), (2, first)]
    assert [model._recorded_step(*one) for one in asked] == [(rows, id(slots)) for rows, slots in asked]
    made: list[object] = []
    monkeypatch.setattr(PackedModel, "_record", lambda *_: made.append(1) or "step")
    model._recorded_step(1, first)
    model._recorded_step(1, first)
    assert len(made) == 1
