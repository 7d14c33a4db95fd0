"""The floor is what a count by hand says, the benchmark asks what lm-evaluation-harness asks, and the command runs."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli_tools import run_cli
from tiny_models import make_checkpoint, make_tokenizer

from benchmarks.engine import report, runners, texts, workloads
from eval_platform.bench import floor
from eval_platform.bench.agreement import Agreement, compare
from eval_platform.bench.processes import Job, Measured, Rates, run_side
from eval_platform.bench.rate import read_matrices
from eval_platform.bench.requests import read_requests, write_requests
from eval_platform.errors import EvalPlatformError, TaskError
from eval_platform.values import Generation, make_request

MATRICES = floor.Matrices({(4, 3): 2, (3, 8): 1}, (10, 4))  # 48 weights in the layers, 40 in the head
PROSE = workloads.Prose(["The river is long and cold.", "Most people walk, and few of them run at all."])
RATES = Rates(matrix=1e11, memory=1e10, kernels={})
with_data = pytest.mark.skipif(
    not (texts.DATA / "mmlu").is_dir(), reason=f"public items are needed: none at {texts.DATA} (set EVAL_PLATFORM_DATA)"
)


# --- the floor


def test_a_beginning_is_counted_once_and_a_row_of_the_head_once() -> None:
    inputs = [([1, 2, 3], 1), ([1, 2, 4], 2), ([1, 2], 1), ([1, 2, 3], 1), ([2, 2, 3], 1)]
    # Unique: 1, 12, 123, 124, 2, 22, 223. Rows: 123, 12, 124, 223 (12 and 123 are asked for twice).
    assert floor.count_work(inputs) == floor.Work(input_tokens=14, unique_tokens=7, head_rows=4)


def test_no_input_is_no_work() -> None:
    assert floor.count_work([]) == floor.Work(0, 0, 0)
    assert floor.decoding_of([]) == floor.Decoding(0, 0)


def test_floor_seconds_by_hand() -> None:
    work = floor.Work(input_tokens=14, unique_tokens=7, head_rows=4)
    decoding = floor.decoding_of([1, 5, 3])  # feeds back 0, 4 and 2 tokens
    assert decoding == floor.Decoding(tokens=6, steps=4)
    assert work.flops(MATRICES) == 2 * (7 * 48 + 4 * 40)
    # 4 steps x 88 weights x 4 bytes = 1,408 bytes at 100 bytes/s; 2 x 6 x 88 = 1,056 FLOP at 1,000 FLOP/s: 1.056 s.
    rates = {"matrix_rate": 1000.0, "bytes_per_weight": 4}
    assert floor.floor_seconds(work, decoding, MATRICES, memory_rate=100.0, **rates) == (0.992, 14.08)
    assert floor.floor_seconds(work, decoding, MATRICES, memory_rate=1e6, **rates) == (0.992, 1.056)


def test_what_the_model_reads() -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer("the river is long")["input_ids"]
    context = tokenizer("the river is")["input_ids"]
    requests = [
        make_request("choice", "the river is", " long"),
        make_request("rolling", "the river is long"),
        make_request("generate", "the river is long", settings=Generation(max_new_tokens=30)),
    ]
    bos = tokenizer.bos_token_id
    assert floor.inputs_of(requests, tokenizer, 256) == [
        (ids[:-1], len(ids) - len(context)),
        ([bos, *ids[:-1]], len(ids)),
        (ids, 1),
    ]
    # In a window of 32, two tokens are left for the prompt.
    assert floor.inputs_of(requests, tokenizer, 32)[2] == (ids[-2:], 1)


@pytest.mark.parametrize(
    ("architecture", "layers"),
    [
        # Two layers of hidden 32: q, o; k, v of half the heads; gate, up; down.
        ("llama", {(32, 32): 4, (16, 32): 4, (64, 32): 4, (32, 64): 2}),
        # GPT-2 keeps weights as inputs x outputs: qkv; o; up and down of 4 x 32.
        ("gpt2", {(96, 32): 2, (32, 32): 2, (128, 32): 2, (32, 128): 2}),
    ],
)
def test_the_shapes_of_a_model(tmp_path: Path, architecture: Any, layers: dict[tuple[int, int], int]) -> None:
    found = read_matrices(make_checkpoint(tmp_path / "model", architecture=architecture))
    assert found.layers == layers
    assert found.head == (512, 32)


# --- answers side by side


def test_agreement_is_in_units_of_the_tolerance() -> None:
    greedy = Generation(max_new_tokens=4)
    requests = [
        make_request("choice", "a", "b"),
        make_request("rolling", "c"),
        make_request("generate", "d", settings=greedy),
        make_request("generate", "e", settings=Generation(max_new_tokens=4, temperature=1.0)),
    ]
    ours = [
        {"log_likelihood": -1.0, "is_greedy": True, "n_tokens": 2},
        {"log_likelihood": -500.0, "is_greedy": None, "n_tokens": 100},
        {"text": "same"},
        {"text": "drawn"},
    ]
    theirs = [
        {"log_likelihood": -1.00005, "is_greedy": False},
        {"log_likelihood": -500.0005},
        {"text": "same"},
        {"text": "otherwise"},
    ]
    found = compare(requests, ours, theirs)
    assert found.worst == pytest.approx(0.5)  # 5e-5 of 1e-4, and 5e-4 of 1e-3
    assert found.largest == pytest.approx(5e-4)
    assert (found.greedy_equal, found.choices) == (0, 1)
    assert (found.texts_equal, found.texts) == (1, 1)
    theirs[0]["log_likelihood"] = math.nan
    worst = compare(requests, ours, theirs).worst
    assert worst is not None
    assert math.isnan(worst)


# --- requests in a file


def test_requests_survive_a_file(tmp_path: Path) -> None:
    requests = [
        make_request("choice", "naïve\n", " café"),
        make_request("rolling", ""),
        make_request("generate", "x", settings=Generation(8, stop=("\n", "Q:"), temperature=0.5)),
    ]
    write_requests(tmp_path / "asked.jsonl", requests)
    assert read_requests(tmp_path / "asked.jsonl") == requests
    assert read_requests(tmp_path / "asked.jsonl", limit=1) == requests[:1]


@pytest.mark.parametrize(
    "line",
    [
        "no json",
        "[]",
        '{"kind": "choice", "context": "a"}',
        '{"kind": "generate", "context": "a"}',
        '{"kind": "riddle", "context": "a"}',
        '{"kind": "generate", "context": "a", "settings": {"until": "b"}}',
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "asked.jsonl"
    file.write_text('{"kind": "rolling", "context": "a"}\n' + line + "\n")
    with pytest.raises(TaskError, match=r"asked\.jsonl: line 2"):
        read_requests(file)


def test_a_file_without_requests_is_refused(tmp_path: Path) -> None:
    (tmp_path / "asked.jsonl").touch()
    with pytest.raises(TaskError, match="no requests"):
        read_requests(tmp_path / "asked.jsonl")
    with pytest.raises(TaskError, match="cannot be read"):
        read_requests(tmp_path / "nothing.jsonl")


# --- the benchmark's requests


@pytest.mark.parametrize("name", ["endings", "ten_shots", "perplexity", "one_token"])
def test_prose_rows_are_the_same_every_time(name: str) -> None:
    made = workloads.ROWS[name].make(2, PROSE)
    assert made == workloads.ROWS[name].make(2, PROSE)
    assert [workloads.as_request(asked).kind for asked in made] == [asked[0] for asked in made]
    # The first documents stay the first when more are asked about.
    if name != "perplexity":
        assert workloads.ROWS[name].make(3, PROSE)[: len(made)] == made


@with_data
@pytest.mark.parametrize("name", ["mmlu", "bbh", "gsm8k"])
def test_real_rows_ask_what_lm_eval_asks(name: str) -> None:
    pytest.importorskip("lm_eval")
    from importlib.resources import files

    from lm_eval_oracle import asked_by_config

    tasks = files("lm_eval") / "tasks"
    folder, file, template = {
        "mmlu": ("mmlu/default", "mmlu_astronomy.yaml", "_default_template_yaml"),
        "bbh": ("bbh/cot_fewshot", "date_understanding.yaml", "_cot_fewshot_template_yaml"),
        "gsm8k": ("gsm8k", "gsm8k-cot.yaml", None),
    }[name]
    config: dict[str, Any] = {}
    for part in (template, file):
        if part is not None:
            config |= yaml.safe_load((tasks / folder / part).read_text(encoding="utf-8"))
    for field in ("include", "tag", "task_alias"):
        config.pop(field, None)
    config.setdefault("num_fewshot", 5)  # MMLU's is for whoever runs it to say
    data = texts.data_folder()
    if name == "mmlu":
        tables = {
            split: texts.read_table(data / "mmlu" / split / f"astronomy_{split}.csv") for split in ("dev", "test")
        }
        splits: dict[str, Any] = {
            split: [
                {
                    "question": row["question"],
                    "choices": [row[f"choice{i}"] for i in range(4)],
                    "answer": int(row["answer"]),
                }
                for row in table
            ]
            for split, table in tables.items()
        }
    elif name == "bbh":
        splits = {"test": json.loads((data / "bbh/bbh/date_understanding.json").read_text())["examples"]}
    else:
        splits = {"test": list(texts.read_lines(data / "gsm8k/test.jsonl.gz"))}
    splits["test"] = splits["test"][:3]
    theirs = [
        asked[:2] if name == "mmlu" else asked[:1] for document in asked_by_config(config, splits) for asked in document
    ]
    ours = [asked[1:3] if name == "mmlu" else asked[1:2] for asked in workloads.ROWS[name].make(3, PROSE)]
    assert ours == theirs


def test_the_table_has_medians_and_the_counts_side_by_side(tmp_path: Path) -> None:
    def measured(seconds: float, megabytes: int, **counters: int) -> Measured:
        return Measured(seconds, seconds, 1.0, megabytes * 2**20, 10, "tree", 4, {"torch": "1"}, counters)

    pairs = [
        runners.Pair(measured(theirs, 800), measured(ours, 100, forward_tokens=7, head_rows=4), RATES, fraction)
        for theirs, ours, fraction in ((10.0, 1.0, 0.5), (12.0, 1.0, 0.6), (30.0, 1.5, 0.4))
    ]
    row = workloads.ROWS["mmlu"]
    agreed = Agreement(worst=0.5, largest=5e-5, greedy_equal=8, texts_equal=None, choices=8, texts=0)
    work, nothing = floor.Work(14, 7, 4), floor.Decoding(0, 0)
    result = runners.RowResult("mmlu", row, 8, work, nothing, pairs, agreed, their_own=None)
    setup = runners.Setup("llama24m", "float32", 2, "auto", 3, tmp_path)
    table = report.markdown(setup, [result]).splitlines()
    cells = [cell.strip() for cell in table[2].strip("|").split("|")]
    assert len(cells) == len(table[0].strip("|").split("|"))
    assert cells[1:6] == ["12.00 (4)", "1.00", "**12.0** (10.0-20.0)", "11 / 20", "50%"]
    assert cells[6:9] == ["50% / 75%", "7 : 7, 4 : 4", "100 : 800 = 0.12 (at most 0.25)"]
    assert cells[9:] == ["5.0e-05 (0.50 of the tolerance), greedy 8/8", "tree"]


# --- processes and the command


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("bench") / "model")


def job(folder: Path, checkpoint: Path) -> Job:
    asked = folder / "asked.jsonl"
    write_requests(asked, [make_request("choice", "the river is", " long")])
    settings = {"dtype": "float32", "device": "cpu", "max_length": 256, "trust_remote_code": False}
    return Job("ours", str(checkpoint), str(asked), str(folder / "answers.jsonl"), settings, threads=1)


def test_what_takes_too_long_is_ended(tmp_path: Path, checkpoint: Path) -> None:
    assert run_side(job(tmp_path, checkpoint), timeout=0.05) is None


def test_a_process_that_fails_says_why(tmp_path: Path, checkpoint: Path) -> None:
    asked = job(tmp_path, checkpoint)
    Path(asked.requests).write_text("no request")
    with pytest.raises(EvalPlatformError, match=r"bench\.side ended with 1: (.*\n)*.*line 1"):
        run_side(asked)


def test_work_without_a_checkpoint_is_wrong_usage(tmp_path: Path) -> None:
    assert run_cli("bench", "--tasks", "addition").code == 2
    answer = run_cli("bench", "--checkpoint", str(tmp_path), "--tasks", "addition", "--workload", "asked.jsonl")
    assert answer.code == 2
    assert "not both" in answer.err


@pytest.mark.slow
@pytest.mark.timeout(900)  # three processes that import torch, one after the other
def test_the_command_measures_a_tiny_model(tmp_path: Path, checkpoint: Path) -> None:
    file = tmp_path / "asked.jsonl"
    write_requests(file, [make_request("choice", "the river is", " long")])
    (tmp_path / "eval_platform.toml").write_text('[engine]\ndevice = "cpu"\n')
    answer = run_cli(
        *("--config", str(tmp_path / "eval_platform.toml"), "bench"),
        *("--checkpoint", str(checkpoint), "--workload", str(file), "--json"),
    )
    assert answer.code == 0, answer.err
    found = answer.json
    assert found["requests"] == 1
    assert found["work"]["unique_tokens"] == found["work"]["input_tokens"] > 0
    assert found["rates"]["matrix"] > 0
    assert found["rates"]["memory"] > 0
    assert found["fraction"] > 0
    assert found["ours"]["seconds"] > 0
    assert found["theirs"]["engine_path"] == "lm-eval"
    assert found["agreement"]["worst"] <= 1
    assert found["agreement"]["choices"] == 1
