"""Workers as jobs of a real Slurm: nothing lost and nothing asked twice, whatever it does to them.

`make test-slurm` runs these; elsewhere they are skipped. The workers are the platform's own program on a node of
`slurm_cluster`; an engine that answers from the weights' bytes (the soak's) stands in place of the model, slowly enough
to be interrupted.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from fault_tools import Driver, until
from job_world import N_REQUESTS, SECONDS_A_REQUEST, SLOW_IMPORT, JobWorld, all_published
from running_platform import Up
from s3_server import CREDENTIALS, s3_server
from slurm_cluster import GPUS, REAL_CLUSTER, Cluster, slurm_cluster, why_not

from eval_platform import __version__, launching
from eval_platform.config import S3, Config, Slurm
from eval_platform.drive import Outcome
from eval_platform.errors import ConfigError
from eval_platform.launching import folders, slurm
from eval_platform.launching import jobs as launched
from eval_platform.store.process import same_machine
from eval_platform.values import Arrival
from eval_platform.worker import EXIT_TRY_AGAIN, FLUSH_RESPONSES

if REAL_CLUSTER not in os.environ:
    pytest.skip("a real Slurm: `make test-slurm`", allow_module_level=True)

pytestmark = pytest.mark.slow


class World(JobWorld):
    """exchange: of workers that see no folder of their driver's, which are `state`'s."""

    def __init__(self, folder: Path) -> None:
        self.exchange: str | None = None
        self.s3 = S3()
        self.state = "state"
        super().__init__(folder, slurm=Slurm(gres="gpu:1"))

    def config(self, state: str | None = None) -> Config:
        config = super().config(state or self.state)
        worker = config.worker.model_copy(update={"exchange": self.exchange})
        return config.model_copy(update={"worker": worker, "s3": self.s3})

    def wants(self, asked: Slurm) -> None:
        self.asks = {"slurm": asked}

    def job(self, arrival: Arrival) -> slurm.SlurmHandle:
        handle = self.started(arrival)
        assert isinstance(handle, slurm.SlurmHandle)
        return handle


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with slurm_cluster() as one:
        yield one


@pytest.fixture
def world(tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """Its drivers are this process's threads or forks of it; its workers, on the cluster, obey it."""
    one = World(tmp_path / "world")
    for name, value in one.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    monkeypatch.setattr(launched, "ASK_SECONDS", (0.3, 1.0))
    yield one
    cluster.ask("scancel", f"--user={os.getuid()}")
    until(lambda: not cluster.ask("squeue", "-h"), "the queue to be empty", 30)


def jobs(cluster: Cluster) -> list[str]:
    """Numbers of all jobs that Slurm remembers of this test and those before, the newest last."""
    return sorted(cluster.ask("squeue", "-h", "--states=all", "-o", "%A").split(), key=int)


def test_checkpoints_run_at_once_on_gpus_of_their_own(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three that want two GPUs each on a node of four: two run, the third waits and says why."""
    monkeypatch.setenv(SECONDS_A_REQUEST, "0.01")
    world.wants(Slurm(gres="gpu:2", time_limit="10", arguments=("--mem=200M",)))
    arrivals = [world.arrived(seed) for seed in range(3)]
    said: list[list[dict[str, Any]]] = [[], [], []]
    running = [world.in_background(one, heard) for one, heard in zip(arrivals, said, strict=True)]
    until(lambda: any(one.waits for one in launching.running(world.config())), "status to see one that waits", 60)
    for one in running:
        all_published(one.result(90))
    world.all_is_there(3)
    spans = []
    for heard in said:
        (hello,) = [one for one in heard if one["type"] == "hello"]
        (end,) = [one for one in heard if one["type"] == "end"]
        assert len(hello["devices"]) == 2
        spans.append((hello["time"], end["time"], set(hello["devices"])))
    spans.sort(key=lambda span: span[0])
    (_, first_end, first), (second_begin, second_end, second), (third_begin, _, _) = spans
    assert second_begin < first_end  # at once
    assert first | second == {str(gpu) for gpu in range(GPUS)}
    assert not first & second
    assert third_begin > min(first_end, second_end) - 0.5  # not before devices were free
    waited = {one["reason"] for heard in said for one in heard if one["type"] == "slot"}
    assert any("Resources" in reason or "Priority" in reason for reason in waited), waited


def test_a_time_limit_keeps_the_journal_and_the_next_run_asks_only_the_rest(
    world: World, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SECONDS_A_REQUEST, "0.2")  # Slurm looks at limits every so many seconds
    arrival, said = world.arrived(1), list[dict[str, Any]]()
    running = world.in_background(arrival, said)
    until(lambda: world.n_asked() > 10, "answers", 60)
    # Slurm counts limits in minutes; a job's end can be set to the second.
    cluster.ask("scontrol", "update", f"JobId={jobs(cluster)[-1]}", "EndTime=now+1seconds")
    outcomes = running.result(60)
    assert {one.status for one in outcomes} == {"failed"}
    assert all("time limit" in one.reasons[0] and "raise [slurm] time_limit" in one.reasons[0] for one in outcomes)
    before = world.n_asked()
    assert before < N_REQUESTS
    monkeypatch.setenv(SECONDS_A_REQUEST, "0.002")
    all_published(world.driven(arrival))
    world.all_is_there(1, stops=1)


def test_a_node_that_fails_is_no_loss(world: World, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job is queued again under its number, and its driver goes on reading."""
    monkeypatch.setenv(SECONDS_A_REQUEST, "0.05")
    arrival, said = world.arrived(2), list[dict[str, Any]]()
    running = world.in_background(arrival, said)
    until(lambda: world.n_asked() > FLUSH_RESPONSES, "answers", 60)
    job = jobs(cluster)[-1]
    cluster.kill_node()
    until(lambda: cluster.ask("squeue", "-h", "-j", job, "-o", "%T").strip() == "PENDING", "the job in the queue", 60)
    cluster.start_node()
    all_published(running.result(180))
    world.all_is_there(1, kills=1)
    assert len([one for one in said if one["type"] == "hello"]) == 2


def run_urgent_job(cluster: Cluster) -> None:
    """Before all of ours: it wants every GPU."""
    sleep = ("sbatch", "--parsable", "-p", "urgent", f"--gres=gpu:{GPUS}", "-o", "/dev/null", "--wrap", "sleep 1")
    job = cluster.ask(*sleep).strip()
    until(lambda: cluster.ask("squeue", "-h", "-t", "all", "-j", job, "-o", "%T").strip() == "COMPLETED", "it", 60)


def test_a_more_urgent_job_goes_before_and_ours_goes_on_after_it(
    world: World, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SECONDS_A_REQUEST, "0.05")
    arrival, said = world.arrived(3), list[dict[str, Any]]()
    running = world.in_background(arrival, said)
    until(lambda: world.n_asked() > FLUSH_RESPONSES, "answers", 60)
    run_urgent_job(cluster)
    all_published(running.result(180))
    world.all_is_there(1, stops=1)
    assert [one["code"] for one in said if one["type"] == "end"] == [EXIT_TRY_AGAIN, 0]


def importing(world: World, seed: int, said: list[dict[str, Any]]) -> "tuple[Arrival, Future[list[Outcome]]]":
    """A checkpoint whose driver waits for a worker that is importing, so that SIGTERM finds no handler yet."""
    (world.control / SLOW_IMPORT).touch()
    arrival = world.arrived(seed)
    running = world.in_background(arrival, said)
    until((world.control / "importing").exists, "a worker", 60)
    return arrival, running


def test_a_worker_that_is_told_to_leave_while_it_imports_is_no_failure(world: World, cluster: Cluster) -> None:
    arrival, running = importing(world, 21, said := [])
    cluster.ask("scancel", "--full", "--signal=TERM", jobs(cluster)[-1])
    assert all(f"ended with code {EXIT_TRY_AGAIN}" in one.reasons[0] for one in running.result(60))
    assert [one for one in said if one["type"] == "failed"] == []
    world.revoke(SLOW_IMPORT)
    all_published(world.driven(arrival))
    world.all_is_there(1)


def test_a_more_urgent_job_goes_before_one_that_imports(world: World, cluster: Cluster) -> None:
    _, running = importing(world, 22, said := [])
    run_urgent_job(cluster)
    world.revoke(SLOW_IMPORT)
    all_published(running.result(180))
    world.all_is_there(1)
    assert [one["code"] for one in said if one["type"] == "end"] == [0]


def test_stopping_frees_the_gpus_within_ten_seconds(
    world: World, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that runs, and one that waits: the first leaves by itself with what it has answered."""
    monkeypatch.setenv(SECONDS_A_REQUEST, "0.05")
    world.wants(Slurm(gres=f"gpu:{GPUS}"))
    works, waits = world.job(world.arrived(4)), world.job(world.arrived(5))
    until(lambda: world.n_asked() > 10, "answers", 60)
    for handle in (waits, works):
        began = time.monotonic()
        handle.stop()
        assert time.monotonic() - began < 10
    assert cluster.ask("squeue", "-h") == ""
    assert works.poll() == EXIT_TRY_AGAIN
    assert waits.poll() is not None
    assert world.n_asked() - len(world.journaled()) <= 1  # the one in hand
    assert [one for message in works.messages() for one in message if one["type"] == "failed"] == []
    world.wants(Slurm(gres="gpu:1"))
    for seed in (4, 5):
        all_published(world.driven(world.arrive(f"a/step_{seed}")))
    world.all_is_there(2, stops=1)


def test_a_worker_that_does_not_leave_is_killed_within_ten_seconds(world: World, cluster: Cluster) -> None:
    handle = world.job(world.arrived(6))
    until(lambda: world.told("hello"), "a worker", 60)
    (hello,) = world.told("hello")
    os.kill(hello["pid"], signal.SIGSTOP)  # SIGTERM does not reach it, nor its own watchdog
    began = time.monotonic()
    handle.stop()
    assert time.monotonic() - began < 12  # and one for Slurm to see that it is gone
    assert not Path(f"/proc/{hello['pid']}/stat").exists()


def test_a_run_terminated_in_dagster_frees_its_gpu_within_ten_seconds(
    world: World, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the button on a run's page does it, on a platform that is up."""
    monkeypatch.setenv(SECONDS_A_REQUEST, "0.2")
    (world.folder / "eval_platform.toml").write_text("""
        results = "results"
        state = "state"
        checkpoints = [{name = "runs", path = "checkpoints", quiet_seconds = 0}]
        tasks = {folders = ["tasks"]}
        engine = {device = "cpu", dtype = "float32", max_length = 256}
        worker = {launcher = "slurm", lease_seconds = 4}
        slurm = {gres = "gpu:1"}
    """)
    world.checkpoint("a/step_23", seed=23)
    up = Up(world)
    try:
        until(lambda: world.n_asked() > 10, "answers", 180)
        (run,) = up.runs("runs/a/step_23@1")
        began = time.monotonic()
        up.end_run(run)
        until(lambda: not cluster.ask("squeue", "-h"), "the GPU to be free", 10)
        assert time.monotonic() - began < 10
        until(lambda: up.runs("runs/a/step_23@1") == {run: "CANCELED"}, "the end of the run", 30)
    finally:
        up.end()
    assert [one["code"] for one in world.told("end")] == [EXIT_TRY_AGAIN]
    assert world.n_asked() - len(world.journaled()) <= 1  # the one in hand
    all_published(world.driven(world.arrive("a/step_23")))
    world.all_is_there(1, stops=1)


def test_a_driver_that_was_killed_finds_its_job_again(
    world: World, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SECONDS_A_REQUEST, "0.03")
    arrival = world.arrived(7)
    before = jobs(cluster)
    driver = Driver(lambda: world.driven(arrival))
    until(lambda: world.n_asked() > 10, "answers", 60)
    driver.kill()
    said: list[dict[str, Any]] = []
    all_published(world.driven(arrival, said.append))
    world.all_is_there(1)
    assert len(set(jobs(cluster)) - set(before)) == 1
    assert "found again" in next(one["state"] for one in said if one["type"] == "slurm")
    assert [one["type"] for one in said if one["type"] in ("hello", "end")] == ["hello", "end"]


def test_a_job_that_ends_with_nobody_looking_is_not_shown_for_ever(
    world: World, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its driver is killed, then the worker: no word says that it has ended."""
    monkeypatch.setenv(SECONDS_A_REQUEST, "0.03")
    arrival, config = world.arrived(18), world.config()
    driver = Driver(lambda: world.driven(arrival))
    until(lambda: world.n_asked() > 10, "answers", 60)
    driver.kill()
    (one,) = launching.running(config)
    assert one.job == f"slurm {jobs(cluster)[-1]}"
    os.kill(one.pid, signal.SIGKILL)
    until(lambda: not cluster.ask("squeue", "-h"), "Slurm to see that it is gone", 30)
    all_published(world.driven(arrival))
    assert launching.running(config) == []


def test_a_driver_killed_before_it_wrote_the_jobs_number_down_is_no_loss(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one whose job waits while another release is installed: that job would only refuse."""
    monkeypatch.setenv(SECONDS_A_REQUEST, "0.03")
    world.wants(Slurm(gres=f"gpu:{GPUS}"))
    arrivals = world.arrived(19), world.arrived(20)
    works, waits = (world.job(one) for one in arrivals)
    (works.folder / "job.json").unlink()
    again = world.job(arrivals[0])
    assert (again.job, again.was_found) == (works.job, True)
    assert folders.job(works.folder) == f"slurm {works.job}"
    plan_file = waits.folder / "plan.json"
    plan_file.write_text(plan_file.read_text().replace(f'"platform": "{__version__}"', '"platform": "0.0.1"'))
    other = world.job(arrivals[1])
    assert other.job != waits.job
    for handle in (waits, other, again):
        handle.stop()


def test_somebody_elses_scancel_is_told(world: World, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECONDS_A_REQUEST, "0.1")
    running = world.in_background(world.arrived(8), said := [])
    until(lambda: world.n_asked() > 2, "answers", 60)
    cluster.ask("scancel", jobs(cluster)[-1])
    assert all("somebody cancelled job" in one.reasons[0] for one in running.result(60))
    assert any(one["type"] == "failed" for one in said)


def test_a_worker_that_is_killed_is_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECONDS_A_REQUEST, "0.1")
    running = world.in_background(world.arrived(9), [])
    until(lambda: world.n_asked() > 2, "answers", 60)
    os.kill(world.told("hello")[0]["pid"], signal.SIGKILL)
    for one in running.result(60):
        assert "was killed by signal 9 without a word" in one.reasons[0]


@pytest.mark.parametrize(
    ("asked", "problem", "remedy"),
    [
        (Slurm(partition="nowhere"), "Invalid partition name", "[slurm] partition"),
        (Slurm(gres="gpu:5"), "Requested node configuration is not available", "lower [slurm] gres"),
        (Slurm(gres="gpu:a100:1"), "Requested node configuration is not available", "lower [slurm] gres"),
        (Slurm(time_limit="soon"), "Invalid --time specification", "[slurm] time_limit"),
        (Slurm(arguments=("--no-such-option=1",)), "unrecognized option", "section [slurm]"),
    ],
)
def test_what_slurm_refuses_is_told_with_the_remedy(world: World, asked: Slurm, problem: str, remedy: str) -> None:
    world.wants(asked)
    with pytest.raises(ConfigError) as raised:
        world.job(world.arrived(10))
    assert problem in str(raised.value)
    assert remedy in str(raised.value)


def test_a_job_that_would_wait_for_ever_is_given_up(world: World, cluster: Cluster) -> None:
    """sbatch takes a limit beyond the partition's, and the job then waits until somebody changes one of them."""
    world.wants(Slurm(time_limit="2:00:00"))
    outcomes = world.driven(world.arrived(11))
    assert all("would never start" in one.reasons[0] for one in outcomes)
    assert all("PartitionTimeLimit" in one.reasons[0] and "sinfo" in one.reasons[0] for one in outcomes)
    assert cluster.ask("squeue", "-h") == ""


def test_a_machine_without_slurm_is_told_so(world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    arrival = world.arrived(12)
    with monkeypatch.context() as here:  # the cluster itself still has it
        here.setenv("PATH", str(tmp_path))
        with pytest.raises(slurm.SlurmError, match=r"there is no `squeue` on this machine(.|\n)*login node"):
            world.job(arrival)


def test_a_controller_that_is_away_is_waited_for(
    world: World, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its restart costs nothing; while it is away nothing new can be submitted, which is told."""
    monkeypatch.setenv(SECONDS_A_REQUEST, "0.03")
    running = world.in_background(world.arrived(13), [])
    until(lambda: world.n_asked() > 10, "answers", 60)
    away = cluster.running.pop("slurmctld")
    away.terminate()
    away.wait(30)
    with pytest.raises(slurm.SlurmError, match="scontrol ping"):
        world.job(world.arrived(14))
    cluster.start("slurmctld", "slurmctld", "-D", "-f", str(cluster.folder / "slurm.conf"))
    all_published(running.result(90))
    assert len(world.told("hello")) == 1


def test_a_job_that_could_not_be_stopped_is_found_again(
    world: World, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SECONDS_A_REQUEST, "0.05")
    arrival = world.arrived(25)
    handle = world.job(arrival)
    until(lambda: world.n_asked() > 2, "answers", 60)
    away = cluster.running.pop("slurmctld")
    away.terminate()
    away.wait(30)
    try:
        with pytest.raises(slurm.SlurmError, match="scontrol ping"):
            handle.stop()
    finally:
        cluster.start("slurmctld", "slurmctld", "-D", "-f", str(cluster.folder / "slurm.conf"))
        cluster.until(lambda: bool(cluster.ask("squeue", "-h")), "the controller")
    again = world.job(arrival)
    assert (again.job, again.was_found) == (handle.job, True)
    monkeypatch.setenv(SECONDS_A_REQUEST, "0.002")
    again.stop()
    all_published(world.driven(arrival))
    world.all_is_there(1, stops=1)


def test_a_state_folder_that_the_node_cannot_see_is_told(world: World, cluster: Cluster) -> None:
    """The node in a mount namespace of its own, where the state folder is another one, as a local disk is."""
    state = world.config().state_dir
    state.mkdir()
    cluster.kill_node()
    hide = f'mount -t tmpfs none {state} && exec "$@"'
    cluster.start_node("unshare", "--mount", "sh", "-c", hide, "sh")
    try:
        outcomes = world.driven(world.arrived(15))
        assert all("could not start job" in one.reasons[0] and "`state`" in one.reasons[0] for one in outcomes)
    finally:
        cluster.kill_node()
        cluster.start_node()


def test_an_installation_that_the_node_has_not_is_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/bin/python")
    outcomes = world.driven(world.arrived(16))
    assert all("ended with code 127" in one.reasons[0] and "no such Python" in one.reasons[0] for one in outcomes)


def test_a_job_goes_over_with_what_it_needs_and_nothing_else(
    world: World, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Credentials of the store are in the worker's environment, and nowhere that others can read."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-for-others, 'quoted' $HOME")
    monkeypatch.setenv("MY_TOKEN", "asked for")
    monkeypatch.setenv("SOMETHING_ELSE", "stays here")
    monkeypatch.setenv("EVAL_PLATFORM_POSTGRES", "not-for-workers")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    monkeypatch.setenv(SECONDS_A_REQUEST, "0.05")
    world.wants(Slurm(gres="gpu:1", variables=("MY_TOKEN",)))
    handle = world.job(world.arrived(17))
    until(lambda: world.told("hello"), "a worker", 60)
    (hello,) = world.told("hello")
    assert same_machine(json.loads((handle.folder / "process.json").read_text())["worker"])
    pairs = Path(f"/proc/{hello['pid']}/environ").read_bytes().decode().split("\0")
    has = dict(pair.split("=", 1) for pair in pairs if pair)
    assert has["AWS_SECRET_ACCESS_KEY"] == "not-for-others, 'quoted' $HOME"
    assert has["MY_TOKEN"] == "asked for"
    assert not {"SOMETHING_ELSE", "EVAL_PLATFORM_POSTGRES"} & has.keys()
    assert has["CUDA_VISIBLE_DEVICES"] != "7"
    open_to_all = cluster.ask("scontrol", "show", "job", handle.job)
    open_to_all += "".join(file.read_text() for file in handle.folder.iterdir())
    assert "not-for-others" not in open_to_all
    handle.stop()


def test_a_node_that_sees_no_folder_of_the_drivers_gets_its_plan_and_says_its_words_through_a_bucket(
    world: World, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two elements of an array, on a node in a mount namespace of its own; the driver is killed, and one on another
    machine goes on."""
    all_published(world.driven(world.arrived(36)))  # so that the next one is shared out
    world.shards = 2
    arrival = world.arrived(37)
    for name, value in {**CREDENTIALS, "XDG_CACHE_HOME": str(tmp_path / "node"), SECONDS_A_REQUEST: "0.05"}.items():
        monkeypatch.setenv(name, value)
    state = world.config().state_dir
    hide = f'mount -t tmpfs none {state} && exec "$@"'
    cluster.kill_node()
    cluster.start_node("unshare", "--mount", "sh", "-c", hide, "sh")
    try:
        with s3_server() as server:
            server.make_bucket("evals")
            world.exchange, world.s3 = "s3://evals/exchange", S3(endpoint=server.endpoint)
            driver = Driver(lambda: world.driven(arrival))
            until(lambda: len(world.told("started")) == 4, "both at work", 60)
            driver.kill()
            world.state = "other"
            said: list[dict[str, Any]] = []
            all_published(world.driven(arrival, said.append))
            assert {one["state"] for one in said if one["type"] == "slurm"} >= {"found again: its driver had ended"}
            assert len([one for one in said if one["type"] == "hello"]) == 2
            for job in {one["job"] for one in said if one["type"] == "slurm"}:
                Path(f"{slurm.NODE_LOG}-{job}.log").unlink()  # what was printed before a worker could send it
    finally:
        cluster.kill_node()
        cluster.start_node()
    world.all_is_there(2)


def shared_out(world: World, monkeypatch: pytest.MonkeyPatch, seeds: tuple[int, int]) -> Arrival:
    """A checkpoint whose two tasks two workers share out, since another of its run was asked before."""
    all_published(world.driven(world.arrived(seeds[0])))
    world.shards = 2
    monkeypatch.setenv(SECONDS_A_REQUEST, "0.03")
    return world.arrived(seeds[1])


def elements_of(cluster: Cluster) -> set[str]:
    """All jobs that Slurm remembers, those of arrays as "71_0"."""
    return set(cluster.ask("squeue", "-h", "--states=all", "--array", "-o", "%i").split())


def test_a_checkpoint_is_shared_out_as_an_array_that_is_found_again(
    world: World, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also by a driver that would share it out in another way: one submission, nothing asked twice."""
    arrival = shared_out(world, monkeypatch, (30, 31))
    before = elements_of(cluster)
    driver = Driver(lambda: world.driven(arrival))
    until(lambda: len(world.told("started")) == 4 and world.n_asked() > N_REQUESTS + 20, "both at work", 60)
    at_work = launching.running(world.config())
    driver.kill()
    world.shards = 1
    said: list[dict[str, Any]] = []
    all_published(world.driven(arrival, said.append))
    world.all_is_there(2)
    elements = elements_of(cluster) - before
    assert {one.partition("_")[2] for one in elements} == {"0", "1"}
    assert {one.job for one in at_work} == {f"slurm {element}" for element in elements}
    assert {one["job"] for one in said if one["type"] == "slurm" and "found again" in one["state"]} == elements
    first, second = [set(one["devices"]) for one in said if one["type"] == "hello"]
    assert not first & second
    (planned,) = [one for one in said if one["type"] == "planned"]
    assert sorted(one["tasks"] for one in planned["shards"]) == [["sums"], ["words"]]
    assert launching.running(world.config()) == []


def test_all_of_an_array_is_stopped_within_ten_seconds(
    world: World, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrival = shared_out(world, monkeypatch, (32, 33))
    begun: list[str] = []
    stopped_at = 0.0

    def hear(message: dict[str, Any]) -> None:
        nonlocal stopped_at
        begun.extend([message["task"]] if message["type"] == "started" else [])
        if len(begun) == 2:
            stopped_at = time.monotonic()
            raise KeyError("cancelled")

    with pytest.raises(KeyError):
        world.driven(arrival, hear)
    assert time.monotonic() - stopped_at < 10
    assert cluster.ask("squeue", "-h") == ""
    all_published(world.driven(arrival))
    world.all_is_there(2, stops=2)


def test_an_element_that_dies_takes_its_own_tasks_with_it_and_no_others(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrival = shared_out(world, monkeypatch, (34, 35))
    killed: list[str] = []

    def hear(message: dict[str, Any]) -> None:
        if message["type"] == "progress" and message["done"] and not killed:
            killed.append(message["task"])
            (its,) = [
                one for one in launching.running(world.config()) if killed == [task.name for task in one.plan.tasks]
            ]
            os.kill(its.pid, signal.SIGKILL)

    outcomes = {one.task: one for one in world.driven(arrival, hear)}
    (lost,) = killed
    assert outcomes[lost].status == "failed"
    assert "was killed by signal 9" in outcomes[lost].reasons[0]
    assert [one.status for name, one in outcomes.items() if name != lost] == ["published"]
    assert len(outcomes) == 2
    all_published(world.driven(arrival))
    world.all_is_there(2, kills=1)
