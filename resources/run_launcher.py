"""Dagster's default run launcher plus a health check, so that a power cut does not leave runs STARTED for ever; and a
run's process is a fork of the run nursery where there is one."""

import json
import os
import re
import signal
from contextlib import suppress
from pathlib import Path
from typing import Any

from dagster import DagsterEventType, DagsterRun
from dagster._core.launcher.base import CheckRunHealthResult, LaunchRunContext, WorkerStatus
from dagster._core.launcher.default_run_launcher import DefaultRunLauncher
from dagster._grpc.types import ExecuteRunArgs

from eval_platform.store.process import known_dead, same_machine, this_process
from resources.run_nursery import fork_run

# Of a run: the record of the process that works on it, written by the evaluating op.
PROCESS_TAG = "eval/process"
# Of a run that the run nursery forked: the record of that process.
FORKED_TAG = "eval/forked"

# "Started process for run (pid: 7)", or "Executing steps in process (pid: 7)" when somebody runs a job by hand.
_STARTED = re.compile(r"(?:Started process for run|Executing steps in process) \(pid: (\d+)\)")
# What reported its pid was started before that; slack for the rounding of /proc's clock.
_SLACK_SECONDS = 2.0


class HealthCheckedRunLauncher(DefaultRunLauncher):
    """Knows a dead run process, also after the daemon and the code server were restarted, or the whole box.

    A run is called dead on evidence alone: a process of it was there and is gone. Runs are always on this machine.
    """

    def launch_run(self, context: LaunchRunContext) -> None:
        run = context.dagster_run
        process = None
        if run.job_code_origin is not None:
            args = ExecuteRunArgs(run.job_code_origin, run.run_id, self._instance.get_ref())
            process = fork_run(Path(self._instance.root_directory), args)
        if process is None:
            super().launch_run(context)
        else:
            record = {**process, "run_id": run.run_id}
            self._instance.add_run_tags(run.run_id, {FORKED_TAG: json.dumps(record)})

    def terminate(self, run_id: str) -> bool:
        run = self._instance.get_run_by_id(run_id)
        process = None if run is None or run.is_finished else _forked(run)
        if run is None or process is None:
            return super().terminate(run_id)
        self._instance.report_run_canceling(run)
        return _interrupt(process)

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


def _forked(run: DagsterRun) -> dict[str, Any] | None:
    """The process of a run that the run nursery forked."""
    process = json.loads(run.tags.get(FORKED_TAG, "{}"))
    return process if process.get("run_id") == run.run_id else None  # a retry copies its parent's tags


def _interrupt(process: dict[str, Any]) -> bool:
    """As Ctrl-C does. False when it has ended, or is not on this machine."""
    if not same_machine(process):
        return False
    with suppress(ProcessLookupError):
        descriptor = os.pidfd_open(process["pid"])
        try:
            if not known_dead(process):  # held by its descriptor: no other can have its number now
                signal.pidfd_send_signal(descriptor, signal.SIGINT)
                return True
        finally:
            os.close(descriptor)
    return False


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
