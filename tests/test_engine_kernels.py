"""The chosen products are F.linear's, whatever shape and dtype, and packing keeps no second copy of the weights."""

import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from tiny_models import ARCHITECTURES, make_model, make_tokenizer
from torch import nn
from transformers.pytorch_utils import Conv1D
from warm import run_warm

from eval_platform.engine import choice, head, kernels
from eval_platform.engine.kernels import Kernels, install
from eval_platform.engine.pages import Pages
from eval_platform.engine.products import KINDS, Linear, product

SHAPES = [(1, 1), (3, 5), (53, 37), (64, 64), (129, 512), (700, 33)]
DTYPES = [torch.float32, torch.bfloat16]


def _random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float32).to(dtype)


def _llama(*, layers: int = 2, hidden: int = 512, tied: bool = False) -> transformers.LlamaForCausalLM:
    config = transformers.LlamaConfig(
        vocab_size=1000,
        hidden_size=hidden,
        intermediate_size=1408,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return transformers.LlamaForCausalLM(config).eval()


def _swap_all(model: transformers.PreTrainedModel, kind: str) -> int:
    """Swap every layer that may be swapped, whatever would win here; how many."""
    places = kernels._swappable(model)[0]
    for place in places:
        kernels._swap([place], kind, Pages())
    return len(places)


def _forward(model: transformers.PreTrainedModel) -> Callable[[], object]:
    return lambda: model(torch.arange(24)[None])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_products_equal_linear(kind: str, dtype: torch.dtype, has_bias: bool) -> None:
    for (inputs, outputs), rows in itertools.product(SHAPES, (0, 1, 2, 7, 64, 300)):
        weight, x = _random(outputs, inputs, dtype=dtype), _random(rows, inputs, dtype=dtype)
        bias = _random(outputs, dtype=dtype) if has_bias else None
        given = product(weight, bias, kind)(x)
        expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        # Rounding of one sum: a few units of the number format times the size of what is summed.
        scale = (x.double().abs() @ weight.double().abs().T) + 1
        unit = torch.finfo(torch.float32).eps * 4 * scale
        if dtype == torch.bfloat16:
            unit = unit + torch.finfo(dtype).eps * expected.abs()
        assert given.dtype == dtype
        assert given.shape == (rows, outputs)
        assert bool(((given.double() - expected).abs() <= unit).all()), (inputs, outputs, rows)


@pytest.mark.parametrize("kind", KINDS)
def test_products_take_the_layouts_that_models_make(kind: str) -> None:
    weight = _random(40, 24)
    run = product(weight, None, kind)
    for x in (
        _random(1, 9, 24),
        _random(24, 9).T,
        _random(9, 48)[:, ::2],
        _random(9, 60)[:, 7:31],
        _random(2, 3, 5, 24),
    ):
        torch.testing.assert_close(run(x), F.linear(x, weight))
    transposed = _random(24, 40)
    torch.testing.assert_close(product(transposed.T, None, kind)(_random(9, 24)), _random(9, 24) @ transposed)


def test_products_keep_what_is_not_finite() -> None:
    for kind in KINDS:
        weight = _random(40, 24)
        weight[3, 5] = torch.nan
        given = product(weight, None, kind)(_random(9, 24))
        assert given[:, 3].isnan().all()
        assert given.isnan().sum() == 9


def test_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="no kind of product"):
        product(_random(3, 4), None, "cublas")


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_stay_with_every_layer_swapped(architecture: str, kind: str) -> None:
    model = make_model(architecture, make_tokenizer())  # pyright: ignore[reportArgumentType]
    tokens = torch.randint(0, 512, (1, 70), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before = model(tokens).logits.log_softmax(-1)
        # Llama and Qwen3: 7 a layer; GPT-2 (Conv1D) and GPT-NeoX: 4. The head is never among them.
        assert _swap_all(model, kind) == {"llama": 14, "qwen3": 14, "gpt2": 8, "gpt_neox": 8}[architecture]
        after = model(tokens).logits.log_softmax(-1)
    assert (before - after).abs().max() < 1e-5 * max(1, float(before.abs().max()))


@pytest.mark.parametrize("rows", [1, 64, 65, 700])
def test_a_head_that_shares_its_weight_multiplies_few_rows_its_own_way(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _llama(tied=True)
    used: set[str] = set()

    def noted(weight: torch.Tensor, bias: torch.Tensor | None, kind: str) -> Callable[[torch.Tensor], torch.Tensor]:
        multiply = product(weight, bias, kind)

        def run(x: torch.Tensor) -> torch.Tensor:
            used.add(kind)
            return multiply(x)

        return run

    monkeypatch.setattr(head, "product", noted)
    _, layer, is_tied = kernels._swappable(model)
    assert layer is model.lm_head
    assert is_tied
    made = head.Head(model, "torch", "onednn")
    hidden = _random(rows, 512)
    with torch.inference_mode():
        logits = made.logits(hidden)
        assert torch.allclose(logits, F.linear(hidden, model.lm_head.weight), atol=1e-4)
        assert made.best(hidden)[0].tolist() == logits.argmax(-1).tolist()
    assert used == {"onednn" if rows <= 64 else "torch"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layers_that_share_their_input_share_a_product(architecture: str) -> None:
    model = make_model(architecture, make_tokenizer())  # pyright: ignore[reportArgumentType]
    places = kernels._swappable(model)[0]
    with torch.inference_mode():
        units = kernels.siblings(places, _forward(model))
        assert sorted(name for unit in units for _, name in unit) == sorted(name for _, name in places)
        shared = [tuple(name for _, name in unit) for unit in units if len(unit) > 1]
        # GPT-2 and GPT-NeoX have queries, keys and values in one layer already.
        expected = [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")] * 2
        assert shared == (expected if architecture in ("llama", "qwen3") else [])
        batches = [torch.randint(0, 512, (1, n), generator=torch.Generator().manual_seed(n)) for n in (70, 1, 70)]
        before = [model(tokens).logits.log_softmax(-1) for tokens in batches]
        weights = [getattr(*place).weight.clone() for unit in units for place in unit]
        for unit in units:
            kernels._swap(unit, "onednn-packed", Pages())
        for tokens, logits in zip(batches, before, strict=True):
            after = model(tokens).logits.log_softmax(-1)
            assert (logits - after).abs().max() < 1e-5 * max(1, float(logits.abs().max()))
        for place, weight in zip((place for unit in units for place in unit), weights, strict=True):
            assert torch.equal(getattr(*place).weight, weight)


def test_a_layer_takes_its_part_of_the_tensor_it_is_given() -> None:
    """Also when its siblings are not called, are called in another order, or are given something else."""
    first, second = nn.Linear(24, 40), nn.Linear(24, 16, bias=False)
    block = nn.ModuleDict({"a": first, "b": second})
    with torch.inference_mode():
        kernels._swap([(block, "a"), (block, "b")], "onednn-packed", Pages())
        for order in ("ab", "ba", "a", "aab", "bb", "ab"):
            x, other = _random(9, 24), _random(9, 24) + 1
            for name in order:
                for given in (x, other) if order == "aab" else (x,):
                    torch.testing.assert_close(block[name](given), {"a": first, "b": second}[name](given))


def test_install_measures_in_time_and_changes_no_logit() -> None:
    model = _llama()
    tokens = torch.arange(300)[None]
    with torch.inference_mode():
        before = model(tokens).logits
        start = time.perf_counter()
        chosen = install(model, _forward(model), deterministic=False, seconds=0.3)
        took = time.perf_counter() - start
        torch.testing.assert_close(model(tokens).logits, before, atol=1e-5, rtol=1e-5)
    assert set(chosen.linear) == {"512x512+256+256", "512x512", "512x1408+1408", "1408x512"}
    assert set(chosen.linear.values()) <= set(KINDS)
    assert chosen.threads == torch.get_num_threads()
    assert took < 5  # one round too many, on a machine that does other things


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deterministic_leaves_torch_and_repeats_to_the_last_digit(dtype: torch.dtype) -> None:
    model = _llama().to(dtype)
    threads = torch.get_num_threads()
    chosen = install(model, _forward(model), deterministic=True)
    assert set(chosen.linear.values()) == {"torch"}
    assert chosen.threads == threads == torch.get_num_threads()
    assert not any(isinstance(module, Linear) for module in model.modules())
    tokens = torch.arange(200)[None]
    with torch.inference_mode():
        assert torch.equal(model(tokens).logits, model(tokens).logits)


def test_float16_stays_with_torch() -> None:
    model = _llama().half()
    assert set(install(model, _forward(model), deterministic=False).linear.values()) == {"torch"}


def test_small_models_cost_nothing() -> None:
    model = make_model("llama", make_tokenizer())
    start = time.perf_counter()
    chosen = install(model, _forward(model), deterministic=False)
    assert time.perf_counter() - start < 0.05
    assert set(chosen.linear.values()) == {"torch"}


def test_shared_hooked_and_foreign_layers_are_left() -> None:
    class Mine(nn.Linear):
        pass

    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
            self.two.weight = self.one.weight
            self.hooked, self.mine, self.free = nn.Linear(8, 8), Mine(8, 8), nn.Linear(8, 8)
            self.again = self.free_twice = nn.Linear(8, 8)
            self.other_dtype = nn.Linear(8, 8, dtype=torch.float64)
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
            self.hooked.register_forward_hook(lambda *_: None)

    model = _llama(tied=True)
    model.model.layers[0].mlp = Router()  # pyright: ignore[reportAttributeAccessIssue]
    found = [getattr(parent, name) for parent, name in kernels._swappable(model)[0]]
    ours = [layer for layer in found if layer in list(model.model.layers[0].mlp.modules())]
    assert ours == [model.model.layers[0].mlp.free]  # pyright: ignore[reportAttributeAccessIssue]
    assert model.lm_head not in found
    assert model.lm_head.weight is model.model.embed_tokens.weight
    untied = _llama()
    assert untied.lm_head not in [getattr(parent, name) for parent, name in kernels._swappable(untied)[0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_transposed", [False, True])
def test_a_packed_layer_whose_weight_is_read_becomes_what_it_was(dtype: torch.dtype, is_transposed: bool) -> None:
    layer = (Conv1D(48, 24) if is_transposed else nn.Linear(24, 48)).to(dtype)
    original, x = layer.weight.detach().clone(), _random(1, 5, 24, dtype=dtype)
    expected = layer(x)
    swapped = Linear(layer, "onednn-packed")
    assert not [name for name, _ in swapped.named_parameters() if "weight" in name]
    torch.testing.assert_close(swapped(x), expected)
    assert torch.equal(swapped.weight, original)
    assert swapped.weight is swapped.weight
    torch.testing.assert_close(swapped(x), expected)


def test_half_the_threads_are_taken_only_when_faster() -> None:
    usual = torch.get_num_threads()
    sample = choice.Sample([nn.Linear(512, 512)])
    with torch.inference_mode():
        assert choice.best_threads(sample, 0.05) in {usual, max(1, usual // 2)}
    assert torch.get_num_threads() == usual


def test_choice_wants_a_clear_gain_and_no_loss() -> None:
    # Seconds of (scoring, decoding).
    def chosen(onednn: tuple[float, float], packed: tuple[float, float]) -> str:
        return choice._fastest({"torch": (1.0, 1.0), "onednn": onednn, "onednn-packed": packed})

    assert chosen((1.0, 1.0), (0.98, 0.98)) == "torch"
    assert chosen((0.6, 1.0), (0.5, 1.0)) == "onednn-packed"
    assert chosen((0.6, 0.6), (0.5, 1.1)) == "onednn"
    assert chosen((1.0, 1.0), (1.2, 0.5)) == "torch"


def test_describe() -> None:
    linear = {"1x1": "torch", "1x2": "onednn-packed", "2x1": "onednn-packed"}
    assert Kernels(linear, "onednn", "onednn", 2, True).describe() == (
        "threads 2; linear onednn-packed (2 shapes), torch (1); head onednn; huge pages"
    )
    assert (
        Kernels({"1x1": "torch"}, "torch", "torch", 1, False).describe()
        == "threads 1; linear torch (1 shape); head torch"
    )
    assert Kernels({}, "torch", "torch", 4, False).describe() == "threads 4; linear torch; head torch"
    assert Kernels({}, "torch", "onednn", 4, False).describe().endswith("head torch, of few rows onednn")


_MEMORY = """
import gc, json, sys
import psutil, torch, transformers
from eval_platform.engine import kernels
from eval_platform.engine.pages import Pages

model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="float32").eval()
tokens = torch.arange(64)[None]
with torch.inference_mode():
    before = model(tokens).logits  # reads every weight once: what is mapped is resident
    weights = sum(p.nbytes for p in model.parameters())
    units = kernels.siblings(kernels._swappable(model)[0], lambda: model(tokens))
    largest = max(sum(getattr(*place).weight.nbytes for place in unit) for unit in units)
    gc.collect()
    rss = psutil.Process().memory_info().rss
    pages = Pages()
    for unit in units:
        kernels._swap(unit, "onednn-packed", pages)
    grown = psutil.Process().memory_info().rss - rss
    close = torch.allclose(model(tokens).logits, before, atol=1e-4)
json.dump({"weights": weights, "largest": largest, "grown": grown, "close": close}, sys.stdout)
"""


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_packing_doubles_no_memory(tmp_path: Path, stored: torch.dtype) -> None:
    # Stored in float32 the weights are pages of the mapped file, in bfloat16 they are converted into memory of ours.
    _llama(layers=10).to(stored).save_pretrained(tmp_path)
    seen = json.loads(run_warm(_MEMORY, str(tmp_path))[0])
    assert seen["weights"] > 100e6
    assert seen["close"]
    # The largest unit of layers, and 4 MiB of oneDNN's own (kernels, fragments of the heap).
    assert seen["grown"] < seen["largest"] + 4 * 2**20


_FAULTS = """
import resource, sys
import torch
from eval_platform.engine.pages import settle_allocator

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):  # 24 MiB each, three at a time, all freed
        kept = [torch.ones(6 * 2**20) for _ in range(3)]
        del kept
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

settle_allocator()
faults()
print(*(faults() for _ in range(4)))
"""


def test_settled_memory_is_not_faulted_in_again() -> None:
    """Of 55,296 written each time. A small block that another thread took in between may cost one tensor once."""
    faults = [int(n) for n in run_warm(_FAULTS)[0].split()]
    assert len(faults) == 4
    assert sorted(faults)[1] < 1000, faults


def test_a_deterministic_engine_repeats_to_the_last_digit(tmp_path: Path) -> None:
    """Loaded anew, in a process of its own, on a model large enough that products would be measured."""
    _llama(layers=3).save_pretrained(tmp_path)
    make_tokenizer(max_length=2048).save_pretrained(tmp_path)
    code = """
import sys
from pathlib import Path
from eval_platform.engine.loading import load
from eval_platform.values import RunSettings, make_request
engine = load(Path(sys.argv[1]), RunSettings(deterministic=True))
assert engine.info.n_parameters > 5_000_000, engine.info
assert "onednn" not in engine.info.versions["kernels"], engine.info
asked = [make_request("choice", "the river " * n, f" mountain {k}") for n in (3, 90, 200) for k in range(4)]
answers = {answer.request_id: answer.log_likelihood.hex() for answer in engine.answer(asked)}
print([answers[request.request_id] for request in asked])
"""
    runs = [run_warm(code, str(tmp_path))[0] for _ in range(2)]
    assert runs[0] == runs[1]
    assert "0x" in runs[0]
