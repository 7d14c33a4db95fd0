"""Dagster shows what the results root holds, whoever did it, and asks for what is owed."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster_world import DagsterWorld, dagster_world
from warehouse_world import commit_record

from eval_platform.checkpoints import hold
from eval_platform.status import status as status_of
from eval_platform.store import arrivals, commits, layout, log, tries
from eval_platform.tasks import read_lock
from resources.warehouse import WarehouseResource
from sensors import repairs as repairs_module
from sensors.arrivals import run_request

pytestmark = pytest.mark.dagster

FAILURE, SUCCESS, CANCELED = dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.CANCELED


@pytest.fixture
def world(tmp_path: Path) -> Iterator[DagsterWorld]:
    with dagster_world(tmp_path) as one:
        one.lock(a="a1", b="b1")
        yield one


@pytest.fixture
def no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repairs_module, "FIRST_REPAIR_SECONDS", 0.0)


def requested(result: Any) -> list[tuple[str, str | None, frozenset[str] | None]]:
    """(run_key, partition, selected results) of each requested run."""
    return [
        (
            request.run_key,
            request.partition_key,
            frozenset(key.path[-1] for key in request.asset_selection if key.path[0] == "results")
            if request.asset_selection
            else None,
        )
        for request in result.run_requests or ()
    ]


def told(result: Any) -> list[tuple[str, ...]]:
    """(kind, asset, partition) of each event about a checkpoint."""
    return [
        (type(event).__name__, event.asset_key.to_user_string(), event.partition)
        for event in result.asset_events
        if event.partition is not None
    ]


def ask(world: DagsterWorld, key: str, status: dg.DagsterRunStatus | None, **tags: str) -> dg.DagsterRun:
    """A run for the key's newest arrival, on all tasks of the lock; ended as `status`, or queued."""
    lock = read_lock(world.config.lock_path)
    arrival = arrivals.newest(world.store, key)
    assert arrival is not None
    world.instance.add_dynamic_partitions("checkpoints", [key])
    run = world.run(run_request(arrival, lock, lock.tasks), tags=tags)
    assert run is not None
    if status is not None:
        world.end(run, status)
    return run


# ------------------------------------------------------------------------------------------------------- mirroring


def test_mirrors_what_the_command_line_evaluated(world: DagsterWorld) -> None:
    world.arrive("adhoc/x", "C", step=7)
    evaluation = world.publish("C", "a", "a1", 0.75)
    held = world.commit("C", "b", "b1", None)
    world.decide(held, "held")

    first = world.tick("reconciliation")
    assert told(first) == [
        ("AssetMaterialization", "checkpoint", "adhoc/x"),
        ("AssetMaterialization", "results/a", "adhoc/x"),
        ("AssetMaterialization", "results/b", "adhoc/x"),
        ("AssetMaterialization", "summary", "adhoc/x"),
    ]
    assert world.partitions() == {"adhoc/x"}
    shown = world.events(["results", "a"], "adhoc/x")[0]
    assert shown.metadata["score"].value == 0.75
    assert (shown.tags or {})["dagster/data_version"] == f"{evaluation}.1"
    # Published with a warning, and held: WARN and ERROR.
    assert world.check("a", "adhoc/x") == (False, dg.AssetCheckSeverity.WARN)
    assert world.check("b", "adhoc/x") == (False, dg.AssetCheckSeverity.ERROR)
    summary = world.events("summary", "adhoc/x")[0]
    assert (summary.metadata["published"].value, summary.metadata["held"].value) == (1, 1)
    assert "a NaN" in str(summary.metadata["tasks"].value)

    # The same sensor, one that was restarted, and one on a catalog built anew: nothing more to say.
    assert told(world.tick("reconciliation")) == []
    world.reload()
    assert told(world.tick("reconciliation")) == []
    world.catalog.unlink()
    assert told(world.tick("reconciliation")) == []


def test_shows_the_datasets_once(world: DagsterWorld) -> None:
    world.tick("reconciliation")
    assert [(e.tags or {})["dagster/data_version"] for e in world.events(["datasets", "a"])] == ["data-a"]
    world.reload()
    world.tick("reconciliation")
    assert len(world.events(["datasets", "a"])) == 1


def test_a_release_and_a_retraction_are_shown_and_nothing_else_is_repeated(world: DagsterWorld) -> None:
    world.arrive("runs/x", "C")
    world.publish("C", "a", "a1")
    held = world.commit("C", "b", "b1", 0.5)
    world.decide(held, "held")
    world.tick("reconciliation")

    for action, status, passed, severity in (
        ("release", "published", False, dg.AssetCheckSeverity.WARN),
        ("retract", "held", False, dg.AssetCheckSeverity.ERROR),
        ("release", "published", False, dg.AssetCheckSeverity.WARN),
    ):
        world.decide(held, status, action=action)
        result = world.tick("reconciliation")
        assert [one[:2] for one in told(result)] == [
            ("AssetMaterialization", "results/b"),
            ("AssetMaterialization", "summary"),
        ]
        assert world.check("b", "runs/x") == (passed, severity)
        assert world.events(["results", "b"], "runs/x")[0].metadata["status"].value == status


def test_one_result_is_shown_where_two_settings_were_evaluated(world: DagsterWorld) -> None:
    """Two evaluations of one task on one key must not take turns for ever."""
    world.arrive("runs/x", "C")
    world.publish("C", "a", "a1", 0.2)
    later = world.publish("C", "a", "a1", 0.9, settings_id="other", finished_at="2026-03-01T00:00:00.000000Z")
    world.tick("reconciliation")
    assert world.events(["results", "a"], "runs/x")[0].metadata["evaluation_id"].value == later
    assert told(world.tick("reconciliation")) == []


def test_trials_other_tasks_stale_and_undecided_results_are_not_shown(world: DagsterWorld) -> None:
    world.arrive("runs/x", "C")
    world.publish("C", "a", "a1", limit=3)
    world.publish("C", "elsewhere", "e1")
    world.publish("C", "b", "b0")
    world.commit("C", "b", "b1")
    assert told(world.tick("reconciliation")) == []


def test_shows_the_arrival_that_boards_show(world: DagsterWorld) -> None:
    world.arrive("adhoc/x", "A")
    world.publish("A", "a", "a1", 0.1)
    world.arrive("adhoc/x", None)  # the second is not known by content yet
    world.tick("reconciliation")
    assert world.events("checkpoint", "adhoc/x")[0].metadata["arrival"].value == 1
    second = arrivals.newest(world.store, "adhoc/x")
    assert second is not None
    world.identify(second, "B")
    assert told(world.tick("reconciliation")) == []
    world.publish("B", "a", "a1", 0.9)
    world.tick("reconciliation")
    assert world.events(["results", "a"], "adhoc/x")[0].metadata["score"].value == 0.9
    assert world.events("checkpoint", "adhoc/x")[0].metadata["arrival"].value == 2


def test_a_copy_under_another_key_is_shown_there(world: DagsterWorld) -> None:
    world.arrive("runs/x", "C")
    world.arrive("runs/copy", "C")
    world.publish("C", "a", "a1")
    result = world.tick("reconciliation")
    assert {key for kind, asset, key in told(result) if asset == "results/a"} == {"runs/x", "runs/copy"}


def test_leaves_to_a_run_what_it_reports_itself_and_takes_over_when_it_dies(world: DagsterWorld) -> None:
    world.arrive("runs/x", "C")
    run = ask(world, "runs/x", None)
    world.publish("C", "a", "a1")
    assert told(world.tick("reconciliation")) == []
    world.end(run, FAILURE)
    assert ("AssetMaterialization", "results/a", "runs/x") in told(world.tick("reconciliation"))


def test_what_a_crash_cut_off_is_told_the_next_time(world: DagsterWorld) -> None:
    """The daemon dies between two events of a tick: the summary comes last, so the key is still owed."""
    world.arrive("runs/x", "C")
    world.publish("C", "a", "a1")
    world.publish("C", "b", "b1")
    result = world.tick("reconciliation", apply=False)
    for event in [event for event in result.asset_events if event.partition][:2]:
        world.instance.report_runless_asset_event(event)
    world.reload()
    assert [one[:2] for one in told(world.tick("reconciliation"))] == [
        ("AssetMaterialization", "results/b"),
        ("AssetMaterialization", "summary"),
    ]


def test_a_tick_is_bounded_and_what_was_decided_last_comes_first(
    world: DagsterWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sensors import reconciliation

    monkeypatch.setattr(reconciliation, "MIRRORED_KEYS_PER_TICK", 2)
    for n in range(5):
        world.arrive(f"runs/{n}", f"C{n}")
        world.publish(f"C{n}", "a", "a1")
    seen = []
    for _ in range(4):
        result = world.tick("reconciliation")
        seen.append({key for _, asset, key in told(result) if asset == "summary"})
    assert seen == [{"runs/4", "runs/3"}, {"runs/2", "runs/1"}, {"runs/0"}, set()]


def test_asks_the_catalog_only_when_it_has_changed(world: DagsterWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    real = WarehouseResource.query
    monkeypatch.setattr(WarehouseResource, "query", lambda self, sql: asked.append(sql) or real(self, sql))
    world.arrive("adhoc/x", "C")
    world.publish("C", "a", "a1")
    world.tick("reconciliation")
    assert asked
    asked.clear()
    world.tick("reconciliation")
    assert asked == []
    # Another process refreshed the catalog before the sensor did: it must see that all the same.
    world.decide(commit_record("C", "a", "a1")["evaluation_id"], "held", action="retract")
    from eval_platform import warehouse

    assert warehouse.refresh(world.store, world.catalog)
    assert ("AssetMaterialization", "results/a", "adhoc/x") in told(world.tick("reconciliation"))


# --------------------------------------------------------------------------------------------------------- repairs


def test_asks_for_the_run_that_a_crash_dropped(world: DagsterWorld) -> None:
    """A known key's second arrival was registered, and the tick died before it asked for a run."""
    world.arrive("runs/x", "C")
    world.publish("C", "a", "a1")
    world.publish("C", "b", "b1")
    ask(world, "runs/x", SUCCESS)
    world.arrive("runs/x", None)
    assert requested(world.tick("reconciliation")) == [("runs/x@2", "runs/x", None)]
    # Asked for once: now it waits in the queue.
    assert requested(world.tick("reconciliation")) == []


def test_a_key_that_the_other_sensor_has_not_shown_dagster_yet_is_left_to_it(world: DagsterWorld) -> None:
    world.arrive("runs/x", None)
    assert requested(world.tick("reconciliation")) == []


def test_a_crashed_run_is_asked_for_again_later_and_later(world: DagsterWorld, monkeypatch: pytest.MonkeyPatch) -> None:
    world.arrive("runs/x", None)
    run = ask(world, "runs/x", FAILURE)
    assert requested(world.tick("reconciliation")) == []  # too soon
    monkeypatch.setattr(repairs_module, "FIRST_REPAIR_SECONDS", 0.0)
    keys = []
    for _ in range(3):
        keys += [run_key for run_key, _, _ in requested(world.tick("reconciliation"))]
        run = world.runs("runs/x")[0]
        world.end(run)
    assert keys == ["runs/x@1#1", "runs/x@1#2", "runs/x@1#3"]


def test_asks_only_for_what_has_no_result(world: DagsterWorld, no_backoff: None) -> None:
    world.arrive("runs/x", "C")
    world.publish("C", "a", "a1")
    ask(world, "runs/x", FAILURE)
    assert requested(world.tick("reconciliation")) == [("runs/x@1#1", "runs/x", frozenset("b"))]


@pytest.mark.parametrize(
    "case", ["decided", "held", "failed for good", "gone", "cancelled", "retried by Dagster", "running"]
)
def test_does_not_repeat(world: DagsterWorld, no_backoff: None, case: str) -> None:
    arrival = world.arrive("runs/x", None if case == "gone" else "C")
    tags = {"dagster/will_retry": "true"} if case == "retried by Dagster" else {}
    status = {"cancelled": CANCELED, "running": None}.get(case, FAILURE)
    ask(world, "runs/x", status, **tags)
    for task in "ab":
        if case in ("decided", "held"):
            world.decide(world.commit("C", task, f"{task}1"), "published" if case == "decided" else "held")
        elif case == "failed for good":
            record = commit_record("C", task, f"{task}1")
            names = ("key", "arrival", "checkpoint_id", "weights_id", "task", "task_id", "ask_id", "settings_id")
            subject = tries.evaluation_subject(record["evaluation_id"], 1)
            world.fail(subject, **{name: record[name] for name in names})
    if case == "gone":
        world.fail(tries.arrival_subject(arrival), "gone")
    for _ in range(2):
        assert requested(world.tick("reconciliation")) == []


@pytest.mark.parametrize("on_task_change", ["new_only", "backfill"])
def test_what_a_person_cancelled_is_not_begun_again_and_status_says_how(
    world: DagsterWorld, no_backoff: None, on_task_change: str
) -> None:
    world.file.write_text(world.file.read_text() + f'[tasks]\non_task_change = "{on_task_change}"\n')
    arrival = world.arrive("runs/x", "C")
    ask(world, "runs/x", FAILURE)
    (again,) = world.tick("reconciliation").run_requests  # after a crash it is begun again
    assert standing(world) == ("queued", "")
    (run, _) = world.runs("runs/x")
    world.end(run, CANCELED)
    for _ in range(2):
        assert requested(world.tick("reconciliation")) == []
        world.reload()
    state, reason = standing(world)
    assert state == "missing"
    assert f"run {run.run_id[:8]} was cancelled" in reason
    assert f"`eval-platform run --checkpoint {arrival.uri}`" in reason
    # A person has it run again, and that run crashes: it is the platform's to begin once more.
    executed = world.run(again, parent=run.run_id)
    assert executed is not None
    world.end(executed)
    assert requested(world.tick("reconciliation")) == [("runs/x@1#3", "runs/x", None)]
    for task in "ab":
        world.publish("C", task, f"{task}1")
    assert standing(world) == ("published", "")


def standing(world: DagsterWorld) -> tuple[str, str]:
    """(state, reason) of the only checkpoint, for all its tasks; what the queue's end counts is what is queued."""
    (one,) = status_of(world.config, world.store, read_lock(world.config.lock_path))
    assert {task.state for task in one.tasks} == {one.state}
    assert (one.waiting != 0) == (one.state == "queued")
    return one.state, one.reason


def test_a_retry_makes_a_failed_arrival_owed_again(world: DagsterWorld, no_backoff: None) -> None:
    arrival = world.arrive("runs/x", None)
    ask(world, "runs/x", FAILURE)
    subject = tries.arrival_subject(arrival)
    world.fail(subject)
    assert requested(world.tick("reconciliation")) == []
    tries.retry(world.store, subject, "me", "mended")
    assert requested(world.tick("reconciliation")) == [("runs/x@1#1", "runs/x", None)]


def test_an_undecided_commit_is_owed_its_decision(world: DagsterWorld, no_backoff: None) -> None:
    """The driver was killed between commit and gate."""
    world.arrive("runs/x", "C")
    world.publish("C", "a", "a1")
    world.commit("C", "b", "b1")
    ask(world, "runs/x", FAILURE)
    assert requested(world.tick("reconciliation")) == [("runs/x@1#1", "runs/x", frozenset("b"))]


def test_a_run_that_dagster_retried_counts_no_more(world: DagsterWorld, no_backoff: None) -> None:
    world.arrive("runs/x", None)
    first = ask(world, "runs/x", FAILURE, **{"dagster/will_retry": "true"})
    lock = read_lock(world.config.lock_path)
    arrival = arrivals.newest(world.store, "runs/x")
    assert arrival is not None
    assert requested(world.tick("reconciliation")) == []
    retried = world.run(run_request(arrival, lock, lock.tasks), parent=first.run_id)
    assert retried is not None
    assert requested(world.tick("reconciliation")) == []  # it waits in the queue
    world.end(retried)
    assert requested(world.tick("reconciliation")) == [("runs/x@1#2", "runs/x", None)]


def evaluated_everywhere(world: DagsterWorld) -> None:
    """Two checkpoints with every result, by runs that ended well or red."""
    for n, status in enumerate((SUCCESS, FAILURE)):
        world.arrive(f"runs/{n}", f"C{n}")
        for task in "ab":
            world.publish(f"C{n}", task, f"{task}1", ask_id=f"ask-{task}")
        ask(world, f"runs/{n}", status)
    assert requested(world.tick("reconciliation")) == []


def test_a_task_added_later_is_left_to_a_person(world: DagsterWorld, no_backoff: None) -> None:
    evaluated_everywhere(world)
    world.lock(a="a1", b="b1", c="c1")
    for _ in range(2):
        assert requested(world.tick("reconciliation")) == []


def test_a_task_added_later_is_asked_of_all_where_so_configured(world: DagsterWorld, no_backoff: None) -> None:
    evaluated_everywhere(world)
    world.file.write_text(world.file.read_text() + '[tasks]\non_task_change = "backfill"\n')
    world.lock(a="a1", b="b1", c="c1")
    found = requested(world.tick("reconciliation"))
    assert {(key, tasks) for _, key, tasks in found} == {("runs/0", frozenset("c")), ("runs/1", frozenset("c"))}
    assert requested(world.tick("reconciliation")) == []


def test_what_need_only_be_scored_again_always_is(world: DagsterWorld, no_backoff: None) -> None:
    evaluated_everywhere(world)
    world.lock(a="a2", b="b1")  # another scorer, the same ask_id
    found = requested(world.tick("reconciliation"))
    assert {(key, tasks) for _, key, tasks in found} == {("runs/0", frozenset("a")), ("runs/1", frozenset("a"))}


def test_a_checkpoint_of_the_command_line_is_not_asked_more_than_it_was(world: DagsterWorld, no_backoff: None) -> None:
    for key in ("adhoc/x", "runs/x"):
        world.arrive(key, key)
        world.publish(key, "a", "a1")
    first = requested(world.tick("reconciliation"))
    # In a watched folder everything is asked, as of any that arrives there.
    assert first == [("runs/x@1", "runs/x", None)]
    assert requested(world.tick("reconciliation")) == []


# ---------------------------------------------------------------------------------------------------------- reruns


def rerun_asked(world: DagsterWorld) -> str:
    world.arrive("runs/x", "C")
    evaluation = world.publish("C", "a", "a1", key="runs/x")
    world.publish("C", "b", "b1", key="runs/x")
    ask(world, "runs/x", SUCCESS)
    world.tick("reconciliation")
    assert commits.open_rerun(world.store, evaluation, "me", "why") == 2
    return evaluation


def test_a_rerun_is_run_once_and_again_if_it_crashes(world: DagsterWorld, no_backoff: None) -> None:
    evaluation = rerun_asked(world)
    asked = requested(world.tick("reconciliation"))
    assert asked == [(f"runs/x@1#rerun-{evaluation}-2#0", "runs/x", frozenset("a"))]
    assert requested(world.tick("reconciliation")) == []
    world.end(world.runs("runs/x")[0])
    asked = requested(world.tick("reconciliation"))
    assert asked == [(f"runs/x@1#rerun-{evaluation}-2#1", "runs/x", frozenset("a"))]
    world.publish("C", "a", "a1", attempt=2, key="runs/x")
    world.end(world.runs("runs/x")[0], SUCCESS)
    result = world.tick("reconciliation")
    assert requested(result) == []
    assert (world.events(["results", "a"], "runs/x")[0].tags or {})["dagster/data_version"] == f"{evaluation}.2"


def test_a_rerun_that_a_person_cancelled_is_not_run_again(world: DagsterWorld, no_backoff: None) -> None:
    rerun_asked(world)
    (request,) = world.tick("reconciliation").run_requests
    run = world.runs("runs/x")[0]
    world.end(run, CANCELED)
    assert requested(world.tick("reconciliation")) == []
    executed = world.run(request, parent=run.run_id)
    assert executed is not None
    world.end(executed)
    assert len(requested(world.tick("reconciliation"))) == 1


def test_a_rerun_that_failed_for_good_waits_for_a_retry(world: DagsterWorld, no_backoff: None) -> None:
    evaluation = rerun_asked(world)
    world.tick("reconciliation")
    subject = tries.evaluation_subject(evaluation, 2)
    world.fail(subject)
    world.end(world.runs("runs/x")[0])
    assert requested(world.tick("reconciliation")) == []
    tries.retry(world.store, subject, "me", "mended")
    assert len(requested(world.tick("reconciliation"))) == 1


def test_a_rerun_asked_while_the_platform_was_down_for_days_is_found(world: DagsterWorld) -> None:
    evaluation = rerun_asked(world)
    entry = next(e for e in log.read(world.store, log.recent_dates()) if e.get("action") == "rerun")
    body = world.store.read(entry["log_key"])
    world.store.delete(entry["log_key"])
    world.store.create(layout.log_entry("2026-01-05", "000000", "old"), body)
    assert requested(world.tick("reconciliation", apply=False)) == []  # a platform that never ran before that day
    world.cursors["reconciliation"] = '{"reruns_since": "2026-01-04"}'
    assert [run_key for run_key, _, _ in requested(world.tick("reconciliation"))] == [
        f"runs/x@1#rerun-{evaluation}-2#0"
    ]


# ----------------------------------------------------------------------------------------------------------- holds


def test_lets_go_of_checkpoints_that_nothing_waits_for(world: DagsterWorld, no_backoff: None) -> None:
    from checkpoint_factory import make_checkpoint

    from eval_platform.checkpoints import locate

    def arrive(name: str, seed: int) -> Any:
        folder = make_checkpoint(world.checkpoints / name, seed=seed)
        found = locate(folder, world.config.checkpoints, world.config.cache_dir, lambda done, total: None)
        arrival, _ = arrivals.register(
            world.store, key=found.key, uri=found.uri, fingerprint=found.fingerprint, run="r", watcher="w"
        )
        assert hold(arrival, world.config.cache_dir)
        return arrival

    def held() -> set[str]:
        from eval_platform.identity import content_id

        names = {path.name for path in (world.config.cache_dir / "held").iterdir()}
        every = [("runs/old", 1), ("runs/old", 2), ("runs/bad", 1), ("runs/waits", 1)]
        return {f"{key}@{n}" for key, n in every if content_id([key, n]) in names}

    arrive("old", 1)
    first_run = ask(world, "runs/old", None)
    arrive("bad", 2)
    arrive("waits", 3)
    for key in ("runs/bad", "runs/waits"):
        ask(world, key, FAILURE)
    arrive("old", 4)
    world.tick("reconciliation")
    assert held() == {"runs/old@1", "runs/old@2", "runs/bad@1", "runs/waits@1"}

    bad = arrivals.newest(world.store, "runs/bad")
    assert bad is not None
    world.fail(tries.arrival_subject(bad))
    world.end(first_run, SUCCESS)
    world.end(world.runs("runs/bad")[0])
    world.tick("reconciliation")
    assert held() == {"runs/old@2", "runs/waits@1"}
