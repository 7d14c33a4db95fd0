"""Dagster's default run launcher plus a health check, so that a power cut does not leave runs STARTED for ever."""

import re
from pathlib import Path

from dagster import DagsterRun
from dagster._core.launcher.base import CheckRunHealthResult, WorkerStatus
from dagster._core.launcher.default_run_launcher import DefaultRunLauncher

_STARTED = re.compile(r"Started process for run \(pid: (\d+)\)")


class HealthCheckedRunLauncher(DefaultRunLauncher):
    """Knows a dead run process by its pid and start time, also after the daemon and the code server were restarted."""

    @property
    def supports_check_run_worker_health(self) -> bool:
        return True

    def check_run_worker_health(self, run: DagsterRun) -> CheckRunHealthResult:
        found = None
        for record in self._instance.all_logs(run.run_id):
            match = _STARTED.search(record.user_message or record.message or "")
            if match:
                found = int(match.group(1)), record.timestamp
        if found is None:
            return CheckRunHealthResult(WorkerStatus.UNKNOWN, "the run's process has not reported its pid yet")
        pid, reported = found
        started = _process_start(pid)
        if started is None:
            return CheckRunHealthResult(WorkerStatus.FAILED, f"process {pid} of the run is gone")
        # The pid may have been given to another process since; a second of slack for the clocks' rounding.
        if started > reported + 1:
            return CheckRunHealthResult(WorkerStatus.FAILED, f"process {pid} of the run is gone, its pid was reused")
        return CheckRunHealthResult(WorkerStatus.RUNNING)


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
    return boot + ticks_since_boot / 100
