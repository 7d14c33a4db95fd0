"""Sync: ids change with what they are made of and with nothing else; snapshots, names and lock tell what is asked."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eval_platform.config import Tasks
from eval_platform.errors import ConfigError, SchemaError, TaskError
from eval_platform.store import LocalStore, layout, log, read_record
from eval_platform.tasks import (
    Size,
    SyncReport,
    build_task,
    check_tasks,
    load_task,
    prompts_id,
    read_lock,
    render,
    sync,
    sync_tasks,
    write_prompts,
)
from eval_platform.tasks.schema import TaskFile
from eval_platform.tasks.snapshots import frozen_rows

ROWS = [{"q": f"q{n}", "a": f"a{n}", "s": f"s{n % 2}", "order": {"z": 1, "a": n}} for n in range(6)]
BASE: dict[str, Any] = {
    "task": "sums",
    "documents": {"file": "rows.jsonl"},
    "doc_to_text": "{{q}}",
    "doc_to_target": "a",
    "num_fewshot": 2,
    "fewshot_config": {"sampler": "first_n"},
}


class World:
    """A folder of task files, a store and a lock."""

    def __init__(self, folder: Path) -> None:
        self.tasks = folder / "tasks"
        self.tasks.mkdir()
        self.store = LocalStore(folder / "results")
        self.lock = folder / "eval_platform.lock.json"
        self.rows(ROWS)

    def rows(self, rows: list[dict[str, Any]]) -> None:
        (self.tasks / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write(self, name: str = "sums", **keys: Any) -> Path:
        path = self.tasks / f"{name}.yaml"
        path.write_text(json.dumps({**BASE, "task": name, **keys}))
        return path

    def sync(self, *include: str) -> SyncReport:
        return sync_tasks(Tasks(include=include, folders=(str(self.tasks),)), self.store, self.lock)

    def names(self, name: str = "sums") -> list[tuple[int, str]]:
        """(n, task_id) of all that the name has stood for."""
        found = layout.numbers(self.store, layout.task_names(name))
        return sorted((n, read_record(self.store, key)["task_id"]) for n, key in found)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_synced_task_is_loaded_from_the_store_alone(world: World) -> None:
    built = build_task(world.write(documents={"file": "rows.jsonl", "subset": "s", "cluster": "a"}))
    report = world.sync()
    for file in world.tasks.iterdir():
        file.unlink()

    loaded = load_task(world.store, report.lock.tasks["sums"].task_id)

    assert loaded == built
    assert list(render(loaded)) == list(render(built))
    assert [document.subset for document in loaded.documents] == ["s0", "s1"] * 3
    assert report.changed == ("sums",)
    assert read_lock(world.lock) == report.lock


def test_the_store_holds_definition_snapshot_and_name(world: World) -> None:
    world.write(about="What it is.", source="here", licence="MIT", citation="me")
    locked = world.sync().lock.tasks["sums"]

    definition = read_record(world.store, layout.task(locked.task_id))
    assert TaskFile.model_validate(definition["definition"]).about == "What it is."
    card = read_record(world.store, layout.dataset_card(locked.dataset_id))
    assert (card["n"], card["source"], card["licence"], card["citation"]) == (6, "here", "MIT", "me")
    name = read_record(world.store, layout.task_name("sums", 1))
    assert name["task_id"] == locked.task_id
    assert (name["primary_metric"], name["higher_is_better"], name["chance"]) == ("exact_match", True, None)
    assert frozen_rows(world.store, locked.dataset_id) == ROWS


def test_syncing_again_writes_nothing(world: World) -> None:
    world.write()
    world.sync()
    files = {entry.key: entry.etag for entry in world.store.list("")}
    before = world.lock.stat().st_mtime_ns

    report = world.sync()

    assert report.changed == ()
    assert {entry.key: entry.etag for entry in world.store.list("")} == files
    assert world.lock.stat().st_mtime_ns == before


def test_what_is_known_to_work_is_not_rendered_again(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.rows([{"q": "?", "a": n % 2} for n in range(4)])
    choices = {
        "output_type": "multiple_choice",
        "doc_to_choice": ["x", "y"],
        "doc_to_target": "{{a}}",
        "num_fewshot": 0,
    }
    said = world.write(**choices, chance=0.3)
    world.sync()
    proved: list[str] = []
    prove = sync.prove_task
    monkeypatch.setattr(sync, "prove_task", lambda task, path: (proved.append(task.name), prove(task, path))[1])

    locked = world.sync().lock.tasks["sums"]
    assert (proved, locked.chance) == ([], 0.3)
    assert locked.task_id == build_task(said).task_id
    world.write(**choices)  # chance is not said any more, and so follows from the choices again
    assert (world.sync().lock.tasks["sums"].chance, proved) == (0.5, ["sums"])
    world.write(**choices, title="Another title")
    report = world.sync()
    assert (report.lock.tasks["sums"].title, proved) == ("Another title", ["sums"])
    size = report.lock.tasks["sums"].size
    assert size == Size(items=4, requests=2, characters=len("?" + " x" + " y"), longest=0)  # four times the same
    body = json.loads(world.lock.read_text())
    del body["tasks"]["sums"]["size"]  # a lock from before it was counted
    world.lock.write_text(json.dumps(body))
    assert ([world.sync().lock.tasks["sums"].size for _ in range(2)], proved) == ([size] * 2, ["sums", "sums"])
    world.lock.unlink()
    assert (world.sync().lock.tasks["sums"].chance, proved) == (0.5, ["sums", "sums", "sums"])


def test_a_name_that_means_a_then_b_then_a_has_three_numbers(world: World) -> None:
    ids = []
    for template in ("{{q}}", "{{q}}!", "{{q}}"):
        world.write(doc_to_text=template)
        ids.append(world.sync().lock.tasks["sums"].task_id)

    assert ids[0] == ids[2] != ids[1]
    assert world.names() == [(1, ids[0]), (2, ids[1]), (3, ids[2])]


def test_what_a_name_points_to_is_there_before_the_name_and_the_log_before_both(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    created: list[str] = []
    create: Callable[..., bool] = LocalStore.create

    def noting(store: LocalStore, key: str, body: bytes | Path) -> bool:
        created.append(key)
        return create(store, key, body)

    monkeypatch.setattr(LocalStore, "create", noting)
    world.write()
    locked = world.sync().lock.tasks["sums"]

    by_name = created.index(layout.task_name("sums", 1))
    entry = next(key for key in created if key.startswith(layout.LOG))
    assert created.index(entry) < by_name
    assert created.index(layout.task(locked.task_id)) < by_name
    assert created.index(layout.dataset_documents(locked.dataset_id)) < by_name
    announced = log.read(world.store, log.dates(world.store))
    assert [(e["kind"], e["name"], e["n"], e["task_id"]) for e in announced] == [("task", "sums", 1, locked.task_id)]


def test_many_syncs_at_once_agree(world: World) -> None:
    world.write()
    reports: list[SyncReport] = []
    threads = [threading.Thread(target=lambda: reports.append(world.sync())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(reports) == 4
    assert [n for n, _ in world.names()] == [1]
    assert sum(len(report.changed) for report in reports) == 1


# What a change of the file changes: (keys, ask_id?, task_id?)
CHANGES: dict[str, tuple[dict[str, Any], bool, bool]] = {
    "nothing, said by name": ({"output_type": "generate_until", "repeats": 1, "target_delimiter": " "}, False, False),
    "the metric's own direction": (
        {"metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]},
        False,
        False,
    ),
    "generation defaults": ({"generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 256}}, False, False),
    "title": ({"title": "Sums"}, False, False),
    "about": ({"about": "About sums."}, False, False),
    "citation": ({"citation": "me", "source": "here", "licence": "MIT", "tag": ["x"]}, False, False),
    "metadata": ({"metadata": {"version": 2.0}}, False, False),
    "question": ({"doc_to_text": "{{q}}?"}, True, True),
    "answer": ({"doc_to_target": "{{a}}"}, True, True),
    "description": ({"description": "Add."}, True, True),
    "target delimiter": ({"target_delimiter": "\n"}, True, True),
    "shots": ({"num_fewshot": 3}, True, True),
    "no shots": ({"num_fewshot": 0}, True, True),
    "sampler": ({"fewshot_config": {"sampler": "default"}}, True, True),
    "stop": ({"generation_kwargs": {"until": "."}}, True, True),
    "temperature": ({"generation_kwargs": {"temperature": 0.5}}, True, True),
    "a sample": ({"documents": {"file": "rows.jsonl", "sample": 3}}, True, True),
    "a sample of all": ({"documents": {"file": "rows.jsonl", "sample": 6, "seed": 3}}, False, False),
    "repeats": ({"repeats": 2}, False, True),
    "metric": ({"metric_list": [{"metric": "f1"}]}, False, True),
    "metric's argument": ({"metric_list": [{"metric": "exact_match", "ignore_case": True}]}, False, True),
    "filter": ({"filter_list": [{"name": "none", "filter": [{"function": "lowercase"}]}]}, False, True),
    "chance": ({"chance": 0.1}, False, True),
    "quality": ({"quality": {"raise": ["empty"]}}, False, True),
    "subset": ({"documents": {"file": "rows.jsonl", "subset": "s"}}, False, True),
    "cluster": ({"documents": {"file": "rows.jsonl", "cluster": "s"}}, False, True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_ids_change_with_what_they_are_made_of(change: str, world: World) -> None:
    keys, ask, task = CHANGES[change]
    before = build_task(world.write())
    after = build_task(world.write(**keys))

    assert (after.ask_id != before.ask_id, after.task_id != before.task_id) == (ask, task)


def test_the_name_is_no_part_of_the_ids(world: World) -> None:
    one, other = build_task(world.write("sums")), build_task(world.write("other"))

    assert (one.ask_id, one.task_id) == (other.ask_id, other.task_id)


def test_shots_do_not_matter_where_none_are_asked_for(world: World) -> None:
    one = build_task(world.write(num_fewshot=0))
    other = build_task(world.write(num_fewshot=0, fewshot_config={"sampler": "default"}, fewshot_delimiter="\n\n"))

    assert one.ask_id == other.ask_id
    assert one.fewshot_dataset_id is None


def test_unconditional_requests_are_part_of_what_is_asked(world: World) -> None:
    world.rows([{"q": "?", "a": 0}] * 4)
    choices = {
        "output_type": "multiple_choice",
        "doc_to_choice": ["x", "y"],
        "doc_to_target": "{{a}}",
        "num_fewshot": 0,
    }
    one = build_task(world.write(**choices))
    other = build_task(world.write(**choices, metric_list=[{"metric": "acc"}, {"metric": "acc_mutual_info"}]))

    assert one.ask_id != other.ask_id


@pytest.mark.parametrize(
    ("rows", "same"),
    [
        ([dict(reversed(row.items())) for row in ROWS], True),  # fields have no order
        (ROWS[::-1], False),
        (ROWS[:5], False),
        ([*ROWS[:5], {**ROWS[5], "a": "b"}], False),
        ([{**row, "order": dict(reversed(row["order"].items()))} for row in ROWS], False),  # a template can see it
    ],
)
def test_the_rows_and_their_order_are_the_dataset(rows: list[dict[str, Any]], same: bool, world: World) -> None:
    path = world.write()
    before = build_task(path)
    world.rows(rows)
    after = build_task(path)

    assert (after.dataset_id == before.dataset_id) == same
    assert (after.ask_id == before.ask_id) == same


def test_a_broken_file_is_reported_and_keeps_its_last_meaning(world: World) -> None:
    world.write("good")
    path = world.write("bad", doc_to_text="{{q}}?")
    before = world.sync().lock.tasks
    path.write_text(path.read_text().replace("{{q}}?", "{{qq}}"))
    world.write("good", doc_to_text="{{q}}!")
    world.write("new", doc_to_text="{{q}}...")

    report = world.sync()

    assert [str(path) in str(error) and "'qq' is undefined" in str(error) for error in report.errors] == [True]
    assert report.changed == ("good", "new")
    assert report.lock.tasks["bad"] == before["bad"]
    assert report.lock.tasks["good"] != before["good"]
    assert [str(e) for e in check_tasks(Tasks(folders=(str(world.tasks),)))] == [str(e) for e in report.errors]


def test_a_broken_file_without_a_past_is_not_in_the_lock(world: World) -> None:
    world.write("good")
    (world.tasks / "no_name.yaml").write_text("task: [")
    (world.tasks / "bad.yaml").write_text("task: bad\n")

    report = world.sync()

    assert list(report.lock.tasks) == ["good"]
    assert len(report.errors) == 2


def test_two_tasks_of_one_name_name_both_files(world: World) -> None:
    one = world.write("sums")
    (world.tasks / "deeper").mkdir()
    other = world.tasks / "deeper" / "other.yml"
    other.write_text(one.read_text())
    world.write("good", doc_to_text="{{q}}!")

    report = world.sync()

    assert list(report.lock.tasks) == ["good"]
    (error,) = report.errors
    assert "two tasks are called sums" in str(error)
    assert str(one) in str(error)
    assert str(other) in str(error)


def test_a_library_name_taken_again_names_both_files(world: World) -> None:
    own = world.write("copying")

    report = world.sync("copying")

    assert report.lock.tasks == {}
    assert str(own) in str(report.errors[0])
    assert "library" in str(report.errors[0])
    assert world.sync().errors == ()  # not selected, the shipped task is in nobody's way


def test_two_names_for_one_task_are_refused(world: World) -> None:
    world.write("one")
    world.write("two")

    report = world.sync()

    assert list(report.lock.tasks) == ["one"]
    assert "two asks and scores exactly what one does" in str(report.errors[0])


def test_included_names_are_found_in_library_and_folders(world: World) -> None:
    world.write("mine")
    world.write("other", doc_to_text="x{{q}}")

    report = world.sync("mine", "parity", "no_such", "mien")

    assert list(report.lock.tasks) == ["mine", "parity"]
    assert len(report.errors) == 2
    assert "there is no task 'mien' (did you mean 'mine'?)" in str(report.errors[1])


def test_a_missing_folder_is_the_configurations_fault(world: World) -> None:
    with pytest.raises(ConfigError, match="there is no folder"):
        sync_tasks(Tasks(folders=(str(world.tasks / "absent"),)), world.store, world.lock)


def test_a_task_no_longer_selected_leaves_the_lock_and_stays_in_the_store(world: World) -> None:
    path = world.write()
    locked = world.sync().lock.tasks["sums"]
    path.unlink()

    assert world.sync().lock.tasks == {}
    assert load_task(world.store, locked.task_id).name == "sums"


def test_the_lock_is_sorted_text_without_places(world: World) -> None:
    for n, name in enumerate(("zeta", "alpha", "mid")):
        world.write(name, doc_to_text=f"{n}{{{{q}}}}")
    world.sync()
    text = world.lock.read_text()

    assert list(json.loads(text)["tasks"]) == ["alpha", "mid", "zeta"]
    assert str(world.tasks) not in text
    assert text.endswith("}\n")


def test_a_newer_or_broken_lock_is_refused(world: World) -> None:
    assert read_lock(world.lock).tasks == {}
    world.lock.write_text('{"schema_version": 99, "tasks": {}}')
    with pytest.raises(SchemaError, match="schema version 99; this eval-platform reads up to 1"):
        read_lock(world.lock)
    for text in ("[]", "{", '{"schema_version": 1}', '{"schema_version": 1, "tasks": {"a": {}}}'):
        world.lock.write_text(text)
        with pytest.raises(SchemaError, match="is not a task lock"):
            read_lock(world.lock)


def test_a_store_that_a_newer_release_laid_out_is_refused_before_anything_is_written(world: World) -> None:
    world.write()
    world.store.create(layout.ROOT, b'{"schema_version": 1, "root_id": "x", "layout": 99}')
    with pytest.raises(SchemaError, match=r"layout version 99(.|\n)*upgrade"):
        world.sync()
    assert [entry.key for entry in world.store.list("")] == [layout.ROOT]


def test_an_unknown_or_altered_task_is_refused(world: World) -> None:
    world.write()
    locked = world.sync().lock.tasks["sums"]
    with pytest.raises(TaskError, match="task 0000 is not in"):
        load_task(world.store, "0000")

    other = world.write("other", documents={"file": "rows.jsonl", "sample": 4})
    theirs = layout.dataset_documents(build_task(other).dataset_id)
    world.sync()
    world.store.put(layout.dataset_documents(locked.dataset_id), world.store.read(theirs))
    with pytest.raises(SchemaError, match="is not what was frozen"):
        load_task(world.store, locked.task_id)
    world.store.put(layout.dataset_documents(locked.dataset_id), b"no parquet")
    with pytest.raises(SchemaError, match="cannot be read"):
        load_task(world.store, locked.task_id)


def test_prompts_are_kept_once(world: World) -> None:
    import pyarrow.parquet as pq

    items = list(render(build_task(world.write())))

    identity = write_prompts(world.store, items)

    assert identity == prompts_id(items) == write_prompts(world.store, items)
    rows = pq.read_table(world.store.path(layout.prompts(identity))).to_pylist()
    assert [row["prompt"] for row in rows] == [item.prompt for item in items]
    assert [row["sample_id"] for row in rows] == [item.document.sample_id for item in items]
    assert [row["target"] for row in rows] == [f"a{n}" for n in range(6)]


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.fixed_dictionaries({"q": st.text(), "a": st.text(), "more": _json}), min_size=3, max_size=6))
def test_a_snapshot_gives_back_what_was_frozen(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]
) -> None:
    world = World(tmp_path_factory.mktemp("snapshot"))
    world.rows(rows)
    built = build_task(world.write(documents={"file": "rows.jsonl"}, num_fewshot=0))
    locked = world.sync().lock.tasks["sums"]

    assert load_task(world.store, locked.task_id) == built
    assert json.dumps(frozen_rows(world.store, locked.dataset_id)) == json.dumps(
        [dict(sorted(row.items())) for row in rows]
    )
