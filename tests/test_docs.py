"""The documentation says what is so: commands parse, files exist, every field is there with its default."""

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
from cli_tools import Lived, lived_in, parse
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from eval_platform import config, tasks
from eval_platform.config import Config

pytestmark = pytest.mark.timeout(900)  # one test waits for the whole place to be made

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [page for page in PAGES if page.name != "log.md"]  # a journal of what was
# Folders of ours: what a page names below them is there. What a run makes, and the picture, may not be yet.
OURS = ("assets/", "benchmarks/", "demo/", "docs/", "eval_platform/", "resources/", "sensors/", "tests/", ".ci/")
MADE = ("demo/checkpoints", "demo/results", "docs/images/ui.png")


def commands(text: str) -> list[str]:
    """What stands as `eval-platform ...` on a line of its own or between backticks."""
    lines = re.findall(r"^(?: {4,}|\$ )?(eval-platform .*)$", text, re.MULTILINE)
    return [*lines, *re.findall(r"`(eval-platform [^`]*)`", text)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_parses(page: Path) -> None:
    for command in commands(page.read_text(encoding="utf-8")):
        words = shlex.split(command)
        if len(words) > 1 and not command.endswith(("...", "…")) and "|" not in words[1]:
            # A command that is only named lacks what it must be given.
            named_only = len(words) == 2 or (words[1] == "tasks" and len(words) == 3)
            try:
                parse(command)
            except Exception as error:
                if not (named_only and type(error).__name__ == "MissingParameter"):
                    raise AssertionError(f"{page.name}: {command}: {error}") from error


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_is_named_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in link and not str(link).startswith(MADE):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"
    for named in re.findall(r"`([\w./-]+)`", text):
        if named.startswith(OURS) and not named.startswith(MADE):
            assert (ROOT / named).exists(), f"{page.name} names {named}"


def sections() -> dict[str, type[BaseModel]]:
    """Heading -> its model."""
    found: dict[str, type[BaseModel]] = {"Top of the file": Config}
    for name, field in Config.model_fields.items():
        if name in ("checkpoints", "served", "references"):
            kinds = {"checkpoints": config.Root, "served": config.ServedModel, "references": config.Reference}
            found[f"[[{name}]]"] = kinds[name]
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found[f"[{name}]"] = field.annotation
    # These may be left out as a whole, which is a value of its own.
    return {**found, "[queue]": config.Queue, "[[queue.tiers]]": config.Tier}


def shown(value: Any) -> str:
    """A default as TOML has it."""
    match value:
        case _ if value is PydanticUndefined:
            return "required"
        case None:
            return "none"
        case bool():
            return f"`{str(value).lower()}`"
        case str():
            return f'`"{value}"`'
        case ():
            return "`[]`"
        case dict():
            return "`{}`"
        case _:
            return f"`{value}`"


def test_every_field_of_the_configuration_is_documented_with_its_default() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    pages = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))
    models = sections()
    assert set(pages) == {*models, "Environment"}
    for heading, model in models.items():
        told = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", pages[heading], re.MULTILINE))
        fields = {
            name: shown(field.default)
            for name, field in model.model_fields.items()
            if model not in (Config, config.Queue)
            or (model is config.Queue and name != "tiers")
            # Those left out have a page each.
            or (
                model is Config
                and name not in ("folder", "file", "checkpoints", "served", "references", "queue")
                and f"[{name}]" not in models
            )
        }
        assert told == fields, heading
    variables = set(re.findall(r"EVAL_PLATFORM_\w+", (ROOT / "eval_platform" / "config.py").read_text()))
    assert variables == set(re.findall(r"EVAL_PLATFORM_\w+", text))


def test_the_readme_examples_work(tmp_path: Path) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (toml,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    told = Config(**tomllib.loads(toml), folder=tmp_path)
    assert set(told.tasks.include) <= set(tasks.library_tasks())
    (yaml,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    (row,) = re.findall(r"# (\{.*\})$", yaml, re.MULTILINE)
    (tmp_path / "capitals.yaml").write_text(yaml)
    (tmp_path / "capitals.jsonl").write_text(row)
    assert tasks.build_task(tmp_path / "capitals.yaml").chance == 0.5


@pytest.mark.slow
def test_the_queries_run(tmp_path_factory: pytest.TempPathFactory) -> None:
    lived: Lived = lived_in(tmp_path_factory.getbasetemp() / "lived_in")
    found = [shlex.split(command)[1:] for page in PAGES for command in commands(page.read_text(encoding="utf-8"))]
    queries = [words for words in found if words[:1] == ["sql"] and len(words) > 1]
    assert len(queries) >= 3
    for words in queries:
        answer = lived.place(*words)
        assert answer.code == 0, f"{words}: {answer.err}"
