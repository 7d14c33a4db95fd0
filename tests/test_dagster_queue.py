"""Tiers, turns and what is passed over, in Dagster: its own queue begins the runs, on the instance that is shipped."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml
from checkpoint_factory import make_checkpoint
from dagster._core.instance import InstanceType
from dagster._core.remote_representation.grpc_server_registry import GrpcServerRegistry
from dagster._core.run_coordinator import QueuedRunCoordinator
from dagster._core.storage.event_log import InMemoryEventLogStorage
from dagster._core.storage.noop_compute_log_manager import NoOpComputeLogManager
from dagster._core.storage.root import TemporaryLocalArtifactStorage
from dagster._core.storage.runs import InMemoryRunStorage
from dagster._core.test_utils import MockedRunLauncher
from dagster._core.workspace.context import WorkspaceProcessContext
from dagster._core.workspace.load_target import EmptyWorkspaceTarget
from dagster._daemon.run_coordinator import QueuedRunCoordinatorDaemon
from dagster._grpc.constants import GrpcServerCommand
from dagster_world import DagsterWorld, dagster_world

from eval_platform.checkpoints import held
from eval_platform.errors import ConfigError
from eval_platform.instance import instance_text
from eval_platform.queueing import BY_HAND
from eval_platform.status import status
from eval_platform.store import arrivals, commits
from eval_platform.tasks import read_lock
from sensors import repairs as repairs_module
from sensors.queue import _waits

pytestmark = pytest.mark.dagster

TIERS = """
[[queue.tiers]]
name = "quick"
tasks = ["a"]
[[queue.tiers]]
name = "full"
tasks = ["a", "b"]
every = 2
last = true
"""
QUEUED = dg.DagsterRunStatus.QUEUED


@pytest.fixture(scope="module")
def instance() -> Iterator[dg.DagsterInstance]:
    """As `eval-platform up` configures it, one slot; in memory, and a run that is begun only stays so until it is
    ended by the test."""
    shipped = instance_text(1, postgres=False)
    with dg.DagsterInstance(
        instance_type=InstanceType.EPHEMERAL,
        local_artifact_storage=TemporaryLocalArtifactStorage(),
        run_storage=InMemoryRunStorage(),
        event_storage=InMemoryEventLogStorage(),
        compute_log_manager=NoOpComputeLogManager(),
        run_coordinator=QueuedRunCoordinator(),
        run_launcher=MockedRunLauncher(),
        settings=yaml.safe_load(shipped),
    ) as one:
        yield one


@pytest.fixture
def queue(instance: dg.DagsterInstance, tmp_path: Path) -> Iterator["Queue"]:
    servers = GrpcServerRegistry(None, GrpcServerCommand.API_GRPC, 30, 30, wait_for_processes_on_shutdown=False)
    with servers, WorkspaceProcessContext(instance, EmptyWorkspaceTarget(), grpc_server_registry=servers) as workspace:
        yield Queue(DagsterWorld(tmp_path, instance), workspace)
    instance.run_storage.wipe()
    instance.event_log_storage.wipe()


class Queue:
    """A world whose runs wait in Dagster's queue, and Dagster's own loop that begins them."""

    def __init__(self, world: DagsterWorld, workspace: Any) -> None:
        self.world, self.workspace = world, workspace
        self.daemon = QueuedRunCoordinatorDaemon(interval_seconds=1)

    def configure(self, text: str, **tasks: str) -> None:
        self.world.file.write_text(self.world.file.read_text() + text)
        self.world.lock(**tasks or {"a": "a1", "b": "b1"})

    def drop(self, *names: str) -> list[str]:
        """Checkpoints arrive, and the sensor ticks: what it asked for."""
        for name in names:
            aside = make_checkpoint(self.world.folder / "aside", seed=len(list(self.world.checkpoints.rglob("step*"))))
            (self.world.checkpoints / name).parent.mkdir(exist_ok=True)
            os.rename(aside, self.world.checkpoints / name)
        return self.tick("new_checkpoints")

    def tick(self, sensor: str) -> list[str]:
        result = self.world.tick(sensor, apply=False)
        requests, result = list(result.run_requests or ()), result
        self.world.cursors[sensor] = result.cursor
        for request in result.dynamic_partitions_requests or ():
            self.world.instance.add_dynamic_partitions("checkpoints", list(request.partition_keys))
        for request in requests:
            self.world.run(request, QUEUED)
        return [str(request.run_key).removeprefix("runs/") for request in requests]

    def begin(self) -> str | None:
        """What Dagster begins next, if anything: arrival and tier."""
        before = {run.run_id for run in self.world.instance.run_launcher.queue()}  # type: ignore[attr-defined]
        list(self.daemon.run_iteration(self.workspace))
        begun = [r for r in self.world.instance.run_launcher.queue() if r.run_id not in before]  # type: ignore[attr-defined]
        assert len(begun) <= 1, "one slot, one run"
        for run in begun:
            started = dg.DagsterEvent(dg.DagsterEventType.RUN_START.value, run.job_name, message="by the test")
            self.world.instance.report_dagster_event(started, run.run_id)
            self.at_work = run
            return f"{run.tags['eval/arrival'].removeprefix('runs/')}+{run.tags.get('eval/tier')}"
        return None

    def end(self) -> None:
        self.world.end(self.at_work, dg.DagsterRunStatus.SUCCESS)

    def drain(self) -> list[str]:
        found: list[str] = []
        while (one := self.begin()) is not None:
            found.append(one)
            self.end()
        return found


def test_dagsters_queue_begins_them_in_the_order_that_is_promised(queue: Queue) -> None:
    queue.configure(TIERS)
    assert len(queue.drop("a/step_1", "a/step_2", "a/step_3", "b/step_1")) == 4
    assert queue.begin() == "a/step_3@1+quick"
    assert queue.begin() is None  # one slot
    # What arrives meanwhile changes the places of what waits: newest first, the runs in turn.
    queue.drop("b/step_2", "c/step_1")
    assert queue.tick("reconciliation") == ["a/step_2@1+full", "b/step_2@1+full"]
    queue.end()
    begun = [queue.begin()]
    queue.drop("a/step_4")
    queue.end()
    assert [*begun, *queue.drain()] == [
        *("b/step_2@1+quick", "c/step_1@1+quick", "a/step_4@1+quick", "b/step_1@1+quick", "a/step_2@1+quick"),
        "a/step_1@1+quick",
        *("a/step_2@1+full", "b/step_2@1+full"),
    ]
    # Each asked its own tier's tasks, of the same partition.
    of = {(run.tags["eval/tier"], run.tags["eval/tasks"]) for run in queue.world.runs("runs/a/step_2")}
    assert of == {("quick", '["a"]'), ("full", '["b"]')}
    # Every second, and nobody has said that any was the last.
    assert queue.tick("reconciliation") == ["a/step_4@1+full"]


def test_a_runs_last_checkpoint_is_asked_everything(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    queue.configure("[queue]\nidle_minutes = 1e-9\n" + TIERS.replace("every = 2\n", ""))
    queue.drop("a/step_1", "a/step_2", "b/step_1")
    assert sorted(queue.tick("reconciliation")) == ["a/step_2@1+full", "b/step_1@1+full"]
    # It went on after all: then its last is another.
    queue.drop("a/step_3")
    assert queue.tick("reconciliation") == ["a/step_3@1+full"]
    assert queue.tick("reconciliation") == []
    # A crash took the run of the first tier: that one of a later tier is there does not hide it.
    full, quick = queue.world.runs("runs/a/step_3")
    queue.world.instance.delete_run(quick.run_id)
    queue.world.end(full, dg.DagsterRunStatus.SUCCESS)
    monkeypatch.setattr(repairs_module, "FIRST_REPAIR_SECONDS", 0.0)
    assert sorted(queue.tick("reconciliation")) == ["a/step_3@1+full#1", "a/step_3@1+quick#1"]


def test_what_is_passed_over_is_recorded_and_has_its_turn_when_nothing_waits(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repairs_module, "FIRST_REPAIR_SECONDS", 0.0)
    queue.configure("[queue]\nskip_superseded_beyond = 2\n", a="a1")
    world = queue.world
    assert sorted(queue.drop("a/step_1", "a/step_2", "a/step_3", "b/step_1")) == ["a/step_3@1", "b/step_1@1"]
    assert world.partitions() == {*(f"runs/a/step_{n}" for n in (1, 2, 3)), "runs/b/step_1"}
    # One that waits in Dagster's queue already is taken off it; a run's newest never is, however far behind.
    assert sorted(queue.drop("a/step_4", "c/step_1")) == ["a/step_4@1", "c/step_1@1"]
    assert [run.status for run in world.runs("runs/a/step_3")] == [dg.DagsterRunStatus.CANCELED]
    told = {one.key: one for one in status(world.config, world.store, read_lock(world.config.lock_path))}
    assert {key.removeprefix("runs/"): one.state for key, one in told.items()} == {
        **dict.fromkeys(("a/step_1", "a/step_2", "a/step_3"), "skipped"),
        **dict.fromkeys(("a/step_4", "b/step_1", "c/step_1"), "queued"),
    }
    assert "step 4" in told["runs/a/step_3"].reason
    # While others wait nothing is taken up, and what is passed over is held no more: its disk space is the trainer's.
    assert queue.tick("reconciliation") == []
    assert len(list((world.config.cache_dir / "held").iterdir())) == 3
    assert [one.partition("+")[0] for one in queue.drain()] == ["a/step_4@1", "b/step_1@1", "c/step_1@1"]
    for key, checkpoint in (("a/step_4", "A4"), ("b/step_1", "B1"), ("c/step_1", "C1")):
        evaluated(world, key, checkpoint)
    # Nothing waits: one at a time, as there is one slot, the newest first; not what its trainer has deleted.
    shutil.rmtree(world.checkpoints / "a" / "step_2")
    assert queue.tick("reconciliation") == ["a/step_3@1+gap#1"]
    queue.drain()
    evaluated(world, "a/step_3", "A3")
    assert queue.tick("reconciliation") == ["a/step_1@1+gap#0"]
    # Somebody cancels it by hand: that is meant.
    world.end(world.runs("runs/a/step_1")[0], dg.DagsterRunStatus.CANCELED)
    assert queue.tick("reconciliation") == []
    rows = world.sql("select key, n, step, tier, tasks, reason from skipped order by step, time")
    assert [(row["key"], row["n"], row["tasks"]) for row in rows] == [
        *[("runs/a/step_1", 1, ["a"])] * 2,
        ("runs/a/step_2", 1, ["a"]),
    ]
    assert "more than 2 were waiting" in rows[0]["reason"]
    assert "cancelled in Dagster" in rows[1]["reason"]
    told = {one.key: one for one in status(world.config, world.store, read_lock(world.config.lock_path))}
    assert (told["runs/a/step_1"].state, told["runs/a/step_2"].state) == ("missing", "skipped")


def evaluated(world: DagsterWorld, key: str, checkpoint_id: str, tasks: str = "a") -> None:
    arrival = arrivals.newest(world.store, f"runs/{key}")
    assert arrival is not None
    world.identify(arrival, checkpoint_id)
    for task in tasks:
        world.publish(checkpoint_id, task, f"{task}1", key=arrival.key)


def test_a_task_that_is_added_is_asked_where_its_tier_was_and_last_of_all(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repairs_module, "FIRST_REPAIR_SECONDS", 0.0)
    queue.configure('[tasks]\non_task_change = "backfill"\n' + TIERS)
    queue.drop("a/step_1", "a/step_2")
    queue.drain()
    evaluated(queue.world, "a/step_1", "A1")
    evaluated(queue.world, "a/step_2", "A2", "ab")
    queue.world.file.write_text(queue.world.file.read_text().replace('["a", "b"]', '["a", "b", "c"]'))
    queue.world.lock(a="a1", b="b1", c="c1")
    (row,) = queue.world.sql("select evaluation_id from evaluations where key = 'runs/a/step_1'")
    commits.open_rerun(queue.world.store, row["evaluation_id"], "me", "why")
    by_hand = f"a/step_1@1#rerun-{row['evaluation_id']}-2#0"
    assert sorted(queue.tick("reconciliation")) == [by_hand, "a/step_2@1+full+gap#1"]
    # A person is served first; what comes newly goes before what fills a gap.
    queue.drop("b/step_1")
    assert queue.drain() == ["a/step_1@1+None", "b/step_1@1+quick", "a/step_2@1+full"]


def test_a_task_that_is_added_and_passed_over_has_its_turn(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    """That the tier's first run has ended says nothing of a task which came later."""
    monkeypatch.setattr(repairs_module, "FIRST_REPAIR_SECONDS", 0.0)
    queue.configure('[tasks]\non_task_change = "backfill"\n[queue]\nskip_superseded_beyond = 1\n', a="a1")
    for step in (1, 2):
        queue.drop(f"a/step_{step}")
        queue.drain()
        evaluated(queue.world, f"a/step_{step}", f"A{step}")
    queue.world.lock(a="a1", c="c1")
    assert [one.partition("+")[0] for one in queue.tick("reconciliation")] == ["a/step_2@1"]
    queue.drain()
    evaluated(queue.world, "a/step_2", "A2", "c")
    assert [one.partition("+")[0] for one in queue.tick("reconciliation")] == ["a/step_1@1"]


def test_tiers_that_share_tasks_hide_nothing_of_one_another(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repairs_module, "FIRST_REPAIR_SECONDS", 0.0)
    tiers = '[[queue.tiers]]\nname = "mid"\ntasks = ["a"]\nevery = 2\n[[queue.tiers]]\nname = "full"\nlast = true\n'
    queue.configure("[queue]\nidle_minutes = 1e9\n" + tiers)
    queue.drop("a/step_1", "a/step_2")
    assert queue.tick("reconciliation") == ["a/step_2@1+mid"]
    queue.drain()
    evaluated(queue.world, "a/step_2", "A2")
    assert queue.tick("reconciliation") == []
    assert len(held(queue.world.config.cache_dir)) == 1  # of the run's newest, for the tier of the last
    queue.world.file.write_text(queue.world.file.read_text().replace("1e9", "1e-9"))
    assert queue.tick("reconciliation") == ["a/step_2@1+full"]
    assert json.loads(queue.world.runs("runs/a/step_2")[0].tags["eval/tasks"]) == ["b"]
    # A person does not wait until that has had its turn.
    (row,) = queue.world.sql("select evaluation_id from evaluations where task = 'a'")
    commits.open_rerun(queue.world.store, row["evaluation_id"], "me", "why")
    assert queue.tick("reconciliation") == [f"a/step_2@1#rerun-{row['evaluation_id']}-2#0"]
    queue.drain()
    evaluated(queue.world, "a/step_2", "A2", "b")
    queue.tick("reconciliation")
    assert not held(queue.world.config.cache_dir)  # nothing is left to ask: its disk space is the trainer's


def test_what_a_person_executes_again_is_not_passed_over() -> None:
    tags = {"eval/arrival": "runs/a/step_1@1", "eval/run": "runs/a", "eval/tier": "quick", "eval/place": "1"}
    again = {**tags, "dagster/parent_run_id": "x"}
    assert (_waits("1", tags).place, _waits("1", tags).tier) == (1, "quick")
    assert (_waits("1", again).place, _waits("1", again).tier) == (BY_HAND, None)
    by_dagster = {**again, "dagster/retry_number": "1"}  # after a crash
    assert (_waits("1", by_dagster).place, _waits("1", by_dagster).tier) == (1, "quick")


def test_without_the_section_nothing_is_other_than_before(tmp_path: Path) -> None:
    with dagster_world(tmp_path) as world:
        world.lock(a="a1", b="b1")
        os.rename(make_checkpoint(tmp_path / "aside"), world.checkpoints / "step_1")
        (request,) = world.tick("new_checkpoints").run_requests
        arrival = arrivals.newest(world.store, "runs/step_1")
        assert arrival is not None
        assert request.run_key == "runs/step_1@1"
        assert request.asset_selection is None
        shown = {name: value for name, value in request.tags.items() if name.startswith(("eval/", "dagster/prio"))}
        assert shown.pop("dagster/priority").isdecimal()
        assert shown == {
            "eval/arrival": "runs/step_1@1",
            "eval/tasks": json.dumps(["a", "b"]),
            "eval/run": arrival.run,
            "eval/kind": "evaluate",
        }
        # A field that cannot be meant stops the sensors, which say which.
        world.file.write_text(world.file.read_text() + '[[queue.tiers]]\nname = "t"\ntasks = ["nosuch"]\n')
        with pytest.raises(ConfigError, match=r"queue\.tiers\.0 \(tier t\): no task named nosuch"):
            world.tick("new_checkpoints")
