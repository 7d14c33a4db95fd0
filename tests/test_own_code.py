"""A checkpoint that brings its own modeling code: never run unasked, run with a person's word, recorded, right."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_oracle import Subject, ask, check_completed, check_scored
from fault_tools import Place, forked
from tiny_models import make_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval_platform.config import load_config
from eval_platform.engine import load
from eval_platform.errors import CheckpointError
from eval_platform.once import evaluate_folder
from eval_platform.plan import Wanted
from eval_platform.store import open_store
from eval_platform.tasks import read_lock, sync_tasks
from eval_platform.values import Generation, RunSettings, make_request

TRUSTED = RunSettings(device="cpu", trust_remote_code=True)

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel


class OwnConfig(LlamaConfig):
    model_type = "own_llama"


class OwnModel(LlamaModel):
    def forward(self, input_ids=None, position_ids=None, inputs_embeds=None, **how):
        if inputs_embeds is None:
            inputs_embeds = {embedding} * self.embed_tokens(input_ids)
        return super().forward(position_ids=position_ids, inputs_embeds=inputs_embeds, **how)


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = OwnModel(config)
        self.post_init()

    def forward(self, *args, **how):
        output = super().forward(*args, **how)
        output.logits = {logits} * output.logits
        return output
"""
REQUESTS = [
    make_request("choice", "the river is", " Yes"),
    make_request("choice", "the river is", " No the of"),
    make_request("rolling", "the river is a mountain. " * 20),
    make_request("generate", "the river is", settings=Generation(8, ("e",))),
]


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers copies a checkpoint's code to a folder from which it imports: here not to the user's."""
    folder = tmp_path / "modules"
    monkeypatch.setenv("HF_MODULES_CACHE", str(folder))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(folder))
    monkeypatch.syspath_prepend(str(folder))


def own_checkpoint(folder: Path, *, embedding: float = 1.0, logits: float = 1.0) -> Path:
    """A Llama with code of its own, which multiplies what is embedded and the logits."""
    make_checkpoint(folder, max_length=96)
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own_llama", "auto_map": names}))
    (folder / "modeling_own.py").write_text(CODE.format(embedding=embedding, logits=logits))
    return folder


def test_refused_by_default_and_never_run(tmp_path: Path) -> None:
    path = own_checkpoint(tmp_path / "own")
    proof = tmp_path / "it ran"
    with (path / "modeling_own.py").open("a") as file:
        file.write(f"\nopen({str(proof)!r}, 'w')\n")
    with pytest.raises(CheckpointError, match=r"'own_llama' needs .* own Python code\n  remedy: .*trust_remote_code"):
        load(path, RunSettings(device="cpu"))
    assert not proof.exists()
    load(path, TRUSTED)
    assert proof.exists()


@pytest.mark.parametrize(
    ("embedding", "logits", "engine_path"),
    # Changed logits are not what the tree engine's head computes: it finds out and leaves the model to the plain path.
    [(1.0, 1.0, "tree"), (3.0, 1.0, "tree"), (1.0, 0.5, "plain")],
)
def test_its_numbers_are_those_of_its_own_code(
    embedding: float, logits: float, engine_path: str, tmp_path: Path
) -> None:
    path = own_checkpoint(tmp_path / "own", embedding=embedding, logits=logits)
    engine = load(path, TRUSTED)
    assert (engine.info.engine_path, engine.info.architecture) == (engine_path, "OwnForCausalLM")
    model: Any = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True, dtype=torch.float32).eval()
    tiny = Subject(path, engine, model, AutoTokenizer.from_pretrained(path), "auto")
    answered = ask(engine, REQUESTS)
    for request in REQUESTS:
        check = check_completed if request.kind == "generate" else check_scored
        check(tiny, request, answered[request.request_id, 0])


def test_a_tokenizers_own_code_is_refused_too(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path)
    file = path / "tokenizer_config.json"
    stored = json.loads(file.read_text())
    own = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}}
    file.write_text(json.dumps(stored | own))
    (path / "tokenization_own.py").write_text("raise SystemExit")
    with pytest.raises(CheckpointError, match=r"tokenizer needs .* own Python code\n  remedy: .*trust_remote_code"):
        load(path, RunSettings(device="cpu"))


@pytest.mark.slow
def test_the_whole_road_asks_for_a_persons_word_and_records_it(tmp_path: Path) -> None:
    path = own_checkpoint(tmp_path / "own")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "data.jsonl").write_text('{"q": "the river is", "a": 0}\n{"q": "a mountain", "a": 1}\n')
    (tmp_path / "tasks" / "small.yaml").write_text(
        "task: small\ndataset_path: json\ndataset_kwargs: {data_files: {test: "
        f"{tmp_path}/tasks/data.jsonl}}}}\ntest_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{q}}"\ndoc_to_choice: ["Yes", "No"]\ndoc_to_target: a\n'
    )
    (tmp_path / "eval_platform.toml").write_text(
        '[tasks]\nfolders = ["tasks"]\ninclude = ["small"]\n[engine]\ndevice = "cpu"\n'
    )
    config = load_config(tmp_path / "eval_platform.toml")
    store = open_store(config.results)
    assert sync_tasks(config.tasks, store, config.lock_path).errors == ()

    wanted = Wanted(read_lock(config.lock_path))
    with forked(Place(tmp_path / "workers")):
        (refused,) = evaluate_folder(config, store, path, wanted, actor="test")
        (outcome,) = evaluate_folder(config, store, path, replace(wanted, trust_remote_code=True), actor="test")
    assert refused.status == "failed"
    assert "trust_remote_code = true" in str(refused.reasons)
    assert outcome.status in {"published", "held"}, outcome.reasons
    record = outcome.record
    assert record["trust_remote_code"] is True
    assert record["settings"]["trust_remote_code"] is True
    assert record["engine_path"] == "tree"
