"""Samples and scores: against lm-evaluation-harness's own process_results and aggregations, and there and back."""

import io
import json
import math
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval_platform.identity import content_id
from eval_platform.scoring import SAMPLE_SCHEMA, aggregate, responses_from_sample, score_item
from eval_platform.statistics import mean_estimate
from eval_platform.tasks.schema import TaskFile
from eval_platform.tasks.task import Task
from eval_platform.values import Document, Generation, Item, Response, make_request

CHOICE_METRICS = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info")
ROLLING_METRICS = ("word_perplexity", "byte_perplexity", "bits_per_byte")


def make_task(output_type: str, *metrics: str | dict[str, Any], filters: Any = None, repeats: int = 1) -> Task:
    raw = {
        "task": "t",
        "documents": {"file": "documents.jsonl"},
        "output_type": output_type,
        "doc_to_text": "q",
        "doc_to_target": "gold",
        "doc_to_choice": "choices" if output_type == "multiple_choice" else None,
        "metric_list": [{"metric": name} if isinstance(name, str) else name for name in metrics],
        "filter_list": filters,
        "repeats": repeats,
    }
    return Task("t", TaskFile.model_validate(raw), "", "", "", None, (), (), None)


def make_item(requests: Sequence[Any], target: Any, choices: Sequence[str] = (), n: int = 0, **where: Any) -> Item:
    document = Document(content_id([n, where.get("subset")]), n, {}, **where)
    return Item(document, tuple(requests), tuple(choices), target, "", shots_used=3)


def choice_item(choices: Sequence[str], target: Any, n: int = 0, *, unconditional: bool = False, **where: Any) -> Item:
    requests = [make_request("choice", f"question {n}", f" {choice}") for choice in choices]
    if unconditional:
        requests += [make_request("choice", "", f" {choice}") for choice in choices]
    return make_item(requests, target, choices, n, **where)


def text_item(target: Any, n: int = 0, **where: Any) -> Item:
    return make_item([make_request("generate", f"question {n}", settings=Generation(8))], target, n=n, **where)


def answered(item: Item, log_likelihoods: Sequence[float | None], greedy: Any = False) -> dict[Any, Response]:
    return {
        (request.request_id, 0): Response(request.request_id, 0, value, greedy, n_tokens=2)
        for request, value in zip(item.requests, log_likelihoods, strict=True)
    }


def completed(item: Item, *texts: str | None) -> dict[Any, Response]:
    (request,) = item.requests
    return {
        (request.request_id, n): Response(request.request_id, n, text=text, n_tokens=3, finish_reason="stop")
        for n, text in enumerate(texts)
    }


@cache
def lm_task(output_type: str, several: bool = False, metrics: tuple[str, ...] = ()) -> Any:
    """lm-evaluation-harness's task over documents {q, choices, gold}."""
    pytest.importorskip("lm_eval", reason="lm-eval, the oracle, is not installed")
    import datasets
    from lm_eval.api.task import ConfigurableTask

    gold: Any = 0 if output_type == "multiple_choice" else "x"
    document = {"q": "?", "choices": ["a", "b"], "gold": [gold] if several else gold}
    config: dict[str, Any] = {
        "task": "t",
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list([document])},
        "test_split": "test",
        "output_type": output_type,
        "doc_to_text": "q",
        "doc_to_target": "gold",
        "metric_list": [{"metric": name} for name in metrics],
    }
    if output_type == "multiple_choice":
        config["doc_to_choice"] = "choices"
    return ConfigurableTask(config=config)


choice_texts = st.lists(st.text(min_size=1, max_size=8), min_size=2, max_size=5)
# Few values, so that ties are frequent; and any.
likelihoods = st.one_of(st.sampled_from([-1.0, -2.0, -4.0]), st.floats(-1e4, 0))


@settings(deadline=None)
@given(choice_texts, st.data())
def test_choices_score_as_in_lm_eval(choices, data):
    lls = data.draw(st.lists(likelihoods, min_size=len(choices), max_size=len(choices)))
    alone = data.draw(st.lists(likelihoods, min_size=len(choices), max_size=len(choices)))
    gold = data.draw(st.integers(0, len(choices) - 1))
    oracle = lm_task("multiple_choice", metrics=CHOICE_METRICS)
    document = {"q": "?", "choices": choices, "gold": gold}
    expected = oracle.process_results(document, [(value, False) for value in lls + alone])

    item = choice_item(choices, gold, unconditional=True)
    # Equal choices are one request, so they have one answer.
    by_text = dict(zip(choices, zip(lls, alone, strict=True), strict=True))
    if len(by_text) == len(choices):
        (row,) = score_item(make_task("multiple_choice", *CHOICE_METRICS), item, answered(item, lls + alone))
        assert row["metrics"] == expected
        assert row["chosen"] == lls.index(max(lls))


@settings(deadline=None)
@given(choice_texts.filter(lambda c: len(set(c)) == len(c)), st.data())
def test_several_right_choices_score_as_in_lm_eval(choices, data):
    lls = data.draw(st.lists(likelihoods, min_size=len(choices), max_size=len(choices)))
    gold = data.draw(st.lists(st.integers(0, len(choices) - 1), min_size=1, unique=True))
    oracle = lm_task("multiple_choice", several=True, metrics=CHOICE_METRICS[:3])
    document = {"q": "?", "choices": choices, "gold": gold}
    expected = oracle.process_results(document, [(value, False) for value in lls])
    item = choice_item(choices, tuple(gold))
    (row,) = score_item(make_task("multiple_choice", *CHOICE_METRICS[:3]), item, answered(item, lls))
    assert row["metrics"] == expected
    assert json.loads(row["target"]) == gold


def test_acc_norm_counts_characters_and_acc_bytes_bytes():
    # Per character: -6/3 < -3/2 < -4/4 (right). Per byte: -6/9 is best. In total: -3 is.
    item = choice_item(["日本語", "ab", "abcd"], 2)
    (row,) = score_item(make_task("multiple_choice", *CHOICE_METRICS[:3]), item, answered(item, [-6.0, -3.0, -4.0]))
    assert row["metrics"] == {"acc": 0.0, "acc_norm": 1.0, "acc_bytes": 0.0}
    assert row["chosen"] == 1
    assert [(c["n_chars"], c["n_bytes"]) for c in row["choices"]] == [(3, 9), (2, 2), (4, 4)]
    # A flag of two code points counts as two, as len() does.
    flags = choice_item(["🇩🇪", "x"], 0)
    (row,) = score_item(make_task("multiple_choice"), flags, answered(flags, [-1.0, -2.0]))
    assert row["choices"][0]["n_chars"] == 2


def test_an_empty_choice_is_never_preferred_by_length():
    task = make_task("multiple_choice", "acc", "acc_norm")
    item = choice_item(["", "long"], 1)
    assert score_item(task, item, answered(item, [-0.5, -4.0]))[0]["metrics"] == {"acc": 0.0, "acc_norm": 1.0}
    # Nothing was scored for it: 0/0.
    assert score_item(task, item, answered(item, [0.0, -4.0]))[0]["metrics"] == {"acc": 0.0, "acc_norm": None}


@settings(deadline=None)
@given(st.floats(-300, 0), st.booleans(), st.text(max_size=30))
def test_likelihoods_score_as_in_lm_eval(value, greedy, text):
    from lm_eval.api import metrics as theirs

    oracle = lm_task("loglikelihood", metrics=("perplexity", "acc"))
    expected = oracle.process_results({"q": "?", "gold": text}, [(value, greedy)])
    item = make_item([make_request("choice", "q", text)], text)
    task = make_task("loglikelihood", "perplexity", "acc")
    (row,) = score_item(task, item, answered(item, [value], greedy))
    assert row["metrics"]["acc"] == expected["acc"]
    assert row["metrics"]["perplexity"] == pytest.approx(theirs.perplexity([expected["perplexity"]]))


spaced = st.text(st.sampled_from("ab ä\n\t。"), max_size=60)


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(-200, 0), spaced), min_size=1, max_size=8))
def test_rolling_scores_aggregate_as_in_lm_eval(documents):
    from lm_eval.api import metrics as theirs

    oracle = lm_task("loglikelihood_rolling", metrics=ROLLING_METRICS)
    task = make_task("loglikelihood_rolling", *ROLLING_METRICS)
    expected: dict[str, list[Any]] = {name: [] for name in ROLLING_METRICS}
    rows = []
    for n, (value, text) in enumerate(documents):
        for name, pair in oracle.process_results({"q": "", "gold": text}, [value]).items():
            expected[name].append(pair)
        item = make_item([make_request("rolling", text)], text, n=n)
        rows += score_item(task, item, answered(item, [value], None))
    scores = {score.metric: score for score in aggregate(task, rows)}
    if sum(len(text) for _, text in documents) == 0:
        assert scores["bits_per_byte"].value is None
        return
    for name in ROLLING_METRICS:
        aggregation = theirs.bits_per_byte if name == "bits_per_byte" else theirs.weighted_perplexity
        try:
            assert scores[name].value == pytest.approx(aggregation(expected[name]), rel=1e-9)
        except OverflowError:  # theirs
            assert scores[name].value is None
        if len(documents) == 1 and scores[name].value is not None:
            assert rows[0]["metrics"][name] == scores[name].value


GSM8K = [
    {
        "name": "strict-match",
        "filter": [{"function": "regex", "regex_pattern": r"#### (\-?[0-9\.\,]+)"}, {"function": "take_first"}],
    },
    {
        "name": "flexible-extract",
        "filter": [
            {"function": "regex", "group_select": -1, "regex_pattern": r"(-?[$0-9.,]{2,})|(-?[0-9]+)"},
            {"function": "take_first"},
        ],
    },
]
NORMALISED = {"metric": "exact_match", "ignore_case": True, "regexes_to_ignore": [",", r"\$", "(?s).*#### ", r"\.$"]}
completions = st.one_of(
    st.text(st.sampled_from("#### 12,.-$a\n"), max_size=20), st.sampled_from(["so #### 12", "12.", "It is $1,212"])
)


@settings(deadline=None)
@given(completions, st.one_of(st.sampled_from(["12", "1,212", "work\n#### 12"]), completions), st.booleans())
def test_completions_score_as_in_lm_eval(text, gold, several):
    from lm_eval.api.instance import Instance
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.filters import build_filter_ensemble

    oracle: ConfigurableTask = lm_task("generate_until", several=several, metrics=("exact_match",))
    oracle._metric_fn_kwargs["exact_match"] = {key: value for key, value in NORMALISED.items() if key != "metric"}
    document = {"q": "?", "gold": [gold, "7"] if several else gold}
    expected = {}
    for pipeline in GSM8K:
        instance = Instance("generate_until", document, ("?", {}), 0, resps=[text])
        steps = [(s["function"], {k: v for k, v in s.items() if k != "function"}) for s in pipeline["filter"]]
        build_filter_ensemble(pipeline["name"], steps).apply([instance])
        found = oracle.process_results(document, [instance.filtered_resps[pipeline["name"]]])
        expected[f"exact_match,{pipeline['name']}"] = found["exact_match"]

    item = text_item((gold, "7") if several else gold)
    task = make_task("generate_until", NORMALISED, filters=GSM8K)
    (row,) = score_item(task, item, completed(item, text))
    assert row["metrics"] == expected


def test_what_was_not_extracted_is_null():
    task = make_task("generate_until", "exact_match", filters=GSM8K)
    item = text_item("12")
    (row,) = score_item(task, item, completed(item, "twelve, or 12"))
    assert row["extracted"] == {"strict-match": None, "flexible-extract": "12"}
    assert row["metrics"] == {"exact_match,strict-match": 0.0, "exact_match,flexible-extract": 1.0}
    assert [score.metric for score in aggregate(task, [row])] == list(task.definition.score_names)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.lists(st.floats(-50, 0), min_size=4, max_size=4)), min_size=2))
def test_means_and_their_errors_aggregate_as_in_lm_eval(answers):
    from lm_eval.api import metrics as theirs

    task = make_task("multiple_choice", "acc", "acc_norm")
    rows = []
    for n, (gold, lls) in enumerate(answers):
        item = choice_item(["a", "bb", "ccc", "dddd"], gold, n)
        rows += score_item(task, item, answered(item, lls))
    for score in aggregate(task, rows):
        values = [row["metrics"][score.metric] for row in rows]
        assert score.value == pytest.approx(theirs.mean(values))
        assert score.standard_error == pytest.approx(theirs.mean_stderr(values))
        assert (score.interval_method, score.n, score.n_clusters, score.subset) == ("wilson", len(rows), None, "")


@settings(deadline=None)
@given(st.lists(st.floats(-30, 0), min_size=2, max_size=20))
def test_perplexity_aggregates_as_in_lm_eval(values):
    from lm_eval.api import metrics as theirs

    task = make_task("loglikelihood", "perplexity", "acc")
    items = [make_item([make_request("choice", f"{n}", "x")], "x", n=n) for n in range(len(values))]
    rows = [row for item, v in zip(items, values, strict=True) for row in score_item(task, item, answered(item, [v]))]
    score = aggregate(task, rows)[0]
    assert (score.metric, score.value) == ("perplexity", pytest.approx(theirs.perplexity(values)))


numbers = st.one_of(st.none(), st.floats(allow_nan=True))


def _responses(item: Item, repeats: int, draw: Any) -> dict[tuple[str, int], Response]:
    found = {}
    for request in item.requests:
        for n in range(repeats):
            generated = request.kind == "generate"
            found[request.request_id, n] = Response(
                request.request_id,
                n,
                log_likelihood=None if generated else draw(numbers),
                is_greedy=None if request.kind != "choice" else draw(st.booleans()),
                text=draw(st.text(max_size=10)) if generated else None,
                n_tokens=draw(st.integers(0, 9)),
                finish_reason=draw(st.sampled_from(["stop", "length", "eos"])) if generated else "scored",
                truncated_left_tokens=draw(st.integers(0, 5)) if request.context else 0,
            )
    return found


def through_parquet(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=SAMPLE_SCHEMA), file)
    table = pq.read_table(io.BytesIO(file.getvalue()))
    assert table.schema.equals(SAMPLE_SCHEMA)
    return table.to_pylist()


@settings(deadline=None)
@given(st.data())
def test_samples_give_back_the_responses_and_score_the_same(data):
    kind, repeats = data.draw(st.sampled_from(["choices", "alone", "text", "rolling", "target"])), 2
    if kind in ("choices", "alone"):
        task = make_task("multiple_choice", *CHOICE_METRICS[: 4 if kind == "alone" else 3], repeats=repeats)
        item = choice_item(["a", "日本", ""], data.draw(st.integers(0, 2)), unconditional=kind == "alone", cluster="p")
    elif kind == "text":
        task = make_task("generate_until", "exact_match", "f1", filters=GSM8K, repeats=repeats)
        item = text_item(("12", "[x]"), subset="s")
    elif kind == "rolling":
        task, item = (
            make_task("loglikelihood_rolling", repeats=repeats),
            make_item([make_request("rolling", "a b")], ""),
        )
    else:
        task, item = make_task("loglikelihood", repeats=repeats), make_item([make_request("choice", "a", " b")], " b")
    responses = _responses(item, repeats, data.draw)
    rows = score_item(task, item, responses)
    assert [list(row) for row in rows] == [SAMPLE_SCHEMA.names] * repeats

    read = through_parquet(rows)
    back = [response for row in read for response in responses_from_sample(task, item, row)]
    # repr, as NaN is to come back as NaN.
    assert sorted(map(repr, back)) == sorted(map(repr, responses.values()))
    again = score_item(task, item, {(response.request_id, response.repeat): response for response in back})
    assert repr(through_parquet(again)) == repr(read)
    assert repr(aggregate(task, read)) == repr(aggregate(task, rows))
    for score in aggregate(task, rows):
        for number in (score.value, score.standard_error, score.ci_low, score.ci_high):
            assert number is None or math.isfinite(number)


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, -math.inf])
def test_no_score_comes_of_a_log_likelihood_that_is_not_finite(bad):
    task = make_task("multiple_choice", "acc", "acc_norm")
    fine, broken = choice_item(["a", "b"], 0, 0), choice_item(["a", "b"], 0, 1, subset="s")
    rows = score_item(task, fine, answered(fine, [-1.0, -2.0])) + score_item(
        task, broken, answered(broken, [bad, -2.0])
    )
    assert rows[1]["metrics"] == {"acc": None, "acc_norm": None}
    assert rows[1]["chosen"] is None
    assert repr(through_parquet(rows)[1]["choices"][0]["log_likelihood"]) == repr(bad)
    for score in aggregate(task, rows):
        assert (score.value, score.ci_low, score.interval_method) == (
            None,
            None,
            "none: a value is missing or not finite",
        )

    rolling = make_task("loglikelihood_rolling")
    texts = [make_item([make_request("rolling", f"text {n}")], "", n=n) for n in range(2)]
    rows = score_item(rolling, texts[0], answered(texts[0], [-3.0])) + score_item(
        rolling, texts[1], answered(texts[1], [bad])
    )
    assert set(rows[1]["metrics"].values()) == {None}
    assert {score.value for score in aggregate(rolling, rows)} == {None}


def test_no_score_comes_of_a_completion_whose_logits_are_not_finite():
    task = make_task("generate_until", "exact_match")
    item = text_item("1")
    answers = {
        key: replace(response, finish_reason="non_finite", log_likelihood=math.nan)
        for key, response in completed(item, "1").items()
    }
    (row,) = through_parquet(score_item(task, item, answers))
    assert (row["response"], dict(row["metrics"])) == ("1", {"exact_match": None})
    (rescored,) = score_item(task, item, {(r.request_id, 0): r for r in responses_from_sample(task, item, row)})
    assert rescored["metrics"] == {"exact_match": None}
    assert aggregate(task, [row])[0].value is None


def test_a_perplexity_too_large_for_a_float_has_no_entry_but_the_task_has_one():
    task = make_task("loglikelihood", "perplexity")
    items = [make_item([make_request("choice", f"{n}", "x")], "x", n=n) for n in range(2)]
    rows = score_item(task, items[0], answered(items[0], [-1000.0])) + score_item(
        task, items[1], answered(items[1], [-1.0])
    )
    assert rows[0]["metrics"] == {}
    assert aggregate(task, rows)[0].value == pytest.approx(math.exp(500.5))


def test_repeats_are_averaged_within_their_item():
    task = make_task("generate_until", "exact_match", repeats=3)
    items = [text_item("1", 0), text_item("1", 1)]
    answers = completed(items[0], "1", "2", "1") | completed(items[1], "2", "2", "1")
    rows = [row for item in items for row in score_item(task, item, answers)]
    assert [row["metrics"]["exact_match"] for row in rows] == [1, 0, 1, 0, 0, 1]
    (score,) = aggregate(task, rows)
    estimate = mean_estimate([2 / 3, 1 / 3], proportion=True)
    assert (score.n, score.value, score.standard_error) == (
        2,
        pytest.approx(0.5),
        pytest.approx(estimate.standard_error),
    )
    # One repeat without a text is one too few.
    answers |= completed(items[0], "1", None, "1")
    rows = [row for item in items for row in score_item(task, item, answers)]
    assert rows[1]["metrics"] == {"exact_match": None}
    assert aggregate(task, rows)[0].value is None


def test_a_vote_stands_in_the_first_row():
    filters = [
        {"name": "first", "filter": [{"function": "take_first"}]},
        {"name": "vote", "filter": [{"function": "majority_vote"}, {"function": "take_first"}]},
        {"name": "each", "filter": [{"function": "remove_whitespace"}]},
    ]
    task = make_task("generate_until", "exact_match", filters=filters, repeats=3)
    item = text_item("1")
    rows = score_item(task, item, completed(item, "2", "1", "1"))
    assert rows[0]["extracted"] == {"first": "2", "vote": "1", "each": "2"}
    assert rows[1]["extracted"] == {"each": "1"}
    values = {score.metric: score.value for score in aggregate(task, rows)}
    assert values == pytest.approx({"exact_match,first": 0.0, "exact_match,vote": 1.0, "exact_match,each": 2 / 3})


def test_subsets_and_clusters():
    task = make_task("multiple_choice", "acc")
    rng, rows = random.Random(0), []
    for n in range(40):
        item = choice_item(["a", "b"], 0, n, subset="law" if n % 4 else "art", cluster=f"passage {n // 5}")
        rows += score_item(task, item, answered(item, [-rng.random(), -rng.random()]))
    scores = aggregate(task, rows)
    assert [(score.subset, score.n) for score in scores] == [("", 40), ("art", 10), ("law", 30)]
    values = [row["metrics"]["acc"] for row in rows]
    estimate = mean_estimate(values, [row["cluster"] for row in rows], proportion=True)
    assert scores[0].standard_error == estimate.standard_error
    assert (scores[0].interval_method, scores[0].n_clusters) == ("t_clustered", 8)
    assert scores[2].value == pytest.approx(
        sum(v for v, r in zip(values, rows, strict=True) if r["subset"] == "law") / 30
    )
    rng.shuffle(rows)
    assert aggregate(task, rows) == scores


def test_wrong_use_is_refused():
    task, item = make_task("generate_until", "exact_match", repeats=2), text_item("1")
    with pytest.raises(ValueError, match=rf"sample {item.document.sample_id}: no response to request .*, repeat 1"):
        score_item(task, item, completed(item, "1"))
    (row, _) = score_item(task, item, completed(item, "1", "1"))
    with pytest.raises(ValueError, match="another prompt"):
        responses_from_sample(task, text_item("1", 5), row)


def test_no_samples_have_no_score():
    (score,) = aggregate(make_task("generate_until", "f1"), [])
    assert (score.value, score.n, score.interval_method) == (None, 0, "none: no items")


def test_scoring_needs_no_heavy_package():
    heavy = ("torch", "transformers", "scipy", "pandas", "duckdb")
    code = f"import sys, eval_platform.scoring; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
