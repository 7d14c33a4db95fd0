"""The demo's trainer: short real runs, read back as any other checkpoint is."""

import hashlib
import json
import os
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo import train as demo
from eval_platform.checkpoints import inspect
from eval_platform.config import load_config
from eval_platform.tasks.generators import generate, split_of

STEPS = 8  # one of them is a step of text
ROOT = Path(__file__).resolve().parents[1]


def weights_hash(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the trainer runs: two threads wait for each other for minutes where other tests use the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def seen() -> list[tuple[str, set[str]]]:
    """What stood beside a checkpoint at the moment it was announced."""
    return []


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, seen: list) -> list[Path]:
    out = tmp_path_factory.mktemp("demo") / "tiny"
    return demo.train(
        out,
        run="tiny",
        steps=STEPS,
        n_checkpoints=3,
        on_checkpoint=lambda folder: seen.append((folder.name, set(os.listdir(out)))),
    )


@pytest.fixture(scope="module")
def tokenizer(folders: list[Path]):
    return AutoTokenizer.from_pretrained(folders[0])


def test_checkpoints_arrive_one_after_another(folders: list[Path], seen: list) -> None:
    names = ["step_00000", "step_00004", "step_00008"]
    assert [folder.name for folder in folders] == names
    assert seen == [(name, set(names[: i + 1])) for i, name in enumerate(names)]


def test_each_is_complete_for_the_platform_and_loads(folders: list[Path]) -> None:
    for folder in folders:
        inspection = inspect(folder)
        assert inspection.complete, inspection.reason
        assert all(tensor.isfinite().all() for tensor in load_file(folder / "model.safetensors").values())
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert model.dtype == torch.float32
        assert 1e6 <= model.num_parameters() <= 3e6
        assert model.config.max_position_embeddings == 4096
        assert model.generation_config.eos_token_id == AutoTokenizer.from_pretrained(folder).eos_token_id


def test_checkpoint_json_says_which_one_it_is(folders: list[Path]) -> None:
    records = [json.loads((folder / "checkpoint.json").read_text()) for folder in folders]
    assert [record["step"] for record in records] == [0, 4, 8]
    assert {record["run"] for record in records} == {"tiny"}
    tokens = [record["tokens_seen"] for record in records]
    assert tokens[0] == 0
    assert tokens == sorted(set(tokens))
    assert all(datetime.fromisoformat(record["time"]) <= datetime.now(UTC) for record in records)
    assert all(isinstance(value, str) for record in records for value in record["tags"].values())


def test_success_is_the_last_act(folders: list[Path]) -> None:
    for folder in folders:
        others = [path.stat().st_mtime_ns for path in folder.iterdir() if path.name != "_SUCCESS"]
        assert (folder / "_SUCCESS").stat().st_mtime_ns >= max(others)


def test_same_seed_same_weights_and_another_seed_others(folders: list[Path], tmp_path: Path) -> None:
    again = demo.train(tmp_path / "again", run="again", steps=STEPS, n_checkpoints=3)
    assert [weights_hash(folder) for folder in again] == [weights_hash(folder) for folder in folders]
    assert len({weights_hash(folder) for folder in again}) == 3
    other = demo.train(tmp_path / "other", run="other", seed=1, steps=1, n_checkpoints=2)
    assert weights_hash(other[0]) != weights_hash(folders[0])


def test_training_lowers_the_loss_on_questions_it_never_saw(tmp_path: Path) -> None:
    first, last = demo.train(tmp_path / "run", run="run", steps=40, n_checkpoints=2)
    tokenizer = AutoTokenizer.from_pretrained(first)
    pairs = [(item["question"], f" {item['answer']}") for item in generate("copying", 32, 0)]

    def loss(folder: Path) -> float:
        """Cross entropy per answer token, by transformers' own loss."""
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        ids = [tokenizer.encode(question + answer) for question, answer in pairs]
        labels = [[-100] * len(tokenizer.encode(question)) for question, _ in pairs]
        labels = [blank + row[len(blank) :] for blank, row in zip(labels, ids, strict=True)]
        with torch.no_grad():
            return model(input_ids=torch.tensor(ids), labels=torch.tensor(labels)).loss.item()

    assert loss(last) < loss(first) - 2


def test_the_answer_is_the_target_and_the_question_is_not(tokenizer) -> None:
    batch = demo.question_batch(demo.random.Random(0), tokenizer)
    for tokens, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
        answer = [target for target in targets if target != demo.IGNORED]
        asked = targets.index(answer[0])
        question = tokenizer.decode(tokens[:asked])
        assert split_of(question) == "train"
        assert tokenizer.decode(answer).endswith(demo.END)
        # As a task asks it: lm-eval encodes question, space and answer as one text.
        text = tokenizer.decode(tokens[:asked] + answer).removesuffix(demo.END)
        assert tokenizer.encode(text) == tokens[:asked] + answer[:-1]


@settings(max_examples=60, deadline=None)
@given(text=st.text(max_size=60))
def test_every_text_comes_back_from_its_tokens(tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(number=st.integers(0, 10**12))
def test_every_digit_is_a_token(tokenizer, number: int) -> None:
    assert len(tokenizer.encode(f" {number}")) == len(str(number))


@pytest.mark.parametrize(("steps", "n_checkpoints"), [(10, 1), (2, 4)])
def test_checkpoints_that_cannot_be_told_apart_are_refused(tmp_path: Path, steps: int, n_checkpoints: int) -> None:
    with pytest.raises(ValueError, match="ask for at least 2"):
        demo.train(tmp_path / "run", run="run", steps=steps, n_checkpoints=n_checkpoints)


def test_an_earlier_run_is_never_overwritten(folders: list[Path]) -> None:
    before = [weights_hash(folder) for folder in folders]
    with pytest.raises(FileExistsError, match="already holds checkpoints"):
        demo.train(folders[0].parent, run="tiny", seed=1, steps=STEPS, n_checkpoints=3)
    assert [weights_hash(folder) for folder in folders] == before


def test_the_demo_configuration_names_tasks_that_exist() -> None:
    config = load_config(ROOT / "demo" / "eval_platform.toml")
    shipped = {path.stem for path in (ROOT / "eval_platform" / "tasks" / "library").glob("*.yaml")}
    assert set(config.tasks.include) <= shipped
    assert len(config.tasks.include) >= 8
    assert Path(config.checkpoints[0].path) == ROOT / "demo" / "checkpoints"
    assert Path(config.results) == ROOT / "demo" / "results"


def test_the_real_slices_fit_into_the_context(tokenizer, tmp_path: Path) -> None:
    """Five shots of MMLU and of GSM8K with its 256 tokens of answer; a cut prompt would not be what the task says."""
    from eval_platform.store import open_store
    from eval_platform.tasks import load_task, read_lock, render, sync_tasks

    store = open_store(str(tmp_path / "results"))
    config = load_config(ROOT / "demo" / "eval_platform.toml")
    wanted = config.tasks.model_copy(update={"include": ("mmlu_abstract_algebra", "gsm8k_50")})
    report = sync_tasks(wanted, store, tmp_path / "lock.json")
    assert not report.errors
    for name, entry in read_lock(tmp_path / "lock.json").tasks.items():
        longest = max(
            len(tokenizer.encode(request.context))
            for item in render(load_task(store, entry.task_id))
            for request in item.requests
        )
        assert 200 < longest <= demo.CONTEXT - 256, name
