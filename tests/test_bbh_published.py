"""BIG-Bench Hard against what its authors published: their stored predictions, accuracies and prompts.

The prediction files hold 2 x 6,511 answers of code-davinci-002, scored here by the filters and metrics of the shipped
tasks.
"""

import gzip
import json
from collections.abc import Mapping
from functools import cache
from typing import Any

import pytest

from eval_platform.scoring.filters import extract
from eval_platform.scoring.text import exact_match, prefix_match
from eval_platform.tasks.building import _assemble
from eval_platform.tasks.catalogue import read
from eval_platform.tasks.catalogue.bbh import SUBTASKS
from eval_platform.tasks.reading import read_task_file
from eval_platform.tasks.render import render
from eval_platform.tasks.selection import LIBRARY
from tests.data import originals, use_originals

# (subtask, strict, prefix) in per cent where the two differ: ../shared/facts of INSTRUCTEVAL, section 6.
INFLATED = {
    "bbh_instructeval": {"dyck_languages": (46.8, 52.8), "multistep_arithmetic_two": (1.2, 1.6)},
    "bbh_cot": {
        "snarks": (59.55, 62.36),
        "dyck_languages": (56.8, 62.8),
        "ruin_names": (68.4, 70.0),
        "hyperbaton": (66.4, 66.8),
        "multistep_arithmetic_two": (47.6, 48.4),
    },
}
KINDS = {"bbh_instructeval": "direct", "bbh_cot": "cot"}


@cache
def _predictions(kind: str, subtask: str) -> list[Mapping[str, str]]:
    stem = f"bbh/code-davinci-002-outputs/code-davinci-002-{kind}/{subtask}_few_shot_template_0-255000"
    return json.loads(gzip.decompress(originals(f"{stem}.json.gz").read_bytes()))["outputs"]


def _published(kind: str, subtask: str) -> float:
    stem = f"bbh/code-davinci-002-outputs/code-davinci-002-{kind}/{subtask}_few_shot_template_0-255000"
    return json.loads(originals(f"{stem}_eval_metrics.jsonl").read_text().splitlines()[0])["accuracy"]


@cache
def _scored(task: str) -> dict[str, tuple[float, float]]:
    """subtask -> (strict, prefix) accuracy in per cent of the stored predictions, by the shipped task's filters."""
    steps = read_task_file(LIBRARY / f"{task}.yaml").filter_list[0].filter
    found = {}
    for subtask in SUBTASKS:
        rows = _predictions(KINDS[task], subtask)
        answers = [extract(steps, [row["prediction"]])[0].text for row in rows]
        pairs = list(zip(answers, ([row["target"]] for row in rows), strict=True))
        found[subtask] = tuple(
            100 * sum(metric(*pair) for pair in pairs) / len(pairs) for metric in (exact_match, prefix_match)
        )
    return found


@pytest.mark.parametrize("task", KINDS)
def test_the_strict_rule_gives_every_published_accuracy(task: str) -> None:
    published = {subtask: _published(KINDS[task], subtask) for subtask in SUBTASKS}

    assert {subtask: strict for subtask, (strict, _) in _scored(task).items()} == pytest.approx(published, abs=1e-9)
    assert len(published) == 27
    mean = {"bbh_instructeval": 52.76, "bbh_cot": 73.71}[task]
    assert sum(published.values()) / 27 == pytest.approx(mean, abs=0.005)


@pytest.mark.parametrize("task", KINDS)
def test_the_prefix_rule_gives_more_where_it_is_known_to(task: str) -> None:
    differing = {subtask: pair for subtask, pair in _scored(task).items() if pair[0] != pair[1]}

    assert differing.keys() == INFLATED[task].keys()
    for subtask, pair in differing.items():
        assert pair == pytest.approx(INFLATED[task][subtask], abs=0.005), subtask


def test_prompts_are_those_that_the_authors_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    use_originals(monkeypatch, "bbh/bbh", "bbh/cot-prompts")
    definition = read_task_file(LIBRARY / "bbh_cot.yaml")
    for subtask in SUBTASKS:
        rows: list[dict[str, Any]] = read("bbh", "cot", subtask)
        task = _assemble(definition, rows, read("bbh", "cot_shots", subtask), chance=None, identity="")
        theirs = [row["input"] for row in _predictions("cot", subtask)]

        assert [item.prompt for item in render(task, task.documents[:20])] == theirs[:20], subtask
        assert [row["target"] for row in rows] == [row["target"] for row in _predictions("cot", subtask)], subtask
