"""How surprised was the model by a text? Perplexities and bits per byte of one item, and the weights of a mean."""

import math
import re
from collections.abc import Mapping
from typing import Literal

Weight = Literal["items", "words", "bytes"]

# What the exponent of each metric is divided by.
WEIGHTS: Mapping[str, Weight] = {
    "perplexity": "items",
    "word_perplexity": "words",
    "byte_perplexity": "bytes",
    "bits_per_byte": "bytes",
}


def count_words(text: str) -> int:
    """Pieces between white space; as lm-evaluation-harness counts, so that white space at an end adds a word."""
    return len(re.split(r"\s+", text))


def count_bytes(text: str) -> int:
    """Bytes of the text in UTF-8."""
    return len(text.encode())


def surprise(metric: str, log_likelihood: float) -> float:
    """The numerator of `metric` in nats, for bits_per_byte in bits."""
    return -log_likelihood / math.log(2) if metric == "bits_per_byte" else -log_likelihood


def own_value(metric: str, log_likelihood: float, weight: float) -> float | None:
    """The metric of this one item; None where it is not defined alone (no bytes) or too large for a float."""
    if weight == 0:
        return None
    exponent = surprise(metric, log_likelihood) / weight
    if metric == "bits_per_byte":
        return exponent
    try:
        return math.exp(exponent)
    except OverflowError:
        return None
