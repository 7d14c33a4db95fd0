"""The op with a real worker on tiny checkpoints: what a run shows is what the store holds."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import pytest
from completions_server import MODEL, completions_server
from dagster._core.test_utils import create_run_for_test
from dagster_world import DagsterWorld, write_task
from fault_tools import forked
from tiny_models import make_checkpoint

from assets import results
from eval_platform.checkpoints import locate
from eval_platform.store import arrivals, open_store
from eval_platform.tasks import sync_tasks

pytestmark = [pytest.mark.dagster, pytest.mark.slow]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DagsterWorld]:
    folder = tmp_path_factory.mktemp("evaluate")
    with dg.DagsterInstance.local_temp(str(tmp_path_factory.mktemp("home"))) as instance:
        one = DagsterWorld(folder, instance, '[tasks]\nfolders = ["tasks"]\n')
        (folder / "tasks").mkdir()
        for name in ("larger", "smaller.than"):
            write_task(folder / "tasks", name)
        make_checkpoint(one.checkpoints / "a" / "step_1", seed=1)
        sync(one)
        control = folder / "control"
        control.mkdir()
        with forked(SimpleNamespace(control=control)):  # type: ignore[arg-type]
            yield one


def sync(world: DagsterWorld) -> None:
    assert not sync_tasks(world.config.tasks, open_store(world.config.results), world.config.lock_path).errors
    world.reload()


def arrive(world: DagsterWorld, name: str) -> str:
    found = locate(world.checkpoints / name, world.config.checkpoints, world.config.cache_dir, lambda done, total: None)
    arrival, _ = arrivals.register(world.store, watcher="w", **asdict(found))
    world.instance.add_dynamic_partitions("checkpoints", [arrival.key])
    return arrival.key


def evaluate(world: DagsterWorld, key: str, *selection: dg.AssetKey, **tags: str) -> Any:
    job = world.definitions().get_job_def("evaluate")
    return job.execute_in_process(
        instance=world.instance,
        partition_key=key,
        tags=tags,
        asset_selection=list(selection) or None,
        raise_on_error=False,
    )


def told(result: Any) -> list[str]:
    """Assets in the order in which the run materialized them."""
    return [event.asset_key.to_user_string() for event in result.get_asset_materialization_events()]


def test_a_run_shows_every_task_and_the_sensor_has_nothing_to_add(world: DagsterWorld) -> None:
    key = arrive(world, "a/step_1")
    result = evaluate(world, key)
    assert result.success
    assert told(result) == ["checkpoint", "results/larger", "results/smaller.than", "summary"]
    assert sorted(e.asset_key.path[-1] for e in result.get_asset_check_evaluations()) == ["larger", "smaller.than"]
    run = world.instance.get_run_by_id(result.run_id)
    assert run is not None
    assert run.tags["eval/arrival"] == f"{key}@1"

    board = world.sql("select task, value, evaluation_id, attempt from leaderboard order by task")
    for row in board:
        shown = world.events(["results", row["task"]], key)[0]
        assert shown.metadata["score"].value == row["value"]
        assert (shown.tags or {})["dagster/data_version"] == f"{row['evaluation_id']}.{row['attempt']}"
    assert len(board) == 2
    assert world.events("summary", key)[0].metadata["published"].value == 2
    mirrored = world.tick("reconciliation")
    assert [event for event in mirrored.asset_events if event.partition] == []
    assert not mirrored.run_requests


def test_one_task_by_hand_without_its_check_moves_the_board_twice_over(world: DagsterWorld) -> None:
    """`results/<task>` alone, its check not selected: `summary` is told all the same, and names every task."""
    key = arrive(world, "a/step_1")
    alone = dg.AssetKey(["results", "larger"])
    before = len(world.events("summary", key))
    subset = (
        world.definitions().get_job_def("evaluate").get_subset(asset_selection={alone}, asset_check_selection=set())
    )
    for n in (1, 2):  # Dagster takes a runless evaluation of a check once only: the second must not fail the run
        result = subset.execute_in_process(instance=world.instance, partition_key=key, raise_on_error=False)
        assert result.success
        assert told(result) == ["results/larger", "summary"]
        assert len(world.events("summary", key)) == before + n
    assert world.events("summary", key)[0].metadata["published"].value == 2
    assert world.check("larger", key)[1] == dg.AssetCheckSeverity.WARN
    assert [event for event in world.tick("reconciliation").asset_events if event.partition] == []


def test_a_run_of_a_superseded_arrival_leaves_the_partition_to_the_newest(world: DagsterWorld) -> None:
    folder = world.checkpoints / "b" / "step_1"
    shutil.copytree(world.checkpoints / "a" / "step_1", folder)
    key = arrive(world, "b/step_1")
    shutil.rmtree(folder)
    make_checkpoint(folder, seed=2)
    assert arrive(world, "b/step_1") == key
    result = evaluate(world, key, **{"eval/arrival": f"{key}@1"})
    # What arrived first is gone; nobody needs to be told, since the newest arrival has a run of its own.
    assert result.success
    assert told(result) == []
    asked = world.tick("reconciliation", apply=False).run_requests
    assert [request.run_key for request in asked] == [f"{key}@2"]


def test_what_nobody_can_evaluate_fails_in_words(world: DagsterWorld) -> None:
    world.instance.add_dynamic_partitions("checkpoints", ["runs/nothing"])
    result = evaluate(world, "runs/nothing")
    assert not result.success
    failure = result.failure_data_for_node("evaluate_checkpoint")
    assert "nothing has arrived under runs/nothing" in failure.user_failure_data.description

    # Deleted before a worker could read it: the error says where all that the worker said lies.
    folder = make_checkpoint(world.checkpoints / "c" / "step_1", seed=4)
    key = arrive(world, "c/step_1")
    shutil.rmtree(folder)
    failure = evaluate(world, key).failure_data_for_node("evaluate_checkpoint")
    assert f"{key}: larger failed" in failure.user_failure_data.description
    log = Path(failure.user_failure_data.metadata["worker's log"].value)
    assert log.name == "worker.log"
    assert log.is_relative_to(world.config.state_dir)
    assert log.exists()

    # A task was edited and synced elsewhere: this lock is older than the results root.
    lock = world.config.lock_path
    before = lock.read_text()
    body = json.loads(before)
    body["tasks"]["larger"]["task_id"] = "0" * 32
    lock.write_text(json.dumps(body))
    try:
        result = evaluate(world, "runs/a/step_1")
        failure = result.failure_data_for_node("evaluate_checkpoint")
        assert "run `eval-platform tasks sync`" in failure.user_failure_data.description
    finally:
        lock.write_text(before)


def test_a_served_model_is_a_partition_like_any_other(world: DagsterWorld) -> None:
    """One that gives log-likelihoods is asked all; of one that does not, `summary` says what is skipped and why."""
    folder = world.checkpoints / "a" / "step_1"
    before = world.file.read_text()
    with completions_server(folder, world.folder / "server") as address:
        for name, chat in (("plain", ""), ("chat", "chat/")):
            provider = "local-chat-completions" if chat else "local-completions"
            said = {"name": name, "provider": provider, "model": MODEL, "as_of": "2026-11-22"}
            said["endpoint"] = f"{address}/v1/{chat}completions"
            lines = [f"{field} = {json.dumps(value)}" for field, value in said.items()]
            more = ["[served.arguments]", f"tokenizer = {json.dumps(str(folder))}"] if not chat else []
            world.file.write_text("\n".join([world.file.read_text(), "[[served]]", *lines, *more]))
        try:
            world.reload()
            assert len(world.tick("new_checkpoints").run_requests) >= 2
            asked = evaluate(world, "served/plain")
            nothing = evaluate(world, "served/chat")
        finally:
            world.file.write_text(before)
            world.reload()
    assert asked.success
    assert told(asked) == ["checkpoint", "results/larger", "results/smaller.than", "summary"]
    shown = world.events("checkpoint", "served/plain")[0].metadata
    assert shown["endpoint"].value == f"{address}/v1/completions"
    assert shown["model"].value == MODEL
    board = world.sql("select task from leaderboard where kind = 'served' order by task")
    assert [row["task"] for row in board] == ["larger", "smaller.than"]
    assert nothing.success
    assert told(nothing) == ["summary"]
    tasks = str(world.events("summary", "served/chat")[0].metadata["tasks"].value)
    assert tasks.count("skipped") == 2
    assert "multiple_choice needs log-likelihoods, which local-chat-completions does not give" in tasks


def test_who_else_wants_a_worker_is_counted_and_nobody_else() -> None:
    """Of it depends whether a checkpoint may have a second worker."""
    with dg.DagsterInstance.ephemeral() as instance:
        runs = [
            create_run_for_test(instance, status=status, tags=tags)
            for status, tags in [
                (dg.DagsterRunStatus.STARTED, results.EVALUATES),
                (dg.DagsterRunStatus.STARTING, results.EVALUATES),
                (dg.DagsterRunStatus.NOT_STARTED, results.EVALUATES),
                (dg.DagsterRunStatus.SUCCESS, results.EVALUATES),
                (dg.DagsterRunStatus.STARTED, {}),
            ]
        ]
        found = [results._others(SimpleNamespace(instance=instance, run_id=run.run_id)) for run in runs]  # type: ignore[arg-type]
    assert found == [2, 2, 2, 3, 3]
