"""Which event logs of runs go, and what the UI shows afterwards: all that it showed before."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster._core.event_api import PartitionKeyFilter
from dagster_world import dagster_world

from assets.maintenance import RunLogsConfig, forget_old_runs, run_logs
from assets.old_runs import REMOVED_TAG, old_runs, remove_log
from eval_platform.instance import instance_text

pytestmark = pytest.mark.dagster

keys = dg.DynamicPartitionsDefinition(name="keys")
CHECK = dg.AssetCheckKey(dg.AssetKey("a"), "gate")


@dg.multi_asset(
    specs=[dg.AssetSpec(name, partitions_def=keys) for name in "ab"],
    check_specs=[dg.AssetCheckSpec("gate", asset="a", partitions_def=keys)],
    can_subset=True,
)
def answers(context: dg.AssetExecutionContext) -> Iterator[Any]:
    if context.run.tags.get("fail"):
        raise dg.Failure("as asked", allow_retries=False)
    for key in sorted(context.selected_asset_keys):
        yield dg.MaterializeResult(asset_key=key, metadata={"run": context.run_id})
    if CHECK in context.selected_asset_check_keys:
        yield dg.AssetCheckResult(asset_key="a", check_name="gate", passed=True)


@dg.asset
def board(context: dg.AssetExecutionContext) -> None:
    pass


def story(instance: dg.DagsterInstance) -> dict[str, str]:
    """Name -> run id, in this order."""

    def run(partition: str | None, select: str, **tags: str) -> str:
        done = dg.materialize(
            [answers, board],
            instance=instance,
            partition_key=partition,
            selection=list(select) if partition else [select],
            tags=tags,
            raise_on_error=False,
        )
        assert done.success == ("fail" not in tags)
        return done.run_id

    instance.add_dynamic_partitions("keys", ["one", "two"])
    return {
        "has the newest b": run("one", "ab"),
        "superseded": run("one", "a"),
        "newest of one": run("one", "a"),
        "failed before": run("two", "ab", fail="yes"),
        "newest of two": run("two", "ab"),
        "board before": run(None, "board"),
        "newest board": run(None, "board"),
    }


def shown(instance: dg.DagsterInstance) -> Any:
    """What the UI has of assets, partitions and checks."""
    newest = {}
    for asset, partition in [("a", "one"), ("b", "one"), ("a", "two"), ("b", "two"), ("board", None)]:
        where = dg.AssetRecordsFilter(dg.AssetKey(asset), asset_partitions=[partition] if partition else None)
        record = instance.fetch_materializations(where, limit=1).records[0]
        newest[asset, partition] = record.run_id, record.storage_id
    checks = {
        partition: instance.event_log_storage.get_latest_asset_check_execution_by_key(
            [CHECK], partition_filter=PartitionKeyFilter(key=partition)
        )[CHECK].status
        for partition in ("one", "two")
    }
    partitions = {asset: instance.get_materialized_partitions(dg.AssetKey(asset)) for asset in "ab"}
    return newest, checks, partitions


def look(instance: dg.DagsterInstance, config: RunLogsConfig) -> dict[str, Any]:
    done = dg.materialize([run_logs], instance=instance, run_config=dg.RunConfig(ops={"run_logs": config}))
    (event,) = done.get_asset_materialization_events()
    return {name: entry.value for name, entry in event.materialization.metadata.items()}


def check_old_runs(instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole story on one instance, of SQLite or PostgreSQL."""
    runs = story(instance)
    going = [runs[name] for name in ("board before", "failed before", "superseded")]  # newest first
    before = shown(instance)

    # Nothing of today is old. What is looked at only is left as it is.
    assert look(instance, RunLogsConfig(keep_days=1, remove=True))["removed"] == 0
    monkeypatch.setattr("assets.maintenance.old_runs", lambda instance, _: old_runs(instance, keep_days=0))
    found = look(instance, RunLogsConfig())
    assert found["would be removed"] == len(going)
    assert all(run_id in found["runs"] for run_id in going)
    assert all(instance.all_logs(run_id) for run_id in runs.values())
    assert old_runs(instance, keep_days=0).may_go[-3:] == going

    found = look(instance, RunLogsConfig(remove=True))
    assert found["removed"] == len(going) + 1  # the first look's own, which the second has superseded
    assert found["kept: newest of their partition"] == 2
    assert found["kept: shown in the UI"] >= 2  # the newest b, the newest board
    assert shown(instance) == before
    for name, run_id in runs.items():
        run = instance.get_run_by_id(run_id)
        assert run is not None  # its tags say what was asked: the sensors need them
        assert (REMOVED_TAG in run.tags) == (run_id in going), name
        assert bool(instance.all_logs(run_id)) == (run_id not in going), name
    again = old_runs(instance, keep_days=0)
    assert not set(again.may_go) & set(runs.values())
    assert again.gone_before == len(going) + 1


def test_old_runs_go_and_what_is_shown_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with dagster_world(tmp_path) as world:
        check_old_runs(world.instance, monkeypatch)


def test_files_of_one_box_shrink_and_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "dagster.yaml").write_text(instance_text(1, postgres=False))
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        run_id = dg.materialize([board], instance=instance).run_id
        (file,) = Path(instance.root_directory, "history", "runs").glob(f"{run_id}.db")
        before = file.stat().st_size
        assert remove_log(instance, run_id) == before - file.stat().st_size > before / 2
        assert instance.all_logs(run_id) == []  # as a server that has shown it before sees it
        with dg.DagsterInstance.from_config(str(tmp_path)) as other:
            assert other.all_logs(run_id) == []  # and one that has not
            assert remove_log(other, run_id) == 0  # twice, or two at once: nothing more
            assert other.run_monitoring_enabled


def test_the_schedule_removes() -> None:
    with dg.build_schedule_context() as context:
        asked = forget_old_runs.evaluate_tick(context).run_requests
    assert asked is not None
    assert asked[0].run_config["ops"]["run_logs"]["config"] == {"keep_days": 90, "remove": True}
