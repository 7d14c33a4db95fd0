"""Batches under a budget, and what happens when memory runs out."""

from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import make_checkpoint

from eval_platform.engine import load
from eval_platform.engine.batching import run_batches
from eval_platform.engine.likelihood import Row, rows_that_fit
from eval_platform.errors import classify
from eval_platform.values import Generation, RunSettings, make_request

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=40)


def first_n(budget: int) -> Any:
    return lambda rest, share: min(len(rest), int(budget * share))


@given(rows=st.lists(st.integers(), max_size=50), budget=st.integers(0, 20), fits=st.integers(1, 20))
def test_every_row_once_in_order_whatever_fits(rows: list[int], budget: int, fits: int) -> None:
    sizes: list[int] = []

    def run(batch: list[int]) -> list[int]:
        sizes.append(len(batch))
        if len(batch) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return [-row for row in batch]

    done = list(run_batches(rows, run, first_n(budget)))
    assert [row for batch, _ in done for row in batch] == rows
    assert all(result == [-row for row in batch] for batch, result in done)
    # The share never grows again: once a batch has failed, none as large is tried.
    failed = [size for size in sizes if size > fits]
    assert failed == sorted(set(failed), reverse=True)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_one_row_that_does_not_fit_is_an_infrastructure_error(error: Exception) -> None:
    def run(batch: list[int]) -> None:
        raise error

    with pytest.raises(MemoryError, match="one request does not fit") as caught:
        list(run_batches([1, 2, 3], run, first_n(3)))
    assert classify(caught.value) == "infrastructure"


def test_other_errors_are_not_swallowed() -> None:
    tried: list[int] = []

    def run(batch: list[int]) -> None:
        tried.append(len(batch))
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        list(run_batches([1, 2, 3], run, first_n(3)))
    assert tried == [3]


@given(lengths=LENGTHS, targets=st.integers(1, 5), tokens=st.integers(1, 200), logits=st.integers(1, 20000))
def test_rows_that_fit_is_the_most_that_fits(lengths: list[int], targets: int, tokens: int, logits: int) -> None:
    vocab = 50
    rows = [
        Row(tuple(range(length)), [(0, tuple(range(min(targets, length))))]) for length in sorted(lengths, reverse=True)
    ]

    def fits(batch: Sequence[Row]) -> bool:
        longest = max(len(row.tokens_in) for row in batch)
        kept = longest - min(row.first for row in batch)
        return len(batch) * longest <= tokens and len(batch) * kept * vocab <= logits

    size = rows_that_fit(deque(rows), tokens, logits, vocab)
    assert size >= 1
    assert size == 1 or fits(rows[:size])
    assert size == len(rows) or not fits(rows[: size + 1])


def test_out_of_memory_in_the_model_changes_no_answer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A fault planted in the model's forward: more than two rows do not fit."""
    path = make_checkpoint(tmp_path)
    requests = [make_request("choice", f"Question: {i} the river", " Yes") for i in range(9)]
    requests += [make_request("generate", f"Question: {i} the", settings=Generation(4)) for i in range(5)]
    whole = {
        response.request_id: response
        for response in load(path, RunSettings(device="cpu", engine_path="plain")).answer(requests)
    }
    engine: Any = load(path, RunSettings(device="cpu", engine_path="plain"))
    forward = engine._model.forward

    def tight(*args: Any, **kwargs: Any) -> Any:
        if len(kwargs["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(*args, **kwargs)

    engine._model.forward = tight
    parts = {response.request_id: response for response in engine.answer(requests)}
    assert parts.keys() == whole.keys()
    for key, response in parts.items():
        assert response.text == whole[key].text
        if response.log_likelihood is not None:
            assert response.log_likelihood == pytest.approx(whole[key].log_likelihood, abs=1e-4)
    assert any("out of memory" in message for message in caplog.messages)


@pytest.mark.parametrize("rope", ["default", "dynamic"])
def test_rows_of_unequal_length_never_mix_where_length_chooses_the_frequencies(rope: str, tmp_path: Path) -> None:
    import json

    path = make_checkpoint(tmp_path, max_length=64)
    file = path / "config.json"
    config = json.loads(file.read_text())
    config["rope_parameters"] = {"rope_type": rope, "rope_theta": 10000.0, "factor": 2.0}
    file.write_text(json.dumps(config))
    engine: Any = load(path, RunSettings(device="cpu", engine_path="plain"))
    shapes: list[tuple[int, int]] = []
    forward = engine._model.forward

    def noting(*args: Any, **kwargs: Any) -> Any:
        shapes.append(tuple(kwargs["input_ids"].shape))
        return forward(*args, **kwargs)

    engine._model.forward = noting
    list(engine.answer([make_request("choice", "the" + " river" * n, " Yes") for n in (1, 1, 2, 3)]))
    expected = [(3, 5)] if rope == "default" else [(1, 5), (1, 4), (1, 3)]
    assert len(shapes) == len(expected)
    assert [rows for rows, _ in shapes] == [rows for rows, _ in expected]
