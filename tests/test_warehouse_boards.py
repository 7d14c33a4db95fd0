"""What the boards show, and what they never show."""

import pytest
from warehouse_world import World, rows

from eval_platform import warehouse
from eval_platform.store import commits

BOARD = "select key, task, value, attempt from leaderboard order by key, task"
CURVE = "select key, task_id, value from learning_curves where is_primary order by key, task_id"


@pytest.fixture
def world(tmp_path):
    world = World(tmp_path)
    world.task("add", "add-1")
    world.arrive("r/run/1", "A", step=1)
    return world


def ask(world, sql):
    return rows(warehouse.query(world.catalog, world.store, sql))


def test_an_undecided_commit_is_held_and_a_decided_one_is_on_the_board(world):
    evaluation = world.commit("A", "add", "add-1", 0.5)
    assert ask(world, BOARD) == []
    assert ask(world, "select task, reasons from held") == [("add", ["not decided yet: the gate has not run"])]
    world.decide(evaluation)
    assert ask(world, BOARD) == [("r/run/1", "add", 0.5, 1)]
    assert ask(world, "select count(*) from held") == [(0,)]


def test_a_row_of_the_board_has_the_number_its_interval_and_its_origin(world):
    evaluation = world.publish("A", "add", "add-1", 0.5)
    [row] = warehouse.query(world.catalog, world.store, "select * from leaderboard").to_pylist()
    expected = {
        "key": "r/run/1",
        "run": "run",
        "step": 1,
        "tokens_seen": None,
        "task": "add",
        "subset": "",
        "metric": "acc",
        "value": 0.5,
        "standard_error": 0.05,
        "ci_low": 0.1,
        "ci_high": 0.9,
        "interval_method": "wilson",
        "n": 100,
        "higher_is_better": True,
        "chance": 0.25,
        "warnings": ["chance: at chance"],
        "checkpoint_id": "A",
        "task_id": "add-1",
        "settings_id": "s",
        "evaluation_id": evaluation,
        "attempt": 1,
    }
    assert {name: row[name] for name in expected} == expected
    assert ask(world, "select settings ->> 'dtype', versions ->> 'torch', started_at::varchar from evaluations") == [
        ("float32", "2.13", "2026-01-02 03:04:05.000006+00")
    ]


def test_release_retract_and_rerun_change_the_board(world):
    evaluation = world.commit("A", "add", "add-1", 0.5)
    world.decide(evaluation, "held")
    assert ask(world, BOARD) == []
    assert ask(world, "select reasons from held") == [(["a NaN"],)]
    world.decide(evaluation, "published", action="release")
    assert ask(world, BOARD) == [("r/run/1", "add", 0.5, 1)]
    world.decide(evaluation, "held", action="retract")
    assert ask(world, BOARD) == []
    assert ask(world, "select n, stands, action from decisions order by n") == [
        (1, False, "gate"),
        (2, False, "release"),
        (3, True, "retract"),
    ]
    commits.open_rerun(world.store, evaluation, "test", "the engine was mended")
    world.publish("A", "add", "add-1", 0.7, attempt=2)
    assert ask(world, BOARD) == [("r/run/1", "add", 0.7, 2)]
    # The lowest attempt that stands published is the one shown.
    world.decide(evaluation, "published", action="release")
    assert ask(world, BOARD) == [("r/run/1", "add", 0.5, 1)]


def test_a_copy_under_another_key_stands_on_its_own_run(world):
    world.publish("A", "add", "add-1", 0.5)
    world.arrive("r/copy/9", "A", step=9, run="copy")
    assert ask(world, "select key, run, step, value from leaderboard order by key") == [
        ("r/copy/9", "copy", 9, 0.5),
        ("r/run/1", "run", 1, 0.5),
    ]


def test_weights_a_b_a_again_under_one_key(world):
    world.publish("A", "add", "add-1", 0.5)
    world.arrive("r/run/1", None)  # not staged yet: the newest that is known by content stays
    assert ask(world, BOARD) == [("r/run/1", "add", 0.5, 1)]
    world.arrive("r/run/1", "B")
    assert ask(world, BOARD) == []
    world.publish("B", "add", "add-1", 0.8)
    assert ask(world, BOARD) == [("r/run/1", "add", 0.8, 1)]
    world.arrive("r/run/1", "A")
    assert ask(world, BOARD) == [("r/run/1", "add", 0.5, 1)]
    assert ask(world, "select n from arrivals order by n") == [(1,), (2,), (3,), (4,)]


def test_a_changed_task_makes_rows_stale_and_no_curve_joins_two_definitions(world):
    world.publish("A", "add", "add-1", 0.5)
    world.task("add", "add-2")
    assert ask(world, BOARD) == []
    assert ask(world, "select stale from evaluations") == [(True,)]
    world.publish("A", "add", "add-2", 0.6)
    assert ask(world, BOARD) == [("r/run/1", "add", 0.6, 1)]
    assert ask(world, CURVE) == [("r/run/1", "add-1", 0.5), ("r/run/1", "add-2", 0.6)]
    assert ask(world, "select task_id from learning_curves where stale group by all") == [("add-1",)]
    world.task("add", "add-1")  # the definition comes back
    assert ask(world, BOARD) == [("r/run/1", "add", 0.5, 1)]
    assert ask(world, "select task_id, stale from evaluations order by 1") == [("add-1", False), ("add-2", True)]


def test_trials_with_a_limit_are_on_no_board(world):
    evaluation = world.publish("A", "add", "add-1", 0.5, limit=5, settings_id="limited")
    assert ask(world, BOARD) == ask(world, CURVE) == []
    assert ask(world, "select evaluation_id, status, item_limit from evaluations") == [(evaluation, "published", 5)]


def test_the_board_is_unique_and_shows_every_setting(world):
    world.publish("A", "add", "add-1", 0.5)
    world.publish("A", "add", "add-1", 0.6, settings_id="half")
    world.task("same", "add-1")  # a second name for the same definition
    found = ask(world, "select key, task, subset, metric, settings_id from leaderboard")
    assert len(found) == len(set(found)) == 4


def test_curves_have_every_metric_and_subset(world):
    world.publish("A", "add", "add-1", 0.5)
    assert ask(world, "select metric, subset from learning_curves order by all") == [
        ("acc", ""),
        ("acc", "hard"),
        ("f1", ""),
    ]


def test_what_failed_for_good_is_listed_with_its_class(world):
    gone = world.arrive("r/run/2", None, step=2)
    world.fail(("arrivals", gone.key, gone.n), "gone")
    world.fail(("evaluations", "e" * 32, 1), key="r/run/1", arrival=1, task="add", task_id="add-1", checkpoint_id="A")
    assert ask(world, "select key, step, task, failure_class, reason, attempt from failed order by key") == [
        ("r/run/1", 1, "add", "deterministic", "it was deterministic", 1),
        ("r/run/2", 2, None, "gone", "it was gone", None),
    ]
    assert ask(world, "select status, task_id, reasons from evaluations") == [
        ("failed", "add-1", ["it was deterministic"])
    ]
    assert ask(world, "select key, n, reason from failed_arrivals") == [("r/run/2", 1, "it was gone")]


def test_a_retry_takes_the_failure_away(world):
    from eval_platform.store import tries

    subject = ("evaluations", "e" * 32, 1)
    world.fail(subject, key="r/run/1", arrival=1, task="add")
    assert ask(world, "select count(*) from failed") == [(1,)]
    tries.retry(world.store, subject, "test", "the disk was swapped")
    assert ask(world, "select count(*) from failed") == [(0,)]


def test_a_damaged_record_hides_only_itself(world):
    world.publish("A", "add", "add-1", 0.5)
    broken = world.publish("A", "add", "add-1", 0.6, settings_id="other")
    path = world.store.path(f"evaluations/{broken}/1.json")
    good = path.read_bytes()
    for bad, said in (
        (b"{", "not a record"),
        (b'{"schema_version": 99}', "upgrade"),
        (good.replace(b'"n_tokens": 50', b'"n_tokens": "many"'), "type"),
    ):
        path.write_bytes(bad)
        warehouse.rebuild(world.store, world.catalog)
        assert ask(world, BOARD) == [("r/run/1", "add", 0.5, 1)]
        [(subject, reason)] = ask(world, "select subject, reason from problems")
        assert subject == f"evaluation:{broken}"
        assert said in reason
    path.write_bytes(good)
    # No log entry says that it was mended: it is looked at again all the same.
    assert len(ask(world, BOARD)) == 2
    assert ask(world, "from problems") == []
