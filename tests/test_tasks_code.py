"""HumanEval and MBPP: prompts equal lm-evaluation-harness's, reference solutions pass, functions without bodies do not.

All of them: benchmarks/verify_code.py.
"""

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.verify_code import programs, without_bodies
from eval_platform.sandbox import run_programs
from eval_platform.tasks import Task, build_task, catalogue, render
from eval_platform.tasks.sync import LIBRARY
from tests.data import use_originals
from tests.machine import needs_sandbox


@pytest.fixture(autouse=True)
def _data(monkeypatch: pytest.MonkeyPatch) -> None:
    use_originals(monkeypatch, "humaneval", "mbpp")


def shipped(name: str) -> Task:
    return build_task(LIBRARY / f"{name}.yaml")


class _WithoutFunctions(yaml.SafeLoader):
    """Their YAML, without the Python functions that it names: those score, and fetch their scorer from the network."""


_WithoutFunctions.add_constructor("!function", lambda *_: None)


def theirs(folder: str, name: str) -> dict[str, Any]:
    """lm-eval's own task file, its scoring left out."""
    lm_eval = pytest.importorskip("lm_eval", reason="the oracle is lm-eval, which is not installed (extra `lm-eval`)")
    place = Path(lm_eval.__file__).parent / "tasks" / folder
    said = yaml.load((place / f"{name}.yaml").read_text(), _WithoutFunctions)
    if "include" in said:
        said = {**theirs(folder, said.pop("include").removesuffix(".yaml")), **said}
    if said.get("fewshot_config"):
        # Their function that lists the shots; its module cannot be imported offline, but it is one literal.
        module = ast.parse((place / "utils.py").read_text())
        (function,) = [f for f in module.body if isinstance(f, ast.FunctionDef) and f.name == "list_fewshot_samples"]
        (returned,) = [node for node in ast.walk(function) if isinstance(node, ast.Return)]
        said["fewshot_config"]["samples"] = ast.literal_eval(returned.value)
    unwanted = ("metric_list", "filter_list", "unsafe_code", "dataset_path", "dataset_name")
    return {key: value for key, value in said.items() if key not in unwanted}


@pytest.mark.parametrize(
    ("name", "folder", "rows"),
    [
        ("humaneval", "humaneval", "humaneval"),
        ("humaneval_instruct", "humaneval", "humaneval"),
        ("mbpp", "mbpp", "mbpp"),
    ],
)
def test_prompts_equal_lm_evals(name: str, folder: str, rows: str) -> None:
    from tests.lm_eval_oracle import asked_by_config, asked_by_us

    documents = catalogue.read(rows, "test")[:20]
    asked = asked_by_config(theirs(folder, name), {"test": documents})

    ours = asked_by_us(list(render(shipped(name), limit=20)))

    assert len(ours) == 20
    assert ours == asked


def test_instructevals_prompt_and_draw() -> None:
    task = shipped("humaneval_instructeval_10")
    (item,) = render(task, limit=1)
    (request,) = item.requests
    said = "Please complete the following Python code without providing any additional tasks such as testing or "
    assert request.context == f"{said}explanations\n{task.documents[0].fields['prompt']}"
    assert request.settings is not None
    assert (request.settings.temperature, request.settings.top_k, request.settings.stop) == (0.6, 50, ())
    drawn = {name: shipped(name) for name in ("humaneval_instructeval", "humaneval_instructeval_100")}
    assert [task.repeats for task in drawn.values()] == [1, 100]
    assert drawn["humaneval_instructeval_100"].metrics == ("pass@1", "pass@10", "pass@100")


def _body(row: Mapping[str, Any]) -> str:
    return row["canonical_solution"]


def test_reference_solutions_pass_and_functions_without_bodies_do_not() -> None:
    """Every fortieth HumanEval and every hundredth MBPP, and the two of MBPP that need code before their assertions."""
    needs_sandbox()
    humaneval = catalogue.read("humaneval", "test")[::40]
    mbpp = [row for split in ("prompt", "test", "validation", "train") for row in catalogue.read("mbpp", split)]
    few = [row for row in mbpp if row["task_id"] % 160 == 7 or row["test_setup_code"]]
    assert len(humaneval) == 5
    assert len(mbpp) == 974
    assert len(few) == 9

    right = [*programs("humaneval", humaneval, _body), *programs("mbpp", few, lambda row: row["code"])]
    wrong = [
        *programs("humaneval", humaneval, lambda _: ""),
        *programs("mbpp", few, lambda row: without_bodies(row["code"])),
    ]
    verdicts = run_programs([*right, *wrong], "warm")

    assert [verdict.reason for verdict in verdicts[: len(right)]] == ["passed"] * len(right)
    assert {verdict.reason for verdict in verdicts[len(right) :]} <= {"assertion", "exception"}


def test_splits_are_the_papers() -> None:
    sizes = {split: len(catalogue.read("mbpp", split)) for split in ("prompt", "test", "validation", "train", "shots")}
    assert sizes == {"prompt": 10, "test": 500, "validation": 90, "train": 374, "shots": 3}
    assert len(catalogue.read("humaneval", "test")) == 164
