"""Every family of model takes the tree's path with right numbers, or the plain one with a reason and right numbers."""

import logging
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_oracle import ask, check_completed, check_scored, subject
from model_families import FAMILIES, Family, make_family

from eval_platform.engine import kernels
from eval_platform.engine.products import Linear
from eval_platform.values import Generation, Request, make_request

# Families that go the plain path, and a part of the reason that the log gives. All others go through the tree.
PLAIN = {
    "llama, dynamic rope": "rope_type dynamic",
    "phi3, longrope": "rope_type longrope",
    "llama4_text": "its class does not say which of its modules is the model without the head",
    "falcon, rotary": "it makes its attention masks by itself",
    "falcon, alibi": "it makes its attention masks by itself",
    "falcon, grouped": "it makes its attention masks by itself",
    "gpt_neo": "it makes its attention masks by itself",
    "gptj": "it makes its attention masks by itself",
    "bloom": "its forward takes no position ids",
    "mpt": "its forward takes no position ids",
    "mamba": "its forward takes no position ids",
    "deepseek_v32": "DeepseekV32Indexer",
    "deepseek_v4": "Compressor",
    "recurrent_gemma": "1 of its 3 layers",
    "jamba": "1 of its 3 layers",
    "bamba": "1 of its 3 layers",
    "lfm2": "1 of its 3 layers",
    "qwen3_next": "1 of its 3 layers",
    "falcon_h1": "its hidden states come out otherwise",
    "modernbert-decoder": "its log-probabilities come out otherwise",
}
# Families whose numbers change with padding on the left, mask or no mask: transformers carries it into their state.
PADDING_SHOWS = ("recurrent_gemma", "deepseek_v4")
MIXTURES = ("mixtral", "gpt_oss", "qwen2_moe", "granitemoe", "deepseek_v2")
# One of each way to have linear layers: with and without biases, transposed, compressed, tied heads, experts, capping.
PACKED = ("llama, tied, biases", "gpt2", "phi", "gemma2", "qwen2_moe", "deepseek_v3")
WORDS = ["the", "river", "is", "a", "mountain", "Question:", "Answer:", "Yes", "No", "東京", "café", "42", "over", ")"]
_draw = random.Random(3)


def some_words(n: int) -> str:
    return " ".join(_draw.choices(WORDS, k=n))


# Some forty tokens in common: longer than every window of the families, and than the sequences of the check at load.
SHOTS = some_words(20)
SCORED: list[Request] = [
    *[make_request("choice", f"{SHOTS} {some_words(n)}", f" {some_words(3)}") for n in (1, 2, 5)],
    *[make_request("choice", f"{SHOTS} mountain", letter) for letter in (" Yes", " No")],
    make_request("choice", "", " the river"),
    make_request("rolling", some_words(60)),
]
COMPLETED: list[Request] = [
    make_request("generate", prompt, settings=Generation(6))
    for prompt in (SHOTS, f"{SHOTS} over", f"{SHOTS} over the", "the river")
]


@pytest.fixture(scope="module")
def table() -> Iterator[list[tuple[str, str, float, str]]]:
    """A row for each family: name, path, worst difference in nats, reason; shown at the end by pytest -s."""
    rows: list[tuple[str, str, float, str]] = []
    yield rows
    print(f"\n{'family':24} {'path':11} {'worst, nats':>11}  reason")
    for name, path, worst, reason in rows:
        print(f"{name:24} {path:11} {worst:11.1e}  {reason}")


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_family_has_right_numbers_on_the_path_it_takes(
    family: Family,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    table: list[tuple[str, str, float, str]],
) -> None:
    with caplog.at_level(logging.WARNING, logger="eval_platform"):
        tiny = subject(make_family(tmp_path, family), "auto")
    said = [message for message in caplog.messages if "takes the plain path: " in message]
    reason = said[0].split("takes the plain path: ")[1] if said else ""
    answered = ask(tiny.engine, SCORED)
    worst = max(check_scored(tiny, request, answered[request.request_id, 0]) for request in SCORED)
    table.append((family.name, tiny.engine.info.engine_path, worst, reason))
    assert tiny.engine.info.engine_path == ("plain" if family.name in PLAIN else "tree")
    if family.name in PLAIN:
        assert PLAIN[family.name] in reason
    # All at once, unless padding shows.
    batches = [[request] for request in COMPLETED] if family.name in PADDING_SHOWS else [COMPLETED]
    for batch in batches:
        completed = ask(tiny.engine, batch)
        for request in batch:
            check_completed(tiny, request, completed[request.request_id, 0])


@pytest.mark.parametrize("name", PACKED)
def test_a_family_has_right_numbers_with_onednns_packed_products(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models this small keep torch's products by themselves, and large ones do where nothing else is faster."""
    (family,) = [family for family in FAMILIES if family.name == name]
    monkeypatch.setattr(kernels, "_SMALL_MODEL", 0)
    monkeypatch.setattr(kernels, "choose", lambda samples, seconds: dict.fromkeys(samples, "onednn-packed"))
    tiny = subject(make_family(tmp_path, family), "tree")
    assert any(type(module) is Linear for module in tiny.engine._model.modules())  # type: ignore[attr-defined]
    answered, completed = ask(tiny.engine, SCORED), ask(tiny.engine, COMPLETED)
    for request in SCORED:
        check_scored(tiny, request, answered[request.request_id, 0])
    for request in COMPLETED:
        check_completed(tiny, request, completed[request.request_id, 0])


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_of_experts_takes_the_tree_in_bfloat16(name: str, tmp_path: Path) -> None:
    """Although rounding sends some tokens of the check at load to other experts."""
    (family,) = [family for family in FAMILIES if family.name == name]
    tiny = subject(make_family(tmp_path, family), "auto", dtype="bfloat16")
    assert tiny.engine.info.engine_path == "tree"


@pytest.mark.parametrize("name", PADDING_SHOWS)
def test_padding_changes_no_completion(name: str, tmp_path: Path) -> None:
    (family,) = [family for family in FAMILIES if family.name == name]
    tiny = subject(make_family(tmp_path, family), "auto")
    completed = ask(tiny.engine, COMPLETED)
    for request in COMPLETED:
        check_completed(tiny, request, completed[request.request_id, 0])


def test_every_family_that_is_expected_on_the_plain_path_is_asked() -> None:
    assert set(PLAIN) <= {family.name for family in FAMILIES}


def test_a_deep_model_in_half_precision_is_measured_by_its_own_noise(tmp_path: Path) -> None:
    """Two right computations of it differ by more than a fixed bound allows; it takes the tree all the same."""
    deep = Family("llama, deep", "llama", {"num_hidden_layers": 40, "initializer_range": 0.4})
    model = subject(make_family(tmp_path, deep, dtype="bfloat16"), "auto")
    assert model.engine.info.engine_path == "tree"
