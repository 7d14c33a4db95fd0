"""Extraction and comparison of texts: against lm-evaluation-harness's own filters and metrics."""

import string
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from eval_platform.scoring.filters import extract, selects
from eval_platform.scoring.text import exact_match, squad_words, token_f1
from eval_platform.tasks.metrics import FILTERS
from eval_platform.tasks.scoring_keys import FilterStep

lm_filters = pytest.importorskip("lm_eval.filters", reason="lm-eval, the oracle, is not installed")

texts = st.text(st.sampled_from("#### 12,.-$AaBb()\n\tä"), max_size=25)
patterns = st.sampled_from(
    [r"#### (\-?[0-9\.\,]+)", r"(-?[$0-9.,]{2,})|(-?[0-9]+)", r"\(([AB])\)", "[ab]+", r"(A)?(B)?", "x"]
)


def step(function: str, **arguments: Any) -> FilterStep:
    return FilterStep(function=function, **arguments)


per_completion = st.one_of(
    st.builds(lambda p, g: step("regex", regex_pattern=p, group_select=g), patterns, st.sampled_from([0, -1])),
    st.just(step("regex")),
    st.builds(lambda p: step("regex", regex_pattern=p, fallback="none"), patterns),
    st.sampled_from([step("remove_whitespace"), step("lowercase"), step("uppercase")]),
)
mapping = step("map", mapping_dict={"A": "1", "a": "2", "": "3"}, default_value="4")
pipelines = st.tuples(
    st.lists(per_completion, max_size=3),
    st.sampled_from([[], [mapping]]),
    st.sampled_from([[], [step("take_first")], [step("majority_vote")], [step("majority_vote"), step("take_first")]]),
).map(lambda parts: [one for part in parts for one in part])


def theirs(steps: list[FilterStep], completions: list[str]) -> list[str]:
    """What lm-eval's filters make of one item's completions, as a list."""
    resps: Any = [completions]
    for one in steps:
        resps = list(lm_filters.get_filter(one.function)(**one.arguments).apply(resps, [{}]))
    return [resps[0]] if isinstance(resps[0], str) else list(resps[0])


@settings(deadline=None)
@given(pipelines, st.lists(texts, min_size=1, max_size=6))
def test_filters_extract_what_lm_evals_extract(steps, completions):
    assert [answer.text for answer in extract(steps, completions)] == theirs(steps, completions)


def test_every_filter_of_the_vocabulary_is_there():
    for name in FILTERS:
        arguments = {"mapping_dict": {}, "default_value": "0"} if name == "map" else {}
        assert len(extract([step(name, **arguments)], ["x"])) == 1


def test_what_was_not_found_is_told_from_what_was():
    steps = [step("regex"), step("lowercase")]
    found, missed = extract(steps, ["#### 42", "I do not know"])
    assert (found.text, found.found) == ("42", True)
    assert (missed.text, missed.found) == ("[invalid]", False)
    # A later filter makes no answer of a fallback.
    (later,) = extract([step("regex"), step("regex", regex_pattern="(i)")], ["nothing"])
    assert (later.text, later.found) == ("i", False)
    (unmapped,) = extract([step("map", mapping_dict={"A": "0"})], ["B"])
    assert (unmapped.text, unmapped.found) == (None, False)
    assert extract([step("map", mapping_dict={}), step("lowercase")], ["B"])[0].text is None


def test_a_match_beyond_the_last_falls_back():
    steps = [step("regex", regex_pattern="[0-9]", group_select=1)]
    assert [answer.text for answer in extract(steps, ["1 2", "1"])] == ["2", "[invalid]"]
    assert extract([step("regex", regex_pattern="[0-9]", group_select=-2)], ["1"])[0].found is False


def test_a_vote_goes_to_the_first_of_the_most_frequent():
    assert [answer.text for answer in extract([step("majority_vote")], ["b", "a", "a", "b", "c"])] == ["b"]
    assert selects([step("lowercase"), step("majority_vote")])
    assert not selects([step("regex")])


@settings(deadline=None)
@given(
    texts,
    st.lists(texts, min_size=1, max_size=3),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, [","], [r"\$", "(?s).*#### ", r"\.$"]]),
)
def test_exact_match_equals_lm_evals(answer, references, case, punctuation, numbers, regexes):
    from lm_eval.api.metrics import exact_match_hf_evaluate

    options: dict[str, Any] = {
        "ignore_case": case,
        "ignore_punctuation": punctuation,
        "ignore_numbers": numbers,
        "regexes_to_ignore": regexes,
    }
    mean = exact_match_hf_evaluate([answer] * len(references), references, **options)["exact_match"]
    assert exact_match(answer, references, **options) == float(mean > 0)


def test_exact_match_does_not_cut_what_numpy_cuts():
    assert exact_match("i", ["İ"], ignore_case=True) == 0
    assert exact_match("a\0", ["a"]) == 0
    assert exact_match(None, ["None"]) == 0


@pytest.mark.parametrize(
    ("answer", "references", "expected"),
    [
        ("The cat sat.", ["a cat sat"], 1.0),  # articles, case and punctuation are nothing
        ("cat sat on mat", ["the cat"], 2 * 0.25 * 1 / 1.25),
        ("cat cat", ["cat"], 2 * 0.5 * 1 / 1.5),  # multisets: one of two is right
        ("dog", ["cat", "hot dog"], 2 / 3),  # the best reference counts
        ("dog", ["cat"], 0.0),
        ("", ["the"], 1.0),  # nothing left of either
        ("", ["cat"], 0.0),
        (None, ["cat"], 0.0),
        ("well-known", ["wellknown"], 1.0),  # punctuation is removed, not split at
    ],
)
def test_token_f1_is_squads(answer, references, expected):
    assert token_f1(answer, references) == pytest.approx(expected)


words = st.text(st.sampled_from(string.ascii_letters[:4] + " .,"), max_size=20)


@settings(deadline=None)
@given(words, words)
def test_token_f1_is_symmetric_and_one_for_the_same_words_only(one, other):
    value = token_f1(one, [other])
    assert value == token_f1(other, [one])
    assert 0 <= value <= 1
    assert (value == 1) == (sorted(squad_words(one)) == sorted(squad_words(other)))
    assume(squad_words(one) and squad_words(other))
    assert (value == 0) == (not set(squad_words(one)) & set(squad_words(other)))
