"""Is the process of a run alive, and is it the one that is told to end? Real processes, living, dead, undead and
mistaken for one another."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator

import dagster as dg
import pytest
from dagster._core.launcher.base import WorkerStatus
from dagster._core.test_utils import create_run_for_test

from eval_platform.store.process import process_record
from resources.run_launcher import FORKED_TAG, PROCESS_TAG, HealthCheckedRunLauncher

pytestmark = pytest.mark.dagster


@pytest.fixture(scope="module")
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as one:
        yield one


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    # Whoever runs the tests in a shell's background ignores SIGINT, and so would what it starts.
    one = subprocess.Popen(["env", "--default-signal=INT", "sleep", "600"])
    yield one
    one.kill()
    one.wait()


def run_of(instance: dg.DagsterInstance, pid: int | None, **tags: str) -> dg.DagsterRun:
    run = create_run_for_test(instance, status=dg.DagsterRunStatus.STARTED, tags=tags)
    if pid is not None:
        instance.report_engine_event(f"Started process for run (pid: {pid}).", run)
    return run


def status(instance: dg.DagsterInstance, run: dg.DagsterRun) -> WorkerStatus:
    launcher = HealthCheckedRunLauncher()
    launcher.register_instance(instance)
    assert launcher.supports_check_run_worker_health
    return launcher.check_run_worker_health(run).status


def tagged(instance: dg.DagsterInstance, run: dg.DagsterRun, record: dict[str, object]) -> dg.DagsterRun:
    instance.add_run_tags(run.run_id, {PROCESS_TAG: json.dumps({**record, "run_id": run.run_id})})
    found = instance.get_run_by_id(run.run_id)
    assert found is not None
    return found


def test_living_undead_and_dead(instance: dg.DagsterInstance, process: subprocess.Popen[bytes]) -> None:
    run = run_of(instance, process.pid)
    known = tagged(instance, run_of(instance, process.pid), process_record(process.pid))
    assert {status(instance, run), status(instance, known)} == {WorkerStatus.RUNNING}
    os.kill(process.pid, 9)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # ended and not waited for: a zombie
    assert {status(instance, run), status(instance, known)} == {WorkerStatus.FAILED}
    process.wait()
    assert {status(instance, run), status(instance, known)} == {WorkerStatus.FAILED}


def test_a_number_that_was_given_to_another(instance: dg.DagsterInstance, process: subprocess.Popen[bytes]) -> None:
    run = run_of(instance, process.pid)
    # The event is older than the process that has the number now.
    event = instance.all_logs(run.run_id)[-1]
    moved = event._replace(timestamp=time.time() - 3600)
    other = create_run_for_test(instance, status=dg.DagsterRunStatus.STARTED)
    instance.event_log_storage.store_event(moved._replace(run_id=other.run_id))
    assert status(instance, other) == WorkerStatus.FAILED
    earlier = {**process_record(process.pid), "started": 1}
    assert status(instance, tagged(instance, run, earlier)) == WorkerStatus.FAILED


def test_a_clock_that_stepped_does_not_kill_a_run(
    instance: dg.DagsterInstance, process: subprocess.Popen[bytes]
) -> None:
    run = run_of(instance, process.pid)
    event = instance.all_logs(run.run_id)[-1]
    other = create_run_for_test(instance, status=dg.DagsterRunStatus.STARTED)
    instance.event_log_storage.store_event(event._replace(timestamp=time.time() - 3600, run_id=other.run_id))
    known = tagged(instance, other, process_record(process.pid))
    assert status(instance, known) == WorkerStatus.RUNNING


def test_a_restart_of_the_machine(instance: dg.DagsterInstance, process: subprocess.Popen[bytes]) -> None:
    before = {**process_record(process.pid), "machine": "another-boot/pid:[1]"}
    run = tagged(instance, run_of(instance, process.pid), before)
    assert status(instance, run) == WorkerStatus.FAILED


def test_a_retry_is_not_its_parent(instance: dg.DagsterInstance, process: subprocess.Popen[bytes]) -> None:
    """A retried run copies the tags of the one that died, its process record among them."""
    before = {**process_record(process.pid), "machine": "another-boot/pid:[1]", "run_id": "the parent"}
    run = run_of(instance, process.pid, **{PROCESS_TAG: json.dumps(before)})
    assert status(instance, run) == WorkerStatus.RUNNING


def test_no_evidence_is_no_death(instance: dg.DagsterInstance) -> None:
    """Dagster fails a run whose health is unknown."""
    assert status(instance, run_of(instance, None)) == WorkerStatus.RUNNING


def end(instance: dg.DagsterInstance, process: dict[str, object], run_id: str | None = None) -> bool:
    """Whether a run that says it is this process was told to end. run_id: the one that it was forked for."""
    run = run_of(instance, None)
    instance.add_run_tags(run.run_id, {FORKED_TAG: json.dumps({**process, "run_id": run_id or run.run_id})})
    launcher = HealthCheckedRunLauncher()
    launcher.register_instance(instance)
    return launcher.terminate(run.run_id)


def test_a_forked_run_is_interrupted_and_nobody_else(
    instance: dg.DagsterInstance, process: subprocess.Popen[bytes]
) -> None:
    record = process_record(process.pid)
    assert not end(instance, record, "the parent of a retry")
    assert not end(instance, {**record, "started": 1})  # its number is another's now
    assert not end(instance, {**record, "machine": "another-boot/pid:[1]"})
    assert process.poll() is None
    assert end(instance, record)
    assert process.wait(10) == -signal.SIGINT
    assert not end(instance, record)
