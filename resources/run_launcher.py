"""Dagster's default run launcher plus a health check, so that a power cut does not leave runs STARTED for ever."""

import json
import os
import re
from pathlib import Path

from dagster import DagsterEventType, DagsterRun
from dagster._core.launcher.base import CheckRunHealthResult, WorkerStatus
from dagster._core.launcher.default_run_launcher import DefaultRunLauncher

from eval_platform.store.process import known_dead, same_machine, this_process

# Of a run: the record of the process that works on it, written by the evaluating op.
PROCESS_TAG = "eval/process"

# "Started process for run (pid: 7)", or "Executing steps in process (pid: 7)" when somebody runs a job by hand.
_STARTED = re.compile(r"(?:Started process for run|Executing steps in process) \(pid: (\d+)\)")
# What reported its pid was started before that; slack for the rounding of /proc's clock.
_SLACK_SECONDS = 2.0


class HealthCheckedRunLauncher(DefaultRunLauncher):
    """Knows a dead run process, also after the daemon and the code server were restarted, or the whole box.

    A run is called dead on evidence alone: a process of it was there and is gone. Runs are always on this machine.
    """

    @property
    def supports_check_run_worker_health(self) -> bool:
        return True

    def check_run_worker_health(self, run: DagsterRun) -> CheckRunHealthResult:
        # Dagster fails a run on anything but RUNNING, UNKNOWN too.
        reported = self._reported(run.run_id)
        if reported is None:
            return CheckRunHealthResult(WorkerStatus.RUNNING, "the run's process has not reported its pid yet")
        pid, time = reported
        process = json.loads(run.tags.get(PROCESS_TAG, "{}"))
        if process.get("run_id") == run.run_id:  # a retry copies its parent's tags
            # Exact, whatever the clock did since: the process is known by its start in ticks since boot.
            if not same_machine(process):
                return CheckRunHealthResult(WorkerStatus.FAILED, f"process {pid} of the run ended with its machine")
            dead = known_dead(process)
        else:
            started = _process_start(pid)
            dead = started is None or started > time + _SLACK_SECONDS
        if dead:
            return CheckRunHealthResult(WorkerStatus.FAILED, f"process {pid} of the run is gone")
        return CheckRunHealthResult(WorkerStatus.RUNNING)

    def _reported(self, run_id: str) -> tuple[int, float] | None:
        """(pid, seconds since the epoch) that the run's last process reported."""
        found = None
        for record in self._instance.all_logs(run_id, of_type=DagsterEventType.ENGINE_EVENT):
            match = _STARTED.search(record.user_message or record.message or "")
            if match:
                found = int(match.group(1)), record.timestamp
        return found


def process_tag(run_id: str) -> dict[str, str]:
    """The tag by which the run's own process makes itself known."""
    return {PROCESS_TAG: json.dumps({**this_process(), "run_id": run_id})}


def _process_start(pid: int) -> float | None:
    """When process `pid` started, in seconds since the epoch; None when there is none, or only its corpse."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        boot = next(
            int(line.split()[1]) for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime ")
        )
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, *fields = stat.rpartition(")")[2].split()
    if state in "ZX":
        return None
    ticks_since_boot = int(fields[18])
    return boot + ticks_since_boot / os.sysconf("SC_CLK_TCK")
