"""The standard tasks ask what lm-evaluation-harness's tasks of the same names ask, and score it as they do.

The oracle is the harness's own task, its Python functions included, over the same 20 rows.
"""

import random
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest

from eval_platform.scoring import aggregate, score_item
from eval_platform.tasks import Task, catalogue, render
from eval_platform.tasks.building import _assemble
from eval_platform.tasks.reading import read_task_file
from eval_platform.tasks.selection import LIBRARY
from eval_platform.values import Item, Response
from tests import hub_rows
from tests.data import use_originals
from tests.hub_rows import Hub, Row

pytest.importorskip("lm_eval", reason="the oracle is lm-eval, which is not installed (extra `lm-eval`)")

from tests.lm_eval_oracle import asked_by_us, lm_eval_task, requests_of


class Case(NamedTuple):
    """A task of ours, the file of theirs below lm_eval/tasks, the rows of the hub, by split."""

    name: str
    theirs: str
    rows: Callable[[], Mapping[str, list[Row]]]
    config: str | None = None


def _split(split: str, rows: Callable[[], list[Row]]) -> Callable[[], Mapping[str, list[Row]]]:
    return lambda: {split: rows()}


CASES = [
    Case("arc_easy", "arc/arc_easy", _split("test", lambda: hub_rows.arc("ARC-Easy"))),
    Case("arc_challenge", "arc/arc_challenge", _split("test", lambda: hub_rows.arc("ARC-Challenge"))),
    Case("openbookqa", "openbookqa/openbookqa", _split("test", hub_rows.openbookqa)),
    Case("piqa", "piqa/piqa", _split("validation", hub_rows.piqa)),
    Case("social_iqa", "siqa/siqa", _split("validation", hub_rows.siqa)),
    Case("winogrande", "winogrande/default", _split("validation", hub_rows.winogrande)),
    Case("hellaswag", "hellaswag/hellaswag", _split("validation", hub_rows.hellaswag)),
    Case("boolq", "super_glue/boolq/default", _split("validation", hub_rows.boolq)),
    Case("commonsense_qa", "commonsense_qa/default", _split("validation", hub_rows.commonsense_qa)),
    Case("lambada_openai", "lambada/lambada_openai", _split("test", hub_rows.lambada)),
    Case("truthfulqa_mc1", "truthfulqa/truthfulqa_mc1", _split("validation", hub_rows.truthfulqa_choices)),
    Case("truthfulqa_mc2", "truthfulqa/truthfulqa_mc2", _split("validation", hub_rows.truthfulqa_choices)),
    Case("truthfulqa_gen", "truthfulqa/truthfulqa_gen", _split("validation", hub_rows.truthfulqa_questions)),
    Case("bbq_six", "bbq/bbq_multiple_choice", _split("test", hub_rows.bbq)),
    Case("gsm8k_cot", "gsm8k/gsm8k-cot", _split("test", hub_rows.gsm8k)),
    Case("ifeval", "ifeval/ifeval", _split("train", hub_rows.ifeval)),
    Case("mmlu_pro", "mmlu_pro/mmlu_pro_law", lambda: dict.fromkeys(("test", "validation"), hub_rows.mmlu_pro())),
    Case("mgsm", "mgsm/direct/mgsm_direct_de", _split("test", hub_rows.mgsm), "de"),
    Case("mgsm", "mgsm/direct/mgsm_direct_zh", _split("test", hub_rows.mgsm), "zh"),
]
# What is called otherwise there: the probability of the true answers.
THEIR_NAMES = {("truthfulqa_mc2", "mc2"): "acc"}


@pytest.mark.parametrize("case", CASES, ids=[f"{case.name} {case.config or ''}".strip() for case in CASES])
def test_asks_and_scores_as_lm_eval_does(case: Case) -> None:
    splits = case.rows()
    task = _task(case, splits)
    theirs = lm_eval_task(f"{case.theirs}.yaml", splits)
    items = list(render(task))

    asked, expected = asked_by_us(items), requests_of(theirs)
    if case.name == "mgsm":  # there each language has its own word to stop at; ours stops at any of them
        assert all(stop in ours[1] for (ours,), (their,) in zip(asked, expected, strict=True) for stop in their[1])
        asked, expected = ([[(r[0], *r[2:]) for r in one] for one in side] for side in (asked, expected))
    assert asked == expected
    if case.name != "ifeval":  # its functions need NLTK's data; see test_scoring_ifeval.py
        # The harness bootstraps every single ROUGE score, a second for each item.
        _assert_same_scores(case.name, task, items[:1] if case.name == "truthfulqa_gen" else items, theirs)


def _task(case: Case, splits: Mapping[str, list[Row]]) -> Task:
    """Ours over the rows of the hub: through the dataset's module of the catalogue."""
    definition = read_task_file(LIBRARY / f"{case.name}.yaml")
    assert definition.documents is not None
    assert definition.documents.dataset is not None
    source = definition.documents.dataset
    config = "Age" if source.name == "bbq" else case.config or source.config
    rows = catalogue.read(source.name, source.split, config, Hub(dict(splits)))
    shots = []
    if definition.documents.fewshot is not None:
        assert definition.documents.fewshot.dataset is not None
        shots = catalogue.read(source.name, definition.documents.fewshot.dataset.split, config, Hub(dict(splits)))
    elif definition.shots:
        shots = definition.fewshot_config.samples or []
    return _assemble(definition, rows, shots, chance=None, identity="")


def _assert_same_scores(name: str, task: Task, items: list[Item], theirs: Any) -> None:
    rng = random.Random(name)
    samples: list[dict[str, Any]] = []
    values: dict[str, list[Any]] = {}
    for item, doc in zip(items, theirs.eval_docs, strict=False):
        responses = [_response(rng, k, item) for k in range(len(item.requests))]
        samples += score_item(task, item, {(r.request_id, 0): r for r in responses})
        if task.definition.output_type != "generate_until":
            _add(values, "", theirs.process_results(doc, [(r.log_likelihood, r.is_greedy) for r in responses]))
            continue
        for pipeline in theirs._filters:
            (instance,) = [i for i in theirs.instances if i.doc_id == item.document.position]
            instance.resps = [responses[0].text]
            pipeline.apply([instance])
            suffix = "" if pipeline.name == "none" else f",{pipeline.name}"
            _add(values, suffix, theirs.process_results(doc, [instance.filtered_resps[pipeline.name]]))
    ours = {score.metric: score.value for score in aggregate(task, samples) if score.subset == ""}
    assert set(ours) <= set(task.definition.score_names)
    for score, value in ours.items():
        metric, _, suffix = THEIR_NAMES.get((name, score), score).partition(",")
        expected = theirs.aggregation()[metric](values[f"{metric},{suffix}" if suffix else metric])
        assert value == pytest.approx(float(expected), abs=1e-9), score


def _add(values: dict[str, list[Any]], suffix: str, results: Mapping[str, Any]) -> None:
    for metric, value in results.items():
        values.setdefault(f"{metric}{suffix}", []).append(value)


def _response(rng: random.Random, k: int, item: Item) -> Response:
    request = item.requests[k]
    if request.kind == "choice":
        # The first two likelier than others: of BBQ's twelve choices these name somebody.
        return Response(request.request_id, 0, -rng.uniform(0.1, 5 if k < 2 else 30), rng.random() < 0.5, n_tokens=1)
    right = item.target if isinstance(item.target, str) else str(item.target[0])
    said = rng.choice(
        [right, f"So 3 + 4 = 7. The answer is {right}.", f"the answer is ({right}).", f"Well: $1,{right} {right}", ""]
    )
    return Response(request.request_id, 0, text=said, n_tokens=1, finish_reason="stop")


def test_crows_pairs_is_asked_and_scored_as_lm_eval_does(monkeypatch: pytest.MonkeyPatch) -> None:
    use_originals(monkeypatch, "crows_pairs/crows_pairs_anonymized.csv.gz")
    definition = read_task_file(LIBRARY / "crows_pairs.yaml")
    task = _assemble(definition, catalogue.read("crows_pairs", "test")[: hub_rows.N], [], chance=None, identity="")
    theirs = lm_eval_task("crows_pairs/crows_pairs_english.yaml", {"test": hub_rows.crows_pairs()})
    items = list(render(task))

    assert asked_by_us(items) == requests_of(theirs)
    _assert_same_scores("crows_pairs", task, items, theirs)


LOCAL = [
    ("arc", "test", "ARC-Easy", lambda: hub_rows.arc("ARC-Easy")),
    ("arc", "test", "ARC-Challenge", lambda: hub_rows.arc("ARC-Challenge")),
    ("openbookqa", "test", None, hub_rows.openbookqa),
    ("piqa", "validation", None, hub_rows.piqa),
    ("winogrande", "validation", None, hub_rows.winogrande),
    ("ifeval", "train", None, hub_rows.ifeval),
    ("truthfulqa", "validation", "multiple_choice", hub_rows.truthfulqa_choices),
]


@pytest.mark.parametrize(
    ("name", "split", "config", "rows"), LOCAL, ids=[f"{n} {c or ''}".strip() for n, _, c, _ in LOCAL]
)
def test_local_files_and_the_hub_give_the_same_rows(
    name: str, split: str, config: str | None, rows: Callable[[], list[Row]], monkeypatch: pytest.MonkeyPatch
) -> None:
    of_hub = catalogue.read(name, split, config, Hub({split: rows()}))
    use_originals(monkeypatch)

    assert catalogue.read(name, split, config)[: len(of_hub)] == of_hub


def test_truthfulqas_revised_questions_have_the_form_of_the_hubs(monkeypatch: pytest.MonkeyPatch) -> None:
    of_hub = catalogue.read(
        "truthfulqa", "validation", "generation", Hub({"validation": hub_rows.truthfulqa_questions()})
    )
    use_originals(monkeypatch)

    revised = catalogue.read("truthfulqa", "validation", "generation_revised")

    assert len(revised) == 817
    assert all(row in revised for row in of_hub)


def test_bbqs_biased_answers_are_lm_evals() -> None:
    """All items at hand, and rows with every way in which the data names groups, for the categories that are not."""
    from tests.lm_eval_oracle import lm_eval_function

    biased = lm_eval_function("bbq/utils.py", "doc_to_biased_answer")
    process = lm_eval_function("bbq/utils.py", "process_docs")
    rows = _bbq_rows()

    expected = [sorted(k for k in biased(row) if k < 2) for row in process(_Rows(rows))]

    assert [catalogue.bbq.row_of(row)["biased"] for row in rows] == expected


class _Rows(list[Row]):
    """What the harness's function wants of a dataset."""

    def map(self, function: Callable[[Row], Row]) -> list[Row]:
        return [function(dict(row)) for row in self]


def _bbq_rows() -> list[Row]:
    rows = [row for name in ("Age", "Religion") for row in hub_rows._json(f"bbq/{name}.jsonl.gz")[::29]]
    names = ["F-Black", "M-White", "F", "M", "woman", "girl", "boyfriend", "man", "lowSES-African", "highSES", "lowSES"]
    names += ["nonObese", "obese", "nonTrans", "trans", "nonDisabled", "disabled", "Latino", "Black", "nonOld", "old"]
    rng = random.Random(7)
    for k in range(300):
        groups = rng.sample(names, 2)
        info = [[rng.choice(("Ann", group, "")), group] for group in groups]
        if k % 20 == 0:  # a row that names no group: only the answer tells
            info[0] = ["", ""]
        stereotyped = [rng.choice(names), rng.choice(["Black", "F", "low SES", "trans", "Latino", "African"])]
        rows.append(
            {
                **rows[k],
                "ans0": "The Latina woman",
                "ans1": f"The other {k}",
                "ans2": "Not known",
                "label": k % 3,
                "answer_info": {"ans0": info[0], "ans1": info[1], "ans2": ["Not known", "unknown"]},
                "additional_metadata": {"stereotyped_groups": stereotyped},
                "question_polarity": rng.choice(["neg", "nonneg"]),
            }
        )
    return rows
