"""Ray's launcher where drivers meet, are killed or are refused at the worst moment: never two jobs in one folder, and
none that nobody finds again.

A job server of the test's own stands in place of Ray's, so that each moment comes when it must; `test_ray.py` has the
real one.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from ray_job_server import JobServer, job_server

from eval_platform import launching
from eval_platform.config import Config, Ray, Worker
from eval_platform.launching import jobs
from eval_platform.launching.ray import RayError, RayHandle
from eval_platform.plan import Plan, PlannedTask, plan_of
from eval_platform.store import LocalStore
from eval_platform.values import Arrival

SUBMISSION, LIST = "POST /api/jobs/", "GET /api/jobs/"


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[JobServer]:
    monkeypatch.setattr(jobs, "ASK_SECONDS", (0.0, 0.0))
    with job_server() as server:
        yield server


class Drivers:
    """Each launch is a driver of its own: nothing is shared but the state folder and the cluster."""

    def __init__(self, folder: Path, address: str) -> None:
        self.config = Config(
            folder=folder,
            results=str(folder / "results"),
            state=str(folder / "state"),
            worker=Worker(launcher="ray"),
            ray=Ray(address=address),
        )
        self.store = LocalStore(folder / "results")

    def plan(self, step: int = 1) -> Plan:
        arrival = Arrival("runs/a", step, "fingerprint", "file:///a", "a", 1, None, {})
        tasks = tuple(PlannedTask(name, f"task-{name}", f"ask-{name}") for name in ("sums", "words"))
        return plan_of(arrival, tasks, {}, self.config.run_settings(), self.config, self.store)

    def launch(self, step: int = 1, n: int = 1) -> list[RayHandle]:
        whole = self.plan(step)
        parts: Sequence[Plan] = [whole] if n == 1 else [replace(whole, tasks=(task,)) for task in whole.tasks]
        handles = [one.handle for one in launching.launch(whole, self.config, split=lambda most: parts)]
        assert all(isinstance(one, RayHandle) for one in handles)
        return handles  # type: ignore[return-value]


@pytest.fixture
def drivers(tmp_path: Path, ray: JobServer) -> Drivers:
    return Drivers(tmp_path, ray.address)


def work_in_folders_of_their_own(ray: JobServer) -> bool:
    living = [one["metadata"]["folder"] for one in ray.jobs.values() if one["status"] in ("PENDING", "RUNNING")]
    return len(living) == len(set(living))


def its_jobs(handles: Sequence[RayHandle]) -> list[tuple[str, Path]]:
    return [(one.job, one.folder) for one in handles]


def never_started(ray: JobServer, job: str) -> None:
    ray.jobs[job] |= {"status": "FAILED", "error_type": "JOB_SUPERVISOR_ACTOR_START_TIMEOUT", "message": "it waited"}


@pytest.mark.parametrize(("num_gpus", "share"), [(0.25, "0.25"), (2, "1"), (0, "1")])
def test_a_worker_is_told_its_share_of_a_gpu(ray: JobServer, drivers: Drivers, num_gpus: float, share: str) -> None:
    drivers.config = drivers.config.model_copy(update={"ray": Ray(address=ray.address, num_gpus=num_gpus)})
    (handle,) = drivers.launch()
    assert ray.jobs[handle.job]["runtime_env"]["env_vars"]["EVAL_PLATFORM_DEVICE_SHARE"] == share


def test_who_comes_between_two_submissions_of_a_set_shares_all_of_it(ray: JobServer, drivers: Drivers) -> None:
    second: list[RayHandle] = []
    ray.meanwhile[SUBMISSION] = lambda: second.extend(drivers.launch(n=2))
    first = drivers.launch(n=2)
    assert its_jobs(first) == its_jobs(second)
    assert len(ray.jobs) == 2
    assert work_in_folders_of_their_own(ray)


def test_two_who_come_at_once_upon_half_a_set_share_what_is_missing(ray: JobServer, drivers: Drivers) -> None:
    """Its driver was killed between the two submissions."""
    whole = its_jobs(drivers.launch(n=2))
    (last,) = [job for job in ray.jobs if job.endswith("-1-1")]
    del ray.jobs[last]
    second: list[RayHandle] = []
    ray.meanwhile[LIST] = lambda: second.extend(drivers.launch(n=2))  # after the list was made that the first gets
    first = drivers.launch(n=2)
    assert its_jobs(first) == its_jobs(second) == whole
    assert len(ray.jobs) == 2


def test_a_job_that_waited_too_long_is_submitted_anew_once_for_all_drivers(ray: JobServer, drivers: Drivers) -> None:
    (first,), (second,) = drivers.launch(), drivers.launch()
    never_started(ray, first.job)
    assert first.poll() is None
    assert second.poll() is None
    assert its_jobs([first]) == its_jobs([second])
    assert [job[-2:] for job in ray.jobs] == ["-1", "-2"]
    assert work_in_folders_of_their_own(ray)


def test_who_launches_while_a_job_is_about_to_be_submitted_anew_does_not_end_it(
    ray: JobServer, drivers: Drivers
) -> None:
    (first,) = drivers.launch()
    never_started(ray, first.job)
    drivers.launch(step=2)
    assert not (first.folder / "ended.json").exists()
    (second,) = drivers.launch()
    assert [second.poll(), first.poll()] == [None, None]
    assert its_jobs([first]) == its_jobs([second])
    assert first.job.endswith("-2")
    assert len(ray.jobs) == 3
    ray.jobs[first.job]["status"] = "SUCCEEDED"  # of two jobs in a folder the last counts
    drivers.launch(step=3)
    assert (first.folder / "ended.json").exists()


def test_a_job_that_was_stopped_is_not_submitted_anew(ray: JobServer, drivers: Drivers) -> None:
    (first,), (second,) = drivers.launch(), drivers.launch()
    never_started(ray, first.job)
    first.stop()
    assert second.poll() is not None
    assert "RUNNING" not in {one["status"] for one in ray.jobs.values()}


def test_a_job_that_could_not_be_stopped_is_found_again(ray: JobServer, drivers: Drivers) -> None:
    (first,) = drivers.launch()
    ray.refused.add("stop")
    with pytest.raises(RayError, match="does not stop job"):
        first.stop()
    (again,) = drivers.launch()
    assert (again.job, again.folder, again.was_found) == (first.job, first.folder, True)
    ray.refused.clear()
    again.stop()
    (other,) = drivers.launch()
    assert other.job != first.job


@pytest.mark.parametrize("refused", [{"-1-1"}, {"-1-1", "stop"}])
def test_a_share_of_the_work_does_not_go_on_alone(ray: JobServer, drivers: Drivers, refused: set[str]) -> None:
    """Where it cannot be stopped either, what went wrong first is told, and the job is found again."""
    ray.refused |= refused
    with pytest.raises(RayError, match="No available agent"):
        drivers.launch(n=2)
    ((job, told),) = ray.jobs.items()
    folder = Path(told["metadata"]["folder"])
    assert json.loads((folder / "job.json").read_text()) == {"ray": job}
    is_stopped = "stop" not in refused
    assert (told["status"] == "STOPPED") == (folder / "ended.json").exists() == is_stopped
    ray.refused.clear()
    again = drivers.launch(n=2)
    assert (again[0].job == job) != is_stopped
    assert work_in_folders_of_their_own(ray)


def test_only_ray_itself_can_say_that_it_has_forgotten_a_job(ray: JobServer, drivers: Drivers) -> None:
    (handle,) = drivers.launch()
    ray.proxy_is_alone = True
    assert handle.poll() is None
    with pytest.raises(RayError, match="404"):
        handle.stop()
    ray.proxy_is_alone = False
    (again,) = drivers.launch()
    assert again.job == handle.job
    del ray.jobs[handle.job]
    assert again.poll() == 1
