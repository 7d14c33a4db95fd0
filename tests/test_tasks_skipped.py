"""A task whose data cannot be had is skipped and listed; what was frozen before goes on; a changed source is told."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from cli_tools import Place
from tiny_models import make_checkpoint

from eval_platform.checkpoints import locate
from eval_platform.config import Config, Engine, Tasks
from eval_platform.errors import ConfigError
from eval_platform.once import split_skipped
from eval_platform.plan import Wanted, locked_names, plan
from eval_platform.store import LocalStore, arrivals
from eval_platform.tasks import SyncReport, check_tasks, load_task, read_lock, render, sync_tasks
from eval_platform.tasks.differences import compare_documents
from eval_platform.worker import EXIT_DONE, work

ROWS = [{"question": f"What is {n} + 1?", "answer": f"#### {n + 1}"} for n in range(5)]
SUMS = """
task: sums
documents: {dataset: {name: gsm8k, split: test}}
doc_to_text: question
doc_to_target: answer
generation_kwargs: {max_gen_toks: 4}
"""
COPIES = """
task: copies
documents: {generator: {name: copying, n: 3}}
doc_to_text: question
doc_to_target: answer
generation_kwargs: {max_gen_toks: 4}
"""


class World:
    """A task that needs public data, one that does not, and a folder of public data that may be there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = LocalStore(folder / "results")
        self.lock = folder / "lock.json"
        (folder / "tasks").mkdir()
        (folder / "tasks" / "sums.yaml").write_text(SUMS)
        (folder / "tasks" / "copies.yaml").write_text(COPIES)
        self.tasks = Tasks(folders=(str(folder / "tasks"),))

    def data(self, rows: list[dict[str, str]]) -> None:
        (self.folder / "data" / "gsm8k").mkdir(parents=True, exist_ok=True)
        (self.folder / "data" / "gsm8k" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def no_data(self) -> None:
        (self.folder / "data" / "gsm8k" / "test.jsonl").unlink()

    def sync(self) -> SyncReport:
        return sync_tasks(self.tasks, self.store, self.lock)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setenv("EVAL_PLATFORM_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return World(tmp_path)


def test_without_data_a_task_is_skipped_and_the_lock_says_why(world: World) -> None:
    report = world.sync()

    assert report.errors == ()
    assert list(report.lock.tasks) == ["copies"]
    skipped = report.lock.skipped["sums"]
    assert skipped.dataset == "gsm8k"
    assert "EVAL_PLATFORM_DATA has no gsm8k/test.jsonl" in skipped.reason
    assert "openai/gsm8k" in skipped.remedy
    assert read_lock(world.lock) == report.lock
    assert str(world.folder) not in world.lock.read_text()  # a lock is committed, and read on other machines
    assert check_tasks(world.tasks) == []


def test_with_data_it_is_asked_and_no_longer_skipped(world: World) -> None:
    world.sync()
    world.data(ROWS)

    report = world.sync()

    assert list(report.lock.tasks) == ["copies", "sums"]
    assert report.lock.skipped == {}
    assert "skipped" not in world.lock.read_text()
    assert report.changed == ("sums",)
    assert report.documents == {}


def test_data_that_was_frozen_is_asked_when_its_source_is_gone(world: World) -> None:
    world.data(ROWS)
    before = world.sync().lock.tasks["sums"]
    world.no_data()

    report = world.sync()

    assert report.lock.tasks["sums"] == before
    assert report.lock.skipped == {}
    assert report.kept["sums"].dataset == "gsm8k"
    assert len(list(render(load_task(world.store, before.task_id)))) == 5


def test_a_lock_from_elsewhere_does_not_stand_for_data_that_this_store_never_had(world: World) -> None:
    world.data(ROWS)
    world.sync()
    world.no_data()
    world.store = LocalStore(world.folder / "other_results")

    report = world.sync()

    assert list(report.lock.tasks) == ["copies"]
    assert list(report.lock.skipped) == ["sums"]
    assert report.kept == {}


def test_a_changed_source_is_another_dataset_and_the_difference_is_told(world: World) -> None:
    world.data(ROWS)
    before = world.sync().lock.tasks["sums"]
    world.data([ROWS[0], {**ROWS[1], "answer": "#### 3"}, *ROWS[3:], {"question": "More?", "answer": "#### 1"}])

    report = world.sync()

    assert report.lock.tasks["sums"].dataset_id != before.dataset_id
    change = report.documents["sums"]
    assert (len(change.added), len(change.removed), len(change.changed)) == (1, 1, 1)
    assert "1 added" in str(change)
    assert "1 removed" in str(change)
    assert (report.changed, report.shots) == (("sums",), {})
    assert world.sync().documents == {}


def test_a_changed_source_of_shots_is_told_too(world: World) -> None:
    world.data(ROWS)
    task = world.folder / "tasks" / "sums.yaml"
    task.write_text(SUMS.replace("split: test}", "split: test}, fewshot: {file: shots.jsonl}") + "num_fewshot: 1\n")
    (task.parent / "shots.jsonl").write_text(json.dumps(ROWS[0]) + "\n" + json.dumps(ROWS[1]) + "\n")
    world.sync()
    (task.parent / "shots.jsonl").write_text(json.dumps(ROWS[0]) + "\n")

    report = world.sync()

    assert report.documents == {}
    assert str(report.shots["sums"]).startswith("1 removed")


@pytest.mark.parametrize(
    ("old", "new", "added", "removed", "changed", "moved"),
    [
        ("abc", "abc", "", "", [], False),
        ("abc", "acb", "", "", [], True),
        ("abc", "xabc", "x", "", [], False),
        ("abc", "ab", "", "c", [], False),
        ("abc", "axc", "", "", [("b", "x")], False),
        ("abcd", "axyd", "", "", [("b", "x"), ("c", "y")], False),
        ("abcd", "axyzd", "z", "", [("b", "x"), ("c", "y")], False),
        ("abc", "xyz", "", "", [("a", "x"), ("b", "y"), ("c", "z")], False),
        ("", "ab", "ab", "", [], False),
    ],
)
def test_documents_are_compared_by_what_they_are(
    old: str, new: str, added: str, removed: str, changed: list[tuple[str, str]], moved: bool
) -> None:
    found = compare_documents(list(old), list(new))

    assert ("".join(found.added), "".join(found.removed)) == (added, removed)
    assert list(found.changed) == changed
    assert found.moved == moved
    assert bool(found) == (old != new)


# --- where a person and a platform see it


CONFIG = """
[tasks]
folders = ["tasks"]

[engine]
device = "cpu"
dtype = "float32"
"""


@pytest.fixture
def place(world: World) -> Place:
    (world.folder / "eval_platform.toml").write_text(CONFIG)
    (world.folder / "checkpoints").mkdir()
    return Place(world.folder)


def test_commands_list_what_is_skipped_and_require_all_refuses_it(place: Place) -> None:
    synced = place("tasks", "sync")
    assert (synced.code, "skipped: no data  sums" in synced.out) == (0, True), synced.err
    assert "EVAL_PLATFORM_DATA has no gsm8k/test.jsonl" in synced.out
    assert place("tasks", "sync", "--json").json["skipped"]["sums"]["dataset"] == "gsm8k"

    assert "skipped: no data  sums" in place("tasks", "list").out
    listed = place("tasks", "list", "--json").json
    assert (listed["sums"]["skipped"]["dataset"], listed["copies"]["n_documents"]) == ("gsm8k", 3)
    assert "sums is skipped: no data" in place("tasks", "show", "sums").err
    validated = place("tasks", "validate", str(place.folder / "tasks" / "sums.yaml"))
    assert (validated.code, "(its keys; no data: EVAL_PLATFORM_DATA has no" in validated.out) == (0, True)
    looked = {one["what"]: one for one in place("doctor", "--json").json}
    assert looked["task skipped"]["ok"]
    assert looked["task skipped"]["found"].startswith("sums: no data")

    refused = place("tasks", "sync", "--require-all")
    assert refused.code == 2
    assert "1 tasks have no data: sums (gsm8k)" in refused.err


def test_a_run_asks_the_rest_and_says_what_it_skipped(world: World) -> None:
    lock = world.sync().lock

    asked, (ended,) = split_skipped(lock, None)

    assert asked == ["copies"]
    assert (ended.task, ended.status) == ("sums", "skipped")
    assert "EVAL_PLATFORM_DATA has no gsm8k/test.jsonl" in ended.reasons[0]
    assert f"\n  remedy: {lock.skipped['sums'].remedy}" in ended.reasons[0]
    assert split_skipped(lock, ["copies"]) == (["copies"], [])
    assert split_skipped(lock, ["sums", "copies"]) == (asked, [ended])
    assert split_skipped(lock, ["sums"]) == (["sums"], [])
    with pytest.raises(ConfigError, match=r"there is no data for sums .*no gsm8k/test.jsonl"):
        locked_names(lock, ["copies", "sums"])  # the plan's word, and that of a backfill
    assert locked_names(lock, ["copies", "copies"]) == locked_names(lock, None) == ["copies"]


def test_a_run_of_nothing_else_and_one_that_requires_all_are_refused(place: Place, world: World) -> None:
    checkpoint = str(make_checkpoint(world.folder / "checkpoints" / "step_1", max_length=64))

    alone = place("run", "--checkpoint", checkpoint, "--tasks", "sums")
    assert (alone.code, "there is no data for sums" in alone.err) == (2, True)
    refused = place("run", "--checkpoint", checkpoint, "--require-all")
    assert (refused.code, "sums (gsm8k)" in refused.err) == (2, True)
    (status,) = place("status", "--json").json
    assert {task["task"]: task["state"] for task in status["tasks"]}["sums"] == "skipped"
    assert "where there is no data, `eval-platform tasks list` says how to get it" in place("status").out


def test_a_worker_reads_the_snapshot_and_not_the_source(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.data(ROWS)
    world.sync()
    world.no_data()
    monkeypatch.delenv("EVAL_PLATFORM_DATA")
    for file in (world.folder / "tasks").iterdir():
        file.unlink()
    path = make_checkpoint(world.folder / "checkpoints" / "step_1", max_length=64)
    config = Config(folder=world.folder, state=str(world.folder / "state"), engine=Engine(device="cpu"))
    found = locate(path, (), config.cache_dir, lambda done, total: None)
    arrival, _ = arrivals.register(world.store, watcher="test", **asdict(found))
    told: list[dict[str, Any]] = []

    code = work(plan(arrival, Wanted(read_lock(world.lock), ["sums"]), config, world.store), world.store, told.append)

    assert code == EXIT_DONE, told
    assert [(one["task"], one["origin"]) for one in told if one["type"] == "committed"] == [("sums", "asked")]


@pytest.mark.dagster
def test_dagster_has_no_asset_of_it_and_the_leaderboard_says_so(world: World) -> None:
    from assets.boards import LEADERBOARD, LEARNING_CURVES, told_boards
    from assets.results import evaluate_asset, results_key

    lock = world.sync().lock

    assert results_key("sums") not in evaluate_asset(lock, str).keys
    described = {spec.key: spec.description or "" for spec in told_boards(lock).specs}
    assert "- sums: no data: EVAL_PLATFORM_DATA has no gsm8k/test.jsonl" in described[LEADERBOARD]
    assert "sums" not in described[LEARNING_CURVES]
