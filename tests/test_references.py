"""Pinned models: asked everything once, a line on every curve, rows of a view."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import pyarrow as pa
import pytest
from checkpoint_factory import make_checkpoint
from dagster_world import DagsterWorld, dagster_world
from matplotlib.figure import Figure
from typer.testing import CliRunner

from eval_platform import doctor, report, warehouse
from eval_platform.cli import app
from eval_platform.config import Config, Reference, load_config
from eval_platform.errors import ConfigError
from sensors import repairs as repairs_module

REFERENCES = """
[[references]]
name = "known"
path = "elsewhere/known"
[[references]]
name = "release"
key = "runs/b/step_1"
[[queue.tiers]]
name = "quick"
tasks = ["a"]
[[queue.tiers]]
name = "full"
tasks = ["b"]
every = 2
"""


@pytest.fixture
def world(tmp_path: Path) -> Iterator[DagsterWorld]:
    with dagster_world(tmp_path, REFERENCES) as one:
        one.lock(a="a1", b="b1")
        yield one


def requests(result: Any) -> dict[str, list[str]]:
    return {request.run_key: json.loads(request.tags["eval/tasks"]) for request in result.run_requests or ()}


def drop(world: DagsterWorld, folder: Path, seed: int = 0) -> None:
    aside = make_checkpoint(world.folder / "aside", seed=seed)
    (aside / "_SUCCESS").touch()
    folder.parent.mkdir(parents=True, exist_ok=True)
    os.rename(aside, folder)


@pytest.mark.dagster
def test_a_reference_is_asked_every_task_whatever_its_tiers(
    world: DagsterWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repairs_module, "FIRST_REPAIR_SECONDS", 0.0)
    drop(world, world.folder / "elsewhere" / "known")
    drop(world, world.checkpoints / "a" / "step_1", seed=1)
    drop(world, world.checkpoints / "b" / "step_1", seed=2)
    asked = requests(world.tick("new_checkpoints"))
    assert asked == {"known@1": ["a", "b"], "runs/a/step_1@1+quick": ["a"], "runs/b/step_1@1": ["a", "b"]}
    assert requests(world.tick("new_checkpoints")) == {}
    for run in world.runs():
        world.end(run, dg.DagsterRunStatus.SUCCESS)
    for key, checkpoint in (("known", "K"), ("runs/a/step_1", "A"), ("runs/b/step_1", "B")):
        world.identify(arrived(world, key), checkpoint)
        for task in "ab":
            world.publish(checkpoint, task, f"{task}1", {"K": 0.25, "A": 0.5, "B": 0.75}[checkpoint], key=key)
    world.tick("reconciliation")
    # A task that is added later is asked of the references alone, with `on_task_change = new_only` as it is.
    world.lock(a="a1", b="b1", c="c1")
    found = requests(world.tick("reconciliation"))
    assert {key.partition("#")[0]: tasks for key, tasks in found.items()} == {
        "known@1": ["c"],
        "runs/b/step_1@1": ["c"],
    }
    # In Dagster every result has the lines beside its own score.
    shown = world.events(["results", "a"], "runs/a/step_1")[0].metadata
    assert [shown[name].value for name in ("score", "reference known", "reference release")] == [0.5, 0.25, 0.75]

    # In SQL they are rows of a view, which is there without any reference too.
    text = "select reference, key, value from reference_scores where task = 'a' order by reference"
    told = CliRunner().invoke(app, ["--config", str(world.file), "sql", text, "--format", "csv"])
    assert told.output.split() == ["reference,key,value", "known,known,0.25", "release,runs/b/step_1,0.75"]
    assert warehouse.query(world.catalog, world.store, text).num_rows == 0

    # And on the picture.
    figures: list[Figure] = []
    board = warehouse.query(world.catalog, world.store, "select * from leaderboard")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda self, path, **_: (figures.append(self), Path(path).touch()))
        report.learning_curves_png(board, world.folder / "curves.png", world.config.reference_keys)
    (panel,) = [panel for panel in figures[0].axes if panel.get_title() == "a"]
    lines = {line.get_label(): line for line in panel.lines}
    heights = {name: np.asarray(lines[name].get_ydata()).tolist() for name in ("known", "release")}
    assert heights == {"known": [0.25, 0.25], "release": [0.75, 0.75]}
    assert np.asarray(lines["known"].get_xdata()).tolist() == [0, 1]  # of the panel's width: from edge to edge


def arrived(world: DagsterWorld, key: str) -> Any:
    from eval_platform.store import arrivals

    found = arrivals.newest(world.store, key)
    assert found is not None
    return found


@pytest.mark.dagster
def test_a_folder_of_checkpoints_is_no_reference(world: DagsterWorld) -> None:
    drop(world, world.folder / "elsewhere" / "known" / "step_1")
    result = world.tick("new_checkpoints")
    assert "must be the checkpoint itself" in result.skip_reason.skip_message


def test_without_references_the_picture_is_as_it_was() -> None:
    board = pa.table({"key": ["k"], "task": ["t"], "value": [1.0], "chat": [False]})
    assert report.reference_lines(board, {}) == {}
    assert report.reference_lines(board, {"k": "name"}) == {"t": [("name", 1.0)]}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('name = "x"', "x' must have a path, or the key"),
        ('name = "x"\npath = "p"\nkey = "k"', "not both"),
        ('name = "x"\npath = "hf://org/model"', "must name one revision"),
        ('name = "checkpoints"\npath = "p"', "references: checkpoints is called so already"),
        ('name = "x"\npath = "p"\n[[references]]\nname = "x"\nkey = "k"', "references: x is called so already"),
        ('name = "x"\nkey = "k"\n[[references]]\nname = "y"\nkey = "k"', "references: two of them are the same key"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "eval_platform.toml").write_text(f"[[references]]\n{text}\n")
    with pytest.raises(ConfigError, match=said):
        load_config(tmp_path / "eval_platform.toml")


def test_doctor_tells_of_a_key_that_cannot_arrive(tmp_path: Path) -> None:
    pinned = (Reference(name="x", key="rnus/a"), Reference(name="y", key="checkpoints/a"))
    config = Config(folder=tmp_path, references=pinned)
    assert [(one.what, one.ok) for one in doctor._references(config)] == [("reference x", False)]


def test_a_revision_on_the_hub_is_known_by_its_name() -> None:
    assert Reference(name="pythia", path="hf://org/model@step=1").known_as == "pythia/step=3D1"
    assert Reference(name="gpt", key="served/gpt").known_as == "served/gpt"
