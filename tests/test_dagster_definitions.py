"""What Dagster loads: quickly, without the model's libraries, with tasks and without."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
from dagster_world import DagsterWorld, dagster_world, write_task

from eval_platform import up
from eval_platform.errors import EvalPlatformError
from eval_platform.instance import write_instance

pytestmark = pytest.mark.dagster

HEAVY = ["torch", "transformers", "great_expectations", "pandas", "matplotlib", "scipy", "duckdb", "lm_eval"]
LOOK = f"""
import json, sys
from eval_platform.definitions import defs
repository = defs.get_repository_def()
repository.load_all_definitions()
print(json.dumps({{
    "heavy": [name for name in {HEAVY!r} if name in sys.modules],
    "assets": sorted(key.to_user_string() for key in repository.asset_graph.get_all_asset_keys()),
    "sensors": sorted(sensor.name for sensor in repository.sensor_defs),
}}))
"""


def loaded(folder: Path) -> dict[str, list[str]]:
    """What a code server sees: the module alone, in a process of its own."""
    env = {**os.environ, "EVAL_PLATFORM_CONFIG": str(folder / "eval_platform.toml"), "DAGSTER_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-W", "ignore", "-c", LOOK]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def world(tmp_path: Path) -> Iterator[DagsterWorld]:
    with dagster_world(tmp_path) as one:
        yield one


def test_loads_without_tasks_and_with_them_but_never_the_models_libraries(world: DagsterWorld) -> None:
    world.lock(**{"a": "a1", "dotted.name-2": "d1"})
    found = loaded(world.folder)
    assert found["heavy"] == []
    assert found["assets"] == sorted(
        [
            *("checkpoint", "summary", "leaderboard", "learning_curves", "record_bundles", "run_logs"),
            *("results/a", "results/dotted.name-2", "datasets/a", "datasets/dotted.name-2"),
        ]
    )
    assert {"new_checkpoints", "reconciliation", "alerts", "boards_follow"} <= set(found["sensors"])


def test_an_empty_lock_loads_and_says_what_to_do(world: DagsterWorld) -> None:
    graph = world.definitions().get_repository_def().asset_graph
    assert not [key for key in graph.get_all_asset_keys() if key.path[0] == "results"]
    assert "eval-platform tasks sync" in (graph.get(dg.AssetKey("summary")).description or "")


def test_what_a_person_sees_of_a_task(world: DagsterWorld) -> None:
    world.lock(a="a1", b="b1")
    graph = world.definitions().get_repository_def().asset_graph
    node = graph.get(dg.AssetKey(["results", "a"]))
    assert node.parent_keys == {dg.AssetKey("checkpoint"), dg.AssetKey(["datasets", "a"])}
    assert node.group_name == "results"
    assert node.kinds >= {"torch", "parquet"}
    assert node.owners == ["team:evaluation"]
    assert "About it." in (node.description or "")
    assert "dagster/code_references" in node.metadata
    assert {key.name for key in graph.asset_check_keys if key.asset_key == node.key} == {"gate"}
    # Another task_id or other settings: another code version, of this task alone.
    versions = {name: graph.get(dg.AssetKey(["results", name])).code_version for name in "ab"}
    world.lock(a="a2", b="b1")
    graph = world.definitions().get_repository_def().asset_graph
    assert graph.get(dg.AssetKey(["results", "a"])).code_version != versions["a"]
    assert graph.get(dg.AssetKey(["results", "b"])).code_version == versions["b"]


def test_a_broken_task_file_fails_a_check_and_nothing_else(world: DagsterWorld) -> None:
    (world.folder / "tasks").mkdir()
    write_task(world.folder / "tasks", "good")
    world.file.write_text(world.file.read_text() + '[tasks]\nfolders = ["tasks"]\n')

    def check() -> dg.AssetCheckEvaluation:
        job = world.definitions().get_implicit_global_asset_job_def()
        key = dg.AssetCheckKey(dg.AssetKey("leaderboard"), "tasks_valid")
        subset = job.get_subset(asset_selection=set(), asset_check_selection={key})
        return subset.execute_in_process(instance=world.instance).get_asset_check_evaluations()[0]

    assert check().passed
    (world.folder / "tasks" / "bad.yaml").write_text("task: bad\nno_such_key: 1\n")
    found = check()
    assert not found.passed
    assert "bad.yaml" in str(found.metadata["errors"].value)
    assert "no_such_key" in str(found.metadata["errors"].value)


# ------------------------------------------------------------------------------------------------------------- up


def test_up_makes_its_home_and_keeps_it_in_step_with_the_configuration(world: DagsterWorld) -> None:
    write_instance(world.config)
    home = world.config.dagster_home / "dagster.yaml"
    assert "limit: 1}" in home.read_text()
    world.file.write_text(world.file.read_text() + "slots = 3\n")
    write_instance(world.config)
    assert "limit: 3}" in home.read_text()
    home.write_text(home.read_text() + "# mine\n")
    world.file.write_text(world.file.read_text().replace("slots = 3", "slots = 4"))
    write_instance(world.config)
    assert "limit: 3}" in home.read_text()


@pytest.mark.parametrize("blocked", ["state", "state/dagster"])
def test_up_says_where_it_cannot_write(world: DagsterWorld, blocked: str) -> None:
    path = world.folder / blocked
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("in the way")
    with (
        pytest.raises(EvalPlatformError, match=rf"cannot keep Dagster's home.*{path}") as error,
        up.platform(world.config),
    ):
        pass
    assert "EVAL_PLATFORM_STATE" in str(error.value)


def test_up_never_ends_a_stranger_that_has_the_number_now(world: DagsterWorld) -> None:
    """After a restart of the machine, up.json names process numbers that others have."""
    stranger = subprocess.Popen(["sleep", "600"])
    try:
        record = {"host": "h", "machine": "another-boot/pid:[1]", "pid": stranger.pid, "started": 1}
        world.config.state_dir.mkdir(parents=True)
        (world.config.state_dir / "up.json").write_text(
            json.dumps({"url": "http://127.0.0.1:1", "processes": {"daemon": record}})
        )
        assert up.running(world.config) is None
        up._end_leftovers(world.config, lambda text: None)
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()
