"""DROP's scorer: against lm-evaluation-harness's copy of the released script, and by hand."""

import itertools
import json

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from eval_platform.scoring.drop import drop_em, drop_f1, score_spans

# Words that the rules treat differently: numbers in several forms, articles, hyphens, punctuation, blanks.
_NUMBERS = ["5", "5.0", "1,000", "1000", "$5", "5%", "-3", "7th", "nan", "1e3"]
_TEXTS = ["the", "The", "a", "an", "Smith", "smith's", "O'Neil", "twenty-one", "U.S.", "(b)", "é", ".", "\n", "x\tthe"]
_word = st.sampled_from([*_NUMBERS, *_TEXTS])
_span = st.lists(_word, min_size=0, max_size=4).map(" ".join)
_spans = st.lists(_span, min_size=1, max_size=4)


@settings(max_examples=150, deadline=None)
@given(_spans, _spans)
@example(["1,000", "5 1,000 -3 7th"], ["", "", "5", "5 1,000 -3"])  # the mean is 0.225
def test_spans_score_what_the_released_script_gives(said: list[str], gold: list[str]) -> None:
    theirs = pytest.importorskip("lm_eval.tasks.drop.utils", reason="the oracle is lm-eval (extra `lm-eval`)")

    assert score_spans(said, gold) == pytest.approx(theirs.get_metrics(said, gold), abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["a b", "b c", "c d e", "5 x", "5 6", "x"]), min_size=1, max_size=4), _spans)
def test_the_pairing_is_the_best_of_all(said: list[str], gold: list[str]) -> None:
    longer, shorter = (said, gold) if len(said) >= len(gold) else (gold, said)
    pairings = [list(zip(order, shorter, strict=False)) for order in itertools.permutations(longer)]
    # A pair on its own is scored with one span on either side, so nothing is paired there.
    single = [sum(score_one(*(pair if longer is said else reversed(pair))) for pair in pairing) for pairing in pairings]

    # The parts are rounded before they are added here, and after it there.
    assert score_spans(said, gold)[1] == pytest.approx(max(single) / len(longer), abs=0.011)


def score_one(said: str, gold: str) -> float:
    return score_spans([said], [gold])[1]


@pytest.mark.parametrize(
    ("answer", "references", "em", "f1"),
    [
        ("5", ["5.0"], 1.0, 1.0),
        (" 5 yards", ["5"], 0.0, 0.67),
        ("6 yards", ["5 yards"], 0.0, 0.0),  # the number is what counts
        ("the Bears", ["Bears"], 1.0, 1.0),
        ("Smith", [json.dumps(["Smith", "Jones"])], 0.0, 0.5),
        ("Smith", [json.dumps(["Jones", "Brown"]), "Smith"], 1.0, 1.0),  # the best of the references
        ("twenty-one", ["one twenty"], 0.0, 1.0),  # equal bags, another order
        ("", [""], 0.0, 0.0),  # a reference without an answer is passed over
        (None, ["x"], 0.0, 0.0),
        ("[1", ["[1"], 1.0, 1.0),
    ],
)
def test_answers_score_by_hand(answer: str | None, references: list[str], em: float, f1: float) -> None:
    assert (drop_em(answer, references), drop_f1(answer, references)) == (em, f1)
