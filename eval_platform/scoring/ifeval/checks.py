"""The 25 verifiable instructions of IFEval, each a function of a response that says whether it was followed.

Zhou et al. 2023 (arXiv:2311.07911), table 1, in words of our own; what its table leaves open (which marks make a
bullet, what divides two paragraphs) is as the released verdicts have it. Keyword arguments are named as in the data.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from eval_platform.scoring.ifeval.counting import count_capital_words, count_sentences, count_words
from eval_platform.scoring.ifeval.language import is_in_language

_ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_PARAGRAPH_MARK = re.compile(r"\s?\*\*\*\s?")
_PLACEHOLDER = re.compile(r"\[.*?\]")
_STAR_BULLET = re.compile(r"^[^\S\n]*\*[^\*].*$", re.MULTILINE)
_DASH_BULLET = re.compile(r"^[^\S\n]*-.*$", re.MULTILINE)
_SINGLE_STARS = re.compile(r"\*([^\n\*]*)\*")
_DOUBLE_STARS = re.compile(r"\*\*([^\n\*]*)\*\*")
_TITLE = re.compile(r"<<[^\n]+>>")
_FENCES = ("```json", "```Json", "```JSON", "```")


def _holds(count: int, relation: str, bound: int) -> bool:
    """The data knows two relations, "less than" and "at least"."""
    if relation == "less than":
        return count < bound
    if relation == "at least":
        return count >= bound
    raise ValueError(f"the relation {relation!r} is neither 'less than' nor 'at least'")


# keywords


def _has_keywords(response: str, *, keywords: Sequence[str]) -> bool:
    # Also within a word: "war" is found in "warm".
    return all(re.search(re.escape(keyword), response, re.IGNORECASE) for keyword in keywords)


def _keyword_frequency(response: str, *, keyword: str, frequency: int, relation: str) -> bool:
    return _holds(len(re.findall(re.escape(keyword), response, re.IGNORECASE)), relation, frequency)


def _lacks_words(response: str, *, forbidden_words: Sequence[str]) -> bool:
    whole_words = (rf"(?<!\w){re.escape(word)}(?!\w)" for word in forbidden_words)
    return not any(re.search(word, response, re.IGNORECASE) for word in whole_words)


def _letter_frequency(response: str, *, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _holds(response.lower().count(letter.lower()), let_relation, let_frequency)


# length


def _sentences(response: str, *, num_sentences: int, relation: str) -> bool:
    return _holds(count_sentences(response), relation, num_sentences)


def _words(response: str, *, num_words: int, relation: str) -> bool:
    return _holds(count_words(response), relation, num_words)


def _paragraphs(response: str, *, num_paragraphs: int) -> bool:
    """Divided by `***`; nothing before the first mark or after the last is no paragraph, nothing between is a fault."""
    pieces = [bool(piece.strip()) for piece in _PARAGRAPH_MARK.split(response)]
    return all(pieces[1:-1]) and sum(pieces) == num_paragraphs


def _first_word(response: str, *, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Paragraphs are divided by an empty line. Empty ones do not count, and yet keep their place in the order."""
    paragraphs = response.split("\n\n")
    count = sum(bool(paragraph.strip()) for paragraph in paragraphs)
    if nth_paragraph > count or not paragraphs[nth_paragraph - 1].strip():
        return False
    word = paragraphs[nth_paragraph - 1].split()[0].lstrip("'").lstrip('"')
    return count == num_paragraphs and re.split(r"[.,?!'\"]", word)[0].lower() == first_word.lower()


# content and format


def _placeholders(response: str, *, num_placeholders: int) -> bool:
    return len(_PLACEHOLDER.findall(response)) >= num_placeholders


def _postscript(response: str, *, postscript_marker: str) -> bool:
    """The marker stands somewhere, in any case; the two usual ones may have a space after each full stop."""
    usual = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    return re.search(usual.get(postscript_marker, re.escape(postscript_marker.lower())), response.lower()) is not None


def _bullets(response: str, *, num_bullets: int) -> bool:
    """Lines that begin with a star (not two of them) or a dash."""
    return len(_STAR_BULLET.findall(response)) + len(_DASH_BULLET.findall(response)) == num_bullets


def _constrained(response: str) -> bool:
    return any(answer in response for answer in _ANSWERS)


def _highlights(response: str, *, num_highlights: int) -> bool:
    """Texts between stars, and between double stars: what is between double ones is in neither empty."""
    spans = [*_SINGLE_STARS.findall(response), *_DOUBLE_STARS.findall(response)]
    return sum(bool(span.strip()) for span in spans) >= num_highlights


def _sections(response: str, *, section_spliter: str, num_sections: int) -> bool:
    """Each begins with the word and a number: "SECTION 2"."""
    return len(re.findall(rf"{re.escape(section_spliter)}\s?\d+", response)) >= num_sections


def _json(response: str) -> bool:
    text = response.strip()
    for fence in _FENCES:
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):  # a thousand brackets in a row are no JSON that anybody wants
        return False
    return True


def _title(response: str) -> bool:
    return any(title.lstrip("<").rstrip(">").strip() for title in _TITLE.findall(response))


# two in one


def _repeats_prompt(response: str, *, prompt_to_repeat: str) -> bool:
    return response.strip().lower().startswith(prompt_to_repeat.strip().lower())


def _two_responses(response: str) -> bool:
    """Divided by six stars, and not the same; an empty piece is allowed at the ends alone."""
    pieces = [piece.strip() for piece in response.split("******")]
    said = [piece for piece in pieces if piece]
    return all(pieces[1:-1]) and len(said) == 2 and said[0] != said[1]


# case, ends and marks


def _capitals(response: str) -> bool:
    return response.isupper() and is_in_language(response, "en")


def _small_letters(response: str) -> bool:
    return response.islower() and is_in_language(response, "en")


def _capital_words(response: str, *, capital_frequency: int, capital_relation: str) -> bool:
    return _holds(count_capital_words(response), capital_relation, capital_frequency)


def _ends_with(response: str, *, end_phrase: str) -> bool:
    return response.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _quoted(response: str) -> bool:
    text = response.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def _no_comma(response: str) -> bool:
    return "," not in response


def _language(response: str, *, language: str) -> bool:
    return is_in_language(response, language)


CHECKS: Mapping[str, Callable[..., bool]] = MappingProxyType(
    {
        "keywords:existence": _has_keywords,
        "keywords:frequency": _keyword_frequency,
        "keywords:forbidden_words": _lacks_words,
        "keywords:letter_frequency": _letter_frequency,
        "language:response_language": _language,
        "length_constraints:number_sentences": _sentences,
        "length_constraints:number_paragraphs": _paragraphs,
        "length_constraints:number_words": _words,
        "length_constraints:nth_paragraph_first_word": _first_word,
        "detectable_content:number_placeholders": _placeholders,
        "detectable_content:postscript": _postscript,
        "detectable_format:number_bullet_lists": _bullets,
        "detectable_format:constrained_response": _constrained,
        "detectable_format:number_highlighted_sections": _highlights,
        "detectable_format:multiple_sections": _sections,
        "detectable_format:json_format": _json,
        "detectable_format:title": _title,
        "combination:two_responses": _two_responses,
        "combination:repeat_prompt": _repeats_prompt,
        "startend:end_checker": _ends_with,
        "startend:quotation": _quoted,
        "change_case:capital_word_frequency": _capital_words,
        "change_case:english_capital": _capitals,
        "change_case:english_lowercase": _small_letters,
        "punctuation:no_comma": _no_comma,
    }
)
