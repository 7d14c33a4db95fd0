"""From a completion to the answer in it: the filters of a task's `filter_list`.

Each does what lm-evaluation-harness 0.4.13's filter of that name does (`lm_eval/filters/`), with two differences:
where `group_select` points beyond the matches, ours falls back and theirs raises IndexError; and `take_first` and
`majority_vote` leave a list of one completion, so that filters may follow them (theirs then go through its letters).
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from eval_platform.tasks.metrics import UNPARSED
from eval_platform.tasks.scoring_keys import FilterStep

DEFAULT_REGEX = r"#### (\-?[0-9\.\,]+)"
# Filters that leave one answer of all an item's repeats.
SELECTING = frozenset({"take_first", "majority_vote"})


@dataclass(frozen=True, slots=True)
class Extracted:
    """What is compared with the target, and whether it was found in the completion (else it is a fallback)."""

    text: str | None
    found: bool = True


def selects(steps: Sequence[FilterStep]) -> bool:
    """Whether the steps leave one answer of an item's repeats, instead of one of each."""
    return any(step.function in SELECTING for step in steps)


def extract(steps: Sequence[FilterStep], completions: Sequence[str]) -> list[Extracted]:
    """The answers in an item's completions, one per repeat, or one in all where a step selects.

    The steps are a validated task file's: their functions, arguments and regular expressions are known to be good.
    """
    answers = [Extracted(completion) for completion in completions]
    for step in steps:
        answers = _apply(step, answers)
    return answers


def _apply(step: FilterStep, answers: list[Extracted]) -> list[Extracted]:
    arguments = step.arguments
    match step.function:
        case "regex":
            pattern = re.compile(arguments.get("regex_pattern", DEFAULT_REGEX))
            select, fallback = arguments.get("group_select", 0), arguments.get("fallback", UNPARSED)
            return [_first_match(pattern, select, fallback, answer) for answer in answers]
        case "remove_whitespace":
            return [_changed(answer, str.strip) for answer in answers]
        case "lowercase":
            return [_changed(answer, str.lower) for answer in answers]
        case "uppercase":
            return [_changed(answer, str.upper) for answer in answers]
        case "map":
            mapping, default = arguments.get("mapping_dict") or {}, arguments.get("default_value")
            return [_mapped(mapping, default, answer) for answer in answers]
        case "even_indents":
            return [_changed(answer, _even_indents) for answer in answers]
        case "first_block":
            return [_changed(answer, lambda text: text.lstrip("\n").split("\n\n")[0]) for answer in answers]
        case "code_fence":
            return [_changed(answer, _before_fence) for answer in answers]
        case "take_first":
            return answers[:1]
        case "majority_vote":
            # The first of the most frequent, as Counter keeps the order of appearance among equals.
            winner = Counter(answer.text for answer in answers).most_common(1)[0][0]
            return [next(answer for answer in answers if answer.text == winner)]
    raise ValueError(f"FILTERS of tasks/metrics.py names {step.function!r}, which scoring/filters.py does not do")


def _first_match(pattern: re.Pattern[str], select: int, fallback: str, answer: Extracted) -> Extracted:
    matches = pattern.findall(answer.text or "")
    if not -len(matches) <= select < len(matches):
        return Extracted(fallback, found=False)
    match = matches[select]
    if isinstance(match, tuple):  # several groups: the first that matched something
        match = next((group for group in match if group), None)
        if match is None:
            return Extracted(fallback, found=False)
    return Extracted(match.strip(), answer.found)


def _even_indents(text: str) -> str:
    """Every line's indent of spaces made even by one more space where it is odd (INSTRUCTEVAL's HumanEval)."""
    odd = re.compile(r"^((?:  )*) (?! )", re.MULTILINE)
    return odd.sub(r"\1  ", text)


def _before_fence(text: str) -> str:
    """What stands before a Markdown code fence ends; all of the text where there is none."""
    return text.partition("```")[0]


def _changed(answer: Extracted, change: Callable[[str], str]) -> Extracted:
    return answer if answer.text is None else replace(answer, text=change(answer.text))


def _mapped(mapping: Mapping[str, str], default: str | None, answer: Extracted) -> Extracted:
    if answer.text is not None and answer.text in mapping:
        return Extracted(mapping[answer.text], answer.found)
    return Extracted(default, found=False)
