"""A power cut under a whole running platform, and its daemon killed between tick and run: all goes on by itself."""

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

    def runs(self, arrival: str) -> list[str]:
        """Statuses of Dagster's runs for one arrival, newest first."""
        query = f"""{{ runsOrError(filter: {{tags: [{{key: "eval/arrival", value: "{arrival}"}}]}}) {{
            ... on Runs {{ results {{ status }} }} }} }}"""
        request = urllib.request.Request(
            f"{self.known()['url']}/graphql",
            json.dumps({"query": query}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return [run["status"] for run in json.load(answer)["data"]["runsOrError"]["results"]]


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


def ended(statuses):
    return bool(statuses) and set(statuses) <= {"SUCCESS", "FAILURE", "CANCELED"} and statuses[0] == "SUCCESS"


def test_power_cut_in_mid_task_and_daemon_killed_between_tick_and_run(place, up):
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
    assert len(place.asked()) == asked + 80 - 64 + 80
    assert place.problems(state="onlooker") == []
