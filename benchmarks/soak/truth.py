"""What must be answered: every value follows from the bytes of the weights and the text of the question.

The stub engine answers from the files that the platform staged; the count at the end asks again with the files that
were uploaded and with prompts composed here, so that an answer of other weights, of another question, or of a mix of
two would be seen.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHOICES = ("Yes", "No")
N_SUMS, N_WORDS = 90, 70  # of sums each question is two requests


def weights_digest(folder: Path) -> str:
    """Of the bytes of all weight files in the order of their names."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _draw(*parts: str) -> int:
    return int.from_bytes(hashlib.sha256("\0".join(parts).encode()).digest()[:6])


def log_likelihood(weights: str, context: str, continuation: str) -> float:
    """In nats, from -10 to 0."""
    return -10 * _draw(weights, context, continuation) / 2**48


def completion(weights: str, context: str) -> str:
    return CHOICES[_draw(weights, context) % 2]


def questions(task: str) -> list[str]:
    n = {"sums": N_SUMS, "words": N_WORDS}[task]
    return [f"{task} {i} larger {i * 7 % 10}?" for i in range(n)]


def task_files() -> Iterator[tuple[str, list[dict[str, Any]], dict[str, Any]]]:
    """(name, documents, definition) of the two tasks: one of choices, one of completions."""
    common = {"higher_is_better": True, "doc_to_target": "label"}
    yield (
        "sums",
        [{"question": text, "label": i % 2} for i, text in enumerate(questions("sums"))],
        {
            **common,
            "output_type": "multiple_choice",
            "doc_to_text": "Question: {{question}}\nAnswer:",
            "doc_to_choice": list(CHOICES),
            "metric_list": [{"metric": "acc"}],
            "primary_metric": "acc",
            "chance": 0.5,
        },
    )
    yield (
        "words",
        [{"question": text, "label": CHOICES[i % 2]} for i, text in enumerate(questions("words"))],
        {
            **common,
            "output_type": "generate_until",
            "doc_to_text": "{{question}} =",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
            "metric_list": [{"metric": "exact_match"}],
            "primary_metric": "exact_match",
            "chance": 0.0,
        },
    )


def expected_samples(task: str, weights: str) -> list[Any]:
    """By position: of sums the log-likelihoods of both choices, of words the completion."""
    if task == "words":
        return [completion(weights, f"{text} =") for text in questions(task)]
    contexts = [f"Question: {text}\nAnswer:" for text in questions(task)]
    return [[log_likelihood(weights, context, f" {choice}") for choice in CHOICES] for context in contexts]


def expected_score(task: str, weights: str) -> float:
    """The share of right ones."""
    right = [
        answer == CHOICES[i % 2] if task == "words" else answer.index(max(answer)) == i % 2
        for i, answer in enumerate(expected_samples(task, weights))
    ]
    return sum(right) / len(right)
