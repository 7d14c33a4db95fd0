"""DROP's own scorer: does a completion name the right spans, numbers counting as numbers?

Dua et al. 2019 (arXiv:1903.00161), section 5, as its released evaluation script computes it (lm-evaluation-harness
0.4.13 has that script's rules in `tasks/drop/utils.py`). A span is lowered, cut at blanks and hyphens, and of each
word the punctuation and the articles a, an, the are dropped, and numbers get one form ("5" and "5.0" are the same).
"""

import json
import re
import string
from collections.abc import Iterable, Sequence

import numpy as np

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def drop_em(answer: str | None, references: Sequence[str]) -> float:
    """1.0 when the answer is all spans of a reference and nothing else. References: see `spans`."""
    return max((_both(answer, spans(reference))[0] for reference in references), default=0.0)


def drop_f1(answer: str | None, references: Sequence[str]) -> float:
    """The best F1 over the references, rounded to two digits as the released script does. References: see `spans`."""
    return max((_both(answer, spans(reference))[1] for reference in references), default=0.0)


def spans(reference: str) -> list[str]:
    """The spans of one reference: a JSON list of texts is several, any other text is one."""
    if reference.startswith("["):
        try:
            found = json.loads(reference)
        except ValueError:
            return [reference]  # a text that begins with a bracket
        if isinstance(found, list) and found and all(isinstance(span, str) for span in found):
            return found
    return [reference]


def score_spans(said: Sequence[str], gold: Sequence[str]) -> tuple[float, float]:
    """(exact match, F1) of the spans that were said and those of one reference, neither empty.

    Exact: the same spans, as many of them. F1: spans are paired one to one so that the sum of the pairs' F1 is
    largest; a pair counts nothing where the gold span has numbers and the other has none of them; the sum is divided
    by the number of spans of the longer side.
    """
    ours, theirs = [_normal(span) for span in said], [_normal(span) for span in gold]
    exact = float(set(ours) == set(theirs) and len(ours) == len(theirs))
    values = np.array([[_overlap(set(a.split()), set(b.split())) for a in ours] for b in theirs])
    # numpy's rounding, as there: 0.225 becomes 0.22, and 0.23 by Python's.
    return exact, float(np.round(np.mean(_best_pairing(values)), 2))


def _both(answer: str | None, gold: Sequence[str]) -> tuple[float, float]:
    # The released script passes over references without an answer.
    if answer is None or not gold[0].strip():
        return 0.0, 0.0
    return score_spans([answer], gold)


def _best_pairing(values: np.ndarray) -> np.ndarray:
    """`values` [gold, said] of the pairs, no two of which share a row or a column, with the largest sum; 0 for spans of
    the longer side that are left over.

    In the released script's order, down to the zeros: the last digit of a mean decides how it is rounded.
    """
    paired = np.zeros(max(values.shape))
    if values.shape[1] == 1:  # as all completions are
        paired[0] = values.max()
        return paired
    from scipy.optimize import linear_sum_assignment  # slow to import

    rows, columns = linear_sum_assignment(-values)
    paired[rows] = values[rows, columns]
    return paired


def _overlap(said: set[str], gold: set[str]) -> float:
    """F1 of two bags of words; 1.0 when both are empty."""
    numbers = {word for word in gold if _is_number(word)}
    if numbers and not numbers & said:
        return 0.0
    shared = len(said & gold)
    precision = shared / len(said) if said else 1.0
    recall = shared / len(gold) if gold else 1.0
    # In this form and not as 2 shared / (said + gold): the last digit decides how two digits are rounded.
    return 2 * precision * recall / (precision + recall) if precision or recall else 0.0


def _normal(span: str) -> str:
    return " ".join(word for word in _words(span) if word)


def _words(span: str) -> Iterable[str]:
    for piece in re.split("[ -]", span):
        word = piece.lower()
        if not _is_number(word):
            word = word.translate(_PUNCTUATION)
        if _is_number(word):
            word = str(float(word))
        yield " ".join(_ARTICLES.sub(" ", word).split())


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
