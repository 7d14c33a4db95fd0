"""docs/tasks.md, to which errors point, knows every key and shows only what works."""

import re
from pathlib import Path

from eval_platform.tasks import build_task, render
from eval_platform.tasks.metrics import FILTERS, METRIC_ARGUMENTS, METRICS
from eval_platform.tasks.schema import Documents, GenerationKwargs, TaskFile

TEXT = (Path(__file__).resolve().parent.parent / "docs" / "tasks.md").read_text(encoding="utf-8")


def test_every_key_is_documented() -> None:
    aliases = {"max_new_tokens", "max_tokens", "max_completion_tokens", "do_sample"}  # lm-eval's other names
    words = set(re.findall(r"\w+", TEXT))
    keys = {*TaskFile.model_fields, *Documents.model_fields, *(set(GenerationKwargs.model_fields) - aliases)}

    assert keys - words == set()
    assert {*METRICS, *FILTERS, *METRIC_ARGUMENTS["exact_match"]} - words == set()


def test_the_example_works(tmp_path: Path) -> None:
    task, row = re.findall(r"```(?:yaml|json)\n(.*?)```", TEXT, flags=re.DOTALL)
    (tmp_path / "capitals.yaml").write_text(task)
    countries = ("France", "Italy", "Spain", "Peru")
    (tmp_path / "capitals.jsonl").write_text("".join(row.replace("France", country) for country in countries))

    first = next(render(build_task(tmp_path / "capitals.yaml")))

    assert first.prompt.endswith("capital of Peru?\nAnswer: Paris\n\nQuestion: What is the capital of France?\nAnswer:")
    assert [request.continuation for request in first.requests] == [" Lyon", " Paris", " Nice", " Lille"]
