"""What loads, what is refused, and in which words."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import ARCHITECTURES, make_checkpoint, make_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM
from warm import run_warm

from eval_platform.engine import EngineInfo, kernels, load, placement
from eval_platform.errors import CheckpointError, ConfigError, NoDevice, classify
from eval_platform.values import Generation, RunSettings, make_request

CPU = RunSettings(device="cpu")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_info_says_what_ran(architecture: Any, tmp_path: Path) -> None:
    engine = load(make_checkpoint(tmp_path, architecture=architecture, max_length=96), CPU)
    info = engine.info
    stored = load_file(tmp_path / "model.safetensors")
    assert isinstance(info, EngineInfo)
    assert info.architecture == json.loads((tmp_path / "config.json").read_text())["architectures"][0]
    assert (info.device, info.dtype, info.max_length, info.engine_path) == ("cpu", "float32", 96, "tree")
    assert info.n_parameters == sum(weight.numel() for weight in stored.values())
    assert info.vocab_size == 512
    assert {"torch", "transformers", "tokenizers", "python"} <= set(info.versions)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_is_as_asked_and_logits_math_is_float32(dtype: str, tmp_path: Path) -> None:
    """A half-precision log-softmax over 512 tokens has steps of 2^-5 near -6; sums made in float32 do not."""
    path = make_checkpoint(tmp_path)
    request = make_request("choice", "the river is", " mountain")
    (exact,) = load(path, CPU).answer([request])
    engine = load(path, RunSettings(device="cpu", dtype=dtype))
    (rounded,) = engine.answer([request])
    assert engine.info.dtype == dtype
    assert rounded.log_likelihood == pytest.approx(exact.log_likelihood, abs=0.3)
    assert rounded.log_likelihood is not None
    assert float(torch.tensor(rounded.log_likelihood).to(getattr(torch, dtype))) != rounded.log_likelihood


def edit_config(**fields: Any) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        file = path / "config.json"
        config = json.loads(file.read_text()) | fields
        file.write_text(json.dumps(config))

    return edit


def edit_weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        file = path / "model.safetensors"
        weights = load_file(file)
        change(weights)
        save_file(weights, file, metadata={"format": "pt"})

    return edit


def remove(*patterns: str) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        for pattern in patterns:
            for file in path.glob(pattern):
                file.unlink()

    return edit


def cut_weights(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def pickle_only(path: Path) -> None:
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()


DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.mark.parametrize(
    ("architecture", "spoil", "words"),
    [
        ("llama", edit_weights(lambda w: w.pop(DOWN)), f"1 weights missing: {DOWN}"),
        ("llama", edit_weights(lambda w: w.pop("lm_head.weight")), "1 weights missing: lm_head.weight"),
        ("llama", edit_weights(lambda w: w.update(extra=torch.zeros(2))), "no place for: extra"),
        ("llama", edit_weights(lambda w: w.update({DOWN: torch.zeros(3, 3)})), f"1 weights of another shape: .*{DOWN}"),
        ("llama", edit_config(num_hidden_layers=3), "9 weights missing: .* and 6 more"),
        ("llama", edit_config(num_hidden_layers=1), "9 weights the model has no place for"),
        ("llama", edit_config(model_type="hyena9"), "field model_type: 'hyena9'"),
        ("llama", edit_config(model_type="clip"), "field model_type: 'clip'"),
        (
            "llama",
            edit_config(model_type="hyena9", auto_map={"AutoConfig": "m.C", "AutoModelForCausalLM": "m.M"}),
            r"'hyena9' needs the checkpoint's own Python code\n  remedy: .*trust_remote_code",
        ),
        ("llama", edit_config(hidden_size="wide"), r"config\.json: .*field 'hidden_size'.*wide"),
        ("llama", remove("*.safetensors"), "no model could be loaded"),
        ("llama", pickle_only, "no model could be loaded"),
        ("llama", cut_weights, "no model could be loaded"),
        ("llama", remove("tokenizer*"), "no tokenizer could be loaded"),
        ("gpt2", remove("tokenizer*"), "the tokenizer .* tells no two letters apart"),
        ("llama", lambda path: (path / "tokenizer.json").write_text("{"), "no tokenizer could be loaded"),
        ("llama", remove("*"), r"config\.json does not exist"),
        ("llama", edit_config(model_type="clip", is_encoder_decoder=True), "field model_type: 'clip'"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused(
    architecture: Any, spoil: Callable[[Path], None], words: str, tmp_path: Path
) -> None:
    path = make_checkpoint(tmp_path, architecture=architecture)
    spoil(path)
    with pytest.raises(CheckpointError, match=words) as caught:
        load(path, CPU)
    assert str(path) in str(caught.value)
    assert "remedy" in str(caught.value)
    assert classify(caught.value) == "deterministic"


@pytest.mark.parametrize("architecture", ["gpt2", "qwen3"])
def test_a_tied_head_is_not_missing(architecture: Any, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path, architecture=architecture)
    assert "lm_head.weight" not in load_file(path / "model.safetensors")
    load(path, CPU)


@pytest.mark.parametrize("device", ["tpu", "meta", "no such thing"])
def test_what_is_no_device(device: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="device"):
        load(make_checkpoint(tmp_path), RunSettings(device=device))


def test_a_device_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine may have it, so that the checkpoint is not to blame."""
    path = make_checkpoint(tmp_path)
    with pytest.raises(NoDevice, match="cuda:99"):
        load(path, RunSettings(device="cuda:99"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "98,99")
    with pytest.raises(NoDevice, match=r"given the GPUs 98, 99, and torch .* sees 0 of them"):
        load(path, RunSettings(device="cuda"))


def test_only_local_files_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the hub allowed, still nothing connects: a socket would raise."""
    import socket

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the engine tried to connect")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    engine = load(make_checkpoint(tmp_path), CPU)
    assert len(list(engine.answer([make_request("choice", "the", " river")]))) == 1


def test_weights_of_several_dtypes_all_run_in_the_one_that_is_resolved(tmp_path: Path) -> None:
    """config.json's dtype or the setting decides for every weight, whatever each is stored as."""
    mixed, rounded = make_checkpoint(tmp_path / "mixed"), make_checkpoint(tmp_path / "rounded")

    def halve(weights: dict[str, torch.Tensor]) -> None:
        weights.update({key: weight.bfloat16() for key, weight in weights.items() if "mlp" in key})

    edit_weights(halve)(mixed)
    edit_weights(lambda w: w.update({k: t.bfloat16().float() for k, t in w.items() if "mlp" in k}))(rounded)
    stored = load_file(mixed / "model.safetensors")
    assert {weight.dtype for weight in stored.values()} == {torch.float32, torch.bfloat16}
    request = make_request("choice", "the river is", " mountain")
    for dtype in ("auto", "float32", "bfloat16"):
        engines = [load(path, RunSettings(device="cpu", dtype=dtype)) for path in (mixed, rounded)]
        ours, same = (next(iter(engine.answer([request]))) for engine in engines)
        assert engines[0].info.dtype == ("bfloat16" if dtype == "bfloat16" else "float32")
        assert ours.log_likelihood == pytest.approx(same.log_likelihood, abs=1e-6)


@pytest.mark.parametrize("engine_path", ["plain", "auto"])
def test_a_tokenizer_without_padding(engine_path: str, tmp_path: Path) -> None:
    """Padding is masked, so no token of the tokenizer's is needed for it."""
    path = make_checkpoint(tmp_path)
    settings = RunSettings(device="cpu", engine_path=engine_path)
    requests = [make_request("generate", text, settings=Generation(6)) for text in ("the", "the river is a mountain")]
    texts = {response.request_id: response.text for response in load(path, settings).answer(requests)}
    file = path / "tokenizer_config.json"
    stored = json.loads(file.read_text())
    del stored["pad_token"]
    file.write_text(json.dumps(stored))
    engine = load(path, settings)
    assert {response.request_id: response.text for response in engine.answer(requests)} == texts


def test_a_head_larger_than_the_vocabulary_may_draw_what_is_no_text(tmp_path: Path) -> None:
    """Many a head is padded to a round size; a token without text counts as drawn, and its text is empty."""
    path = make_checkpoint(tmp_path, vocab=512)
    make_tokenizer(vocab=300).save_pretrained(path)

    def draw_no_text(weights: dict[str, torch.Tensor]) -> None:
        head = weights["lm_head.weight"]
        head[:300] = 0.0
        head[300], head[301] = 1.0, -1.0  # one of the two is above 0, whatever the hidden state

    edit_weights(draw_no_text)(path)
    (response,) = load(path, CPU).answer([make_request("generate", "the river", settings=Generation(5))])
    assert (response.text, response.n_tokens, response.finish_reason) == ("", 5, "length")


def test_over_several_devices_with_the_same_numbers_and_recorded(tmp_path: Path) -> None:
    """Here there is one device only, which the map then names; the model is placed by accelerate all the same."""
    path = make_checkpoint(tmp_path)
    request = make_request("choice", "the river is", " mountain")
    mapped = load(path, RunSettings(device="map"))
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]
    assert mapped.info.device in [f"map({','.join(devices[: i + 1])})" for i in range(len(devices))]
    assert mapped.info.engine_path == "plain"
    (ours,), (plain,) = mapped.answer([request]), load(path, CPU).answer([request])
    assert ours.log_likelihood == pytest.approx(plain.log_likelihood, abs=1e-4)
    with pytest.raises(ConfigError, match="does not run over several devices"):
        load(path, RunSettings(device="map", engine_path="tree"))


def test_places_are_named_in_the_order_they_are_filled() -> None:
    places = {"embed": 0, "layers.0": 0, "layers.1": torch.device("cuda:1"), "norm": "cpu", "head": "cpu"}
    assert placement.name_places(places.values()) == ["cuda:0", "cuda:1", "cpu"]


def test_a_model_larger_than_all_memory_is_refused(tmp_path: Path) -> None:
    """Its files are sparse: two matrices, each of 0.7 of this machine's memory, that take no room on disk."""
    psutil = pytest.importorskip("psutil")
    path = make_checkpoint(tmp_path)
    rest = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    shape = [int(psutil.virtual_memory().total * 0.7) // (4 * 32), 32]
    files = {}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        del rest[name]
        size = 4 * shape[0] * shape[1]
        header = json.dumps({name: {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}).encode()
        header += b" " * (-len(header) % 8)
        files[name] = f"{name}.safetensors"
        with (path / files[name]).open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + size)
    save_file(rest, path / "rest.safetensors", metadata={"format": "pt"})
    files |= dict.fromkeys(rest, "rest.safetensors")
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    edit_config(vocab_size=shape[0])(path)
    with pytest.raises(ConfigError, match="does not fit into the free memory"):
        load(path, RunSettings(device="map"))


def test_what_needs_accelerate_says_so_where_it_is_missing(tmp_path: Path) -> None:
    """One device does not need it, on which the same process then loads."""
    code = """
import sys
sys.modules["accelerate"] = None  # what Python does to a package that is not there
from pathlib import Path
from eval_platform.engine import load
from eval_platform.values import RunSettings
from eval_platform.errors import ConfigError
load(Path(sys.argv[1]), RunSettings(device="cpu", engine_path="plain"))
try:
    load(Path(sys.argv[1]), RunSettings(device="map"))
except ConfigError as error:
    print(error)
"""
    command = [sys.executable, "-c", code, str(make_checkpoint(tmp_path))]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "device = 'map' needs the package accelerate" in done.stdout
    assert "remedy: pip install accelerate" in done.stdout


_PEAK = """
import sys, threading, time
from pathlib import Path
from eval_platform.engine import load
from eval_platform.values import RunSettings

def resident():  # bytes: all, and without pages of files, which the system may drop
    fields = dict(line.split(":") for line in open("/proc/self/status"))
    return [int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "RssAnon")]

small, large, dtype = sys.argv[1:]
settings = RunSettings(device="cpu", engine_path="plain", dtype=dtype)
load(Path(small), settings)  # imports what there is to import
before, peak, done = resident(), [0, 0], threading.Event()

def watch():
    while not done.wait(0.001):
        peak[:] = map(max, peak, resident())

watcher = threading.Thread(target=watch)
watcher.start()
engine = load(Path(large), settings)
done.set()
watcher.join()
print(engine.info.n_parameters, *(now - then for now, then in zip(map(max, peak, resident()), before)))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("bfloat16", 2)])
def test_loading_needs_no_second_copy_of_the_weights(dtype: str, size: int, tmp_path: Path) -> None:
    """Stored as float32. In that dtype a weight is the file's own memory; in another it is made weight by weight."""
    large = tmp_path / "large"
    config = LlamaConfig(
        vocab_size=512, hidden_size=768, intermediate_size=2048, num_hidden_layers=6, max_position_embeddings=256
    )
    LlamaForCausalLM(config).save_pretrained(large)
    make_tokenizer().save_pretrained(large)
    said, _ = run_warm(_PEAK, str(make_checkpoint(tmp_path / "small")), str(large), dtype)
    n_parameters, resident, anonymous = map(int, said.split())
    assert n_parameters > 40_000_000
    assert anonymous < 1.3 * size * n_parameters
    # Read as it is mapped, a file in another dtype is resident too until it is closed; those pages are the system's.
    assert resident < (1.3 * size + (4 if dtype == "bfloat16" else 0)) * n_parameters


def test_products_that_give_other_numbers_send_a_fresh_model_down_the_plain_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A fault planted in what the layers are swapped for: right before, wrong after, and the swapped model unusable."""
    checkpoint = make_checkpoint(tmp_path)
    asked = [make_request("choice", "Question: the river", " Yes")]
    (right,) = load(checkpoint, RunSettings(device="cpu", engine_path="plain")).answer(asked)
    install = kernels.install

    def ruinous(model: Any, *given: Any, **keys: Any) -> kernels.Kernels:
        chosen = install(model, *given, **keys)
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight.mul_(1.5)
        return replace(chosen, linear=dict.fromkeys(chosen.linear, "onednn"))

    monkeypatch.setattr(kernels, "install", ruinous)
    engine = load(checkpoint, CPU)
    assert engine.info.engine_path == "plain"
    assert list(engine.answer(asked)) == [right]
    assert "takes the plain path: with threads" in caplog.text
    assert engine.info.versions["why_plain"].startswith("with threads")
    with pytest.raises(ConfigError, match="cannot run so: with threads"):
        load(checkpoint, RunSettings(device="cpu", engine_path="tree"))


@pytest.mark.parametrize(
    ("field", "value", "path"),
    [("min_p", 0.1, "tree"), ("top_k", 7, "tree"), ("repetition_penalty", 1.1, "tree+plain")],
)
def test_only_what_shapes_greedy_text_needs_transformers_own_loop(
    field: str, value: float, path: str, tmp_path: Path
) -> None:
    checkpoint = make_checkpoint(tmp_path)
    file = checkpoint / "generation_config.json"
    stored = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**stored, "do_sample": True, field: value}))
    assert load(checkpoint, CPU).info.engine_path == path
