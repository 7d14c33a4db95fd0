"""What in a task may measure something else than it means to? Findings, each with its figures; nothing is refused.

What makes a task unfit is refused at sync already (`quality.check_items`). These are habits and accidents of wording
that shift scores: white space at the seams, delimiters that occur inside the text, gold that leans to one place.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from eval_platform.tasks.facts import ItemFacts, item_facts, used_shots
from eval_platform.tasks.render import render, shot_texts
from eval_platform.tasks.task import Task
from eval_platform.values import Item, Request

EXAMPLES = 3
# A place of the gold as uneven as this comes about by chance in one task of a thousand.
UNEVEN = 0.001
# Below this many items expected at a place, the chi-square distribution is no approximation.
LEAST_EXPECTED = 5.0
_LABEL = 3  # a choice of at most so many characters is a label, as in "A" or "(A)"
_ENCODED = 20  # items whose labels are encoded: they differ little

Encode = Callable[[str], Sequence[int]]


@dataclass(frozen=True, slots=True)
class Finding:
    """rule: its name. told: what was found, with figures. wrong: whether somebody should look. examples: sample_ids."""

    rule: str
    wrong: bool
    told: str
    examples: tuple[str, ...] = ()


def lint(task: Task, encode: Encode | None = None) -> list[Finding]:
    """Every finding on a task; `encode` gives a text's tokens, None: labels are not looked at."""
    items = list(render(task))
    facts = item_facts(task, items)
    found = [*_seams(items), *_collisions(task, items), *gold_positions(items), *_copies(facts, items)]
    found += _told("shots_among_items", "are among the shots that stand before them", facts.among_shots, items)
    if encode is not None:
        found += _labels(items, encode)
    return found


def _told(rule: str, told: str, hits: Sequence[bool], items: Sequence[Item]) -> list[Finding]:
    """One finding when any item is hit."""
    hit = [item.document.sample_id for item, is_hit in zip(items, hits, strict=True) if is_hit]
    return [Finding(rule, True, f"{len(hit)} of {len(items)} items {told}", tuple(hit[:EXAMPLES]))] if hit else []


def _seams(items: Sequence[Item]) -> list[Finding]:
    """White space where the prompt ends and the answer begins: one of the two must have it, and not both."""
    first = [_answered(item) for item in items]
    glued = [any(_glued(one.context, one.continuation or "") for one in asked) for asked in first]
    doubled = [any(_doubled(one.context, one.continuation or "") for one in asked) for asked in first]
    trailing = [any(r.kind == "generate" and r.context[-1:] in (" ", "\t") for r in item.requests) for item in items]
    before_word = "end their prompt with a space, which most tokenizers put before a word"
    return [
        *_told("glued", "have an answer that follows the prompt without a space", glued, items),
        *_told("double_space", "have two spaces between prompt and answer", doubled, items),
        *_told("trailing_space", before_word, trailing, items),
    ]


def _answered(item: Item) -> list[Request]:
    return [request for request in item.requests if request.kind == "choice" and request.context]


def _glued(context: str, continuation: str) -> bool:
    if not (context.isascii() and continuation.isascii()):  # there are scripts without spaces between words
        return False
    return (context[-1].isalnum() or context[-1] in ":?.!") and continuation[:1].isalnum()


def _doubled(context: str, continuation: str) -> bool:
    return (context[-1] == " " and continuation[:1] == " ") or continuation[:2] == "  "


def _collisions(task: Task, items: Sequence[Item]) -> list[Finding]:
    """Strings that mean an end, inside what they end."""
    definition = task.definition
    found = []
    generation = definition.generation
    stops = [stop for stop in generation.stop if stop] if generation is not None else []
    shots = list(shot_texts(task, used_shots(task))) if definition.shots else []
    for stop in stops:
        hits = sum(stop in answer for _, answer in shots)
        if hits:
            told = f"{hits} of {len(shots)} shots have the stop string {stop!r} in their answer"
            found.append(Finding("stop_in_shot", True, told))
        gold = [any(stop in text for text in _golds(item)) for item in items]
        unsayable = f"have the stop string {stop!r} in their right answer, so that no model can say it whole"
        found += _told("stop_in_gold", unsayable, gold, items)
    delimiter = definition.fewshot_delimiter
    if definition.shots and delimiter:
        inside = sum(delimiter in question or delimiter in answer for question, answer in shots)
        if inside:
            told = f"{inside} of {len(shots)} shots have the delimiter between shots, {delimiter!r}, inside them"
            found.append(Finding("delimiter_in_shot", True, told))
    return found


def _golds(item: Item) -> Sequence[str]:
    if item.choices or isinstance(item.target, int):
        return ()
    return [item.target] if isinstance(item.target, str) else [text for text in item.target if isinstance(text, str)]


def gold_positions(items: Sequence[Item]) -> list[Finding]:
    """Whether the right choice leans to one place: chi-square over the places, the exact binomial test for two.

    Of items with several numbers of choices, those with the most common number are looked at.
    """
    placed = [
        (item.target, len(item.choices)) for item in items if isinstance(item.target, int) and len(item.choices) > 1
    ]
    if not placed:
        return []
    places, n = Counter(number for _, number in placed).most_common(1)[0]
    counts = Counter(place for place, number in placed if number == places)
    observed = [counts[place] for place in range(places)]
    shares = ", ".join(f"{count / n:.1%}" for count in observed)
    whose = f"{n} items" if n == len(placed) else f"those {n} items that have {places} choices"
    last = " and 1" if places == 2 else ", 1, …"
    told = f"the right choice stands at place 0{last} in {shares} of {whose}"
    if n / places < LEAST_EXPECTED:
        return [Finding("gold_position", False, f"{told}; too few to test")]
    from scipy import stats

    if places == 2:
        p, test = float(stats.binomtest(observed[0], n, 0.5).pvalue), "binomial"
    else:
        p, test = float(stats.chisquare(observed).pvalue), "chi-square"
    return [Finding("gold_position", p < UNEVEN, f"{told}; {test} p = {p:.2g}")]


def _copies(facts: ItemFacts, items: Sequence[Item]) -> list[Finding]:
    """Items that stand more than once; worse, with different right answers."""
    golds: dict[str, set[Any]] = {}
    for key, item in zip(facts.keys, items, strict=True):
        golds.setdefault(key, set()).add(item.target)
    counts = Counter(facts.keys)
    several = [counts[key] > 1 for key in facts.keys]
    disagreeing = [len(golds[key]) > 1 for key in facts.keys]
    return [
        *_told("duplicate_items", "stand more than once, question and choices the same", several, items),
        *_told("contradictory_items", "are asked more than once with different right answers", disagreeing, items),
    ]


def _labels(items: Sequence[Item], encode: Encode) -> list[Finding]:
    """Whether the labels of choices are one token each where they stand; of the first items."""
    found: dict[str, int] = {}
    labelled = (item for item in items if item.choices and max(map(len, item.choices)) <= _LABEL)
    for item in islice(labelled, _ENCODED):
        for request in item.requests[: len(item.choices)]:
            continuation = request.continuation or ""
            together, alone = encode(request.context + continuation), encode(request.context)
            found[continuation] = max(found.get(continuation, 0), len(together) - len(alone))
    if not found:
        return []
    told = ", ".join(f"{label!r} {n}" for label, n in sorted(found.items()))
    return [Finding("label_tokens", max(found.values()) > 1, f"tokens of the labels where they stand: {told}")]
