"""Tasks of lm-evaluation-harness as tasks of ours: the numbers of its own evaluator, on the same model and data.

The datasets are invented, in the form that the hub has them, in folders where `datasets` looks before it asks the
hub. So both sides go by the tasks' names alone: theirs by `simple_evaluate`, ours from the configuration through
sync, snapshot, engine, scoring and stored rows.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra `lm-eval`)")

from tiny_models import make_checkpoint

from eval_platform.config import Tasks
from eval_platform.engine import Engine, load, resolve_settings
from eval_platform.errors import TaskError
from eval_platform.report import board_of_rows, suite_markdown
from eval_platform.report.suite_means import Cell, group_means
from eval_platform.scoring import SAMPLE_SCHEMA, aggregate, responses_from_sample, score_items
from eval_platform.store import LocalStore
from eval_platform.tasks import (
    SyncReport,
    build_task,
    find_suite,
    harness_files,
    load_task,
    package_versions,
    read_lock,
    render,
    sync_tasks,
)
from eval_platform.tasks import hub as our_hub
from eval_platform.tasks.building import open_task
from eval_platform.tasks.harness_files import folder as harness_folder
from eval_platform.tasks.harness_files import groups, leaves
from eval_platform.tasks.lock import GroupMean, LockedGroup
from eval_platform.values import Generation, Item, Request, Response, RunSettings, Score, make_request

WORDS = ["the river", "a mountain", "seven", "London", "naïve café", "東京", "copy", "larger", "and so 12 on", "x"]


def _word(n: int) -> str:
    return WORDS[n % len(WORDS)]


def _arc(n: int) -> dict[str, Any]:
    choices = {"text": [f"{_word(n + k)} {'of ' * k}it" for k in range(4)], "label": list("ABCD")}
    return {"question": f"Where is {_word(n)}?", "choices": choices, "answerKey": "ABCD"[n % 4]}


def _winogrande(n: int) -> dict[str, str]:
    sentence = f"{_word(n)} was near {_word(n + 1)} because _ was {_word(n + 2)}."
    return {"sentence": sentence, "option1": _word(n), "option2": _word(n + 1), "answer": str(n % 2 + 1)}


def _trivia(n: int) -> dict[str, Any]:
    # Both of the words that a model so small may say; the harness normalises case and punctuation.
    return {"question": f"What is {_word(n)}", "answer": {"aliases": [_word(n), f"{_word(n + 3)}!", "THE"]}}


def _drop(n: int) -> dict[str, Any]:
    empty = {"number": "", "date": {"day": "", "month": "", "year": ""}, "spans": [_word(n), "the London copy"]}
    said = empty | {"worker_id": "", "hit_id": ""}
    several = {key: [said[key]] for key in said}
    passage = f"{_word(n)} and {_word(n + 1)} went to {_word(n + 2)}."
    return {
        "query_id": str(n),
        "passage": passage,
        "question": f"Who went to {_word(n + 2)}?",
        "answer": said,
        "validated_answers": several,
    }


def _truthful(n: int) -> dict[str, Any]:
    both = {"choices": [_word(n), _word(n + 1), _word(n + 2)], "labels": [1, n % 2, 0]}
    return {"question": f"Is it {_word(n)}?", "mc1_targets": both | {"labels": [1, 0, 0]}, "mc2_targets": both}


def _belarusian(n: int) -> dict[str, Any]:
    letters = {f"option_{letter}": _word(n + k) for k, letter in enumerate("abcd")}
    domain = ["Arts & Humanities", "Social Science", "STEM"][n % 3 if n < 9 else 2]
    return {"question": f" Which {_word(n)}? ", **letters, "answer": n % 4, "domain": domain}


# Dataset -> configuration -> split -> rows.
DATA: Mapping[str, Mapping[str, Mapping[str, list[dict[str, Any]]]]] = {
    "allenai/ai2_arc": {
        "ARC-Easy": {
            "train": [_arc(n) for n in range(20, 26)],
            "validation": [_arc(n) for n in range(15, 18)],
            "test": [_arc(n) for n in range(11)],
        }
    },
    "allenai/winogrande": {
        "winogrande_xl": {
            "train": [_winogrande(n) for n in range(30, 34)],
            "validation": [_winogrande(n) for n in range(8)],
        }
    },
    "nyu-mll/glue": {
        "cola": {
            "train": [{"sentence": _word(n), "label": n % 2} for n in range(3)],
            "validation": [{"sentence": f"{_word(n)} {_word(n * 3)}.", "label": int(n % 3 > 0)} for n in range(12)],
        },
        "mrpc": {
            "train": [{"sentence1": _word(n), "sentence2": "x", "label": n % 2} for n in range(3)],
            "validation": [{"sentence1": _word(n), "sentence2": _word(n * 7), "label": n % 2} for n in range(12)],
        },
    },
    "EleutherAI/lambada_openai": {
        "default": {"test": [{"text": f"It was {_word(n)} of {_word(n + 4)}"} for n in range(9)]}
    },
    "EleutherAI/wikitext_document_level": {
        "wikitext-2-raw-v1": {
            "train": [{"page": "x"}],
            "validation": [{"page": "y"}],
            "test": [{"page": f" = {_word(n)} = \n It 's @-@ ( {_word(n + 1)} ) . " * (n + 1)} for n in range(5)],
        }
    },
    "truthfulqa/truthful_qa": {"multiple_choice": {"validation": [_truthful(n) for n in range(7)]}},
    "openai/gsm8k": {
        "main": {
            "train": [{"question": "One?", "answer": "#### 1"}],
            "test": [{"question": f"How many of {n}?", "answer": f"so many #### {n}"} for n in range(3)],
        }
    },
    "EleutherAI/drop": {"default": {"train": [_drop(40)], "validation": [_drop(n) for n in range(4)]}},
    "mandarjoshi/trivia_qa": {
        "rc.nocontext": {"train": [_trivia(40)], "validation": [_trivia(n) for n in range(5)]},
    },
    "wmt/wmt14": {
        "fr-en": {
            split: [{"translation": {"en": _word(n), "fr": f"{_word(n)} le {_word(n + 1)}"}} for n in range(4)]
            for split in ("train", "validation", "test")
        }
    },
    "CohereForAI/include-base-44": {"Belarusian": {"test": [_belarusian(n) for n in range(12)]}},
}

# Name -> folder below lm_eval/tasks, where its own index is small.
NAMES = {
    "arc_easy": "arc",  # choices
    "winogrande": "winogrande",  # choices that are contexts, by functions
    "cola": "glue/cola",  # Matthews' correlation: no mean
    "mrpc": "glue/mrpc",  # accuracy and F1 over all
    "lambada_openai": "lambada",  # a last word's log-likelihood: perplexity and accuracy
    "wikitext": "wikitext",  # whole texts; its process_results counts other words than were asked
    "truthfulqa_mc2": "truthfulqa",  # process_results: the mass on what is true
    "gsm8k_cot": "gsm8k",  # two filters, shots from the file
    "drop": "drop",  # process_docs and process_results of completions
    "triviaqa": "triviaqa",  # several references
    "wmt14-en-fr": "translation",  # BLEU, TER and chrF of the corpus
    "include_base_44_belarusian": "include/default/Belarusian",  # a group
}
GROUP = [f"include_base_44_belarusian_{part}" for part in ("arts_humanities", "social_science", "stem")]
ASKED = [name for name in NAMES if not name.startswith("include")] + GROUP
# Those that we score ourselves.
OURS = {"arc_easy", "winogrande", "lambada_openai", "gsm8k_cot", "triviaqa", *GROUP}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_checkpoint(folder, seed=3, max_length=384)
    return folder


def _plant(engine: "Once") -> None:
    """Makes what the model says to some questions the right answer, so that not every completion is wrong."""
    aliases = DATA["mandarjoshi/trivia_qa"]["rc.nocontext"]["validation"]
    passages = DATA["EleutherAI/drop"]["default"]["validation"]
    trivia = [f"Question: {row['question']}?\nAnswer:" for row in aliases]
    asked = [make_request("generate", text, settings=Generation(256, ("\n", ".", ","))) for text in trivia]
    asked += [
        make_request("generate", f"{row['passage']} {row['question']}", settings=Generation(256, (".",)))
        for row in passages
    ]
    said = {one.request_id: one.text or "" for one in engine.answer(asked)}
    spoken = [said[request.request_id] for request in asked]
    for row, text in list(zip(aliases, spoken, strict=False))[::2]:
        row["answer"]["aliases"].append(text.strip().upper() + "!")
    for row, text in list(zip(passages, spoken[len(aliases) :], strict=True))[::2]:
        row["answer"]["spans"][:] = [" ".join(text.split()[:8]) or "the"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, engine: "Once") -> Path:
    folder = tmp_path_factory.mktemp("world")
    _plant(engine)
    for name, configs in DATA.items():
        place = folder / name
        place.mkdir(parents=True)
        said: list[str] = []
        for config, splits in configs.items():
            said.append(f"- config_name: {config}\n  data_files:")
            for split, rows in splits.items():
                file = f"{config}_{split}.jsonl"
                (place / file).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
                said.append(f"  - split: {split}\n    path: {file}")
        (place / "README.md").write_text("---\nconfigs:\n" + "\n".join(said) + "\n---\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module", autouse=True)
def offline(world: Path) -> Any:
    """Where `datasets` looks: in the working directory first, and nowhere beyond this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr("datasets.config.HF_DATASETS_CACHE", world / "cache")
        patch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        our_hub._refusal.cache_clear()
        yield
    our_hub._refusal.cache_clear()


class Once:
    """An engine that is asked every request once: both sides score the same answers, and half the time is saved.

    That their model and ours give the same answers is what test_lm_eval_model.py shows.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.info = engine.info
        self.known: dict[tuple[str, int], Response] = {}

    def answer(self, requests: Sequence[Request]) -> Iterator[Response]:
        asked = {(one.request_id, one.repeat): one for one in requests}
        new = [one for key, one in asked.items() if key not in self.known]
        self.known |= {(one.request_id, one.repeat): one for one in self.engine.answer(new)} if new else {}
        return (self.known[key] for key in asked)


@pytest.fixture(scope="module")
def engine(model: Path) -> Once:
    return Once(load(model, resolve_settings(RunSettings(device="cpu", dtype="float32", engine_path="plain"), model)))


@pytest.fixture(scope="module")
def theirs(world: Path, model: Path, engine: Once) -> dict[str, Any]:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    from eval_platform.lm_eval_model import EvalPlatformLM

    folders: list[str | Path] = [harness_folder() / part for part in dict.fromkeys(NAMES.values())]
    asked = EvalPlatformLM(str(model), device="cpu", dtype="float32", path="plain")
    asked._engine = cast(Any, engine)
    return cast(Any, simple_evaluate)(
        model=asked,
        tasks=list(NAMES),
        task_manager=TaskManager(include_path=folders, include_defaults=False),
        bootstrap_iters=0,
    )


@pytest.fixture(scope="module")
def synced(world: Path) -> SyncReport:
    return sync_tasks(Tasks(lm_eval=tuple(NAMES)), LocalStore(world / "results"), world / "lock.json")


def _answers(engine: Once, items: list[Item]) -> dict[tuple[str, int], Response]:
    asked = {request.request_id: request for item in items for request in item.requests}
    return {(one.request_id, one.repeat): one for one in engine.answer(list(asked.values()))}


def _scores(world: Path, engine: Once, task_id: str) -> tuple[dict[str, Score], list[dict[str, Any]]]:
    """From the store alone, the rows by way of Parquet's types."""
    task = load_task(LocalStore(world / "results"), task_id)
    items = list(render(task))
    rows = score_items(task, items, _answers(engine, items))
    stored = pa.Table.from_pylist(rows, schema=SAMPLE_SCHEMA).to_pylist()
    again = {
        (one.request_id, one.repeat): one
        for item, row in zip(items, stored, strict=True)
        for one in responses_from_sample(task, item, row)
    }
    assert [row["metrics"] for row in score_items(task, items, again)] == [row["metrics"] for row in rows]
    return {score.metric: score for score in aggregate(task, stored)}, stored


def test_every_name_becomes_a_task_and_a_group_becomes_its_tasks(synced: SyncReport) -> None:
    assert [str(error) for error in synced.errors] == []
    assert sorted(synced.lock.tasks) == sorted(ASKED)
    assert synced.lock.tasks[GROUP[0]].tags == ("include_base_44_belarusian",)
    assert synced.lock.tasks["gsm8k_cot"].num_fewshot == 8


@pytest.mark.parametrize("name", ASKED)
def test_scores_are_the_harness_own(
    name: str,
    world: Path,
    engine: Once,
    synced: SyncReport,
    theirs: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("eval_platform.scoring.harness.REPLICATES", 10)  # the values are looked at, not their errors
    expected = {
        key.removesuffix(",none"): value
        for key, value in theirs["results"][name].items()
        if "," in key and "_stderr" not in key
    }

    scores, rows = _scores(world, engine, synced.lock.tasks[name].task_id)

    assert {metric: score.value for metric, score in scores.items()} == pytest.approx(expected, rel=1e-4, abs=1e-9)
    assert len(rows) == theirs["n-samples"][name]["original"]


def test_a_groups_mean_is_the_harness_own(
    world: Path, engine: Once, synced: SyncReport, theirs: dict[str, Any]
) -> None:
    name = "include_base_44_belarusian"
    suite = find_suite(name, {}, read_lock(world / "lock.json").groups)
    assert suite.tasks == tuple(GROUP)
    rows = [
        {"key": "r/1", "run": "r", "step": 1, "n_parameters": None, "primary_metric": "acc", "attempt": 1}
        | {"status": "published", "finished_at": 1, "reasons": []}
        | asdict(score)
        for task in GROUP
        for score in _scores(world, engine, synced.lock.tasks[task].task_id)[0].values()
        if score.subset == ""
    ]
    (line,) = board_of_rows(suite, synced.lock, rows).lines
    expected = {
        key.removesuffix(",none"): value
        for key, value in theirs["groups"][name].items()
        if "," in key and "_stderr" not in key
    }
    assert expected
    assert 0 < expected["acc"] < 1
    assert {score: cell.value for score, cell in line.means.items() if cell} == pytest.approx(expected)
    # The tasks differ in size, so that another weighing gives another mean: theirs for it is ours too.
    from lm_eval.api.metrics import aggregate_subtask_metrics

    evenly = suite.model_copy(update={"means": tuple(replace(mean, by_size=False) for mean in suite.means)})
    (other,) = board_of_rows(evenly, synced.lock, rows).lines
    values = [theirs["results"][task]["acc,none"] for task in GROUP]
    assert other.means["acc"] is not None
    assert other.means["acc"].value == pytest.approx(aggregate_subtask_metrics(values, [3, 3, 6], False))
    assert other.means["acc"].value != pytest.approx(expected["acc"])
    # Without one of them there is none.
    (short,) = board_of_rows(suite, synced.lock, [row for row in rows if row["task"] != GROUP[1]]).lines
    assert set(short.means.values()) == {None}
    assert "| mean (acc) |" in suite_markdown(board_of_rows(suite, synced.lock, rows))


def test_groups_in_groups_and_every_way_to_name_filters() -> None:
    found = groups("mmlu_pro_plus")
    ((_, whole),) = found.items()
    assert whole.means == (GroupMean("exact_match", ("custom-extract",), True),)
    assert len(whole.tasks) == 14
    assert groups("arc_easy") == {}
    inner = {"group": "inner", "task": ["arc_challenge"], "aggregate_metric_list": {"metric": "acc"}}
    outer = harness_files._groups("outer", {"group_alias": "Both", "task": ["arc_easy", inner]})
    assert outer == {
        "outer": LockedGroup("Both", ("arc_easy", "arc_challenge")),
        "outer--inner": LockedGroup("outer::inner", ("arc_challenge",), (GroupMean("acc", None, True),)),
    }
    scores = {
        "a": {"f1": Cell(0.5, 0.1, None, None, 4), "f1,x": Cell(0.2, 0.2, None, None, 3)},
        "b": {"f1,x": Cell(0.8, None, None, None, 1)},
    }
    names = {task: list(given) for task, given in scores.items()}
    made = group_means([GroupMean("f1", None, True)], names, scores)
    # A task without the score is left out; sizes are 4 (the fullest score) and 1.
    assert made["f1"] == Cell(0.5, 0.1, None, None, 4)
    assert made["f1,x"] == Cell(pytest.approx((4 * 0.2 + 0.8) / 5), None, None, None, 4)
    assert group_means([GroupMean("f1", ("x", "none", "y"), False)], names, scores) == {
        "f1,x": Cell(pytest.approx(0.5), None, None, None, 4),
        "f1": Cell(0.5, 0.1, None, None, 4),
    }


def test_the_numbers_are_not_all_alike(theirs: dict[str, Any]) -> None:
    values = [
        value
        for name in ASKED
        for key, value in theirs["results"][name].items()
        if "," in key and "_stderr" not in key and value not in (0.0, 1.0)
    ]

    assert len(values) >= 12
    assert 0 < theirs["results"]["triviaqa"]["exact_match,remove_whitespace"] < 1
    assert 0 < theirs["results"]["drop"]["f1,none"] < 1


def test_prompts_are_the_harness_own(synced: SyncReport, world: Path, theirs: dict[str, Any]) -> None:
    for name in ASKED:
        task = load_task(LocalStore(world / "results"), synced.lock.tasks[name].task_id)
        samples = {sample["doc_id"]: sample["arguments"] for sample in theirs["samples"][name]}
        for item in render(task):
            ours = [(r.context,) if r.kind == "rolling" else (r.context, r.continuation) for r in item.requests]
            asked = [tuple(one) for one in samples[item.document.position]]
            if item.requests[0].kind == "generate":
                ours, asked = [(item.requests[0].context,)], [(one[0],) for one in asked]
            assert ours == asked


def test_what_the_harness_computes_is_part_of_a_task(synced: SyncReport, world: Path) -> None:
    for name in ASKED:
        definition = load_task(LocalStore(world / "results"), synced.lock.tasks[name].task_id).definition
        assert (definition.harness is None) == (name in OURS)
        assert ("lm_eval" in package_versions(definition)) == (name not in OURS)


def test_a_score_that_is_no_mean_has_an_interval_and_no_value_without_an_answer(
    world: Path, engine: Once, synced: SyncReport
) -> None:
    task = load_task(LocalStore(world / "results"), synced.lock.tasks["wikitext"].task_id)
    items = list(render(task))
    answers = _answers(engine, items)
    score = next(one for one in aggregate(task, score_items(task, items, answers)) if one.metric == "bits_per_byte")
    assert score.ci_low is not None
    assert score.ci_high is not None
    assert score.value is not None
    assert score.ci_low < score.value < score.ci_high
    assert score.interval_method == "bootstrap_percentile"

    key = (items[0].requests[0].request_id, 0)
    answers[key] = Response(key[0], 0, log_likelihood=float("nan"))

    assert {one.value for one in aggregate(task, score_items(task, items, answers))} == {None}


def test_another_code_than_was_synced_is_refused(world: Path, synced: SyncReport, engine: Once) -> None:
    task = load_task(LocalStore(world / "results"), synced.lock.tasks["cola"].task_id)
    assert task.definition.lm_eval is not None
    changed = task.definition.lm_eval.model_copy(update={"code": "0" * 64})
    other = replace(task, definition=task.definition.model_copy(update={"lm_eval": changed}))
    items = list(render(other))

    with pytest.raises(TaskError, match="tasks sync"):
        score_items(other, items, _answers(engine, items))


def test_a_task_file_renames_and_overrides(world: Path, tmp_path: Path) -> None:
    file = tmp_path / "easy.yaml"
    file.write_text("lm_eval: arc_easy\ntask: arc_two_shots\nnum_fewshot: 2\ntitle: ARC, two shots\n")

    task = build_task(file)

    assert task.name == "arc_two_shots"
    assert task.definition.title == "ARC, two shots"
    assert next(render(task)).prompt.count("Question: ") == 3
    assert task.definition.shots_shown == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lm_eval: include_base_44_belarusian\n", "group of 3 tasks"),
        ("lm_eval: [arc_easy]\n", "is the name of a task"),
        ("lm_eval: humaneval\n", "sandbox"),
        ("lm_eval: squad_completion\n", "Python class"),
        ("lm_eval: arc_easy\ngeneration_kwargs: {num_beams: 4}\noutput_type: generate_until\n", "num_beams"),
    ],
)
def test_what_is_not_supported_says_so(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "t.yaml").write_text(text)

    with pytest.raises(TaskError, match=message):
        open_task(tmp_path / "t.yaml")


def test_data_that_is_not_here_skips_the_task(tmp_path: Path) -> None:
    report = sync_tasks(Tasks(lm_eval=("piqa", "arc_easy")), LocalStore(tmp_path / "results"), tmp_path / "lock.json")

    assert report.errors == ()
    assert list(report.lock.tasks) == ["arc_easy"]
    assert report.lock.skipped["piqa"].dataset == "baber/piqa"
    assert os.fspath(tmp_path) not in report.lock.skipped["piqa"].reason


def test_an_unknown_name_says_what_is_near(monkeypatch: pytest.MonkeyPatch) -> None:
    # The harness's own index, which tags are looked up in, takes most of a minute.
    monkeypatch.setattr("eval_platform.tasks.harness_files._index", dict)

    with pytest.raises(TaskError, match=r"did you mean .*arc_easy"):
        leaves("arc_eazy")


def test_without_the_package_the_error_names_it_and_the_name_stands_for_what_it_did(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import importlib.util

    names = ("arc_easy", "include_base_44_belarusian")
    asked, store, lock = Tasks(lm_eval=names), LocalStore(tmp_path / "results"), tmp_path / "lock.json"
    before = sync_tasks(asked, store, lock).lock
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name))

    report = sync_tasks(asked, store, lock)

    assert 'pip install "eval-platform[lm-eval]"' in str(report.errors[0])
    assert report.lock == before
    assert sorted(before.tasks) == ["arc_easy", *GROUP]
