"""The last layer is computed for the rows that somebody asks for, where that changes nothing, and only there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_oracle import ask, check_completed, check_scored, counted, subject
from tiny_models import Architecture, make_checkpoint
from transformers import AutoModelForCausalLM

from eval_platform.engine import support
from eval_platform.engine.narrowing import narrow
from eval_platform.values import Generation, make_request

SHOTS = "the river is a mountain over the river Question: 42 Answer: Yes "
ASKED = [make_request("choice", f"{SHOTS * k}the river", " is over") for k in (1, 2, 3)]
COMPLETED = [make_request("generate", SHOTS * k, settings=Generation(1)) for k in (1, 2)]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_last_products_are_made_for_the_rows_of_targets(architecture: Architecture, tmp_path: Path) -> None:
    tiny = subject(make_checkpoint(tmp_path, architecture=architecture, max_length=96), "tree")
    model: Any = tiny.engine._model  # type: ignore[attr-defined]
    last = model.model.layers[-1].mlp.down_proj if architecture == "llama" else model.transformer.h[-1].mlp.c_proj
    rows = 0

    def count(_layer: Any, given: Any) -> None:
        nonlocal rows
        rows += given[0].shape[1]

    handle = last.register_forward_pre_hook(count)
    with counted(tiny.engine) as computed:
        answered = ask(tiny.engine, ASKED)
    assert rows == computed["head_rows"] < computed["forward_tokens"] / 3
    for request in ASKED:
        check_scored(tiny, request, answered[request.request_id, 0])
    rows = 0
    completed = ask(tiny.engine, COMPLETED)
    assert rows == len(COMPLETED)
    handle.remove()
    for request in COMPLETED:
        check_completed(tiny, request, completed[request.request_id, 0])


class _Mixing(torch.nn.Module):
    """Gives each row something of the row before it."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x + x.roll(1, dims=1))


def test_where_rows_are_not_apart_behind_the_last_attention_all_are_computed(tmp_path: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(make_checkpoint(tmp_path), dtype=torch.float32).eval()
    expected = support.reference(model)
    packed = support.packed_model(model, expected)
    tokens = expected.sequences[0][0]
    assert narrow(model, packed, tokens, expected.hidden) == 4  # o_proj and the MLP's three
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    packed = support.packed_model(model, expected)
    model.model.norm = _Mixing(model.model.norm)
    assert narrow(model, packed, tokens, expected.hidden) == 0
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in model.modules())
