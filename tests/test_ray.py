"""Workers as jobs of a real Ray: nothing lost and nothing asked twice, whatever happens to them.

`make test-ray` runs these; elsewhere they are skipped. The workers are the platform's own program on the two nodes of
`ray_cluster`, with the stub of `job_world` in place of the model.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from fault_tools import Driver, until
from job_world import N_REQUESTS, SECONDS_A_REQUEST, JobWorld, all_published
from ray_cluster import HEAD, NODES, OTHER, REAL_CLUSTER, START_TIMEOUT_S, Cluster, ray_cluster, why_not
from running_platform import Up
from s3_server import CREDENTIALS, s3_server

from eval_platform import __version__, launching
from eval_platform.config import S3, Config, Ray
from eval_platform.errors import ConfigError
from eval_platform.launching import folders
from eval_platform.launching import jobs as launched
from eval_platform.launching import ray as ray_launcher
from eval_platform.launching.ray import RayError, RayHandle
from eval_platform.worker import EXIT_TRY_AGAIN, FLUSH_RESPONSES

if REAL_CLUSTER not in os.environ:
    pytest.skip("a real Ray: `make test-ray`", allow_module_level=True)

pytestmark = pytest.mark.slow


class World(JobWorld):
    """exchange: of workers that see no folder of their driver's, which are `state`'s."""

    def __init__(self, folder: Path, address: str) -> None:
        self.address = address
        self.exchange: str | None = None
        self.s3 = S3()
        self.state = "state"
        super().__init__(folder)
        self.wants()

    def config(self, state: str | None = None) -> Config:
        config = super().config(state or self.state)
        worker = config.worker.model_copy(update={"exchange": self.exchange})
        return config.model_copy(update={"worker": worker, "s3": self.s3})

    def wants(self, num_gpus: float = 1, node: str = HEAD, **more: Any) -> None:
        """Of each worker from now on."""
        ray = Ray(address=self.address, num_gpus=num_gpus, num_cpus=0.1, resources={node: 1}, **more)
        self.asks = {"ray": ray}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with ray_cluster() as one:
        yield one


@pytest.fixture
def world(tmp_path: Path, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """Its drivers are this process's threads or forks of it; its workers, on the cluster, obey it."""
    one = World(tmp_path / "world", cluster.address)
    for name, value in {**one.environment, **cluster.environment}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launched, "ASK_SECONDS", (0.3, 1.0))
    yield one
    for job in living(cluster):
        cluster.ask(f"/api/jobs/{job}/stop", {})
    until(lambda: not living(cluster), "all jobs to end", 60)


def living(cluster: Cluster) -> list[str]:
    return [job for job, state in cluster.jobs().items() if state in ("PENDING", "RUNNING")]


def workers_alive(world: World) -> list[int]:
    """Process numbers of this world's workers, by their command lines, which the dead have not."""
    return [
        one.pid
        for one in psutil.process_iter(["cmdline"])
        if one.info["cmdline"] and one.info["cmdline"][1:3] == ["-m", "eval_platform.worker"]
        if str(world.folder) in one.info["cmdline"][-1]
    ]


def spans(said: list[list[dict[str, Any]]]) -> list[tuple[float, float, tuple[str, ...]]]:
    """(begin, end, devices) of each worker, in the order in which they began."""
    found = []
    for heard in said:
        (hello,) = [one for one in heard if one["type"] == "hello"]
        (end,) = [one for one in heard if one["type"] == "end"]
        found.append((hello["time"], end["time"], tuple(hello["devices"])))
    return sorted(found)


def test_checkpoints_run_at_once_on_gpus_of_their_own(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three that want two GPUs each on a node of four: two run, the third waits and says so."""
    monkeypatch.setenv(SECONDS_A_REQUEST, "0.02")
    world.wants(2)
    arrivals = [world.arrived(seed) for seed in range(3)]
    said: list[list[dict[str, Any]]] = [[], [], []]
    running = [world.in_background(one, heard) for one, heard in zip(arrivals, said, strict=True)]
    for one in running:
        all_published(one.result(120))
    world.all_is_there(3)
    (_, first_end, first), (second_begin, second_end, second), (third_begin, _, third) = spans(said)
    assert second_begin < first_end  # at once
    assert {len(one) for one in (first, second, third)} == {2}
    assert {*first, *second} == {str(gpu) for gpu in range(NODES[HEAD]["num_gpus"])}
    assert third_begin > min(first_end, second_end) - 0.5  # not before devices were free
    waited = {one["reason"] for heard in said for one in heard if one["type"] == "slot"}
    assert any("waiting for resources" in reason for reason in waited), waited


def test_two_checkpoints_share_a_gpu(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECONDS_A_REQUEST, "0.02")
    world.wants(0.5, OTHER)
    said: list[list[dict[str, Any]]] = [[], []]
    running = [world.in_background(world.arrived(seed), heard) for seed, heard in enumerate(said)]
    for one in running:
        all_published(one.result(90))
    world.all_is_there(2)
    (_, first_end, first), (second_begin, _, second) = spans(said)
    assert second_begin < first_end
    assert first == second == ("0",)


def test_a_node_that_fails_is_told_and_the_next_run_asks_only_the_rest(
    world: World, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SECONDS_A_REQUEST, "0.05")
    world.wants(1, OTHER)
    arrival = world.arrived(3)
    running = world.in_background(arrival, said := [])
    until(lambda: world.n_asked() > FLUSH_RESPONSES, "answers", 60)
    cluster.kill_node(OTHER)
    try:
        outcomes = running.result(90)
        assert {one.status for one in outcomes} == {"failed"}
        assert all("the node" in one.reasons[0] and "failed under job" in one.reasons[0] for one in outcomes), outcomes
        assert workers_alive(world) == []
    finally:
        cluster.start_node(OTHER)
    assert [one["class"] for one in said if one["type"] == "failed"] == ["infrastructure"]
    monkeypatch.setenv(SECONDS_A_REQUEST, "0.002")
    all_published(world.driven(arrival))
    world.all_is_there(1, kills=1)


def test_a_driver_that_was_killed_finds_its_job_again(
    world: World, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SECONDS_A_REQUEST, "0.03")
    arrival, before = world.arrived(4), cluster.jobs()
    driver = Driver(lambda: world.driven(arrival))
    until(lambda: world.n_asked() > 10, "answers", 60)
    driver.kill()
    (one,) = launching.running(world.config())
    said: list[dict[str, Any]] = []
    all_published(world.driven(arrival, said.append))
    world.all_is_there(1)
    (job,) = cluster.jobs().keys() - before.keys()
    assert one.job == f"ray {job}"
    assert "found again" in next(one["state"] for one in said if one["type"] == "ray")
    assert [one["type"] for one in said if one["type"] in ("hello", "end")] == ["hello", "end"]
    assert launching.running(world.config()) == []


def test_two_drivers_that_come_at_once_share_one_job(
    world: World, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SECONDS_A_REQUEST, "0.01")
    arrival, before = world.arrived(5), cluster.jobs()
    running = [world.in_background(arrival, []) for _ in range(2)]
    for one in running:
        all_published(one.result(90))
    assert len(cluster.jobs().keys() - before.keys()) == 1
    world.all_is_there(1)


def test_stopping_frees_the_gpus_within_ten_seconds(
    world: World, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that runs, and one that waits: the first leaves by itself with what it has answered."""
    monkeypatch.setenv(SECONDS_A_REQUEST, "0.05")
    world.wants(4)
    works, waits = world.started(world.arrived(6)), world.started(world.arrived(7))
    until(lambda: world.n_asked() > 10, "answers", 60)
    for handle in (waits, works):
        began = time.monotonic()
        handle.stop()
        assert time.monotonic() - began < 10
    assert workers_alive(world) == []
    assert works.poll() == EXIT_TRY_AGAIN
    assert waits.poll() is not None
    assert world.n_asked() - len(world.journaled()) <= 1  # the one in hand
    assert [one for message in works.messages() for one in message if one["type"] == "failed"] == []
    began = time.monotonic()
    handle = world.started(world.arrived(8))  # it wants all GPUs as well
    until(lambda: len(world.told("hello")) == 2, "a worker on the same GPUs", 30)
    handle.stop()
    world.wants(1)
    for seed in (6, 7, 8):
        all_published(world.driven(world.arrive(f"a/step_{seed}")))
    world.all_is_there(3, stops=2)


def test_a_worker_that_does_not_leave_is_killed_within_ten_seconds(world: World) -> None:
    handle = world.started(world.arrived(9))
    until(lambda: world.told("hello"), "a worker", 60)
    (hello,) = world.told("hello")
    os.kill(hello["pid"], signal.SIGSTOP)  # SIGTERM does not reach it, nor its own watchdog
    began = time.monotonic()
    handle.stop()
    assert time.monotonic() - began < 12  # and one for Ray to see that it is gone
    assert workers_alive(world) == []


def test_a_job_that_waits_longer_than_ray_lets_it_is_submitted_anew(
    world: World, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.wants(4)
    monkeypatch.setenv(SECONDS_A_REQUEST, "0.3")
    works = world.started(world.arrived(10))
    until(lambda: world.told("hello"), "a worker", 60)
    monkeypatch.setenv(SECONDS_A_REQUEST, "0.002")
    before = cluster.jobs()
    running = world.in_background(world.arrived(11), [])
    until(lambda: len(cluster.jobs().keys() - before.keys()) == 2, "it anew", START_TIMEOUT_S + 30)
    works.stop()
    all_published(running.result(60))
    assert len(world.told("hello")) == 2


def test_a_driver_killed_before_it_wrote_the_jobs_name_down_is_no_loss(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one whose job waits while another release is installed: that job would only refuse."""
    monkeypatch.setenv(SECONDS_A_REQUEST, "0.03")
    world.wants(4)
    arrivals = world.arrived(12), world.arrived(13)
    works, waits = (world.started(one) for one in arrivals)
    (works.folder / "job.json").unlink()
    again = world.started(arrivals[0])
    assert again.folder == works.folder
    assert folders.job(works.folder) is not None
    plan_file = waits.folder / "plan.json"
    plan_file.write_text(plan_file.read_text().replace(f'"platform": "{__version__}"', '"platform": "0.0.1"'))
    other = world.started(arrivals[1])
    assert other.folder != waits.folder
    for handle in (waits, other, again):
        handle.stop()


def test_a_checkpoint_that_is_shared_out_is_found_again_as_it_was(
    world: World, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers, each with one of the tasks; who comes again would not share it out at all."""
    monkeypatch.setenv(SECONDS_A_REQUEST, "0.03")
    whole, config, before = world.plan(world.arrived(23)), world.config(), cluster.jobs()
    parts = [replace(whole, tasks=(task,)) for task in whole.tasks]
    first = launching.launch(whole, config, split=lambda most: parts)
    again = launching.launch(whole, config)
    assert [one.handle.folder for one in again] == [one.handle.folder for one in first]
    assert [one.plan.tasks for one in again] == [one.tasks for one in parts]
    for one in again:
        assert list(one.handle.messages())
        assert one.handle.poll() == 0
    assert len(cluster.jobs().keys() - before.keys()) == 2
    assert len(world.commits()) == 2


def test_a_driver_that_comes_between_two_submissions_shares_both_jobs(
    world: World, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, config, before = world.plan(world.arrived(24)), world.config(), cluster.jobs()
    parts = [replace(whole, tasks=(task,)) for task in whole.tasks]
    second: list[launching.Shard] = []
    submit = ray_launcher._submit

    def submit_and_be_overtaken(*asked: Any) -> bool:
        is_new = submit(*asked)
        monkeypatch.setattr(ray_launcher, "_submit", submit)
        second.extend(launching.launch(whole, config, split=lambda most: parts))
        return is_new

    monkeypatch.setattr(ray_launcher, "_submit", submit_and_be_overtaken)
    first = launching.launch(whole, config, split=lambda most: parts)
    jobs = [[one.handle.job for one in shards if isinstance(one.handle, RayHandle)] for shards in (first, second)]
    assert jobs[0] == jobs[1]
    for one in (*first, *second):
        assert list(one.handle.messages())
        assert one.handle.poll() == 0
    assert cluster.jobs().keys() - before.keys() == set(jobs[0])
    assert len(world.commits()) == 2
    assert world.n_asked() == N_REQUESTS


def test_somebody_who_stops_the_job_is_told(world: World, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECONDS_A_REQUEST, "0.1")
    running = world.in_background(world.arrived(14), [])
    until(lambda: world.n_asked() > 2, "answers", 60)
    cluster.ask(f"/api/jobs/{living(cluster)[-1]}/stop", {})
    assert all("somebody stopped job" in one.reasons[0] for one in running.result(60))


def test_a_worker_that_is_killed_is_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECONDS_A_REQUEST, "0.1")
    running = world.in_background(world.arrived(15), [])
    until(lambda: world.n_asked() > 2, "answers", 60)
    os.kill(world.told("hello")[0]["pid"], signal.SIGKILL)
    for one in running.result(60):
        assert "was killed by signal 9 without a word" in one.reasons[0]


@pytest.mark.parametrize(
    ("asked", "problem"),
    [
        ({"num_gpus": 5}, "no node of the Ray cluster has 5 GPU"),
        ({"num_gpus": 2, "node": OTHER}, "no node of the Ray cluster has 2 GPU"),
        ({"num_gpus": 1, "node": "accelerator_type:H900"}, "accelerator_type:H900"),
    ],
)
def test_what_no_node_has_is_refused_with_the_remedy(world: World, asked: dict[str, Any], problem: str) -> None:
    world.wants(**asked)
    with pytest.raises(ConfigError) as raised:
        world.started(world.arrived(16))
    assert problem in str(raised.value)
    assert "lower [ray] num_gpus" in str(raised.value)


def test_a_wrong_token_is_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    with pytest.raises(RayError, match=r"does not let us in: 40[13](.|\n)*RAY_AUTH_TOKEN"):
        world.started(world.arrived(17))


def test_a_state_folder_that_the_node_cannot_see_is_told(world: World, cluster: Cluster) -> None:
    """The node in a mount namespace of its own, where the state folder is another one, as a local disk is."""
    world.wants(1, OTHER)
    state = world.config().state_dir
    state.mkdir()
    cluster.kill_node(OTHER)
    hide = f'mount -t tmpfs none {state} && exec "$@"'
    cluster.start_node(OTHER, "unshare", "--mount", "sh", "-c", hide, "sh")
    try:
        outcomes = world.driven(world.arrived(18))
        assert all("could not start job" in one.reasons[0] and "`state`" in one.reasons[0] for one in outcomes)
    finally:
        cluster.kill_node(OTHER)
        cluster.start_node(OTHER)


def test_a_node_that_sees_no_folder_of_the_drivers_gets_its_plan_and_says_its_words_through_a_bucket(
    world: World, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The node in a mount namespace of its own; the driver is killed, and one on another machine goes on. Credentials
    are the node's own, in the environment in which Ray was started there."""
    world.wants(1, OTHER)
    for name, value in {**CREDENTIALS, "XDG_CACHE_HOME": str(tmp_path / "node"), SECONDS_A_REQUEST: "0.03"}.items():
        monkeypatch.setenv(name, value)
    arrival, state, before = world.arrived(25), world.config().state_dir, cluster.jobs()
    cluster.kill_node(OTHER)
    hide = f'mount -t tmpfs none {state} && exec "$@"'
    cluster.start_node(OTHER, "unshare", "--mount", "sh", "-c", hide, "sh")
    try:
        with s3_server() as server:
            server.make_bucket("evals")
            world.exchange, world.s3 = "s3://evals/exchange", S3(endpoint=server.endpoint)
            driver = Driver(lambda: world.driven(arrival))
            until(lambda: world.n_asked() > 10, "answers", 60)
            driver.kill()
            world.state = "other"
            said: list[dict[str, Any]] = []
            all_published(world.driven(arrival, said.append))
    finally:
        cluster.kill_node(OTHER)
        cluster.start_node(OTHER)
    world.all_is_there(1)
    assert len(cluster.jobs().keys() - before.keys()) == 1
    assert "found again" in next(one["state"] for one in said if one["type"] == "ray")
    assert [one["type"] for one in said if one["type"] in ("hello", "end")] == ["hello", "end"]


def test_an_installation_that_the_node_has_not_is_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/bin/python")
    outcomes = world.driven(world.arrived(19))
    assert all("ended with code 127" in one.reasons[0] and "no such Python" in one.reasons[0] for one in outcomes)


def test_a_job_goes_over_with_what_it_needs_and_no_secret(
    world: World, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Ray is told of a job, everybody reads who can open its dashboard."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-for-others")
    monkeypatch.setenv("HF_TOKEN", "not-for-others")
    monkeypatch.setenv("EVAL_PLATFORM_POSTGRES", "not-for-others")
    monkeypatch.setenv("AWS_REGION", "eu-north-1")
    monkeypatch.setenv("MY_OWN", "asked for")
    monkeypatch.setenv("SOMETHING_ELSE", "stays here")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    monkeypatch.setenv(SECONDS_A_REQUEST, "0.05")
    world.wants(1, HEAD, variables=("MY_OWN",))
    handle = world.started(world.arrived(20))
    until(lambda: world.told("hello"), "a worker", 60)
    (hello,) = world.told("hello")
    has = psutil.Process(hello["pid"]).environ()
    assert (has["AWS_REGION"], has["MY_OWN"]) == ("eu-north-1", "asked for")
    assert not {"SOMETHING_ELSE", "EVAL_PLATFORM_POSTGRES", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"} & has.keys()
    assert has["CUDA_VISIBLE_DEVICES"] in {"0", "1", "2", "3"}
    shown = json.dumps(cluster.ask("/api/jobs/")) + "".join(file.read_text() for file in handle.folder.iterdir())
    assert "not-for-others" not in shown
    handle.stop()


def test_a_run_cancelled_in_dagster_frees_its_gpu_within_ten_seconds(
    world: World, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the UI's button does it, in a platform that runs."""
    monkeypatch.setenv(SECONDS_A_REQUEST, "0.5")
    (world.folder / "eval_platform.toml").write_text(f"""
        results = "results"
        state = "state"
        checkpoints = [{{name = "runs", path = "checkpoints", require_success = true, quiet_seconds = 0}}]
        tasks = {{folders = ["tasks"]}}
        engine = {{device = "cpu", dtype = "float32", max_length = 256}}
        worker = {{launcher = "ray", lease_seconds = 4.0}}
        ray = {{address = "{cluster.address}", num_gpus = 4, num_cpus = 0.1}}
    """)
    before = cluster.jobs()
    up = Up(world)
    try:
        (world.checkpoint("a/step_21", seed=21) / "_SUCCESS").touch()
        until(lambda: world.n_asked() > 2, "answers", 180)
        assert len(workers_alive(world)) == 1
        (run,) = up.runs("runs/a/step_21@1")
        up.end_run(run)
        began = time.monotonic()
        until(lambda: workers_alive(world) == [] and not living(cluster), "the worker to leave", 10.0)
        handle = world_of_all_gpus(world)
        until(lambda: len(world.told("hello")) == 2, "another on the same GPUs", 15)
        assert time.monotonic() - began < 20
        handle.stop()
        until(lambda: up.runs("runs/a/step_21@1") == {run: "CANCELED"}, "the run to be cancelled", 120)
    finally:
        up.end()
    assert len(cluster.jobs().keys() - before.keys()) == 2


def world_of_all_gpus(world: World) -> launching.Handle:
    world.wants(4)
    return world.started(world.arrived(22))
