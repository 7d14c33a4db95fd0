"""How many words, sentences and words in capitals does a text have?

IFEval counts sentences and tokens with NLTK, whose trained models are data that no package brings along. These are
plain rules of our own that end sentences where those do. `benchmarks/verify_ifeval.py` says in which verdicts they
differ.
"""

import re

# Words whose full stop ends no sentence: titles, which stand before names, and what stands before a number.
_TITLES = "mr mrs ms dr prof rev st gen col sgt capt lt sen rep gov hon messrs mt ft no vol fig v p pp"
# Words whose full stop ends one only where the next word is of those that begin one.
_ABBREVIATIONS = (
    "jr sr etc inc ltd co corp bros dept vs jan feb mar apr jun jul aug sept sep oct nov dec ave blvd "
    "e.g i.e a.m p.m ph.d m.d b.c a.d d.c u.s u.k u.n"
)
_FIRST_WORDS = (
    "a after all an and as at but despite each even every for he here how however i if in indeed instead it meanwhile "
    "moreover my no nor now of on one our she since so some such that the their then there these they this those "
    "though thus to under we what when where while who why with yet you your"
)
_NEVER_LAST, _SELDOM_LAST, _OFTEN_FIRST = (
    frozenset(words.split()) for words in (_TITLES, _ABBREVIATIONS, _FIRST_WORDS)
)

_WORD = re.compile(r"\w+")
# Closing marks, the quotes and brackets that belong to the sentence if white space follows, and what the next begins
# with. A star or a quote right after the marks begins the next.
_END = re.compile(r"(?P<marks>[.!?]+)(?:[\"')\]}]*\s+(?=\S)|(?=[*\"')\]};:@({\[]))(?=(?P<next>\w*))")
_WORD_BEFORE = re.compile(r"[^\s!?]*\Z")
_LONGEST = 30  # characters looked back on: more than any word that matters
# A closing quote at the very end begins nothing.
_LAST = re.compile(r"[\"')\]}]*\s*\Z")

# The Penn Treebank's way to cut words (its rules are published with it): marks stand alone, a full stop only at the
# end, and what is shortened by an apostrophe is a word of its own.
_STANDS_ALONE = re.compile(r"\.\.\.|--|[,:](?!\d)|[;@#$%&?!()\[\]{}<>\"“”«»*—]|(?<=\s)['’]|['’](?=\s|$)")
_SHORTENED = re.compile(r"(n['’]t|['’](?:ll|re|ve|s|m|d))\b", re.IGNORECASE)
_RUN_TOGETHER = re.compile(r"\b(can|gim|gon|got|lem|wan)(not|me|na|ta)\b", re.IGNORECASE)


def count_words(text: str) -> int:
    """Runs of letters, digits and underscores."""
    return len(_WORD.findall(text))


def count_sentences(text: str) -> int:
    """What full stops, exclamation marks and question marks divide; 0 for white space alone."""
    if not text.strip():
        return 0
    return 1 + sum(_ends_sentence(match) for match in _END.finditer(text))


def count_capital_words(text: str) -> int:
    """Words with a capital letter and no small one."""
    return sum(word.isupper() for word in _treebank_words(text))


def _ends_sentence(match: re.Match[str]) -> bool:
    if _LAST.match(match.string, match.end("marks")):
        return False
    following = match["next"]
    if match["marks"] != ".":
        # Three full stops trail off: the sentence ends where the next word looks like a beginning.
        return match["marks"].strip(".") != "" or not following[:1].islower()
    before = match.string[max(0, match.start() - _LONGEST) : match.start()]
    word = _WORD_BEFORE.findall(before)[0].lower().lstrip("\"'“‘([{*_")
    if word in _NEVER_LAST or (len(word) == 1 and word.isalpha()):
        return False
    if word in _SELDOM_LAST:
        return following[:1].isupper() and following.lower() in _OFTEN_FIRST
    # "1. buy milk" is one sentence.
    return not (word.isdigit() and following[:1].islower())


def _treebank_words(text: str) -> list[str]:
    spaced = _STANDS_ALONE.sub(lambda mark: f" {mark[0]} ", text)
    spaced = _RUN_TOGETHER.sub(r"\1 \2", _SHORTENED.sub(r" \1", spaced))
    words = []
    for word in spaced.split():
        words += [word[:-1], "."] if word.endswith(".") and len(word) > 1 else [word]
    return words
