"""IFEval's checks: each instruction followed and not, and the official verdicts on real responses."""

import sys
from typing import Any

import pytest

pytest.importorskip("langdetect", reason="langdetect is not installed (extra `metrics`)")

from eval_platform.scoring import aggregate, score_item
from eval_platform.scoring.ifeval import verdict
from eval_platform.scoring.ifeval.checks import CHECKS
from eval_platform.scoring.ifeval.counting import count_capital_words, count_sentences, count_words
from eval_platform.tasks.schema import TaskFile
from eval_platform.tasks.task import Task
from eval_platform.values import Document, Generation, Item, Response, make_request
from tests.data import REPOSITORY, originals

ENGLISH = "this is a plain sentence in the english language about the weather"

# instruction -> arguments, a response that follows it, one that does not.
CASES: list[tuple[str, dict[str, Any], str, str]] = [
    ("keywords:existence", {"keywords": ["sea", "Wave"]}, "The SEA has waves.", "The sea is calm."),
    ("keywords:frequency", {"keyword": "war", "frequency": 2, "relation": "at least"}, "War is warm.", "A war."),
    ("keywords:frequency", {"keyword": "war", "frequency": 2, "relation": "less than"}, "A war.", "War, war."),
    ("keywords:forbidden_words", {"forbidden_words": ["rock"]}, "A rocket.", "Rock it!"),
    ("keywords:forbidden_words", {"forbidden_words": ["C++"]}, "xC++ and C", "in C++, or"),
    ("keywords:letter_frequency", {"letter": "Q", "let_frequency": 2, "let_relation": "at least"}, "q Q", "q"),
    ("keywords:letter_frequency", {"letter": "#", "let_frequency": 2, "let_relation": "at least"}, "# #", "#"),
    ("language:response_language", {"language": "de"}, "Das ist ein deutscher Satz über das Wetter.", ENGLISH),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"}, "One. Two.", "One, two."),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": "less than"},
        "Mr. Two.",
        "It is. It was.",
    ),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, "one two-three", "one two"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb\n***\n", "a\n***\n \n***\nb"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "b"},
        'a c\n\n"B, c',
        "b c\n\na b",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[a] and [b]", "[a and b]"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\nP. S. more", "Bye. PS more"),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Bye.\np.p.s more", "Bye.\nP.S. more"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n - b", "* a\n** b"),
    ("detectable_format:constrained_response", {}, "I say: My answer is maybe.", "Maybe."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and **b**", "*a* and **  **"),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "SECTION", "num_sections": 2},
        "SECTION 1\na\nSECTION 2\nb",
        "SECTION 1\na\nSection 2\nb",
    ),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "a: 1"),
    ("detectable_format:title", {}, "<<A title>>\ntext", "<< >>\ntext"),
    ("combination:two_responses", {}, "a\n******\nb", "a\n******\na"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it. "}, " SAY IT. Yes.", "Yes. Say it."),
    ("startend:end_checker", {"end_phrase": "The end."}, 'So: "THE END."', "The end. No."),
    ("startend:quotation", {}, ' "quoted" ', '"quoted" not'),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "at least"}, "DON'T", "A b"),
    ("change_case:english_capital", {}, ENGLISH.upper(), ENGLISH.capitalize()),
    ("change_case:english_lowercase", {}, ENGLISH, ENGLISH.capitalize()),
    ("punctuation:no_comma", {}, "a; b", "a, b"),
]


@pytest.mark.parametrize(("name", "arguments", "follows", "breaks"), CASES)
def test_each_instruction_is_followed_or_not(name: str, arguments: dict[str, Any], follows: str, breaks: str) -> None:
    assert CHECKS[name](follows, **arguments) is True
    assert CHECKS[name](breaks, **arguments) is False


def test_every_instruction_has_a_case() -> None:
    assert {name for name, *_ in CASES} == set(CHECKS)
    assert len(CHECKS) == 25


def test_loosely_the_first_line_the_last_line_and_stars_do_not_count() -> None:
    said = "Sure, here it is:\n*plain words*\nAnything else, sir?"
    names = ["punctuation:no_comma", "startend:end_checker", "startend:quotation"]
    found = verdict(said, names, [{}, {"end_phrase": "words", "unused": None}, {}])

    assert found.strict == (False, False, False)
    assert found.loose == (True, True, False)
    assert verdict(" \n", ["punctuation:no_comma"], [{}]).loose == (False,)
    assert verdict(None, ["punctuation:no_comma"], [{}]).strict == (False,)
    with pytest.raises(ValueError, match="IFEval has no instruction 'punctuation:no_dots'"):
        verdict("a", ["punctuation:no_dots"], [{}])


@pytest.mark.parametrize(
    ("text", "sentences", "words", "capitals"),
    [
        ("", 0, 0, 0),
        ("Hello there", 1, 2, 0),
        ("Dr. Who met Mr. X at 3 p.m. today. Fine!", 2, 11, 1),
        ("It costs 3.5 dollars... or more. He left.", 2, 9, 0),
        ('He said "Stop!" and left.', 2, 5, 0),  # as NLTK has it
        ("1. buy milk\n2. sell it", 1, 6, 0),
        ("1. Buy milk.\n2. Sell it.", 4, 6, 0),
        ("WE CAN'T-WON'T; NASA, U.S. OK.", 1, 9, 7),
    ],
)
def test_counts(text: str, sentences: int, words: int, capitals: int) -> None:
    assert (count_sentences(text), count_words(text), count_capital_words(text)) == (sentences, words, capitals)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("piece", ["a", "<", "[", "*", "\n", "- ", "a.", "'", '"', "******", "((", "SECTION 1"])
def test_no_response_takes_for_ever(piece: str) -> None:
    """Every check on 10,000 characters of what makes patterns go back and forth."""
    response = piece * (10_000 // len(piece))
    for name, arguments, *_ in CASES:
        if name != "language:response_language":
            CHECKS[name](response, **arguments)


def test_official_verdicts_are_ours() -> None:
    """Every eleventh response of seven models; `benchmarks/verify_ifeval.py` is about all."""
    folder = originals("ifeval")
    sys.path.insert(0, str(REPOSITORY / "benchmarks"))
    try:
        from verify_ifeval import compare
    finally:
        sys.path.pop(0)

    rows = list(compare(folder, step=11))

    assert len(rows) > 1200
    assert len({row.instruction for row in rows}) >= 24
    assert sum(row.official == row.ours for row in rows) / len(rows) >= 0.995
    random_there = {"keywords:letter_frequency", "change_case:english_capital", "change_case:english_lowercase"}
    random_there.add("language:response_language")
    assert {row.instruction for row in rows if row.official != row.ours} - {None} <= random_there


def test_instructions_are_counted_over_all_prompts() -> None:
    definition = TaskFile.model_validate(
        {
            "task": "t",
            "documents": {"file": "d.jsonl"},
            "doc_to_text": "q",
            "doc_to_target": "q",
            "metric_list": [{"metric": name} for name in ("prompt_level_strict_acc", "inst_level_strict_acc")],
        }
    )
    task = Task("t", definition, "", "", "", None, (), (), None)
    samples = []
    for n, (names, said) in enumerate([(["punctuation:no_comma"], "a, b"), (["punctuation:no_comma"] * 3, "a b")]):
        request = make_request("generate", f"q{n}", settings=Generation(8))
        fields = {"instruction_id_list": names, "kwargs": [{} for _ in names]}
        item = Item(Document(str(n), n, fields), (request,), (), "q", "q")
        samples += score_item(task, item, {(request.request_id, 0): Response(request.request_id, 0, text=said)})

    by_metric = {score.metric: score for score in aggregate(task, samples)}

    assert by_metric["prompt_level_strict_acc"].value == 0.5
    assert by_metric["inst_level_strict_acc"].value == 0.75
    assert dict(samples[1]["metrics"]) == {
        "prompt_level_strict_acc": 1.0,
        "inst_level_strict_acc": 1.0,
        "inst_level_strict_acc@0": 3,
        "inst_level_strict_acc@1": 3,
    }
