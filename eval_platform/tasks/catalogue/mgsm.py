"""MGSM: 250 problems of GSM8K in eleven languages.

A row is `language`, `question`, `answer` (the number, as text), `problem` (its number, the same in every language), and
what a prompt in that language begins and ends with: `asks` ("Frage:") and `replies` ("Antwort:"), which are
lm-evaluation-harness 0.4.13's.
"""

from typing import Any

from eval_platform.tasks.catalogue.data import Card, Data, one_of

# language -> (what stands before a question, what stands before the answer).
_WORDS = {
    "bn": ("প্রশ্ন:", "Answer:"),
    "de": ("Frage:", "Antwort:"),
    "en": ("Question:", "Answer:"),
    "es": ("Pregunta:", "Respuesta:"),
    "fr": ("Question :", "Réponse :"),
    "ja": ("問題：", "Answer:"),
    "ru": ("Задача:", "Answer:"),
    "sw": ("Swali:", "Answer:"),
    "te": ("ప్రశ్న:", "Answer:"),
    "th": ("โจทย์:", "Answer:"),
    "zh": ("问题：", "Answer:"),
}

CARD = Card(
    title="MGSM",
    homepage="https://github.com/google-research/url-nlp/tree/main/mgsm",
    licence="CC BY-SA 4.0",
    citation="Shi et al., Language Models are Multilingual Chain-of-Thought Reasoners, 2022, arXiv:2210.03057",
    hub="juletxara/mgsm",
)


def rows(data: Data, split: str, config: str | None) -> list[dict[str, Any]]:
    """Split test; a configuration is a language, without one all eleven, one after the other."""
    one_of("mgsm", "split", split, ("test",))
    languages = tuple(_WORDS) if config is None else (one_of("mgsm", "config", config, _WORDS),)
    found = []
    for language in languages:
        items = data.from_hub("mgsm", CARD, language, split)
        found += [row_of(language, n, item) for n, item in enumerate(items)]
    return found


def row_of(language: str, problem: int, item: dict[str, Any]) -> dict[str, Any]:
    """A row of the hub's as ours."""
    asks, replies = _WORDS[language]
    return {
        "language": language,
        "problem": problem,
        "question": item["question"],
        "answer": str(item["answer_number"]),
        "asks": asks,
        "replies": replies,
    }
