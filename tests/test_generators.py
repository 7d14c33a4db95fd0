"""Generators: every answer is checked by reading its question again, with other code than made it."""

import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval_platform.errors import TaskError
from eval_platform.tasks.generators import GENERATORS, generate, item_text, split_of

QUESTIONS = [name for name in GENERATORS if name != "text"]


def right_answer(name: str, question: str) -> str:
    """The answer as a reader of the question works it out."""
    body = question.split(": ", 1)[1].removesuffix(" ->")
    numbers = [int(digits) for digits in re.findall(r"\d+", body)]
    match name:
        case "copying":
            return body
        case "reversal":
            return body[::-1]
        case "sorting":
            return " ".join(sorted(body.split()))
        case "comparison":
            return str(max(numbers))
        case "addition":
            return str(sum(numbers))
        case "successor":
            return str(numbers[0] + 1)
        case "parity":
            return "odd" if body[-1] in "13579" else "even"
        case "brackets":
            rest, before = body.replace(" ", ""), ""
            while rest != before:
                rest, before = rest.replace("()", "").replace("[]", ""), rest
            return "no" if rest else "yes"
    raise AssertionError(f"no oracle for generator {name}")


@pytest.mark.parametrize("name", QUESTIONS)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**40), split=st.sampled_from(["test", "train"]))
def test_every_item_is_right_distinct_and_in_its_split(name, seed, split):
    items = generate(name, 24, seed, split)
    assert len({item["question"] for item in items}) == 24
    for item in items:
        assert item["question"] == item["question"].strip()
        assert item["answer"] == right_answer(name, item["question"])
        assert split_of(item["question"]) == split
        if "choices" in item:
            assert item["choices"][item["label"]] == item["answer"]
            assert len(set(item["choices"])) == len(item["choices"])


@pytest.mark.parametrize("name", [name for name in QUESTIONS if name not in ("copying", "reversal")])
def test_an_answer_that_ignores_the_question_is_right_by_chance(name):
    items = generate(name, 200, 3)
    n_choices = len(items[0]["choices"])
    assert Counter(item["label"] for item in items) == dict.fromkeys(range(n_choices), 200 // n_choices)


@pytest.mark.parametrize("name", ["addition", "successor"])
def test_the_rank_of_the_right_number_among_the_choices_says_nothing(name):
    items = generate(name, 400, 1)
    ranks = Counter(sorted(item["choices"], key=int).index(item["answer"]) for item in items)
    # 400 draws at 1/4: standard deviation 8.7, so 5 of them.
    assert all(abs(ranks[rank] - 100) < 43 for rank in range(4))


def test_wrong_orders_use_the_letters_of_the_question():
    for item in generate("sorting", 100, 0):
        letters = sorted(item["question"].removeprefix("sort: ").removesuffix(" ->").split())
        assert all(sorted(choice.split()) == letters for choice in item["choices"])


@pytest.mark.parametrize("name", GENERATORS)
def test_same_seed_same_items_and_another_seed_others(name):
    assert generate(name, 30, 5) == generate(name, 30, 5)
    first, second = ({item_text(item) for item in generate(name, 30, seed)} for seed in (5, 6))
    assert len(first & second) < 15


@pytest.mark.parametrize("name", GENERATORS)
def test_splits_never_meet_whatever_the_seeds(name):
    test, train = ({item_text(item) for item in generate(name, 150, 9, split)} for split in ("test", "train"))
    assert not test & train


def test_items_are_these_on_every_machine():
    """Written down once: a platform or Python that draws otherwise would change every task's identity."""
    assert [generate(name, 1, 0)[0] for name in GENERATORS] == PINNED


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("copyng", 1, 0), "no generator is called 'copyng'"),
        (("copying", -1, 0), "n is -1"),
        (("copying", 1, 0, "dev"), "split is 'dev'"),
        (("parity", 2000, 0), "too few distinct test items: 2000 wanted"),
    ],
)
def test_what_cannot_be_made_is_refused_with_the_reason(arguments, words):
    with pytest.raises(TaskError, match=re.escape(words)):
        generate(*arguments)


PINNED = [
    {"question": "copy: s b h s y ->", "answer": "s b h s y"},
    {"question": "reverse: b h g c ->", "answer": "c g h b"},
    {
        "question": "sort: u p c l ->",
        "choices": ["c l p u", "l p u c", "u p l c", "u c p l"],
        "label": 0,
        "answer": "c l p u",
    },
    {"question": "larger: 983 or 984 ->", "choices": ["983", "984"], "label": 1, "answer": "984"},
    {"question": "add: 154 + 8 ->", "choices": ["182", "172", "152", "162"], "label": 3, "answer": "162"},
    {"question": "after: 1514 ->", "choices": ["1515", "1495", "1525", "1505"], "label": 0, "answer": "1515"},
    {"question": "parity: 9417 ->", "choices": ["even", "odd"], "label": 1, "answer": "odd"},
    {"question": "balanced: ( ( ) [ ] ) [ [ ( ) ->", "choices": ["yes", "no"], "label": 1, "answer": "no"},
    {
        "text": "Hugo was a sailor who lived near the school. After the rain Hugo carried a broken stone."
        " Before winter Hugo took the stone to the school. Hugo was proud, because the stone was old."
    },
]
