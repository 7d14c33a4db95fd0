"""The catalog is a mirror: refreshed step by step it says what one built from the files alone says."""

import contextlib
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_processes import kill_after
from warehouse_world import World, commit_record, dump, evaluation_id, rows, task_record

from eval_platform import warehouse
from eval_platform.errors import QueryError, StoreError
from eval_platform.store import LocalStore, create_record, layout, roots, tries
from eval_platform.warehouse.connection import open_catalog

KEYS, CONTENTS, TASK_IDS, ATTEMPTS = ("r/a", "r/a/b"), ("A", "B"), ("t1", "t2"), (1, 2)
VALUES = {
    (c, t, k): round(0.1 + 0.2 * i, 1)
    for i, (c, t, k) in enumerate((c, t, k) for c in CONTENTS for t in TASK_IDS for k in ATTEMPTS)
}


def arrival_file(key, n):
    fields = {"key": key, "n": n, "fingerprint": f"f{n}", "uri": "u", "run": "run", "step": n, "tags": {"a": "b"}}
    return {"kind": "arrival", "key": key, "n": n}, layout.arrival(key, n), fields


def identity_file(key, n, content):
    record = {"checkpoint_id": content, "weights_id": f"w-{content}"}
    return {"kind": "identity", "key": key, "n": n}, layout.arrival_identity(key, n), record


def commit_file(content, task_id, attempt):
    record = commit_record(content, "t", task_id, VALUES[content, task_id, attempt], attempt)
    identity = record["evaluation_id"]
    entry = {"kind": "evaluation", "evaluation_id": identity, "attempt": attempt}
    return entry, layout.evaluation(identity, attempt), record


def decision_file(content, task_id, attempt, n, status):
    identity = evaluation_id(content, task_id)
    record = {"status": status, "checks": [{"name": "c", "passed": True, "severity": "error"}], "reasons": [], "n": n}
    entry = {"kind": "decision", "evaluation_id": identity, "attempt": attempt, "n": n}
    return entry, layout.decision(identity, attempt, n), record


def task_file(n, task_id):
    return {"kind": "task", "name": "t", "n": n}, layout.task_name("t", n), task_record(task_id)


FILES = st.one_of(
    st.builds(arrival_file, st.sampled_from(KEYS), st.integers(1, 3)),
    st.builds(identity_file, st.sampled_from(KEYS), st.integers(1, 3), st.sampled_from(CONTENTS)),
    st.builds(commit_file, st.sampled_from(CONTENTS), st.sampled_from(TASK_IDS), st.sampled_from(ATTEMPTS)),
    st.builds(
        decision_file,
        st.sampled_from(CONTENTS),
        st.sampled_from(TASK_IDS),
        st.sampled_from(ATTEMPTS),
        st.integers(1, 2),
        st.sampled_from(["published", "held"]),
    ),
    st.builds(task_file, st.integers(1, 3), st.sampled_from(TASK_IDS)),
)
# (what, when its file follows its log entry: at once, later, or never because the writer crashed; day of its clock)
WRITES = st.tuples(FILES, st.sampled_from(["now", "now", "later", "never"]), st.sampled_from([-1, 0, 0, 1]))
STEPS = st.lists(st.one_of(WRITES, WRITES, st.just("refresh"), st.just("deliver")), min_size=4, max_size=24)


def announce(store, entry, day):
    date = (datetime.now(UTC) + timedelta(days=day)).date().isoformat()
    assert create_record(store, layout.log_entry(date, "120000.0", os.urandom(6).hex()), entry)


def expected_board(files):
    """The leaderboard by the contract's words, from the records alone."""
    names = {key: record for key, record in files.items() if key.startswith("tasks/by-name/t/")}
    current = names[max(names)]["task_id"] if names else None
    standing = {}
    for content, task_id, attempt in VALUES:
        identity = evaluation_id(content, task_id)
        decisions = [files[k] for n in (1, 2) if (k := layout.decision(identity, attempt, n)) in files]
        if layout.evaluation(identity, attempt) in files and decisions and decisions[-1]["status"] == "published":
            standing.setdefault((content, task_id), attempt)  # attempts ascend: the lowest is first
    board = []
    for key in KEYS:
        known = [n for n in (1, 2, 3) if layout.arrival(key, n) in files and layout.arrival_identity(key, n) in files]
        if known:
            content = files[layout.arrival_identity(key, known[-1])]["checkpoint_id"]
            attempt = standing.get((content, current))
            if current and attempt:
                board.append((key, known[-1], VALUES[content, current, attempt], attempt))
    return sorted(board)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(STEPS)
def test_a_refreshed_catalog_equals_one_rebuilt_from_files_alone(steps):
    folder = Path(tempfile.mkdtemp())
    try:
        world, files, awaited = World(folder), {}, []

        def deliver(key, record):
            if create_record(world.store, key, record):
                files[key] = record

        for step in steps:
            if step == "refresh":
                warehouse.refresh(world.store, world.catalog)
            elif step == "deliver":
                for key, record in awaited:
                    deliver(key, record)
                awaited.clear()
            else:
                (entry, key, record), when, day = step
                announce(world.store, entry, day)
                if when == "now":
                    deliver(key, record)
                elif when == "later":
                    awaited.append((key, record))
        warehouse.refresh(world.store, world.catalog)
        rebuilt = folder / "rebuilt.duckdb"
        warehouse.rebuild(world.store, rebuilt)
        assert dump(world.catalog) == dump(rebuilt)
        assert not warehouse.behind(world.store, world.catalog)
        con = open_catalog(world.catalog)
        board = con.execute("select key, step, value, attempt from leaderboard order by all").fetchall()
        con.close()
        assert board == expected_board(files)
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def world(tmp_path):
    world = World(tmp_path)
    world.task("add", "add-1")
    world.arrive("r/run/1", "A", step=1)
    return world


def published(world):
    return warehouse.query(world.catalog, world.store, "select * from evaluations where shown").num_rows


def test_a_refresh_with_nothing_new_leaves_the_file_alone(world):
    assert warehouse.behind(world.store, world.catalog)
    assert warehouse.refresh(world.store, world.catalog)
    before = world.catalog.stat()
    assert not warehouse.behind(world.store, world.catalog)
    assert not warehouse.refresh(world.store, world.catalog)
    assert (world.catalog.stat().st_ino, world.catalog.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    world.publish("A", "add", "add-1")
    assert warehouse.behind(world.store, world.catalog)


@pytest.mark.parametrize("back", [timedelta(hours=1), timedelta(days=1)])
def test_a_clock_that_steps_back_loses_nothing(world, back):
    warehouse.refresh(world.store, world.catalog)
    entry, key, record = commit_file("A", "t1", 1)
    then = datetime.now(UTC) - back
    create_record(world.store, layout.log_entry(then.date().isoformat(), then.strftime("%H%M%S.%f"), "ab"), entry)
    create_record(world.store, key, record)
    assert warehouse.refresh(world.store, world.catalog)
    assert rows(warehouse.query(world.catalog, world.store, "select evaluation_id from evaluations")) == [
        (record["evaluation_id"],)
    ]


def test_a_catalog_left_alone_for_a_week_lists_every_day_since(world):
    warehouse.refresh(world.store, world.catalog)
    import duckdb

    con = duckdb.connect(str(world.catalog))
    today = datetime.now(UTC).date()
    con.execute("update bookkeeping.meta set refreshed_on = ?", [(today - timedelta(days=7)).isoformat()])
    con.close()
    entry, key, record = commit_file("A", "t1", 1)
    announce(world.store, entry, -5)
    create_record(world.store, key, record)
    assert warehouse.refresh(world.store, world.catalog)
    assert warehouse.query(world.catalog, world.store, "from evaluations").num_rows == 1


def test_three_silent_deaths_are_a_failure_though_nobody_logs_it(world):
    subject = ("evaluations", "e" * 32, 1)
    for _ in range(tries.MAX_TRIES):
        kill_after(lambda: tries.start(world.store, subject, evaluation={"task": "add"}))
        warehouse.refresh(world.store, world.catalog)
    assert rows(warehouse.query(world.catalog, world.store, "select task, failure_class from failed")) == [
        ("add", "infrastructure")
    ]


def test_a_store_made_anew_or_a_damaged_catalog_is_built_from_nothing(world):
    roots.open_root(world.store)
    world.publish("A", "add", "add-1")
    assert published(world) == 1
    world.catalog.write_bytes(b"no database at all")
    assert published(world) == 1
    shutil.rmtree(world.store.folder)
    roots.open_root(world.store)
    assert published(world) == 0


def test_what_a_killed_refresh_left_is_cleared_away(world):
    warehouse.refresh(world.store, world.catalog)
    left = world.catalog.with_name(f"{world.catalog.name}.0123.next")
    left.write_bytes(b"half")
    world.publish("A", "add", "add-1")
    warehouse.refresh(world.store, world.catalog)
    assert sorted(path.name for path in world.catalog.parent.iterdir()) == ["catalog.duckdb", "catalog.duckdb.lock"]


def test_an_unknown_log_entry_is_a_problem_not_a_crash(world):
    announce(world.store, {"kind": "telepathy"}, 0)
    world.publish("A", "add", "add-1")
    assert published(world) == 1
    [(reason,)] = rows(warehouse.query(world.catalog, world.store, "select reason from problems"))
    assert "telepathy" in reason


def test_a_catalog_that_cannot_be_written_names_file_and_remedy(world, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(StoreError, match=r"catalog.*\n  remedy"):
        warehouse.refresh(world.store, blocked / "catalog.duckdb")


def test_readers_see_every_refresh_and_are_never_locked_out(world):
    """Readers of this process and of another one, while a third writes and refreshes."""
    warehouse.refresh(world.store, world.catalog)
    spawn = multiprocessing.get_context("spawn")
    done, counted = spawn.Event(), spawn.SimpleQueue()
    args = (world.store.uri, str(world.catalog))
    writer = spawn.Process(target=write_and_refresh, args=(*args, 6))
    reader = spawn.Process(target=read_until, args=(*args, done, counted))
    here, errors = [], []

    def read():
        try:
            while not done.is_set():
                here.append(count(world.catalog))
        except Exception as error:  # noqa: BLE001 -- an error in a thread is this test's finding
            errors.append(error)

    threads = [threading.Thread(target=read) for _ in range(2)]
    for one in (writer, reader, *threads):
        one.start()
    writer.join(120)
    time.sleep(0.2)
    done.set()
    for thread in threads:
        thread.join(60)
    there = counted.get()
    reader.join(60)
    assert (writer.exitcode, reader.exitcode, errors) == (0, 0, [])
    assert there == sorted(there)
    # Two threads append in turn, so order is not asked of them; the last look must be the newest file.
    assert count(world.catalog) == here[-1] == 6


def count(catalog):
    con = open_catalog(catalog)
    try:
        [(n,)] = con.execute("select count(*) from evaluations").fetchall()
        return n
    finally:
        con.close()


def write_and_refresh(uri, catalog, n):
    world = World(Path(catalog).parent)
    world.store, world.catalog = LocalStore(uri), Path(catalog)
    for i in range(n):
        world.publish("A", "add", "add-1", settings_id=f"s{os.getpid()}-{i}")
        warehouse.refresh(world.store, world.catalog)


def read_until(uri, catalog, done, counted):
    seen = []
    while not done.is_set():
        seen.append(count(Path(catalog)))
    counted.put(seen)


def test_two_refreshers_at_once_lose_nothing(world):
    spawn = multiprocessing.get_context("spawn")
    writers = [spawn.Process(target=write_and_refresh, args=(world.store.uri, str(world.catalog), 4)) for _ in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(120)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert count(world.catalog) == 8
    assert not warehouse.behind(world.store, world.catalog)


def test_a_query_does_not_wait_for_ever_for_a_refresher_that_sleeps(world):
    warehouse.refresh(world.store, world.catalog)
    world.publish("A", "add", "add-1")
    spawn = multiprocessing.get_context("spawn")
    locked = spawn.Event()
    sleeper = spawn.Process(target=lock_and_sleep, args=(str(world.catalog), locked))
    sleeper.start()
    try:
        assert locked.wait(60)
        assert published(world) == 0  # the catalog as it is, rather than none
    finally:
        sleeper.kill()
        sleeper.join(60)
    assert published(world) == 1


def lock_and_sleep(catalog, locked):
    import fcntl

    descriptor = os.open(f"{catalog}.lock", os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    locked.set()
    with contextlib.suppress(KeyboardInterrupt):
        time.sleep(300)


def test_without_a_catalog_a_connection_says_so(world):
    with pytest.raises(QueryError, match="no catalog"):
        warehouse.connect(world.catalog, world.store)
