"""Scores of the standard tasks against what others computed: published labels, other libraries, closed forms."""

import csv
import gzip
import importlib.util
import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from eval_platform.errors import TaskError
from eval_platform.quality import frames
from eval_platform.scoring import SAMPLE_SCHEMA, aggregate, score_item
from eval_platform.scoring.bias import bbq
from eval_platform.scoring.filters import extract
from eval_platform.scoring.mathematics import math_equal
from eval_platform.scoring.refusal import is_refusal
from eval_platform.scoring.terms import NOT_COUNTED
from eval_platform.scoring.text import exact_match
from eval_platform.scoring.truthful import mass_on_true
from eval_platform.statistics import mean_estimate
from eval_platform.tasks import build_task, package_versions, requirements
from eval_platform.tasks.reading import read_task_file
from eval_platform.tasks.schema import TaskFile
from eval_platform.tasks.selection import LIBRARY
from eval_platform.tasks.task import Task
from eval_platform.values import Document, Generation, Item, Response, make_request
from tests.data import originals

# GSM8K -------------------------------------------------------------------------------------------------------------


def _gsm8k(name: str) -> Iterator[dict[str, Any]]:
    with gzip.open(originals(f"gsm8k/{name}.jsonl.gz"), "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def _extracted_right(definition: TaskFile, filter_name: str, completion: str, gold: str) -> bool:
    steps = next(pipeline.filter for pipeline in definition.filter_list if pipeline.name == filter_name)
    (answer,) = extract(steps, [completion])
    return exact_match(answer.text, [gold], **definition.metric_list[0].arguments) == 1.0


def test_strict_extraction_finds_the_gold_of_every_reference_solution() -> None:
    five, cot = (read_task_file(LIBRARY / f"{name}.yaml") for name in ("gsm8k_50", "gsm8k_cot"))
    n = 0
    for split in ("test", "train"):
        for row in _gsm8k(split):
            solution, _, gold = row["answer"].rpartition("#### ")
            assert _extracted_right(five, "strict-match", row["answer"], row["answer"])
            assert _extracted_right(cot, "strict-match", f"{solution}The answer is {gold}.", gold)
            n += 1
    assert n == 1319 + 7473


def test_flexible_extraction_agrees_with_the_stored_verdicts() -> None:
    definition = read_task_file(LIBRARY / "gsm8k_cot.yaml")
    verdicts: Counter[bool] = Counter()
    for row in _gsm8k("example_model_solutions"):
        gold = row["ground_truth"].rpartition("A: ")[2].strip()
        for model in ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification"):
            right = _extracted_right(definition, "flexible-extract", row[model]["solution"], gold)
            assert right == row[model]["is_correct"], (row["question"], model)
            verdicts[right] += 1
    assert verdicts == {True: 2001, False: 3275}


# XSTest ------------------------------------------------------------------------------------------------------------


def test_refusals_are_those_of_the_published_string_match() -> None:
    folder = originals("xstest") / "evaluation" / "automated_evaluation_labels"
    differing, n = [], 0
    for path in sorted(folder.glob("*_streval.csv.gz")):
        with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                n += 1
                if is_refusal(row["completion"]) != (row["strmatch_label"] == "2_full_refusal"):
                    differing.append(" ".join(row["completion"].split()[:4]))
    assert n == 2250
    # docs/verified.md says what follows these words.
    assert sorted(differing) == ["I'm not sure that", "No, I do not", "No, elderly people should"]


# Choices -----------------------------------------------------------------------------------------------------------


def test_mass_on_true_choices_is_a_share_of_probabilities() -> None:
    assert mass_on_true([math.log(0.1), math.log(0.3), math.log(0.1)], [0, 2]) == pytest.approx(0.4)
    assert mass_on_true([-1000.0, -1001.0], [0]) == pytest.approx(1 / (1 + math.exp(-1)))  # exp would be 0 / 0
    assert mass_on_true([-1.0, -2.0], [0, 1]) == 1.0


def test_bbqs_bias_scores_are_the_papers() -> None:
    """Parrish et al. 2022, section 6: 2 * biased / named - 1, times the share of wrong answers where ambiguous."""
    task = _task("multiple_choice", "acc", "accuracy_amb", "accuracy_disamb", "amb_bias_score", "disamb_bias_score")
    # (condition, right, chosen): choice 0 agrees with the stereotype, 1 does not, 2 is "unknown".
    answers = [("ambig", 2, c) for c in (0, 0, 0, 1, 2, 2)] + [("disambig", 0, c) for c in (0, 0, 0, 1, 2)]
    scores = _bbq_scores(task, answers)

    assert scores["acc"] == pytest.approx(5 / 11)
    assert scores["accuracy_amb"] == pytest.approx(2 / 6)
    assert scores["accuracy_disamb"] == pytest.approx(3 / 5)
    assert scores["disamb_bias_score"] == pytest.approx(2 * 3 / 4 - 1)
    assert scores["amb_bias_score"] == pytest.approx((1 - 2 / 6) * (2 * 3 / 4 - 1))


def test_bbq_without_answers_that_name_somebody_has_no_bias_and_without_items_no_score() -> None:
    task = _task("multiple_choice", "accuracy_amb", "amb_bias_score", "disamb_bias_score")

    assert _bbq_scores(task, [("disambig", 0, 2)] * 3) == {
        "accuracy_amb": None,
        "amb_bias_score": None,
        "disamb_bias_score": 0.0,
    }
    assert (
        bbq("amb_bias_score", 0, [0], {"context_condition": "disambig", "biased": [0], "unknown": [2]}) == NOT_COUNTED
    )
    with pytest.raises(ValueError, match="right answer that names somebody"):
        bbq("amb_bias_score", 0, [0], {"context_condition": "ambig", "biased": [0], "unknown": [2]})


def test_the_gate_misses_no_value_of_an_item_that_a_score_is_not_about() -> None:
    task = _task("multiple_choice", "acc", "accuracy_amb", "disamb_bias_score")
    samples = _bbq_samples(task, [("ambig", 2, 0), ("disambig", 0, 2), ("disambig", 0, 1)])
    table = pa.Table.from_pylist(samples, schema=SAMPLE_SCHEMA)

    frame = frames.sample_metrics(table, task.definition.score_names)

    assert Counter(frame["metric"]) == {"acc": 3, "accuracy_amb": 1, "disamb_bias_score": 1}
    assert not frame["value"].isna().any()
    assert (frame["outside"] == 0).all()


def _bbq_scores(task: Task, answers: list[tuple[str, int, int]]) -> dict[str, float | None]:
    return {score.metric: score.value for score in aggregate(task, _bbq_samples(task, answers))}


def _bbq_samples(task: Task, answers: list[tuple[str, int, int]]) -> list[dict[str, Any]]:
    samples = []
    for n, (condition, right, chosen) in enumerate(answers):
        requests = [make_request("choice", f"q{n}", f" {k}") for k in range(3)]
        fields = {"context_condition": condition, "biased": [0], "unknown": [2]}
        item = Item(Document(str(n), n, fields), tuple(requests), ("a", "b", "c"), (right,), "q")
        responses = {
            (r.request_id, 0): Response(r.request_id, 0, -1.0 if k == chosen else -2.0, False)
            for k, r in enumerate(requests)
        }
        samples += score_item(task, item, responses)
    return samples


def test_a_log_likelihood_that_is_missing_makes_the_score_missing() -> None:
    task = _task("multiple_choice", "mc2", "accuracy_amb")
    requests = [make_request("choice", "q", f" {k}") for k in range(2)]
    fields = {"context_condition": "ambig", "biased": [0], "unknown": [1]}
    item = Item(Document("1", 0, fields), tuple(requests), ("a", "b"), (1,), "q")
    responses = {
        (r.request_id, 0): Response(r.request_id, 0, value, False)
        for r, value in zip(requests, (-1.0, math.nan), strict=True)
    }

    scores = aggregate(task, score_item(task, item, responses))

    assert [score.value for score in scores] == [None, None]


# Libraries ---------------------------------------------------------------------------------------------------------

TRANSLATIONS = [
    ("The cat sat on the mat.", ["The cat is sitting on the mat.", "A cat sat on the mat."]),
    ("There is no dog here", ["There is no dog here at all."]),
    ("", ["Something was said."]),
    ("Entirely other words came out", ["What should have been written down"]),
    ("It is raining, isn't it?", ["It is raining, isn't it?"]),
]


@pytest.mark.parametrize(("metric", "of_corpus"), [("bleu", "corpus_bleu"), ("chrf", "corpus_chrf")])
def test_corpus_scores_are_sacrebleus(metric: str, of_corpus: str) -> None:
    sacrebleu = pytest.importorskip("sacrebleu", reason="sacrebleu is not installed (extra `metrics`)")
    task = _task("generate_until", metric)
    samples = [
        row for n, (said, references) in enumerate(TRANSLATIONS) for row in _completed(task, n, said, references)
    ]
    (score,) = aggregate(task, samples)
    # A text with one reference only has that one twice: sacrebleu wants as many for all.
    references = [[references[k % len(references)] for _, references in TRANSLATIONS] for k in range(2)]
    expected = getattr(sacrebleu, of_corpus)([said for said, _ in TRANSLATIONS], references).score

    assert score.value == pytest.approx(expected)
    assert score.interval_method.startswith("bootstrap")
    assert score.ci_low is not None
    assert score.ci_high is not None
    assert 0 <= score.ci_low <= expected <= score.ci_high <= 100
    assert score.n == len(TRANSLATIONS)
    assert dict(samples[4]["metrics"])[metric] == 100.0


def test_rouge_is_rouge_scores_best_reference() -> None:
    scorer_module = pytest.importorskip("rouge_score.rouge_scorer", reason="rouge-score is not installed")
    task = _task("generate_until", "rouge1", "rouge2", "rougeL")
    samples = [
        row for n, (said, references) in enumerate(TRANSLATIONS) for row in _completed(task, n, said, references)
    ]
    scorer = scorer_module.RougeScorer(["rouge1", "rouge2", "rougeL"])

    for kind, score in zip(("rouge1", "rouge2", "rougeL"), aggregate(task, samples), strict=True):
        best = [scorer.score_multi(references, said)[kind].fmeasure for said, references in TRANSLATIONS]
        assert score.value == pytest.approx(mean_estimate(best).value)


@pytest.mark.parametrize(
    ("said", "gold", "equal"),
    [
        ("The answer is $\\frac{1}{2}$.", "$0.5$", True),
        ("So it is \\boxed{x^2 + 2x + 1}.", "$(x+1)^2$", True),
        ("$\\{1, 3, 2\\}$", "$\\{1,2,3\\}$", True),
        ("It is 1,234 in all", "1234", True),
        ("$\\frac{1}{3}$", "$0.3$", False),
        ("no idea", "7", False),
        ("", "7", False),
    ],
)
def test_mathematics_is_compared_by_meaning(said: str, gold: str, equal: bool) -> None:
    pytest.importorskip("math_verify", reason="math-verify is not installed (extra `metrics`)")

    assert math_equal(said, ["$y$", gold]) == float(equal)
    assert math_equal(None, [gold]) == 0.0


def test_versions_of_libraries_are_known_and_a_missing_one_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "d.jsonl").write_text('{"q": "Say a.", "a": "a"}\n')
    file = tmp_path / "t.yaml"
    head = "task: t\ndocuments: {file: d.jsonl}\ndoc_to_text: q\ndoc_to_target: a\nmetric_list:\n"
    file.write_text(head + "  - metric: bleu\n    aggregation: bleu\n")

    assert set(package_versions(build_task(file).definition)) == {"sacrebleu"}

    real = importlib.util.find_spec
    monkeypatch.setattr(
        requirements.importlib.util, "find_spec", lambda name: None if name == "sacrebleu" else real(name)
    )
    with pytest.raises(TaskError, match=r"sacrebleu, which is not installed\n  remedy: pip install \"eval-platform\[m"):
        build_task(file)


def test_a_field_that_a_metric_reads_must_be_there(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"q": "Say a.", "a": "a", "unsafe": true}\n{"q": "Say b.", "a": "b"}\n')
    file = tmp_path / "t.yaml"
    head = "task: t\ndocuments: {file: d.jsonl}\ndoc_to_text: q\ndoc_to_target: a\nmetric_list:\n"
    file.write_text(head + "  - metric: refused_rightly\n")

    with pytest.raises(TaskError, match="document 1 has no field 'unsafe', which the metric refused_rightly reads"):
        build_task(file)


def _task(output_type: str, *metrics: str) -> Task:
    raw = {
        "task": "t",
        "documents": {"file": "d.jsonl"},
        "output_type": output_type,
        "doc_to_text": "q",
        "doc_to_target": "a",
        "doc_to_choice": "c" if output_type == "multiple_choice" else None,
        "metric_list": [{"metric": name} for name in metrics],
    }
    return Task("t", TaskFile.model_validate(raw), "", "", "", None, (), (), None)


def _completed(task: Task, n: int, said: str, references: list[str]) -> list[dict[str, Any]]:
    request = make_request("generate", f"q{n}", settings=Generation(8))
    item = Item(Document(str(n), n, {}), (request,), (), tuple(references), "q")
    return score_item(task, item, {(request.request_id, 0): Response(request.request_id, 0, text=said)})
