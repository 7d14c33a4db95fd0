"""`eval-platform up` as a process of its own, and what its web server answers."""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from contextlib import suppress
from pathlib import Path

import psutil
from fault_tools import CONTROL, Place

from resources.run_launcher import PROCESS_TAG


class Up:
    """`eval-platform up`, as a person starts it. The place has an eval_platform.toml, and where its workers are not to
    be quite the platform's own a folder `site`."""

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

    def process_of(self, run: str) -> psutil.Process:
        """That of a run which works."""
        query = f'{{ runOrError(runId: "{run}") {{ ... on Run {{ tags {{ key value }} }} }} }}'
        tags = {tag["key"]: tag["value"] for tag in self.ask(query)["runOrError"]["tags"]}
        return psutil.Process(json.loads(tags[PROCESS_TAG])["pid"])

    def end_run(self, run: str) -> None:
        """As the UI's button does it."""
        query = f'mutation {{ terminateRun(runId: "{run}", terminatePolicy: SAFE_TERMINATE) {{ __typename }} }}'
        assert self.ask(query)["terminateRun"]["__typename"] == "TerminateRunSuccess"

    def execute_again(self, run: str) -> None:
        """As the UI's button "Re-execute" does it, for a run that a person cancelled."""
        query = f"""mutation {{ launchRunReexecution(reexecutionParams: {{parentRunId: "{run}", strategy: ALL_STEPS}})
            {{ __typename }} }}"""
        assert self.ask(query)["launchRunReexecution"]["__typename"] == "LaunchRunSuccess"

    def printed(self, run: str) -> str:
        """The standard output that the run's page shows."""
        query = f"""{{ logsForRun(runId: "{run}") {{ ... on EventConnection {{ events {{
            ... on LogsCapturedEvent {{ fileKey }} }} }} }} }}"""
        (key,) = [event["fileKey"] for event in self.ask(query)["logsForRun"]["events"] if "fileKey" in event]
        query = f'{{ capturedLogs(logKey: ["{run}", "compute_logs", "{key}"]) {{ stdout }} }}'
        return self.ask(query)["capturedLogs"]["stdout"]
