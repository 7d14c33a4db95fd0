"""Seeded generators: questions a very small model can learn within minutes, made without any data.

Each generator draws one item from a random source. Choice items have `question`, `choices`, `label` (index of the
right choice) and `answer` (that choice's text); generation items have `question` and `answer`; `text` items have
`text`. A question ends without a space, since the answer follows after one (lm-evaluation-harness's
`target_delimiter`).

Two promises. Same (name, n, seed, split): same items on every platform and Python version, because everything is
drawn from `random.Random.random()`, the one method whose sequence the standard library guarantees. And an item is
in the test or the train split by a hash of its own text, whatever the seed, so that who trains on one split has
never seen the other.
"""

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar

from eval_platform.errors import TaskError

Split = Literal["test", "train"]
T = TypeVar("T")

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TEST_SHARE = 10  # one item in this many is a test item
# A generator that finds nothing new in so many draws per item is taken to be exhausted.
_DRAWS_PER_ITEM = 200


def generate(name: str, n: int, seed: int, split: Split = "test") -> list[dict[str, Any]]:
    """`n` distinct items of generator `name`.

    Choice items have every label equally often (give or take one), so that an answer that ignores the question
    is right by chance and no more.

    Raises TaskError for an unknown name or split, a negative n, or more items than the generator can make.
    """
    if name not in GENERATORS:
        known = ", ".join(GENERATORS)
        raise TaskError(f"no generator is called {name!r}", remedy=f"use one of: {known}")
    if split not in ("test", "train"):
        raise TaskError(f"generator {name}: split is {split!r}", remedy="use 'test' or 'train'")
    if n < 0:
        raise TaskError(f"generator {name}: n is {n}", remedy="ask for 0 items or more")
    # Names are part of the seed, or two generators would draw the same letters for one seed.
    rng = random.Random(int.from_bytes(_digest(f"{name}:{seed}"), "big"))
    items: dict[str, dict[str, Any]] = {}
    labels: Counter[int] = Counter()
    for _ in range(_DRAWS_PER_ITEM * n):
        if len(items) == n:
            break
        item = GENERATORS[name](rng)
        text = item_text(item)
        if split_of(text) != split or text in items:
            continue
        if "label" in item:
            share = -(-n // len(item["choices"]))
            if labels[item["label"]] == share:
                continue
            labels[item["label"]] += 1
        items[text] = item
    if len(items) < n:
        raise TaskError(
            f"generator {name} has too few distinct {split} items: {n} wanted, {len(items)} found",
            remedy="ask for fewer",
        )
    return list(items.values())


def item_text(item: Mapping[str, Any]) -> str:
    """What makes two items the same: the question, or the text of a document."""
    return item["question"] if "question" in item else item["text"]


def split_of(text: str) -> Split:
    """The split that an item of this text is in."""
    return "test" if int.from_bytes(_digest(text)[:8], "big") % TEST_SHARE == 0 else "train"


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _below(rng: random.Random, n: int) -> int:
    """A uniform integer in [0, n). randrange and choice may change between Python versions, random() may not."""
    return int(rng.random() * n)


def _between(rng: random.Random, low: int, high: int) -> int:
    return low + _below(rng, high - low + 1)


def _pick(rng: random.Random, values: Sequence[T]) -> T:
    return values[_below(rng, len(values))]


def _shuffled(rng: random.Random, values: Sequence[T]) -> list[T]:
    """A uniform permutation (Fisher-Yates)."""
    out = list(values)
    for last in range(len(out) - 1, 0, -1):
        other = _below(rng, last + 1)
        out[last], out[other] = out[other], out[last]
    return out


def _distinct(rng: random.Random, values: Sequence[T], k: int) -> list[T]:
    return _shuffled(rng, values)[:k]


def _choice_item(question: str, choices: Sequence[str], label: int) -> dict[str, Any]:
    return {"question": question, "choices": list(choices), "label": label, "answer": choices[label]}


def _copying(rng: random.Random) -> dict[str, Any]:
    """Say the same letters again."""
    letters = " ".join(_pick(rng, LETTERS) for _ in range(5))
    return {"question": f"copy: {letters} ->", "answer": letters}


def _reversal(rng: random.Random) -> dict[str, Any]:
    """Say the letters from last to first."""
    letters = [_pick(rng, LETTERS) for _ in range(4)]
    return {"question": f"reverse: {' '.join(letters)} ->", "answer": " ".join(reversed(letters))}


def _sorting(rng: random.Random) -> dict[str, Any]:
    """Say the letters in the order of the alphabet; the wrong choices are other orders of the same letters."""
    letters = _distinct(rng, LETTERS, _between(rng, 4, 5))
    right = " ".join(sorted(letters))
    orders = [right]
    while len(orders) < 4:
        order = " ".join(_shuffled(rng, letters))
        if order not in orders:
            orders.append(order)
    choices = _shuffled(rng, orders)
    return _choice_item(f"sort: {' '.join(letters)} ->", choices, choices.index(right))


def _comparison(rng: random.Random) -> dict[str, Any]:
    """The larger of two numbers of three digits; half of the pairs share their first digit."""
    first = _between(rng, 100, 999)
    second = first
    while second == first:
        second = first // 100 * 100 + _below(rng, 100) if rng.random() < 0.5 else _between(rng, 100, 999)
    return _choice_item(f"larger: {first} or {second} ->", (str(first), str(second)), int(second > first))


def _number_choices(rng: random.Random, right: int) -> tuple[list[str], int]:
    """Four numbers evenly spaced, the right one at a uniform rank, so that the choices alone do not give it away."""
    spacing = _pick(rng, (1, 10))
    lowest = right - spacing * _below(rng, min(4, right // spacing + 1))
    choices = _shuffled(rng, [lowest + spacing * i for i in range(4)])
    return [str(number) for number in choices], choices.index(right)


def _addition(rng: random.Random) -> dict[str, Any]:
    """The sum of a number of three digits and one of one digit."""
    a, b = _between(rng, 100, 999), _between(rng, 2, 9)
    return _choice_item(f"add: {a} + {b} ->", *_number_choices(rng, a + b))


def _successor(rng: random.Random) -> dict[str, Any]:
    """The number after one of four digits; a third of them carry, which a tenth would by chance."""
    number = _between(rng, 1000, 9998)
    if rng.random() < 0.25:
        number = number // 10 * 10 + 9
    number = min(number, 9998)
    return _choice_item(f"after: {number} ->", *_number_choices(rng, number + 1))


def _parity(rng: random.Random) -> dict[str, Any]:
    """Whether a number of four digits is even or odd."""
    number = _between(rng, 1000, 9999)
    return _choice_item(f"parity: {number} ->", ("even", "odd"), number % 2)


_CLOSING = {"(": ")", "[": "]"}
_BRACKETS = "()[]"


def _balanced(rng: random.Random, pairs: int) -> list[str]:
    """A balanced sequence of brackets with `pairs` pairs: a split at a random place, recursively."""
    if pairs == 0:
        return []
    inside = _below(rng, pairs)
    left = _pick(rng, "([")
    return [left, *_balanced(rng, inside), _CLOSING[left], *_balanced(rng, pairs - 1 - inside)]


def _is_balanced(brackets: Sequence[str]) -> bool:
    expected: list[str] = []
    for bracket in brackets:
        if bracket in _CLOSING:
            expected.append(_CLOSING[bracket])
        elif not expected or expected.pop() != bracket:
            return False
    return not expected


def _brackets(rng: random.Random) -> dict[str, Any]:
    """Whether brackets of two kinds are balanced; the wrong ones have one bracket replaced or two swapped."""
    balanced = rng.random() < 0.5
    brackets = _balanced(rng, _between(rng, 3, 5))
    while not balanced and _is_balanced(brackets):
        place = _below(rng, len(brackets))
        if rng.random() < 0.5:
            brackets[place] = _pick(rng, _BRACKETS)
        else:
            other = _below(rng, len(brackets))
            brackets[place], brackets[other] = brackets[other], brackets[place]
    return _choice_item(f"balanced: {' '.join(brackets)} ->", ("yes", "no"), 0 if balanced else 1)


_NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Felix", "Greta", "Hugo", "Ida", "Jonas", "Lena", "Oscar")
_WHO = ("a teacher", "a sailor", "a farmer", "a baker", "a doctor", "a painter", "a student", "a gardener")
_ADJECTIVES = ("old", "small", "red", "heavy", "broken", "strange", "new", "quiet", "bright", "cold")
_THINGS = ("key", "book", "lamp", "boat", "letter", "stone", "clock", "basket", "map", "bell", "table", "coat")
_PLACES = ("the river", "the market", "the school", "the harbour", "the old mill", "the garden", "the station")
_TIMES = ("In the morning", "At noon", "In the evening", "After the rain", "Before winter", "On the next day")
_FOUND = ("found", "lost", "bought", "sold", "repaired", "carried", "painted", "forgot")
_FEELINGS = ("happy", "tired", "angry", "surprised", "proud", "afraid")
_WEATHER = ("It was raining.", "The sun was shining.", "The wind was cold.", "Snow lay on the roofs.", "It was warm.")


def _text(rng: random.Random) -> dict[str, Any]:
    """A short story of four or five sentences in which the person and the thing stay the same."""
    name, thing = _pick(rng, _NAMES), _pick(rng, _THINGS)
    sentences = [
        f"{name} was {_pick(rng, _WHO)} who lived near {_pick(rng, _PLACES)}.",
        f"{_pick(rng, _TIMES)} {name} {_pick(rng, _FOUND)} a {_pick(rng, _ADJECTIVES)} {thing}.",
    ]
    if rng.random() < 0.5:
        sentences.append(_pick(rng, _WEATHER))
    sentences.append(f"{_pick(rng, _TIMES)} {name} took the {thing} to {_pick(rng, _PLACES)}.")
    sentences.append(f"{name} was {_pick(rng, _FEELINGS)}, because the {thing} was {_pick(rng, _ADJECTIVES)}.")
    return {"text": " ".join(sentences)}


GENERATORS: Mapping[str, Callable[[random.Random], dict[str, Any]]] = {
    "copying": _copying,
    "reversal": _reversal,
    "sorting": _sorting,
    "comparison": _comparison,
    "addition": _addition,
    "successor": _successor,
    "parity": _parity,
    "brackets": _brackets,
    "text": _text,
}
