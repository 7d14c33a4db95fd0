"""What real text is there to ask about and to train a tokenizer on? The data sets of the shared folder."""

import csv
import gzip
import json
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eval_platform.errors import EvalPlatformError

# As tests find it (tests/data.py): where tasks look for public items, else the shared folder beside the repository.
DATA = Path(os.environ.get("EVAL_PLATFORM_DATA") or Path(__file__).resolve().parents[2].parent / "shared" / "data")

LONGEST_DOCUMENT = 4000  # characters; a few very long ones would decide the vocabulary
_SENTENCE = re.compile(r"[A-Z][a-z]+(?: [a-z,']+){6,40}[.?!]")


def data_folder() -> Path:
    """The folder of data sets. Raises EvalPlatformError when it isn't there."""
    if not (DATA / "mmlu").is_dir():
        raise EvalPlatformError(
            f"the benchmark's data are not there: {DATA} does not exist or has no folder mmlu",
            remedy="set EVAL_PLATFORM_DATA, or put the shared folder beside the repository (../shared/data)",
        )
    return DATA


def documents() -> list[str]:
    """Every mostly-ASCII text of over 200 characters in the data sets' JSON lines, each once, in a fixed order."""
    found = set()
    for file in sorted(data_folder().rglob("*.jsonl*")):
        for row in read_lines(file):
            text = "\n".join(_strings(row))
            if len(text) > 200 and sum(map(str.isascii, text)) > 0.97 * len(text):
                found.add(text[:LONGEST_DOCUMENT])
    texts = sorted(found)
    random.Random(0).shuffle(texts)
    return texts


def sentences(texts: list[str]) -> list[str]:
    """The plain prose sentences in `texts`, each once, in a fixed order."""
    found = {s for text in texts for s in _SENTENCE.findall(text.replace("\n", " ")) if len(s) > 40}
    ordered = sorted(found)
    random.Random(0).shuffle(ordered)
    return ordered


def read_lines(file: Path) -> Iterator[Any]:
    """The rows of a JSON-lines file, packed or not; lines that are no JSON are left out."""
    with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8") as lines:
        for line in lines:
            try:
                yield json.loads(line)
            except ValueError:
                continue


def read_table(file: Path) -> list[dict[str, str]]:
    """The rows of a CSV file with a header."""
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def _strings(value: Any) -> Iterator[str]:
    match value:
        case str():
            yield value
        case dict():
            for part in value.values():
                yield from _strings(part)
        case list():
            for part in value:
                yield from _strings(part)
