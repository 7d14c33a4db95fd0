"""The driver killed, alone or with its worker, and several at once: every commit is adopted, nothing runs twice."""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from fault_tools import CONTROL, WORDS, Driver, Place, die_at_write, forked, sitecustomize, until

from eval_platform import launching, warehouse
from eval_platform.adopt import adopt
from eval_platform.drive import drive
from eval_platform.plan import Wanted, plan
from eval_platform.store import decisions, layout, process, tries
from eval_platform.tasks import read_lock

pytestmark = pytest.mark.slow

PAUSE = 70  # of 80 requests: one segment of 64 is journaled


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    place = Place(tmp_path_factory.mktemp("model"))
    return place.checkpoint()


@pytest.fixture
def place(tmp_path, model):
    one = Place(tmp_path)
    shutil.copytree(model, one.checkpoints / "a" / "step_1")
    one.write_task("sums")
    one.write_task("words", 6, **WORDS)
    one.sync()
    return one


def must_be_asked_once(place, requests):
    asked = place.asked()
    assert len(asked) == len(set(asked)) == requests


def must_be_decided_once(place):
    rows = place.sql("""select e.task, e.status, count(*) as decisions
        from evaluations e join decisions d using (evaluation_id, attempt) group by all order by all""")
    assert rows == [
        {"task": "sums", "status": "published", "decisions": 1},
        {"task": "words", "status": "published", "decisions": 1},
    ]
    assert len(place.commits()) == 2
    assert place.problems() == []


_DRIVER = """
import sys
from pathlib import Path
from fault_tools import Place
place = Place(Path(sys.argv[1]))
place.drive(place.arrive())
"""


def test_kill_9_of_the_driver_leaves_a_worker_that_commits_and_keeps_its_slot(place, tmp_path, monkeypatch):
    """All as installed: programs of their own, no fork of this process."""
    paths = [str(sitecustomize(tmp_path / "site")), str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    monkeypatch.setenv(CONTROL, str(place.control))
    place.command("pause_answer", PAUSE)
    driver = subprocess.Popen([sys.executable, "-c", _DRIVER, str(place.folder)])
    worker = place.paused()
    assert worker != driver.pid
    driver.kill()
    assert driver.wait() == -signal.SIGKILL

    config = place.config()
    with (config.state_dir / "slots" / "0").open("ab") as slot, pytest.raises(BlockingIOError):
        fcntl.flock(slot, fcntl.LOCK_EX | fcntl.LOCK_NB)
    said, outcomes = [], []
    todo = plan(place.arrive(), Wanted(read_lock(config.lock_path)), config, place.store)
    second = threading.Thread(
        target=lambda: outcomes.extend(drive(todo, config, place.store, actor="test", on_message=said.append))
    )
    second.start()
    until(lambda: any(one["type"] == "slot" for one in said), "the second driver to wait for the slot")
    (only,) = launching.running(config)
    assert (only.pid, only.is_orphan) == (worker, True)
    assert place.commits() == []

    place.revoke("pause_answer")
    second.join(120)

    assert [(o.task, o.status, o.linked) for o in outcomes] == [
        ("sums", "published", True),
        ("words", "published", True),
    ]
    assert {record["type"] for record in said} >= {"slot", "linked", "end"}
    assert place.loads() == 1
    must_be_asked_once(place, 80 + 6)
    must_be_decided_once(place)


def test_kill_9_of_driver_and_worker_at_once(place):
    with forked(place):
        arrival = place.arrive()
        place.command("pause_answer", PAUSE)
        driver = Driver(lambda: place.drive(arrival))
        worker = place.paused()
        os.kill(worker, signal.SIGKILL)
        driver.kill()
        place.revoke("pause_answer")
        journaled, asked = set(place.journaled()), len(place.asked())
        assert len(journaled) == 64

        outcomes = place.drive(arrival)

        assert [(o.task, o.status, o.linked) for o in outcomes] == [
            ("sums", "published", False),
            ("words", "published", False),
        ]
        assert journaled.isdisjoint(place.asked()[asked:])
        assert len(place.asked()) == asked + 80 - 64 + 6
        must_be_decided_once(place)


def test_killed_at_each_write_of_the_gate(place):
    """A commit whose driver died before, between or after the writes of its decision is adopted by the next."""
    with forked(place):
        worker = place.launch(place.arrive())
        assert worker.process.wait() == 0
        told = [message for messages in worker.messages() for message in messages]
        committed = {m["task"]: m["evaluation_id"] for m in told if m["type"] == "committed"}
        assert {row["status"] for row in place.sql("select status from evaluations")} == {"held"}
        fresh = place.folder / "fresh"
        shutil.copytree(place.results, fresh)
        n, died = 1, 0
        while died == n - 1:
            shutil.rmtree(place.results)
            shutil.copytree(fresh, place.results)
            catalog = place.config(f"state {n}").catalog_path

            def decide(n=n, catalog=catalog):
                die_at_write(n)
                warehouse.refresh(place.store, catalog)
                adopt(place.store, catalog, committed["sums"], 1, "the killed")

            died += Driver(decide).wait() == -signal.SIGKILL
            assert [o.status for o in place.drive(place.arrive())] == ["published", "published"]
            (key,) = [e.key for e in place.store.list(layout.decision_folder(committed["sums"]))]
            assert layout.parse_decision(key) == (1, 1)
            standing = decisions.standing(place.store, committed["sums"], 1)
            assert standing is not None
            assert standing.actor == ("test" if died == n else "the killed")
            n += 1
        assert n > 3
        must_be_decided_once(place)


def test_two_platforms_on_one_folder_and_one_results_root(place):
    place.lease_seconds = 1.0

    def until_done(state):
        def run():
            arrival = place.arrive(state=state)
            assert arrival.n == 1
            while any(o.status != "published" for o in place.drive(arrival, state=state)):
                pass

        return run

    with forked(place):
        both = [Driver(until_done(state)) for state in ("one", "other")]
        assert [driver.wait() for driver in both] == [0, 0]

    must_be_asked_once(place, 80 + 6)
    must_be_decided_once(place)
    board = place.board(state="one")
    assert len(board) == 2
    assert board == place.board(state="other")
    rows = place.sql("select key, n from arrivals", state="other")
    assert rows == [{"key": "runs/a/step_1", "n": 1}]
    for row in place.sql("select evaluation_id from evaluations"):
        told = tries.history(place.store, tries.evaluation_subject(row["evaluation_id"], 1))
        assert [t.outcome for t in told] == ["committed"]


def test_after_a_restart_of_the_machine_the_lease_passes_on_by_its_ttl(place, monkeypatch):
    """Process numbers of another boot say nothing: nobody can be known dead, and silence must do."""
    place.lease_seconds = 1.0
    with forked(place):
        arrival = place.arrive()
        place.command("pause_answer", PAUSE)
        worker = place.launch(arrival)
        place.paused()
        worker.process.kill()
        worker.process.wait()
        place.revoke("pause_answer")
        asked = len(place.asked())
        monkeypatch.setattr(process, "_machine", lambda: "another boot of this kernel")

        assert [o.status for o in place.drive(arrival)] == ["published", "published"]

    assert len(place.asked()) == asked + 80 - 64 + 6
    must_be_decided_once(place)
