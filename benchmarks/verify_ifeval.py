"""Do our IFEval checks agree with the official ones? Every stored verdict on seven models' responses.

    python benchmarks/verify_ifeval.py ../shared/data/ifeval

Reads mifeval_en_input_data.jsonl and mifeval_official_results/ there (github.com/shisa-ai/M-IFEval). Prints a line for
every verdict that differs, and why where that is known; exits with 1 when fewer than 99.5 % of any kind agree.
"""

import gzip
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from eval_platform.scoring.ifeval import verdict

PREFIX = "en:"  # of M-IFEval's instruction ids
ENOUGH = 0.995

# Why a verdict may differ, by instruction.
REASONS = {
    "keywords:letter_frequency": "a letter that is none (# or !) is there replaced by one drawn at random",
    "change_case:english_capital": "langdetect draws at random; its seed is ours",
    "change_case:english_lowercase": "langdetect draws at random; its seed is ours",
    "language:response_language": "langdetect draws at random; its seed is ours",
    "length_constraints:number_sentences": "sentences are divided by our rule and not by NLTK's model",
    "change_case:capital_word_frequency": "words are cut by our rule and not by NLTK's",
}


class Compared(NamedTuple):
    """One official verdict beside ours. instruction: None for the prompt as a whole."""

    model: str
    key: int
    instruction: str | None
    way: str
    official: bool
    ours: bool


def compare(folder: Path, step: int = 1) -> Iterator[Compared]:
    """Every verdict on every `step`-th response of each model."""
    with (folder / "mifeval_en_input_data.jsonl").open(encoding="utf-8") as file:
        asked = {row["prompt"]: row for row in map(json.loads, file)}
    for path in sorted((folder / "mifeval_official_results").glob("*.strict.jsonl.gz")):
        model = path.name.removesuffix(".strict.jsonl.gz")
        strict, loose = _rows(path), _rows(path.with_name(f"{model}.loose.jsonl.gz"))
        for one, other in list(zip(strict, loose, strict=True))[::step]:
            prompt = asked[one["prompt"]]
            names = [name.removeprefix(PREFIX) for name in prompt["instruction_id_list"]]
            ours = verdict(one["response"], names, prompt["kwargs"])
            for way, official, found in (("strict", one, ours.strict), ("loose", other, ours.loose)):
                said = official["follow_instruction_list"]
                whole = official["follow_all_instructions"]
                yield Compared(model, prompt["key"], None, way, whole, all(found))
                for name, their, our in zip(names, said, found, strict=True):
                    yield Compared(model, prompt["key"], name, way, their, our)


def _rows(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def main(folder: Path) -> int:
    counts: Counter[tuple[str, bool]] = Counter()
    for row in compare(folder):
        kind = f"{'prompt' if row.instruction is None else 'instruction'} level, {row.way}"
        agree = row.official == row.ours
        counts[kind, agree] += 1
        if not agree and row.instruction is not None:
            print(f"{row.model} {row.key} {row.instruction} {row.way}: official {row.official}, ours {row.ours}")
            print(f"    {REASONS.get(row.instruction, 'no reason is known')}")
    shares = []
    for kind in sorted({kind for kind, _ in counts}):
        n, differ = counts[kind, True] + counts[kind, False], counts[kind, False]
        shares.append(1 - differ / n)
        print(f"{kind}: {n} verdicts, {differ} differ, {shares[-1]:.2%} agree")
    return 0 if min(shares) >= ENOUGH else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
