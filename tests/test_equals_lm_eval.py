"""The whole road equals lm-evaluation-harness 0.4.13: same checkpoint, same task files, same answers, same numbers.

Ours: `tasks sync`, then what `eval-platform run` does (a worker process, the store, the gate, the catalog), read back
in SQL. Theirs: `simple_evaluate` with their Hugging Face backend. Own small task files of every kind are loaded by
both; every shipped task is handed to them with the same documents as a JSON Lines file.
"""

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import yaml
from lm_eval_oracle import HEAD
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("lm_eval", reason="the oracle is lm-eval, which is not installed (extra `lm-eval`)")

from fault_tools import Place, forked
from tiny_models import make_checkpoint

from eval_platform import warehouse
from eval_platform.config import load_config
from eval_platform.once import evaluate_folder
from eval_platform.plan import Wanted
from eval_platform.scoring import SAMPLE_SCHEMA
from eval_platform.store import open_store
from eval_platform.tasks import load_task, read_lock, sync_tasks
from eval_platform.tasks.sync import LIBRARY, bundled_tasks

pytestmark = pytest.mark.slow

LIMIT = 10  # of the own tasks' 14 documents, so that the limit itself is compared too
MAX_LENGTH = 640  # gsm8k asks for 256 tokens, and its prompts must still be cut off on the left

OWN = {
    "choices": """
output_type: multiple_choice
doc_to_text: "{{question}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: label
metric_list: [{metric: acc}, {metric: acc_norm}, {metric: acc_mutual_info}]
""",
    "choices_with_shots": """
output_type: multiple_choice
num_fewshot: 3
description: "Choose well.\\n\\n"
doc_to_text: "{{question}}"
doc_to_choice: ["A", "B", "C"]
doc_to_target: label
""",
    "choices_with_first_shots": """
output_type: multiple_choice
num_fewshot: 4
fewshot_config: {sampler: first_n}
target_delimiter: ""
doc_to_text: "{{question}} "
doc_to_choice: choices
doc_to_target: label
""",
    "completions": """
num_fewshot: 2
doc_to_text: "Q: {{question}}\\nA:"
doc_to_target: "{{half}}"
generation_kwargs: {until: ["\\n", "er"], max_gen_toks: 24}
filter_list:
  - name: half
    filter:
      - function: regex
        regex_pattern: "([A-Za-z])"
      - {function: lowercase}
      - function: map
        mapping_dict: {a: first, b: first, c: first, d: first, e: first, f: first, g: first, h: first, i: first,
          j: first, k: first, l: first, m: first}
        default_value: second
      - {function: take_first}
  - name: letter
    filter:
      - function: regex
        regex_pattern: "[A-Z]"
        group_select: -1
      - {function: remove_whitespace}
      - {function: take_first}
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    ignore_case: true
    ignore_punctuation: true
""",
    "last_word": """
output_type: loglikelihood
num_fewshot: 1
doc_to_text: "{{passage.split(' ')[:-1] | join(' ')}}"
doc_to_target: "{{passage.split(' ')[-1]}}"
""",
    # Half of the targets are what the model itself would say next.
    "next_word": """
output_type: loglikelihood
target_delimiter: ""
doc_to_text: "{{question}}"
doc_to_target: "{{next}}"
""",
    "whole_text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{passage}}"
""",
}
# Keys of a shipped file that say where the documents are or what a person reads, which lm-eval does not know.
OURS = {"documents", "title", "about", "source", "licence", "citation", "primary_metric", "higher_is_better", "chance"}

TASKS = [*OWN, *bundled_tasks()]


@dataclass
class Both:
    """One evaluation of the same checkpoint by each: per task its samples by position, and its aggregated scores."""

    samples: dict[str, list[dict[str, Any]]]
    scores: dict[str, dict[str, float]]
    their_samples: dict[str, list[dict[str, Any]]]
    their_scores: dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Both:
    folder = tmp_path_factory.mktemp("equal")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("OMP_NUM_THREADS", "1")  # of the worker; this process is set in `_theirs`
        checkpoint = make_checkpoint(folder / "model", seed=3, max_length=MAX_LENGTH)
        _write_own_tasks(folder / "tasks", checkpoint)
        samples, scores = _ours(folder, checkpoint)
        their_samples, their_scores = _theirs(folder, checkpoint)
    return Both(samples, scores, their_samples, their_scores)


def _write_own_tasks(folder: Path, checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    words = ["the river", "a mountain", "seven", "London ", "naïve café", "東京", "copy", "larger", "x [1] {y}"]
    rows = [
        {
            "question": f"Where is {words[i % 9]} {i}?",
            "choices": [f"{words[(i + k) % 9]} {'of ' * k}{k}" for k in range(3)],
            "label": i % 3,
            "next": _said_next(model, tokenizer, f"Where is {words[i % 9]} {i}?") if i % 2 else " the",
            "half": ["first", "second"][i % 2],
            # Every other passage is longer than the window, by up to several times.
            "passage": " ".join(f"{words[(i * j) % 9]} was {j}" for j in range(5 + (i % 2) * 60 * i)),
        }
        for i in range(24)
    ]
    folder.mkdir()
    for name, part in (("test", rows[:14]), ("dev", rows[14:])):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    for name, text in OWN.items():
        (folder / f"{name}.yaml").write_text(HEAD.format(name=name, folder=folder) + text, encoding="utf-8")


def _said_next(model: Any, tokenizer: Any, text: str) -> str:
    """The likeliest next token."""
    tokens = tokenizer(text)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([tokens])).logits[0, -1]
    return tokenizer.decode([int(logits.argmax())])


def _ours(folder: Path, checkpoint: Path) -> tuple[dict[str, list[dict[str, Any]]], dict[str, dict[str, float]]]:
    (folder / "eval_platform.toml").write_text(
        f'[tasks]\nfolders = ["tasks"]\ninclude = {json.dumps(TASKS)}\n[engine]\ndevice = "cpu"\n', encoding="utf-8"
    )
    config = load_config(folder / "eval_platform.toml")
    store = open_store(config.results)
    assert sync_tasks(config.tasks, store, config.lock_path).errors == ()
    _hand_over_the_library(folder)

    lock = read_lock(config.lock_path)
    with forked(Place(folder / "workers")):
        outcomes = list(evaluate_folder(config, store, checkpoint, Wanted(lock, limit=LIMIT), actor="test"))
    for outcome in outcomes:
        # Random weights may be held for what they answer; but every task must have been answered.
        assert outcome.status in {"published", "held"}, (outcome.task, outcome.reasons)

    columns = ", ".join(f"s.{name}" for name in SAMPLE_SCHEMA.names)
    rows = warehouse.query(config.catalog_path, store, f"select task, {columns} from samples s order by task, position")
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows.to_pylist():
        found.setdefault(row["task"], []).append({**row, "metrics": dict(row["metrics"])})
    scores: dict[str, dict[str, float]] = {}
    for row in warehouse.query(config.catalog_path, store, "select * from scores where subset = ''").to_pylist():
        scores.setdefault(row["task"], {})[row["metric"]] = row["value"]
    return found, scores


def _hand_over_the_library(folder: Path) -> None:
    """The shipped files as lm-eval can read them: without our own keys, the frozen documents as its dataset."""
    config = load_config(folder / "eval_platform.toml")
    store = open_store(config.results)
    lock = json.loads(config.lock_path.read_text(encoding="utf-8"))["tasks"]
    target = folder / "library"
    target.mkdir()
    for name in bundled_tasks():
        task = load_task(store, lock[name]["task_id"])
        files = {"test": [dict(document.fields) for document in task.documents], "dev": [dict(s) for s in task.shots]}
        data_files = {}
        for split, rows in files.items():
            if rows:
                data_files[split] = str(target / f"{name}_{split}.jsonl")
                lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                Path(data_files[split]).write_text(lines, encoding="utf-8")
        said = yaml.safe_load((LIBRARY / f"{name}.yaml").read_text(encoding="utf-8"))
        theirs = {key: value for key, value in said.items() if key not in OURS}
        theirs.setdefault("doc_to_text", "")  # of a rolling perplexity: nothing, which lm-eval wants said
        theirs |= {"dataset_path": "json", "dataset_kwargs": {"data_files": data_files}, "test_split": "test"}
        if task.shots:
            theirs["fewshot_split"] = "dev"
        (target / f"{name}.yaml").write_text(yaml.safe_dump(theirs, allow_unicode=True), encoding="utf-8")


def _theirs(folder: Path, checkpoint: Path) -> tuple[dict[str, list[dict[str, Any]]], dict[str, dict[str, Any]]]:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        # Its decorator hides its parameters from a type checker.
        results = cast(Any, simple_evaluate)(
            model="hf",
            model_args={"pretrained": str(checkpoint), "dtype": "float32"},
            tasks=list(TASKS),
            task_manager=TaskManager(
                include_path=[str(folder / "tasks"), str(folder / "library")], include_defaults=False
            ),
            limit=LIMIT,
            batch_size=16,
            device="cpu",
            bootstrap_iters=0,
        )
    finally:
        torch.set_num_threads(threads)
    assert results is not None
    return results["samples"], results["results"]


def _tolerance(n_tokens: int) -> float:
    """In nats, of one log-likelihood (design: two float32 engines that batch differently)."""
    return max(1e-4, 1e-5 * n_tokens)


def _pairs(both: Both, name: str) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(our sample, theirs) of each document asked; a document with several filters is taken once."""
    theirs = {sample["doc_id"]: sample for sample in both.their_samples[name]}
    ours = {sample["position"]: sample for sample in both.samples[name]}
    assert sorted(ours) == sorted(theirs) == list(range(LIMIT))
    return [(ours[position], theirs[position]) for position in ours]


def _scored(sample: dict[str, Any]) -> list[tuple[float, bool | None, int]]:
    """(log-likelihood, greedy, tokens) of every scored request of our sample, in the order in which it is asked."""
    if sample["choices"] is None:
        return [(sample["log_likelihood"], sample["is_greedy"], sample["n_tokens"])]
    asked = [(c["log_likelihood"], c["is_greedy"], c["n_tokens"]) for c in sample["choices"]]
    alone = [
        (c["unconditional_log_likelihood"], c["unconditional_is_greedy"], c["unconditional_n_tokens"])
        for c in sample["choices"]
        if c["unconditional_n_tokens"] is not None
    ]
    return asked + alone


@pytest.mark.parametrize("name", TASKS)
def test_every_answer_is_theirs(both: Both, name: str) -> None:
    """Log-likelihoods within the tolerance, the same greedy flags, the same texts and what was extracted from them."""
    for ours, theirs in _pairs(both, name):
        answers = [reply[0] for reply in theirs["resps"]]
        if ours["response"] is not None:
            assert [ours["response"]] == answers
            continue
        scored = _scored(ours)
        assert len(scored) == len(answers)
        for (log_likelihood, greedy, n_tokens), answer in zip(scored, answers, strict=True):
            their_value, their_greedy = answer if isinstance(answer, list | tuple) else (answer, None)
            assert log_likelihood == pytest.approx(their_value, abs=_tolerance(n_tokens), rel=0)
            assert greedy == their_greedy
    for theirs in both.their_samples[name]:
        ours = both.samples[name][theirs["doc_id"]]
        extracted = dict(ours["extracted"])[theirs["filter"]] if ours["response"] is not None else None
        if extracted is not None:  # of what no pattern matched we keep nothing; its score, below, is theirs
            assert [extracted] == theirs["filtered_resps"]


@pytest.mark.parametrize("name", TASKS)
def test_every_score_is_theirs(both: Both, name: str) -> None:
    samples, ours = both.samples[name], both.scores[name]
    theirs = {
        score.removesuffix(",none"): float(value)
        for score, value in both.their_scores[name].items()
        if "," in score and "_stderr," not in score
    }
    assert set(ours) == set(theirs)
    for score, value in theirs.items():
        metric = score.partition(",")[0]
        tolerances = [_tolerance(sample["n_tokens"]) for sample in samples]
        if metric == "perplexity":  # exp of a mean log-likelihood
            assert math.log(ours[score]) == pytest.approx(math.log(value), abs=max(tolerances), rel=0)
        elif metric in {"word_perplexity", "byte_perplexity", "bits_per_byte"}:
            units = sum(sample["n_words" if metric == "word_perplexity" else "n_bytes"] for sample in samples)
            exponents = [x * math.log(2) if metric == "bits_per_byte" else math.log(x) for x in (ours[score], value)]
            assert exponents[0] == pytest.approx(exponents[1], abs=sum(tolerances) / units, rel=0)
        else:  # a share of right answers
            assert ours[score] == pytest.approx(value, abs=1e-12)


def test_the_comparison_could_fail(both: Both) -> None:
    """Right and wrong answers, greedy and other continuations, cut and whole prompts, several windows: all there."""
    for name, score in (("choices", "acc"), ("completions", "exact_match,half"), ("next_word", "acc")):
        assert 0 < both.scores[name][score] < 1, (name, both.scores[name])
    for name in ("mmlu_abstract_algebra", "gsm8k_50"):
        assert {sample["truncated_left_tokens"] > 0 for sample in both.samples[name]} == {True, False}
    assert max(sample["n_tokens"] for sample in both.samples["whole_text"]) > 3 * MAX_LENGTH
    reasons = {sample["finish_reason"] for sample in both.samples["completions"]}
    assert {"stop", "length"} <= reasons
