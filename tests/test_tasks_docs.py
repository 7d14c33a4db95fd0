"""docs/task_files.md, to which errors point, knows every key and shows only what works; docs/tasks.md is up to date."""

import re
import shlex
from pathlib import Path

import pytest
from cli_tools import Place

from eval_platform.errors import NoData
from eval_platform.tasks import build_task, catalogue, library_tasks, render
from eval_platform.tasks.asking import GenerationKwargs
from eval_platform.tasks.card import BY_DEFINITION, page, section
from eval_platform.tasks.examples import EXAMPLES
from eval_platform.tasks.metrics import FILTERS, METRIC_ARGUMENTS, METRICS
from eval_platform.tasks.reading import read_task_file
from eval_platform.tasks.schema import TaskFile
from eval_platform.tasks.selection import LIBRARY
from eval_platform.tasks.sources import Documents
from tests.data import REPOSITORY, use_originals

TEXT = (REPOSITORY / "docs" / "task_files.md").read_text(encoding="utf-8")
SHIPPED = (REPOSITORY / "docs" / "tasks.md").read_text(encoding="utf-8")


def test_every_key_is_documented() -> None:
    aliases = {"max_new_tokens", "max_tokens", "max_completion_tokens", "do_sample"}  # lm-eval's other names
    words = set(re.findall(r"\w+", TEXT))
    keys = {*TaskFile.model_fields, *Documents.model_fields, *(set(GenerationKwargs.model_fields) - aliases)}

    assert keys - words == set()
    names = {*METRICS, *FILTERS, *METRIC_ARGUMENTS["exact_match"]}
    assert {name for name in names if not set(re.findall(r"\w+", name)) <= words} == set()  # pass@10 is two words


def test_the_example_works(tmp_path: Path) -> None:
    task, row = re.findall(r"```(?:yaml|json)\n(.*?)```", TEXT, flags=re.DOTALL)
    (tmp_path / "capitals.yaml").write_text(task)
    countries = ("France", "Italy", "Spain", "Peru")
    (tmp_path / "capitals.jsonl").write_text("".join(row.replace("France", country) for country in countries))

    first = next(render(build_task(tmp_path / "capitals.yaml")))

    assert first.prompt.endswith("capital of Peru?\nAnswer: Paris\n\nQuestion: What is the capital of France?\nAnswer:")
    assert [request.continuation for request in first.requests] == [" Lyon", " Paris", " Nice", " Lille"]


def test_the_way_from_documents_to_a_task_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    how = TEXT[TEXT.index("## Add a task from your own documents") : TEXT.index("## For people")]
    (rows,) = re.findall(r"```jsonl\n(.*?)```", how, flags=re.DOTALL)
    commands = re.findall(r"^    eval-platform (tasks .*)$", how, flags=re.MULTILINE)
    (tmp_path / "my_tasks").mkdir()
    (tmp_path / "my_tasks" / "rivers.jsonl").write_text(rows)
    (tmp_path / "eval_platform.toml").write_text('[tasks]\nfolders = ["my_tasks"]\n')
    monkeypatch.chdir(tmp_path)

    answers = {command: Place(tmp_path)(*shlex.split(command)) for command in commands}

    assert [command for command, answer in answers.items() if answer.code != 0] == []
    assert "Which river flows through Turin?\nAnswer:" in answers["tasks show my_tasks/rivers.yaml -k 1"].out
    assert answers["tasks list"].out.splitlines()[1].split()[:2] == ["rivers", "2"]


# --- docs/tasks.md


def test_the_page_of_shipped_tasks_is_what_they_say_now() -> None:
    assert page() == SHIPPED, "run `python -m eval_platform.tasks.card docs/tasks.md`"


@pytest.mark.parametrize("name", library_tasks())
def test_every_shipped_task_is_on_it_with_what_people_must_know(name: str) -> None:
    told = section(read_task_file(LIBRARY / f"{name}.yaml"))

    assert "not said" not in told
    assert ("- verified: " in told) != (f"- {BY_DEFINITION}" in told)
    assert len(told.partition("````text\n")[2]) > 40  # an example


def test_made_up_examples_have_the_fields_of_the_real_items(monkeypatch: pytest.MonkeyPatch) -> None:
    use_originals(monkeypatch, "gsm8k", "humaneval", "xstest")
    said = [read_task_file(LIBRARY / f"{name}.yaml").documents for name in library_tasks()]
    sources = {(one.dataset.name, one.dataset.split, one.dataset.config) for one in said if one and one.dataset}
    compared = set()
    for name, split, config in sorted(sources, key=str):
        if name in ("bbq", "mmlu"):  # seconds to read; tests of their prompts read them
            continue
        try:
            row = catalogue.read(name, split, config)[0]
        except NoData:
            continue
        assert {field: type(EXAMPLES[name][field]) for field in row} == {k: type(v) for k, v in row.items()}, name
        compared.add(name)
    assert compared >= {"gsm8k", "humaneval", "xstest"}


def test_every_file_that_is_named_as_a_proof_is_there() -> None:
    pages = [*sorted((REPOSITORY / "docs").glob("*.md")), REPOSITORY / "README.md", *sorted(LIBRARY.glob("*.yaml"))]
    named = {
        (file, page.name)
        for page in pages
        for file in re.findall(r"\b(?:tests|benchmarks)/\w[\w/]*\.py\b", page.read_text(encoding="utf-8"))
    }

    assert len(named) > 10
    assert {(file, page) for file, page in named if not (REPOSITORY / file).is_file()} == set()
