"""Workers as Jobs of Kubernetes: the launcher through the official client, over HTTP, against `kubernetes_server`.

No real cluster was ever asked. What a cluster answers is written down here as its documents have it.
"""

import json
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from fault_tools import until
from hypothesis import given, settings
from hypothesis import strategies as st
from job_world import SECONDS_A_REQUEST, JobWorld, all_published
from kubernetes_server import NAMESPACE, NODE, ApiServer, api_server, manifest_that_mounts, status, write_kubeconfig

from eval_platform import launching
from eval_platform.checkpoints import held, hold
from eval_platform.config import Config, Kubernetes, Worker
from eval_platform.errors import ConfigError
from eval_platform.launching import folders, jobs, kubernetes, manifests, pods
from eval_platform.launching.jobs import ClusterError
from eval_platform.plan import Plan, PlannedTask, launch_id, plan_of, read_plan
from eval_platform.store import LocalStore
from eval_platform.values import Arrival
from eval_platform.worker import EXIT_TRY_AGAIN, pipes_line

IMAGE = "registry.example.org/eval-platform-worker:1"


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiServer]:
    """Found by the launcher as by kubectl; every patience is short."""
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    monkeypatch.setattr(jobs, "ASK_SECONDS", (0.02, 0.02))
    monkeypatch.setattr(jobs, "LOOK_SECONDS", 0.01)
    for name in ("_UNMENDED", "_NO_ROOM", "_REFUSED", "_LOST", "_LATE", "_WARNS_AFTER"):
        monkeypatch.setattr(kubernetes, name, 0.1)
    with api_server(tmp_path) as one:
        yield one


@pytest.fixture
def config(tmp_path: Path) -> Config:
    asked = Kubernetes(image=IMAGE, gpus=8)
    worker = Worker(launcher="kubernetes")
    return Config(
        folder=tmp_path,
        results="s3://evals/results",
        state=str(tmp_path / "state"),
        worker=worker,
        kubernetes=asked,
    )


@pytest.fixture
def todo(tmp_path: Path, config: Config) -> Plan:
    arrival = Arrival("runs/a", 1, "fingerprint", "s3://evals/run7/step_1", "a", 1, None, {})
    tasks = (PlannedTask("sums", "task", "ask"), PlannedTask("words", "task 2", "ask 2"))
    made = plan_of(arrival, tasks, {}, config.run_settings(), config, LocalStore(tmp_path / "results"))
    return replace(made, store=config.results)


def launched(todo: Plan, config: Config) -> kubernetes.KubernetesHandle:
    (shard,) = launching.launch(todo, config)
    assert isinstance(shard.handle, kubernetes.KubernetesHandle)
    return shard.handle


def heard(handle: launching.Handle) -> list[dict[str, Any]]:
    """All that is said, to its end."""
    deadline = time.monotonic() + 20
    said: list[dict[str, Any]] = []
    for messages in handle.messages():
        said += messages
        assert time.monotonic() < deadline, said
    return said


def line(kind: str, **fields: Any) -> str:
    return pipes_line({"type": kind, **fields, "time": 1.0}).removesuffix("\n")


HELLO = line("hello", platform="0", plan_version=1, host="pod", pid=7, devices=None)


# ---------------------------------------------------------------------------------------------- the road, for real


class KubernetesWorld(JobWorld):
    """Its pods see the test's folder, as by a shared volume."""

    def __init__(self, folder: Path) -> None:
        manifest = str(manifest_that_mounts(folder))
        asked = Kubernetes(image=IMAGE, gpus=0, manifest=manifest, cache=str(folder / "cache"))
        super().__init__(folder, kubernetes=asked)


@pytest.mark.slow
def test_plan_in_messages_out_and_a_driver_that_was_killed_finds_its_job_again(tmp_path: Path, api: ApiServer) -> None:
    """The pod is the worker's own program in a process of its own, which sees nothing of the worker's folder.

    Its checkpoint is deleted while it waits, and was held before.
    """
    world = KubernetesWorld(tmp_path / "world")
    api.runs([sys.executable, "-m", "eval_platform.worker"], {**world.environment, SECONDS_A_REQUEST: "0.01"})
    arrival, holds = world.arrived(1), world.config().cache_dir
    assert hold(arrival, holds)
    deleted = Path(arrival.uri).rename(tmp_path / "deleted")
    first = world.started(arrival)
    for _ in first.messages():
        if world.n_asked() > 10:
            break
    (running,) = launching.running(world.config())
    (job,) = api.jobs
    assert running.job == f"kubernetes {NAMESPACE}/{job}"
    assert running.where.endswith(running.job)
    said: list[dict[str, Any]] = []
    all_published(world.driven(arrival, said.append))
    assert not held(holds)
    deleted.rename(arrival.uri)
    world.all_is_there(1)
    assert list(api.jobs) == [job]
    assert next(one["state"] for one in said if one["type"] == "kubernetes") == "found again: its driver had ended"
    ends = [one for one in said if one["type"] in ("hello", "end")]
    assert [one["type"] for one in ends] == ["hello", "end"]
    (process,) = api.processes.values()
    assert (ends[0]["pid"], ends[1]["code"]) == (process.pid, 0)
    assert launching.running(world.config()) == []


def script(*, leaves: bool) -> list[str]:
    """A worker of a few lines: it says hello, and when it is told to leave does so, or does not."""
    leave = f"leave() {{ echo '{line('end', code=EXIT_TRY_AGAIN)}'; exit {EXIT_TRY_AGAIN}; }}; trap leave TERM"
    begin = leave if leaves else "trap '' TERM"
    return ["sh", "-c", f"{begin}; echo '{HELLO}'; echo 'to standard error' >&2; while :; do sleep 0.1; done"]


def test_stopping_deletes_job_and_pods_and_hears_the_last_word(todo: Plan, config: Config, api: ApiServer) -> None:
    api.runs(script(leaves=True), {})
    handle = launched(todo, config)
    said = handle.messages()
    until(lambda: any(one["type"] == "hello" for one in next(said)), "the worker", 10)
    began = time.monotonic()
    handle.stop()
    assert time.monotonic() - began < 5
    assert (handle.poll(), api.jobs, api.pods) == (EXIT_TRY_AGAIN, {}, {})
    assert [process.wait() for process in api.processes.values()] == [EXIT_TRY_AGAIN]
    assert "to standard error" in handle.last_words()
    assert [one["type"] for messages in said for one in messages if one["type"] in ("end", "failed")] == ["end"]
    handle.stop()  # harmless


def test_a_worker_that_does_not_leave_is_killed(
    todo: Plan, config: Config, api: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kubernetes, "_GRACE", 1)
    monkeypatch.setattr(kubernetes, "_LOST", 10.0)
    api.runs(script(leaves=False), {})
    handle = launched(todo, config)
    until(lambda: handle.poll() is not None or handle._unread, "the worker", 10)
    handle.stop()
    assert [process.wait() for process in api.processes.values()] == [-signal.SIGKILL]
    assert api.jobs == {}


# ---------------------------------------------------------------------------------------------- what is submitted


def test_what_is_submitted(todo: Plan, config: Config, api: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {"AWS_SECRET_ACCESS_KEY": "s-1", "HF_TOKEN": "s-2", "EVAL_PLATFORM_POSTGRES": "s-3"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    handle = launched(todo, config)
    (job,) = api.bodies
    text = json.dumps(job)
    assert not any(value in text for value in secrets.values())
    assert handle.job == f"{NAMESPACE}/eval-platform-{launch_id(todo)}-1"
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["image"] == IMAGE
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "8"
    assert {one["name"] for one in container["env"]} == set(launching.WORKER_ENV)
    assert container["envFrom"] == [{"secretRef": {"name": "eval-platform", "optional": True}}]
    for labels in (job["metadata"]["labels"], job["spec"]["template"]["metadata"]["labels"]):
        assert labels[manifests.LAUNCH_ID] == launch_id(todo)
    plan_file = handle.folder / "read.json"
    plan_file.write_text(manifests.plan_in(job))
    assert read_plan(plan_file) == replace(todo, cache="/state/cache") == read_plan(handle.folder / "plan.json")
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.parametrize("gpus", [0, 2])
def test_it_is_valid_to_kubernetes_own_schemas(todo: Plan, gpus: int) -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="`make lint-docker` installs kubernetes-validate")
    manifest = manifests.read_manifest(Kubernetes(image=IMAGE, gpus=gpus))
    job = manifests.job_of(manifest, todo, "one", {manifests.LAUNCH_ID: launch_id(todo)}, manifests.shares_of([todo]))
    for version in ("1.31", validator.latest_version()):
        validator.validate(job, version, strict=True)
    with pytest.raises(validator.ValidationError):
        validator.validate({**job, "spec": {**job["spec"], "backofLimit": 0}}, "1.31", strict=True)


def test_shards_are_jobs_of_their_own_and_are_found_as_they_were(todo: Plan, config: Config, api: ApiServer) -> None:
    parts = [replace(todo, tasks=(task,)) for task in todo.tasks]
    first = kubernetes.launch(todo, parts, config)
    assert len(api.jobs) == 2
    for name in api.jobs:
        api.prints(api.pod(name, "Running", containerStatuses=[{"name": "worker", "state": {"running": {}}}]), HELLO)
    found = kubernetes.launch(todo, [todo], config)
    assert len(api.jobs) == 2
    assert [shard.plan.tasks for shard in found] == [part.tasks for part in parts]
    assert {shard.handle.folder for shard in found} & {shard.handle.folder for shard in first} == set()
    assert all(folders.job(shard.handle.folder) for shard in found)
    until(lambda: all(shard.handle.poll() is None and shard.handle._unread for shard in found), "messages", 5)  # type: ignore[attr-defined]


@pytest.mark.parametrize("split_by_other", [1, 2])
def test_two_drivers_share_one_set_of_jobs_whenever_the_other_comes(
    todo: Plan, config: Config, api: ApiServer, split_by_other: int
) -> None:
    """Before the first of its jobs is made, between the two, and after; also where the other would not share it out."""
    parts = [replace(todo, tasks=(task,)) for task in todo.tasks]
    answer, sets = api.answer, list[list[launching.Shard]]()

    def answers(method: str, path: str, query: Any, body: Any) -> Any:
        if method == "POST" and not sets and len(api.jobs) == comes_after:
            sets.append([])
            sets[0] += kubernetes.launch(todo, parts if split_by_other == 2 else [todo], config)
        return answer(method, path, query, body)

    api.answer = answers  # type: ignore[method-assign]
    for comes_after in (0, 1):
        sets.clear()
        api.jobs.clear()
        ours = kubernetes.launch(todo, parts, config)
        n = split_by_other if comes_after == 0 else 2
        assert len(api.jobs) == n
        for one in (ours, sets[0]):
            assert [shard.handle.job for shard in one] == [f"{NAMESPACE}/{name}" for name in sorted(api.jobs)]  # type: ignore[attr-defined]
            assert [task for shard in one for task in shard.plan.tasks] == list(todo.tasks)
        for name, shard in zip(sorted(api.jobs), ours, strict=True):
            assert json.loads(manifests.plan_in(api.jobs[name])) == json.loads(shard.plan.to_json())


@pytest.mark.parametrize("gone", [0, 1])
def test_what_a_driver_that_was_killed_had_not_submitted_yet_is_submitted_by_the_next(
    todo: Plan, config: Config, api: ApiServer, gone: int
) -> None:
    parts = [replace(todo, tasks=(task,), together="one") for task in todo.tasks]
    kubernetes.launch(todo, parts, config)
    names = sorted(api.jobs)
    del api.jobs[names[gone]]
    shards = kubernetes.launch(todo, [todo], config)
    assert sorted(api.jobs) == names
    assert [shard.plan for shard in shards] == [replace(part, cache=config.kubernetes.cache) for part in parts]
    assert [shard.handle.was_found for shard in shards] == [i != gone for i in (0, 1)]  # type: ignore[attr-defined]


def test_where_not_all_can_be_submitted_none_is_left_and_the_cause_is_told(
    todo: Plan, config: Config, api: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where one of them cannot be ended."""
    parts = [replace(todo, tasks=(PlannedTask(name, name, name),)) for name in ("a", "b", "c")]
    whole = replace(todo, tasks=tuple(task for part in parts for task in part.tasks))
    answer = api.answer

    def answers(method: str, path: str, query: Any, body: Any) -> Any:
        if method == "POST" and len(api.jobs) == 2:
            return 403, status(403, "exceeded quota: gpus")
        if method == "DELETE" and path.endswith(f"{launch_id(whole)}-1"):
            return 500, status(500, "etcdserver: request timed out")
        return answer(method, path, query, body)

    monkeypatch.setattr(api, "answer", answers)
    with pytest.raises(ConfigError, match="exceeded quota: gpus"):
        kubernetes.launch(whole, parts, config)
    assert list(api.jobs) == [f"eval-platform-{launch_id(whole)}-1"]


def test_another_driver_that_was_faster_is_joined(todo: Plan, config: Config, api: ApiServer) -> None:
    name = f"eval-platform-{launch_id(todo)}-1"
    listed = threading.Event()
    answer = api.answer

    def answers(method: str, path: str, query: Any, body: Any) -> Any:
        if method == "POST" and not listed.is_set():
            listed.set()
            assert answer(method, path, query, json.loads(json.dumps(body)))[0] == 201
        return answer(method, path, query, body)

    api.answer = answers  # type: ignore[method-assign]
    assert launched(todo, config).job == f"{NAMESPACE}/{name}"
    assert list(api.jobs) == [name]


# ---------------------------------------------------------------------------------------------- what may happen


def state(**of_worker: Any) -> list[dict[str, Any]]:
    return [{"name": "worker", "state": of_worker}]


def unschedulable(message: str) -> dict[str, Any]:
    waits = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
    return {"node": "", "conditions": [waits]}


def ended(api: ApiServer, job: str, code: int, how: str, **more: Any) -> None:
    terminated = {"exitCode": code, "reason": how}
    api.pod(job, "Failed", containerStatuses=state(terminated=terminated), **more)
    api.job_ends(job, "Failed", "BackoffLimitExceeded", "Job has reached the specified backoff limit")


def is_lost(api: ApiServer, job: str) -> None:
    name = api.pod(job, "Running", node="a-node-that-is-lost", containerStatuses=state(running={}))
    api._end(name, 0)
    api.refusals["GET", "/log$"] = (500, "Get https://10.0.0.7:10250/containerLogs: dial tcp: i/o timeout")


def image(reason: str) -> Callable[[ApiServer, str], object]:
    waits = {"reason": reason, "message": f'Back-off pulling image "{IMAGE}"'}
    return lambda api, job: api.pod(job, "Pending", containerStatuses=state(waiting=waits))


DISTURBED = {"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI", "message": "Eviction API"}


@pytest.mark.parametrize(
    ("happens", "what", "remedy"),
    [
        (
            lambda api, job: ended(api, job, 137, "OOMKilled"),
            "used more main memory than its limit",
            "raise the memory",
        ),
        (
            lambda api, job: ended(api, job, 137, "Error", reason="Evicted", message="Usage of EmptyDir volume"),
            f"was evicted on node {NODE}: Usage of EmptyDir volume",
            "sizeLimit",
        ),
        (
            lambda api, job: ended(api, job, 143, "Error", conditions=[DISTURBED]),
            "its node was drained (EvictionByEvictionAPI): Eviction API",
            "podFailurePolicy",
        ),
        (lambda api, job: ended(api, job, 139, "Error"), "was killed by signal 11", "the next run asks again"),
        (lambda api, job: ended(api, job, 70, "Error"), "ended with code 70", "the next run asks again"),
        (lambda api, job: ended(api, job, 128, "StartError"), "could not start", "entrypoint"),
        (
            lambda api, job: api.job_ends(job, "Failed", "DeadlineExceeded", "Job was active longer than specified"),
            "at its deadline: Job was active longer",
            "raise activeDeadlineSeconds",
        ),
        (image("ErrImagePull"), "cannot begin: ErrImagePull: Back-off", "name an image that the nodes can pull"),
        (image("ImagePullBackOff"), "cannot begin: ImagePullBackOff", "imagePullSecrets"),
        (image("InvalidImageName"), "cannot begin: InvalidImageName", "[kubernetes] image"),
        (
            lambda api, job: api.pod(
                job,
                "Pending",
                containerStatuses=state(
                    waiting={"reason": "CreateContainerConfigError", "message": 'secret "keys" not found'}
                ),
            ),
            'secret "keys" not found',
            "make the secret",
        ),
        (
            lambda api, job: api.pod(job, "Pending", **unschedulable("0/2 nodes: 2 Insufficient nvidia.com/gpu.")),
            "Unschedulable: 0/2 nodes: 2 Insufficient",
            "no node has more than 4 nvidia.com/gpu",
        ),
        (
            lambda api, job: api.pod(job, "Pending", **unschedulable("2 node(s) didn't match Pod's node selector")),
            "didn't match",
            "mend nodeSelector",
        ),
        (
            lambda api, job: api.tells(api.jobs[job], "FailedCreate", 'serviceaccount "missing" not found'),
            'FailedCreate: serviceaccount "missing" not found',
            "make what it names",
        ),
        (
            lambda api, job: api.tells(
                api.pods[api.pod(job, "Pending", containerStatuses=state(waiting={"reason": "ContainerCreating"}))],
                "FailedMount",
                'MountVolume.SetUp failed for volume "keys": secret "keys" not found',
            ),
            'cannot begin: FailedMount: MountVolume.SetUp failed for volume "keys"',
            "mend the volume, secret",
        ),
        (
            lambda api, job: ended(api, job, 75, "Error", reason="Terminated", message="imminent node shutdown"),
            "failed: Terminated: imminent node shutdown",
            "the next run asks again",
        ),
        (is_lost, "the node a-node-that-is-lost does not answer", "another node"),
        (lambda api, job: api.jobs.clear(), "somebody deleted job", "run it again"),
    ],
)
def test_it_is_said_in_words_what_ended_a_worker_and_what_helps(
    todo: Plan, config: Config, api: ApiServer, happens: Callable[[ApiServer, str], object], what: str, remedy: str
) -> None:
    api.nodes = [{"status": {"allocatable": {"nvidia.com/gpu": "4"}}}, {"status": {"allocatable": {"cpu": "8"}}}]
    handle = launched(todo, config)
    (job,) = api.jobs
    happens(api, job)
    (failed,) = [one for one in heard(handle) if one["type"] == "failed"]
    assert (failed["task"], failed["class"]) == (None, "infrastructure")
    assert what in failed["reason"]
    assert remedy in failed["reason"].partition("remedy: ")[2]
    assert handle.poll() not in (None, 0)
    # Nothing is left that whoever comes next would find and wait for.
    again = launched(todo, config)
    assert not again.was_found
    assert pods.is_living(api.jobs[again.name])


def test_a_full_cluster_is_waited_for(todo: Plan, config: Config, api: ApiServer) -> None:
    """A node is large enough, or we may not see the nodes, or the quota is used up: others will end."""
    api.nodes = [{"status": {"allocatable": {"nvidia.com/gpu": "8"}}}]
    handle = launched(todo, config)
    (job,) = api.jobs
    said = handle.messages()
    pod = api.pod(job, "Pending", **unschedulable("0/2 nodes: 2 Insufficient nvidia.com/gpu."))

    def hears(words: str) -> bool:
        return any(words in one.get("reason", "") for one in next(said))

    until(lambda: hears("waits in Kubernetes: Unschedulable: 0/2"), "the reason", 5)
    api.refusals["GET", "/nodes"] = (403, "nodes is forbidden")
    deadline = time.monotonic() + 0.4  # several patiences
    while time.monotonic() < deadline:
        assert all(one["type"] != "failed" for one in next(said))
    del api.pods[pod]
    api.tells(api.jobs[job], "FailedCreate", "pods is forbidden: exceeded quota: gpus")
    until(lambda: hears("exceeded quota"), "the reason", 5)
    deadline = time.monotonic() + 0.4
    while time.monotonic() < deadline:
        assert all(one["type"] != "failed" for one in next(said))
    handle.stop()


def test_what_was_warned_of_and_is_over_ends_nothing(todo: Plan, config: Config, api: ApiServer) -> None:
    """A volume was late, and now a large image is pulled: of the two events the warning was made later, and seen
    earlier."""
    handle = launched(todo, config)
    (job,) = api.jobs
    pod = api.pods[api.pod(job, "Pending", containerStatuses=state(waiting={"reason": "ContainerCreating"}))]
    api.tells(pod, "Pulling", "Pulling image", kind="Normal", at="2026-11-23T04:02:00Z")
    api.tells(pod, "FailedAttachVolume", "Multi-Attach error", at="2026-11-23T04:01:00Z")
    said = handle.messages()
    deadline = time.monotonic() + 0.5  # several patiences
    while time.monotonic() < deadline:
        assert all(one["type"] != "failed" for one in next(said))
    handle.stop()


def test_last_words_that_come_after_the_end_are_heard(
    todo: Plan, config: Config, api: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a cluster does it: the container has ended, then the Job; the log's last lines come, or can be read, after."""
    monkeypatch.setattr(kubernetes, "_LATE", 10.0)
    handle = launched(todo, config)
    (job,) = api.jobs
    pod = api.pod(job, "Running", containerStatuses=state(running={}))
    api.prints(pod, HELLO)
    said = handle.messages()

    def hears(kind: str) -> bool:
        return any((one["type"], one.get("state", "")) in ((kind, ""), ("kubernetes", kind)) for one in next(said))

    until(lambda: hears("hello"), "the worker", 5)
    api.pod(job, "Failed", name=pod, containerStatuses=state(terminated={"exitCode": 70, "reason": "Error"}))
    until(lambda: hears("slot") or handle.told.state == "waiting", "its end to be seen", 5)
    api.job_ends(job, "Failed", "BackoffLimitExceeded")
    until(lambda: hears("ending"), "its last words", 5)
    api.prints(pod, line("end", code=1))
    assert [one["type"] for messages in said for one in messages if one["type"] != "kubernetes"] == ["end"]
    assert handle.poll() == 1


@pytest.mark.parametrize(("patience", "code"), [(10.0, 1), (0.1, 70)])
def test_a_node_that_cannot_say_the_last_words_is_asked_for_a_while(
    todo: Plan, config: Config, api: ApiServer, monkeypatch: pytest.MonkeyPatch, patience: float, code: int
) -> None:
    monkeypatch.setattr(kubernetes, "_UNHEARD", patience)
    handle = launched(todo, config)
    (job,) = api.jobs
    api.refusals["GET", "/log$"] = (500, "Get https://10.0.0.7:10250/containerLogs: dial tcp: i/o timeout")
    ended(api, job, 70, "Error")
    (pod,) = api.pods
    api.prints(pod, HELLO, line("end", code=1))
    deadline = time.monotonic() + 0.4  # longer than last words may be late
    until(lambda: handle.poll() is not None or time.monotonic() > deadline, "a while", 5)
    api.refusals.clear()
    until(lambda: handle.poll() is not None, "its end", 5)
    assert handle.poll() == code


def test_what_a_node_says_late_is_not_passed_over(todo: Plan, config: Config, api: ApiServer) -> None:
    """It counts the seconds back from when it answers, as late as a request may take. No request is repeated unseen."""
    handle = launched(todo, config)
    (job,) = api.jobs
    pod = api.pod(job, "Running", containerStatuses=state(running={}))
    api.prints(pod, HELLO)
    until(lambda: handle.poll() is not None or handle._unread, "the worker", 5)
    api.log_late = sum(kubernetes._REQUEST)
    api.prints(pod, line("end", code=0))
    until(lambda: handle.poll() == 0, "the end", 5)
    api.is_away = True
    api.requests.clear()
    with pytest.raises(ClusterError):
        handle.api.job(job)
    assert len(api.requests) == 1


def test_who_the_worker_is_is_never_seen_in_part(todo: Plan, config: Config, api: ApiServer) -> None:
    handle = launched(todo, config)
    (job,) = api.jobs
    seen, file = handle.folder / "seen.json", handle.folder / "process.json"
    file.write_text("of an earlier life")
    seen.hardlink_to(file)
    api.prints(api.pod(job, "Running", containerStatuses=state(running={})), HELLO)
    until(lambda: handle.poll() is not None or handle._unread, "the worker", 5)
    assert (json.loads(file.read_text())["worker"], seen.read_text()) == ({"pid": 7}, "of an earlier life")


def test_a_pod_that_was_disturbed_comes_again_and_its_worker_goes_on(
    todo: Plan, config: Config, api: ApiServer
) -> None:
    handle = launched(todo, config)
    (job,) = api.jobs
    said = handle.messages()
    first = api.pod(job, "Running", containerStatuses=state(running={}))
    api.prints(first, HELLO, "a warning", line("end", code=EXIT_TRY_AGAIN))
    told: list[dict[str, Any]] = []
    until(lambda: told.extend(next(said)) or any(one["type"] == "end" for one in told), "the first life", 5)
    api.pod(job, "Failed", name=first, conditions=[DISTURBED], containerStatuses=state(terminated={"exitCode": 75}))
    until(lambda: told.extend(next(said)) or (told[-1:] and told[-1]["type"] == "slot"), "it to wait", 5)
    assert "EvictionByEvictionAPI" in told[-1]["reason"]
    api.pods[first]["metadata"]["creationTimestamp"] = "2020-01-01T00:00:00Z"
    second = api.pod(job, "Running", node="gpu-node-2", containerStatuses=state(running={}))
    api.prints(second, HELLO, line("end", code=0))
    told += [one for messages in said for one in messages]
    assert [one.get("code") for one in told if one["type"] in ("hello", "end")] == [None, EXIT_TRY_AGAIN, None, 0]
    assert [one for one in told if one["type"] == "failed"] == []
    assert handle.poll() == 0
    assert (handle.folder / "worker.log").read_text() == "a warning\n"


@pytest.mark.parametrize(
    ("refusal", "what", "remedy"),
    [
        (("POST", "jobs$", 403, 'cannot create resource "jobs"'), "does not let us make jobs in the namespace", "role"),
        (("POST", "jobs$", 403, "exceeded quota: gpus"), "exceeded quota", "quota"),
        (("POST", "jobs$", 422, 'Job.batch "x" is invalid: spec'), "refuses the job: Job.batch", "manifest"),
        (("GET", "jobs$", 401, "Unauthorized"), "does not know who asks", "log in again"),
    ],
)
def test_a_launch_that_is_refused_says_why(
    todo: Plan, config: Config, api: ApiServer, refusal: tuple[str, str, int, str], what: str, remedy: str
) -> None:
    method, path, *answer = refusal
    api.refusals[method, path] = (answer[0], answer[1])  # type: ignore[assignment]
    with pytest.raises(ConfigError) as raised:
        launching.launch(todo, config)
    assert what in str(raised.value)
    assert remedy in (str(raised.value).partition("remedy: ")[2])
    assert api.jobs == {}


def test_a_wrong_token_namespace_context_and_server(
    todo: Plan, config: Config, api: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(**fields: Any) -> str:
        asked = config.kubernetes.model_copy(update=fields)
        with pytest.raises((ConfigError, ClusterError)) as raised:
            launching.launch(todo, config.model_copy(update={"kubernetes": asked}))
        return str(raised.value)

    assert 'no namespace nowhere: namespaces "nowhere" not found' in refused(namespace="nowhere")
    assert "field kubernetes.context" in refused(context="nobody's")
    with monkeypatch.context() as a_proxy:
        a_proxy.setattr(api, "answer", lambda *_: (200, "<html>Log in first</html>"))
        assert "is no JSON: '<html>Log in first" in refused()
    write_kubeconfig(tmp_path / "kubeconfig", api.endpoint, token="an old one")
    assert "an old one" not in (said := refused())
    assert "does not know who asks it: Unauthorized" in said
    write_kubeconfig(tmp_path / "kubeconfig", "http://127.0.0.1:9")
    assert "the API server of Kubernetes does not answer" in refused()
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    assert "there is no cluster to be reached" in refused()
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    assert "pip install 'eval-platform[kubernetes]'" in refused()


def test_a_server_that_is_away_for_a_while_is_waited_for(
    todo: Plan, config: Config, api: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = launched(todo, config)
    (job,) = api.jobs
    pod = api.pod(job, "Running", containerStatuses=state(running={}))
    api.is_away = True
    said = handle.messages()
    until(lambda: sum(len(next(said)) >= 0 for _ in range(10)) and len(api.requests) > 6, "some tries", 5)
    api.prints(pod, HELLO, line("end", code=0))
    api.is_away = False
    assert [one["type"] for messages in said for one in messages if one["type"] in ("hello", "end")] == ["hello", "end"]
    again = launched(todo, config.model_copy(update={"state": config.state + "2"}))
    api.is_away = True
    monkeypatch.setattr(jobs, "SILENT_SECONDS", 0.1)
    with pytest.raises(ClusterError, match="does not answer"):
        heard(again)


def test_rights_that_are_taken_away_are_named_and_the_job_goes_on(todo: Plan, config: Config, api: ApiServer) -> None:
    handle = launched(todo, config)
    (job,) = api.jobs
    api.pod(job, "Running", containerStatuses=state(running={}))
    api.refusals["GET", "/log$"] = (403, 'cannot get resource "pods/log"')
    with pytest.raises(ConfigError, match=r"read the logs of pods(.|\n)*the role of(.|\n)*goes on"):
        heard(handle)
    assert list(api.jobs) == [job]


# ---------------------------------------------------------------------------------------------- reading a pod's log


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 9), max_size=12), st.data())
def test_every_line_is_read_once_however_far_one_looks_back(words: list[int], data: st.DataObject) -> None:
    """Each answer begins at the latest where the one before ended, and may end within a line."""
    log = [f"2026-11-23T03:30:00.{i:09d}Z word {word}\n" for i, word in enumerate(words)]
    cursor, read, seen = kubernetes._Cursor(), list[str](), 0
    for _ in range(4):
        back, there = data.draw(st.integers(0, seen)), data.draw(st.integers(seen, len(log)))
        begun = "".join(log[there : there + 1])[:20]
        read += cursor.new("".join(log[back:there]) + begun, is_all=False)
        seen = there
    read += cursor.new("".join(log[data.draw(st.integers(0, seen)) :]), is_all=True)
    assert read == [one.removesuffix("\n").partition(" ")[2] for one in log]


def test_messages_are_told_from_what_libraries_print() -> None:
    torn = '{"__dagster_pipes_version": "0.1", "met'
    said, printed = kubernetes.split(["Loading: 50%|#", f"Loading: 1%\rLoading: 99%|#{HELLO}", torn, HELLO])
    assert said == [HELLO] * 2
    assert printed == ["Loading: 50%|#", "Loading: 1%\rLoading: 99%|#", torn]


# ---------------------------------------------------------------------------------------------- bad input


def test_who_asks_for_gpus_never_computes_on_a_cpu_in_silence(config: Config) -> None:
    assert config.run_settings().device == "cuda"
    without = config.model_copy(update={"kubernetes": Kubernetes(gpus=0)})
    assert without.run_settings().device == "auto"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"kind": "Pod"}, "is no Job of batch/v1"),
        ({"spec": {}}, "field 'template' is missing"),
        ({"spec": {"template": {"spec": {"containers": [{"name": "main"}]}}}}, "no container is called 'worker'"),
        ({"spec": {"template": {"spec": {"containers": [{"name": "worker"}]}}}}, "restartPolicy must be Never"),
        ("kind: [", "field kubernetes.manifest cannot be read"),
        (None, "field kubernetes.manifest cannot be read"),
    ],
)
def test_a_manifest_that_cannot_be_used_is_refused(tmp_path: Path, change: Any, problem: str) -> None:
    file = tmp_path / "worker.yaml"
    if change is not None:
        body = {"apiVersion": "batch/v1", "kind": "Job", **change} if isinstance(change, dict) else change
        file.write_text(body if isinstance(body, str) else yaml.safe_dump(body))
    with pytest.raises(ConfigError) as raised:
        manifests.read_manifest(Kubernetes(image=IMAGE, manifest=str(file)))
    assert problem in str(raised.value)
    assert str(file) in str(raised.value)


def test_no_image_a_folder_that_no_pod_sees_and_a_plan_that_is_too_large(todo: Plan, config: Config) -> None:
    with pytest.raises(ConfigError, match=r"field kubernetes\.image"):
        manifests.read_manifest(Kubernetes())
    here = replace(todo, store="/home/me/results")
    with pytest.raises(ConfigError, match=r"results is the folder /home/me/results(.|\n)*shared volume"):
        launching.launch(here, config)
    many = replace(todo, tasks=tuple(PlannedTask(f"task {i}", "x" * 64, "y" * 64) for i in range(2_000)))
    with pytest.raises(ConfigError, match="the plan of 2000 tasks has"):
        manifests.job_of(manifests.read_manifest(config.kubernetes), many, "one", {}, "[]")
