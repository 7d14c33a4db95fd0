"""What is asked? The seven rows of the speed table, as tuples (kind, context, continuation | settings | None).

MMLU, BBH and GSM8K are real items with the prompts that lm-evaluation-harness writes; the other rows are prose of the
lengths that their namesakes have. Same name and size, same requests, always.
"""

import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from benchmarks.engine.models import prose_sentences
from benchmarks.engine.texts import data_folder, read_lines, read_table
from eval_platform.values import Generation, Request, RequestKind, make_request

Asked = tuple[RequestKind, str, str | Generation | None]

_WORDS_PER_TOKEN = 0.8
_MMLU_SUBJECT = "astronomy"  # its test set and its questions are of about the mean length of the 57
_BBH_TASK = "date_understanding"
# A random model never says "Q:", so completions would all be as long as they may. The last stop string of each row is
# one that it does say now and then: completions end at many lengths, as a trained model's do.
_BBH_STOPS = ("</s>", "Q", "\n\n", "ch")
_GSM8K_STOPS = ("Q:", "</s>", "<|im_end|>", "ag")


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the table. size: documents asked about, for lm-eval to take some 15-40 s on two cores.

    least and goal: the issue's ratios; floor_least and floor_goal its fractions of the floor, None where it only asks
    for a report. max_length: the window, None for the model's own.
    """

    title: str
    make: Callable[[int, "Prose"], list[Asked]]
    size: int
    least: float
    goal: float
    floor_least: float | None
    floor_goal: float | None
    memory_limit: float  # of lm-eval's memory above the weights
    max_length: int | None = None

    def requests(self, size: int, work: Path) -> list[Request]:
        """The row's requests about `size` documents, as both sides get them."""
        return [as_request(asked) for asked in self.make(size, Prose(prose_sentences(work)))]


def as_request(asked: Asked) -> Request:
    kind, context, rest = asked
    if isinstance(rest, Generation):
        return make_request(kind, context, settings=rest)
    return make_request(kind, context, rest)


class Prose:
    """Real sentences in random order, in any length."""

    def __init__(self, sentences: Sequence[str]) -> None:
        self._sentences = sentences

    def text(self, chance: random.Random, tokens: int) -> str:
        """About that many tokens: the words of sentences, cut to length."""
        wanted = max(1, int(tokens * _WORDS_PER_TOKEN))
        words: list[str] = []
        while len(words) < wanted:
            words += chance.choice(self._sentences).split()
        return " ".join(words[:wanted])

    def around(self, chance: random.Random, tokens: int) -> str:
        """Half to one and a half times as many tokens."""
        return self.text(chance, chance.randint(tokens // 2, tokens * 3 // 2))


def mmlu(size: int, prose: Prose) -> list[Asked]:
    """Five shots from the development set, the same for all questions; four one-token answers each."""
    folder = data_folder() / "mmlu"
    shots = read_table(folder / "dev" / f"{_MMLU_SUBJECT}_dev.csv")[:5]
    questions = read_table(folder / "test" / f"{_MMLU_SUBJECT}_test.csv")[:size]
    before = f"The following are multiple choice questions (with answers) about {_MMLU_SUBJECT.replace('_', ' ')}.\n\n"
    before += "".join(f"{_mmlu_question(shot)} {'ABCD'[int(shot['answer'])]}\n\n" for shot in shots)
    return [("choice", before + _mmlu_question(question), f" {letter}") for question in questions for letter in "ABCD"]


def _mmlu_question(row: dict[str, str]) -> str:
    choices = "".join(f"\n{letter}. {row[f'choice{i}']}" for i, letter in enumerate("ABCD"))
    return f"{row['question'].strip()}{choices}\nAnswer:"


def bbh(size: int, prose: Prose) -> list[Asked]:
    """Three shots of chain of thought, the same for all; up to 128 new tokens."""
    task = _lm_eval_task(f"bbh/cot_fewshot/{_BBH_TASK}.yaml")
    shots = task["fewshot_config"]["samples"]
    before = task["description"] + "".join(f"{_bbh_question(shot)}{shot['target']}\n\n" for shot in shots)
    items = json.loads((data_folder() / "bbh" / "bbh" / f"{_BBH_TASK}.json").read_text(encoding="utf-8"))["examples"]
    settings = Generation(max_new_tokens=128, stop=_BBH_STOPS)
    return [("generate", before + _bbh_question(item), settings) for item in items[:size]]


def _bbh_question(item: dict[str, str]) -> str:
    return f"Q: {item['input']}\nA: Let's think step by step.\n"


def gsm8k(size: int, prose: Prose) -> list[Asked]:
    """Eight shots of chain of thought, the same for all; up to 256 new tokens."""
    shots = _lm_eval_task("gsm8k/gsm8k-cot.yaml")["fewshot_config"]["samples"]
    before = "".join(f"{_gsm8k_question(shot)} {shot['target']}\n\n" for shot in shots)
    items = list(read_lines(data_folder() / "gsm8k" / "test.jsonl.gz"))[:size]
    settings = Generation(max_new_tokens=256, stop=_GSM8K_STOPS)
    return [("generate", before + _gsm8k_question(item), settings) for item in items]


def _gsm8k_question(item: dict[str, str]) -> str:
    return f"Q: {item['question']}\nA:"


def _lm_eval_task(name: str) -> dict[str, Any]:
    """A task file of the installed lm-evaluation-harness."""
    return yaml.safe_load((files("lm_eval") / "tasks" / name).read_text(encoding="utf-8"))


def endings(size: int, prose: Prose) -> list[Asked]:
    """HellaSwag's lengths: a title and 40-115 tokens, four endings of 14-36."""
    chance = random.Random(2)
    found: list[Asked] = []
    for _ in range(size):
        found += _four_endings("", chance, prose)
    return found


def ten_shots(size: int, prose: Prose) -> list[Asked]:
    """The same with ten shots that are drawn anew for each document, as lm-eval's default sampler does."""
    chance = random.Random(7)
    pool = [f"{_opening(chance, prose)} {prose.text(chance, chance.randint(14, 36))}" for _ in range(200)]
    found: list[Asked] = []
    for _ in range(size):
        found += _four_endings("".join(f"{shot}\n\n" for shot in chance.sample(pool, 10)), chance, prose)
    return found


def _four_endings(before: str, chance: random.Random, prose: Prose) -> list[Asked]:
    context = before + _opening(chance, prose)
    return [("choice", context, f" {prose.text(chance, chance.randint(14, 36))}") for _ in range(4)]


def _opening(chance: random.Random, prose: Prose) -> str:
    return f"{prose.text(chance, 3).title()}: {prose.text(chance, chance.randint(40, 115))}"


def perplexity(size: int, prose: Prose) -> list[Asked]:
    """Documents of 400-6,000 tokens, their lengths uniform in the logarithm."""
    chance = random.Random(5)
    lengths = [int(math.exp(chance.uniform(math.log(400), math.log(6000)))) for _ in range(size)]
    return [("rolling", f" {prose.text(chance, length)}", None) for length in lengths]


def one_token(size: int, prose: Prose) -> list[Asked]:
    """A question of some 45 tokens with four options of some 8, nothing before it; four one-token answers."""
    chance = random.Random(6)
    found: list[Asked] = []
    for _ in range(size):
        options = "".join(f"\n{letter}. {prose.around(chance, 8)}" for letter in "ABCD")
        context = f"{prose.around(chance, 45)}?{options}\nAnswer:"
        found.extend(("choice", context, f" {letter}") for letter in "ABCD")
    return found


ROWS: dict[str, Row] = {
    "mmlu": Row("MMLU 5-shot, shared shots", mmlu, 48, 11, 20, 0.5, 0.75, 0.25),
    "endings": Row("0-shot, four multi-token endings", endings, 60, 3.5, 5, 0.6, 0.8, 1),
    "bbh": Row("BBH 3-shot chain of thought, greedy", bbh, 32, 6, 10, None, None, 1),
    "gsm8k": Row("GSM8K 8-shot chain of thought, greedy", gsm8k, 32, 8, 12, None, None, 1),
    "ten_shots": Row("10 shots drawn per document, four endings", ten_shots, 6, 5, 9, 0.5, 0.75, 0.25),
    # The window is the prototype's, so that long documents have several.
    "perplexity": Row("rolling perplexity, 400-6,000 tokens", perplexity, 6, 1.2, 1.5, 0.6, 0.8, 1 / 3, 2048),
    "one_token": Row("0-shot, one-token answers", one_token, 150, 2, 3, 0.6, 0.8, 1),
}
