"""A folder becomes an arrival, a partition and a run in one tick; nothing is lost when the tick is cut off."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoint_factory import make_checkpoint
from dagster_world import DagsterWorld, dagster_world

from eval_platform.store import arrivals, create_record, layout
from sensors.arrivals import _sweep, _swept_to

pytestmark = pytest.mark.dagster


@pytest.fixture
def world(tmp_path: Path) -> Iterator[DagsterWorld]:
    with dagster_world(tmp_path, "[sensor]\nnew_per_tick = 3\nsweep_per_tick = 1\n") as one:
        one.lock(a="a1", b="b1")
        yield one


def drop(world: DagsterWorld, name: str, seed: int = 0) -> Path:
    """A checkpoint that arrives as a whole."""
    aside = make_checkpoint(world.folder / "aside", seed=seed)
    target = world.checkpoints / name
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        shutil.rmtree(target)
    os.rename(aside, target)
    return target


def keys(result: Any) -> list[str]:
    return [request.run_key for request in result.run_requests or ()]


def until_asked(world: DagsterWorld, ticks: int = 6) -> list[str]:
    """A known folder must come round in the sweep."""
    for _ in range(ticks):
        if found := keys(world.tick("new_checkpoints")):
            return found
    return []


def test_one_arrival_one_run(world: DagsterWorld) -> None:
    drop(world, "a/step_10")
    (request,) = world.tick("new_checkpoints").run_requests
    assert request.run_key == "runs/a/step_10@1"
    assert request.partition_key == "runs/a/step_10"
    assert request.asset_selection is None
    assert json.loads(request.tags["eval/tasks"]) == ["a", "b"]
    assert request.tags["eval/kind"] == "evaluate"
    assert int(request.tags["dagster/priority"]) > 1_700_000_000
    assert world.partitions() == {"runs/a/step_10"}
    assert len(list((world.config.cache_dir / "held").iterdir())) == 1
    for _ in range(3):
        assert keys(world.tick("new_checkpoints")) == []


def test_a_tick_that_is_cut_off_loses_nothing(world: DagsterWorld) -> None:
    """Registered in the store, and the daemon dies before it stores partition, run or cursor."""
    drop(world, "a/step_10")
    assert keys(world.tick("new_checkpoints", apply=False)) == ["runs/a/step_10@1"]
    assert arrivals.numbers(world.store) == {"runs/a/step_10": 1}
    assert world.runs() == []
    world.reload()
    assert keys(world.tick("new_checkpoints")) == ["runs/a/step_10@1"]
    assert keys(world.tick("new_checkpoints")) == []


def test_a_known_key_with_other_content_arrives_again(world: DagsterWorld) -> None:
    for name in ("a/step_1", "a/step_2", "a/step_3"):
        drop(world, name)
        until_asked(world)
    drop(world, "a/step_2", seed=7)
    assert until_asked(world, ticks=4) == ["runs/a/step_2@2"]
    assert until_asked(world, ticks=4) == []


def test_a_known_keys_arrival_that_was_cut_off_is_repaired(world: DagsterWorld) -> None:
    """The sweep sees no difference any more once the arrival is numbered: the other sensor asks for its run."""
    drop(world, "a/step_3")
    assert until_asked(world) == ["runs/a/step_3@1"]
    world.end(world.runs()[0])
    drop(world, "a/step_3", seed=8)
    assert keys(world.tick("new_checkpoints", apply=False)) == ["runs/a/step_3@2"]
    world.reload()
    assert until_asked(world, ticks=3) == []
    assert keys(world.tick("reconciliation")) == ["runs/a/step_3@2"]


def test_runs_take_turns_and_the_newest_step_comes_first(world: DagsterWorld) -> None:
    for step in (1, 2, 3, 4):
        drop(world, f"a/step_{step}", seed=step)
    drop(world, "b/step_1", seed=9)
    assert until_asked(world) == ["runs/a/step_4@1", "runs/b/step_1@1", "runs/a/step_3@1"]
    assert until_asked(world) == ["runs/a/step_2@1", "runs/a/step_1@1"]


def test_says_what_waits_and_why(world: DagsterWorld) -> None:
    folder = drop(world, "a/step_1")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-8])
    result = world.tick("new_checkpoints")
    assert "runs/a/step_1 waits" in result.skip_reason.skip_message
    assert "model.safetensors" in json.loads(result.cursor)["waiting"][0]


def test_without_tasks_nothing_is_taken_and_the_remedy_is_said(tmp_path: Path) -> None:
    with dagster_world(tmp_path) as world:
        drop(world, "a/step_1")
        for sensor in ("new_checkpoints", "reconciliation"):
            assert "eval-platform tasks sync" in world.tick(sensor).skip_message
        assert arrivals.keys(world.store) == []
        world.lock(a="a1")
        assert until_asked(world) == ["runs/a/step_1@1"]


SERVED = """
[[served]]
name = "api"
provider = "local-chat-completions"
model = "m"
endpoint = "http://127.0.0.1:9/v1/chat/completions"
as_of = "2026-11-21"
"""


def test_a_served_model_arrives_once_for_every_day_it_is_of(tmp_path: Path) -> None:
    """Of the configuration alone: nothing listens on its port. What it cannot be asked is owed by nobody."""
    with dagster_world(tmp_path, SERVED) as world:
        world.lock(a="a1", b="b1")
        for task_id, kind in (("a1", "multiple_choice"), ("b1", "generate_until")):
            create_record(world.store, layout.task(task_id), {"definition": {"output_type": kind}})
        assert keys(world.tick("new_checkpoints")) == ["served/api@1"]
        assert world.partitions() == {"served/api"}
        assert keys(world.tick("new_checkpoints")) == []
        world.file.write_text(world.file.read_text().replace("11-21", "11-22"))
        assert keys(world.tick("new_checkpoints", apply=False)) == ["served/api@2"]
        world.reload()
        assert keys(world.tick("reconciliation")) == []  # the run of the day before is still going on
        for run in world.runs():
            world.instance.delete_run(run.run_id)
        (request,) = world.tick("reconciliation").run_requests
        assert request.run_key == "served/api@2"
        assert json.loads(request.tags["eval/tasks"]) == ["b"]
        # A model that is configured no more cannot be asked: how stands nowhere else.
        for run in world.runs():
            world.instance.delete_run(run.run_id)
        world.file.write_text(world.file.read_text().partition("[[served]]")[0])
        world.reload()
        assert keys(world.tick("reconciliation")) == []


def test_a_sweep_goes_on_behind_the_last_that_there_was_time_for() -> None:
    keys, position, seen = list("abcdef"), "", []
    for _ in keys:
        sweep = _sweep(keys, position, 4)
        seen.append(sweep[0])
        position = _swept_to(sweep, sweep[1:], position)
    assert seen == keys
    assert _swept_to(["a", "b", "c"], (), "") == "c"
    assert _swept_to(["a", "b", "c"], ["a", "b"], "z") == "z"
