"""A power cut under a whole running platform, its daemon killed between tick and run, a run ended by a person."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import urllib.request
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from fault_tools import CONTROL, Place, sitecustomize, until
from tiny_models import make_checkpoint

from eval_platform.store import layout, tries

pytestmark = [pytest.mark.slow, pytest.mark.dagster, pytest.mark.timeout(900)]

PAUSE = 70  # of 80 requests: one segment of 64 is journaled
PATIENCE_S = 300.0  # Dagster notices a dead run after 30 to 60 s on an idle machine


class Up:
    """`eval-platform up`, as a person starts it."""

    def __init__(self, place: Place) -> None:
        self.place = place
        root = Path(__file__).parent.parent
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(place.folder / "site"), str(root)]),
            CONTROL: str(place.control),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        program = [sys.executable, "-c", "from eval_platform.cli import main; main()"]
        with (place.folder / "up.log").open("ab") as output:
            self.process = subprocess.Popen(
                [*program, "--config", str(place.folder / "eval_platform.toml"), "up"],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=place.folder,
                start_new_session=True,
            )

    def tree(self) -> list[psutil.Process]:
        me = psutil.Process(self.process.pid)
        return [me, *me.children(recursive=True)]

    def cut_power(self) -> None:
        """kill -9 of every process at once."""
        tree = self.tree()
        for signal_ in (signal.SIGSTOP, signal.SIGKILL):  # stopped first, so that none sees another die
            for process in tree:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(signal_)
        psutil.wait_procs(tree[1:], timeout=30)
        assert self.process.wait(30) == -signal.SIGKILL

    def known(self) -> dict:
        """What `up` says of itself."""
        return json.loads((self.place.config().state_dir / "up.json").read_text())

    def end(self) -> None:
        if self.process.poll() is not None:
            return
        tree = self.tree()
        self.process.send_signal(signal.SIGTERM)  # as a service manager stops it
        _, alive = psutil.wait_procs(tree, timeout=60)
        for process in alive:
            process.kill()
        assert not alive, "SIGTERM left processes behind"

    def ask(self, query: str) -> dict:
        """What the web server answers, as the UI asks it."""
        request = urllib.request.Request(
            f"{self.known()['url']}/graphql",
            json.dumps({"query": query}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["data"]

    def runs(self, arrival: str) -> dict[str, str]:
        """Dagster's runs for one arrival, newest first, and their statuses."""
        query = f"""{{ runsOrError(filter: {{tags: [{{key: "eval/arrival", value: "{arrival}"}}]}}) {{
            ... on Runs {{ results {{ runId status }} }} }} }}"""
        return {run["runId"]: run["status"] for run in self.ask(query)["runsOrError"]["results"]}

    def end_run(self, run: str) -> None:
        """As the UI's button does it."""
        query = f'mutation {{ terminateRun(runId: "{run}", terminatePolicy: SAFE_TERMINATE) {{ __typename }} }}'
        assert self.ask(query)["terminateRun"]["__typename"] == "TerminateRunSuccess"

    def printed(self, run: str) -> str:
        """The standard output that the run's page shows."""
        query = f"""{{ logsForRun(runId: "{run}") {{ ... on EventConnection {{ events {{
            ... on LogsCapturedEvent {{ fileKey }} }} }} }} }}"""
        (key,) = [event["fileKey"] for event in self.ask(query)["logsForRun"]["events"] if "fileKey" in event]
        query = f'{{ capturedLogs(logKey: ["{run}", "compute_logs", "{key}"]) {{ stdout }} }}'
        return self.ask(query)["capturedLogs"]["stdout"]


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


def is_slot_free(place):
    with (place.config().state_dir / "slots" / "0").open("ab") as slot:
        try:
            fcntl.flock(slot, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def test_power_cut_in_mid_task_daemon_killed_between_tick_and_run_and_a_run_ended_by_a_person(place, up):
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
    after.end_run(run)
    until(lambda: is_slot_free(place) and not psutil.pid_exists(worker), "the worker to leave", 10.0)
    until(lambda: after.runs(f"{third}@1") == {run: "CANCELED"}, "the run to be cancelled", PATIENCE_S)
    place.revoke("pause_answer")
    assert len(place.journaled()) == journaled + PAUSE

    rows = place.sql(
        "select a.key, a.n, attempt, status, evaluation_id from evaluations e "
        "join arrivals a using (checkpoint_id) order by all",
        state="onlooker",
    )
    assert [(row["key"], row["n"], row["attempt"], row["status"]) for row in rows] == [
        (first, 1, 1, "published"),
        (second, 1, 1, "published"),
    ]
    assert [row[0] for row in place.board(state="onlooker")] == [first, second]
    assert len(place.commits()) == 2
    outcomes = [
        [told.outcome for told in tries.history(place.store, tries.evaluation_subject(row["evaluation_id"], 1))]
        for row in rows
    ]
    assert outcomes == [[None, "committed"], ["committed"]]
    assert len(place.asked()) == asked + 80 - 64 + 80 + 80
    assert place.problems(state="onlooker") == []
