"""Slurm's launcher where a command of Slurm's fails or hangs in the midst; no Slurm is needed.

Programs of the test's own stand in place of Slurm's; `test_slurm.py` has the real ones.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from eval_platform import launching
from eval_platform.config import Config, Worker
from eval_platform.launching import jobs, slurm
from eval_platform.plan import Plan, PlannedTask, plan_of
from eval_platform.store import LocalStore
from eval_platform.values import Arrival

Program = Callable[[str, str], None]


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Program:
    """Puts a command in place of Slurm's: its name, and what a shell does for it."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")

    def put(name: str, does: str) -> None:
        file = tmp_path / "bin" / name
        file.write_text(f"#!/bin/sh\n{does}\n")
        file.chmod(0o755)

    put("sbatch", f"env > {tmp_path}/environment; for script; do :; done; echo $script > {tmp_path}/script; echo 71")
    in_queue(put, tmp_path, "RUNNING")
    put("scancel", "exit 1")
    return put


def in_queue(put: Program, folder: Path, state: str) -> None:
    """What squeue says of the job that was submitted, whichever way it is asked."""
    listed = f'[ ! -f {folder}/script ] || echo "71|{state}|$(cat {folder}/name)|$(cat {folder}/script)"'
    put("squeue", f'case "$*" in *%o*) {listed};; *) echo "{state}|node1|10:00|NonZeroExitCode";; esac')


def launch(folder: Path) -> slurm.SlurmHandle:
    config = Config(
        folder=folder, results=str(folder / "results"), state=str(folder / "state"), worker=Worker(launcher="slurm")
    )
    arrival = Arrival("runs/a", 1, "fingerprint", "file:///a", "a", 1, None, {})
    store = LocalStore(folder / "results")
    todo: Plan = plan_of(arrival, (PlannedTask("sums", "task", "ask"),), {}, config.run_settings(), config, store)
    (folder / "name").write_text(jobs.name_of(todo))
    ((_, handle),) = launching.launch(todo, config)
    assert isinstance(handle, slurm.SlurmHandle)
    return handle


def test_a_job_that_could_not_be_stopped_is_found_again(tmp_path: Path, program: Program) -> None:
    program("scancel", "echo 'scancel: error: Unable to contact slurm controller' >&2; exit 1")
    first = launch(tmp_path)
    with pytest.raises(slurm.SlurmError, match="Unable to contact"):
        first.stop()
    again = launch(tmp_path)
    assert (again.job, again.folder, again.was_found) == (first.job, first.folder, True)
    program("scancel", "exit 0")
    in_queue(program, tmp_path, "CANCELLED")
    again.stop()
    assert launch(tmp_path).folder != first.folder


@pytest.mark.parametrize("state", ["FAILED", "TIMEOUT"])
def test_what_is_known_of_an_end_is_told_though_no_more_can_be_had(
    tmp_path: Path, program: Program, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = launch(tmp_path)
    in_queue(program, tmp_path, state)
    program("scontrol", "exec sleep 30")
    monkeypatch.setattr(slurm, "COMMAND_SECONDS", 0.2)
    said: list[dict[str, Any]] = [one for news in handle.messages() for one in news]
    assert handle.poll() == 1
    (failed,) = [one for one in said if one["type"] == "failed"]
    assert ("it is failed" if state == "FAILED" else "time limit of 10:00") in failed["reason"]
    assert "has not answered" not in failed["reason"]


def test_sbatch_gets_its_users_defaults_and_the_hubs_token_but_no_option_that_would_lose_the_job(
    tmp_path: Path, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    never = ("SBATCH_WAIT", "SBATCH_CLUSTERS", "SLURM_CLUSTERS", "SBATCH_ARRAY_INX", "SBATCH_ERROR")
    for name in ("SBATCH_QOS", "HUGGING_FACE_HUB_TOKEN", *never):
        monkeypatch.setenv(name, "set")
    launch(tmp_path)
    had = {line.partition("=")[0] for line in (tmp_path / "environment").read_text().splitlines()}
    assert {"SBATCH_QOS", "HUGGING_FACE_HUB_TOKEN"} <= had
    assert not had.intersection(never)


def test_no_command_of_slurms_is_led_to_another_cluster_or_away_from_our_jobs(
    tmp_path: Path, program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SLURM_CLUSTERS", "SQUEUE_PARTITION", "SCANCEL_STATE", "SACCT_FEDERATION", "SLURM_CONF"):
        monkeypatch.setenv(name, "set")
    handle = launch(tmp_path)
    works = f"[ -f {tmp_path}/scancel ] || {{ echo 'RUNNING|node1|10:00|None'; exit 0; }}"
    gone = f"{works}; echo 'Invalid job id' >&2; exit 1"
    for name, does in (("scancel", "exit 0"), ("squeue", gone), ("sacct", "exit 1")):
        program(name, f"env > {tmp_path}/{name}; {does}")
    handle.stop()
    for name in ("scancel", "squeue", "sacct"):
        heard = (tmp_path / name).read_text().splitlines()
        assert "SLURM_CONF=set" in heard
        assert [line for line in heard if line.startswith(("SLURM_CLUSTERS", "SQUEUE_", "SCANCEL_", "SACCT_"))] == []
