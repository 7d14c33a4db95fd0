"""A task whose answers are programs, through worker, gate and catalog: verdicts stored, where they ran recorded."""

import json
from pathlib import Path
from typing import Any

import pytest
from fault_tools import WORDS, Place, forked
from machine import needs_sandbox

from eval_platform.config import Config, Sandbox
from eval_platform.sandbox import Mode
from eval_platform.store import commits, layout, read_record

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True, scope="module")
def _sandbox() -> None:
    needs_sandbox()


# Whatever a random model says is a fine text; half of the programs fail all the same.
PROGRAM = "said = {{completion | tojson}}\nassert isinstance(said, str)\nassert {{label}} == 0"
CODE: dict[str, Any] = {
    **WORDS,
    "metric_list": [{"metric": "pass@1"}],
    "primary_metric": "pass@1",
    "code": {"program": PROGRAM},
}


class _Place(Place):
    mode: Mode = "cold"

    def config(self, state: str = "state") -> Config:
        return super().config(state).model_copy(update={"sandbox": Sandbox(mode=self.mode)})

    def records(self) -> list[dict[str, Any]]:
        rows = self.sql("select evaluation_id from evaluations order by finished_at")
        return [read_record(self.store, layout.evaluation(row["evaluation_id"], 1)) for row in rows]


@pytest.fixture
def place(tmp_path: Path) -> _Place:
    one = _Place(tmp_path)
    one.write_task("programs", 6, **CODE)
    one.sync()
    one.checkpoint()
    return one


def test_programs_run_are_stored_and_scored_again_without_the_model(place):
    with forked(place):
        arrival = place.arrive()
        (first,) = place.drive(arrival)
        asked = place.asked()
        place.write_task("programs", 6, **CODE | {"code": {"program": PROGRAM.replace("== 0", "== 5")}})
        place.sync()
        place.mode = "unsafe"
        (second,) = place.drive(arrival)

    assert [first.status, second.status] == ["published", "published"]
    assert place.asked() == asked
    before, after = place.records()
    assert (before["origin"], before["primary"]["value"]) == ("asked", 0.5)
    assert (after["origin"], after["primary"]["value"]) == ("rescored", 0.0)
    assert before["answers_id"] == after["answers_id"]
    assert before["versions"]["sandbox"].startswith("bubblewrap ")
    assert after["versions"]["sandbox"].startswith("UNSAFE: plain processes")
    rows = commits.read_samples(place.store, before).to_pylist()
    assert [dict(row["extracted"])["verdict"] for row in rows] == ["passed", "assertion: AssertionError"] * 3
    assert place.problems() == []
    # In every result, so also where people look for it.
    said = place.sql("select versions from evaluations order by finished_at")
    assert [json.loads(row["versions"])["sandbox"][:6] for row in said] == ["bubble", "UNSAFE"]


def test_without_a_sandbox_nothing_is_asked(place, monkeypatch):
    """The model's hours would be for nothing; the failure may pass on another machine, so it is tried again."""
    monkeypatch.setenv("PATH", "")
    with forked(place):
        (outcome,) = place.drive(place.arrive())
    assert outcome.status == "failed"
    assert "apt-get install bubblewrap" in outcome.reasons[0]
    assert place.asked() == []
