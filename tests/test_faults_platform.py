"""A power cut under a whole running platform, its daemon killed between tick and run, a run ended by a person."""

import fcntl
import os
import signal
import sys
from pathlib import Path

import psutil
import pytest
from fault_tools import CONTROL, Place, sitecustomize, until
from kubernetes_server import api_server, manifest_that_mounts
from running_platform import Up
from tiny_models import make_checkpoint

from eval_platform.status import status
from eval_platform.store import layout, tries
from eval_platform.tasks import read_lock

pytestmark = [pytest.mark.slow, pytest.mark.dagster, pytest.mark.timeout(900)]

PAUSE = 70  # of 80 requests: one segment of 64 is journaled
PATIENCE_S = 300.0  # Dagster notices a dead run after 30 to 60 s on an idle machine


@pytest.fixture
def place(tmp_path):
    one = Place(tmp_path)
    sitecustomize(tmp_path / "site")
    one.write_task("sums")
    (tmp_path / "eval_platform.toml").write_text("""
        results = "results"
        state = "state"
        checkpoints = [{name = "runs", path = "checkpoints", require_success = true, quiet_seconds = 0}]
        tasks = {folders = ["tasks"]}
        engine = {device = "cpu", dtype = "float32", max_length = 256}
        sensor = {interval_seconds = 1}
    """)
    return one


@pytest.fixture
def up(place):
    """Starts the platform, as often as called; nothing of it is left at the end."""
    started = []

    def start() -> Up:
        started.append(Up(place))
        return started[-1]

    yield start
    for one in started:
        one.end()


def drop(place, step):
    folder = make_checkpoint(place.checkpoints / "a" / f"step_{step}", seed=step)
    (folder / "_SUCCESS").touch()
    return f"runs/a/step_{step}"


def decided(place):
    return [entry.key for entry in place.store.list("decisions/")]


def ended(runs):
    statuses = list(runs.values())
    return bool(statuses) and set(statuses) <= {"SUCCESS", "FAILURE", "CANCELED"} and statuses[0] == "SUCCESS"


def told(place, key):
    """What `eval-platform status` says of one checkpoint."""
    found = status(place.config("onlooker"), place.store, read_lock(place.config().lock_path))
    return next(one for one in found if one.key == key)


def is_slot_free(place):
    with (place.config().state_dir / "slots" / "0").open("ab") as slot:
        try:
            fcntl.flock(slot, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """A made-up Kubernetes, whose pods obey `place` as the platform's own workers do."""
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    with api_server(tmp_path) as one:
        path = os.pathsep.join([str(tmp_path / "site"), str(Path(__file__).parent.parent)])
        environment = {"PYTHONPATH": path, CONTROL: str(tmp_path / "control"), "OMP_NUM_THREADS": "1"}
        one.runs([sys.executable, "-m", "eval_platform.worker"], environment)
        yield one


def test_power_cut_in_mid_task_daemon_killed_between_tick_and_run_and_a_run_ended_by_a_person(place, cluster, up):
    first = drop(place, 1)
    place.command("pause_answer", PAUSE)
    before = up()
    worker = place.paused(PATIENCE_S)
    assert worker in {process.pid for process in before.tree()}
    before.cut_power()
    place.revoke("pause_answer")
    journaled, asked = set(place.journaled()), len(place.asked())
    assert len(journaled) == 64
    assert place.commits() == decided(place) == []

    after = up()
    until(lambda: len(decided(place)) == 1, "the first checkpoint to be decided", PATIENCE_S)
    assert journaled.isdisjoint(place.asked()[asked:])
    assert len(place.asked()) == asked + 80 - 64
    until(lambda: ended(after.runs(f"{first}@1")), "no run to be left as started", PATIENCE_S, every_s=2)

    second = drop(place, 2)
    arrived = place.store.path(layout.arrival(second, 1))
    until(arrived.exists, "a tick to register the second checkpoint", PATIENCE_S)
    killed = after.known()["processes"]["daemon"]["pid"]
    os.kill(killed, signal.SIGKILL)  # the run is asked for when the tick has ended
    until(lambda: len(decided(place)) == 2, "the second checkpoint to be decided", PATIENCE_S)
    assert after.known()["processes"]["daemon"]["pid"] != killed
    until(lambda: ended(after.runs(f"{second}@1")), "no run to be left as started", PATIENCE_S, every_s=2)
    assert "threads" in after.printed(next(iter(after.runs(f"{second}@1"))))  # of the worker's own log

    # Ended by a person in the UI: the worker is gone and its slot free within 10 s, and what it answered is kept.
    third = drop(place, 3)
    journaled = len(place.journaled())
    place.command("pause_answer", PAUSE)
    worker = place.paused(PATIENCE_S)
    assert not is_slot_free(place)
    (run,) = after.runs(f"{third}@1")
    assert after.process_of(run).ppid() == after.known()["processes"]["run_nursery"]["pid"]  # ready since long
    after.end_run(run)
    until(lambda: is_slot_free(place) and not psutil.pid_exists(worker), "the worker to leave", 10.0)
    until(lambda: after.runs(f"{third}@1") == {run: "CANCELED"}, "the run to be cancelled", PATIENCE_S)
    place.revoke("pause_answer")
    assert len(place.journaled()) == journaled + PAUSE

    # Nothing begins it again, and `status` says so; a person does.
    until(lambda: told(place, third).state == "missing", "status to say that nobody comes back to it", PATIENCE_S)
    assert f"run {run[:8]} was cancelled" in told(place, third).reason
    after.execute_again(run)
    until(lambda: len(decided(place)) == 3, "the third checkpoint to be decided", PATIENCE_S)
    until(lambda: ended(after.runs(f"{third}@1")), "no run to be left as started", PATIENCE_S, every_s=2)
    assert len(after.runs(f"{third}@1")) == 2
    assert told(place, third).state == "published"

    # The same where workers are jobs of Kubernetes: the pod is told to leave, and its job is deleted.
    with (place.folder / "eval_platform.toml").open("a") as more:
        more.write(f"""
            [worker]
            launcher = "kubernetes"
            [kubernetes]
            image = "registry.example.org/worker:1"
            gpus = 0
            manifest = "{manifest_that_mounts(place.folder)}"
            cache = "{place.folder / "cache"}"
        """)
    fourth = drop(place, 4)
    place.command("pause_answer", PAUSE)
    worker = place.paused(PATIENCE_S)
    assert [process.pid for process in cluster.processes.values()] == [worker]
    (run,) = after.runs(f"{fourth}@1")
    after.end_run(run)
    until(lambda: not cluster.jobs and not psutil.pid_exists(worker), "the job to be deleted", 10.0)
    until(lambda: after.runs(f"{fourth}@1") == {run: "CANCELED"}, "the run to be cancelled", PATIENCE_S)
    place.revoke("pause_answer")
    assert len(place.journaled()) == journaled + 80 + PAUSE

    rows = place.sql(
        "select a.key, a.n, attempt, status, evaluation_id from evaluations e "
        "join arrivals a using (checkpoint_id) order by all",
        state="onlooker",
    )
    assert [(row["key"], row["n"], row["attempt"], row["status"]) for row in rows] == [
        (first, 1, 1, "published"),
        (second, 1, 1, "published"),
        (third, 1, 1, "published"),
    ]
    assert [row[0] for row in place.board(state="onlooker")] == [first, second, third]
    assert len(place.commits()) == 3
    outcomes = [
        [told.outcome for told in tries.history(place.store, tries.evaluation_subject(row["evaluation_id"], 1))]
        for row in rows
    ]
    assert outcomes == [[None, "committed"], ["committed"], ["interrupted", "committed"]]
    assert len(place.asked()) == asked + 80 - 64 + 80 + 2 * 80 + 80 - PAUSE
    assert place.problems(state="onlooker") == []
