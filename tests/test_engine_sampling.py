"""One drawn token: the distribution it comes from, and what top_k and top_p leave."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eval_platform.engine.completion import sample
from eval_platform.values import Generation

LOGITS = st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=12)


def draws(logits: list[float], generation: Generation, n: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return [sample(torch.tensor(logits), generation, generator) for _ in range(n)]


def test_frequencies_are_the_softmax_at_the_temperature() -> None:
    logits, n = [0.0, 1.0, 2.0, -1.0], 4000
    for temperature in (0.5, 1.0, 2.0):
        weights = [math.exp(value / temperature) for value in logits]
        drawn = draws(logits, Generation(1, temperature=temperature), n)
        # Pearson's chi-square over 3 degrees of freedom: above 21.1 with probability 1e-4; the seed is fixed.
        expected = [n * weight / sum(weights) for weight in weights]
        statistic = sum((drawn.count(i) - e) ** 2 / e for i, e in enumerate(expected))
        assert statistic < 21.1


@settings(max_examples=60, deadline=None)
@given(logits=LOGITS, top_k=st.integers(0, 14), top_p=st.floats(0.01, 1.0), seed=st.integers(0, 99))
def test_only_what_the_filters_leave_is_drawn(logits: list[float], top_k: int, top_p: float, seed: int) -> None:
    """Against transformers' own TopK and TopP, but for tokens at the edge where rounding decides."""
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    scores = torch.tensor([logits])
    none = torch.zeros((1, 0), dtype=torch.long)
    if 0 < top_k < len(logits):
        scores = TopKLogitsWarper(top_k)(none, scores)
    allowed = TopPLogitsWarper(min(1.0, top_p + 1e-5))(none, scores) if top_p < 1 else scores
    kept = {i for i, value in enumerate(allowed[0].tolist()) if value > -math.inf}
    # Among equals (to float32's precision) either order is right: what is as probable as a kept token may be drawn.
    least = min(logits[i] for i in kept) - 1e-5
    drawn = draws(logits, Generation(1, temperature=1.0, top_k=top_k, top_p=top_p), 20, seed)
    assert all(i in kept or logits[i] >= least for i in drawn)


def test_filters_leave_everything_they_should() -> None:
    logits = [math.log(p) for p in (0.5, 0.3, 0.15, 0.05)]
    assert set(draws(logits, Generation(1, temperature=1.0, top_p=0.79), 400)) == {0, 1}
    assert set(draws(logits, Generation(1, temperature=1.0, top_p=0.81), 400)) == {0, 1, 2}
    assert set(draws(logits, Generation(1, temperature=1.0, top_k=3), 400)) == {0, 1, 2}
    assert set(draws(logits, Generation(1, temperature=1.0), 400)) == {0, 1, 2, 3}


@pytest.mark.parametrize("position", [0, 1, 2])
def test_a_token_of_probability_zero_is_never_drawn(position: int) -> None:
    logits = [0.0, 0.0, 0.0]
    logits[position] = -math.inf
    assert position not in draws(logits, Generation(1, temperature=1.0), 200)
