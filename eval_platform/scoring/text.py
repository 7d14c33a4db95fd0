"""Is a completion the reference? Exact match, prefix match and token F1; and is there one at all?"""

import re
import string
from collections import Counter
from collections.abc import Sequence

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_NO_DIGITS = str.maketrans("", "", string.digits)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def exact_match(
    answer: str | None,
    references: Sequence[str],
    *,
    regexes_to_ignore: Sequence[str] | None = None,
    ignore_case: bool = False,
    ignore_punctuation: bool = False,
    ignore_numbers: bool = False,
) -> float:
    """1.0 when the answer equals any reference, both normalised alike; an answer of None equals nothing.

    The normalisation and its order are `exact_match_hf_evaluate`'s in lm-evaluation-harness 0.4.13, which is Hugging
    Face evaluate's: regexes removed, lower case, ASCII punctuation removed, ASCII digits removed. (theirs goes
    through fixed-width arrays, which drop trailing NUL characters and cut what grows in lower case; ours does not.)
    """
    if answer is None:
        return 0.0

    def normalised(text: str) -> str:
        for pattern in regexes_to_ignore or ():
            text = re.sub(pattern, "", text)
        if ignore_case:
            text = text.lower()
        if ignore_punctuation:
            text = text.translate(_NO_PUNCTUATION)
        if ignore_numbers:
            text = text.translate(_NO_DIGITS)
        return text

    said = normalised(answer)
    return float(any(said == normalised(reference) for reference in references))


def prefix_match(answer: str | None, references: Sequence[str]) -> float:
    """1.0 when the answer, white space at its ends removed, begins with any reference; None begins with nothing.

    INSTRUCTEVAL's rule (github.com/declare-lab/instruct-eval, `prediction.strip().startswith(label)`), which its paper
    calls exact match. It is lenient: "An apple" begins with the letter A, "12" with the number 1.
    """
    return float(answer is not None and any(answer.strip().startswith(reference) for reference in references))


def is_answered(answer: str | None, _references: Sequence[str]) -> float:
    """1.0 when there is any text but white space. No judgement of it: for answers that are kept to be judged later."""
    return float(answer is not None and bool(answer.strip()))


def token_f1(answer: str | None, references: Sequence[str]) -> float:
    """SQuAD's F1: overlap of the answer's and the reference's words as multisets, the best over the references.

    Rajpurkar et al. 2016 (arXiv:1606.05250), as in SQuAD 2.0's evaluation script: lower case, ASCII punctuation and
    the articles a, an, the removed, split at white space; where either has no words left, 1.0 if both have none.
    An answer of None scores 0. Raises ValueError without a reference.
    """
    if answer is None:
        return 0.0
    return max(_f1(squad_words(answer), squad_words(reference)) for reference in references)


def squad_words(text: str) -> list[str]:
    """The words that SQuAD compares."""
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def _f1(said: list[str], expected: list[str]) -> float:
    if not said or not expected:
        return float(said == expected)
    shared = (Counter(said) & Counter(expected)).total()
    # 2 precision recall / (precision + recall), with shared / len for each.
    return 2 * shared / (len(said) + len(expected))
