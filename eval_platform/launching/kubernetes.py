"""Starts a worker as a Job of Kubernetes', and finds it again when whoever started it was killed.

As `jobs.py` says, but for the folder: the pod shares none with us. It gets its plan with the Job (`manifests.py`) and
says its messages on standard output; what the pod has said so far is read again and again (`pods/log`) and written into
the worker's folder here, so that everything else finds there what it finds of any worker. A driver that comes again,
perhaps on another machine, makes a folder anew and reads from the beginning.

Answers are read as the JSON that they are: the client's own objects refuse some that a server may give. Nothing of
this was tried on a real cluster (docs/kubernetes.md).
"""

import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from eval_platform import __version__
from eval_platform.config import Config, Kubernetes
from eval_platform.errors import ConfigError, EvalPlatformError
from eval_platform.launching import folders, jobs, manifests, pods
from eval_platform.launching.face import Shard
from eval_platform.launching.jobs import ClusterError, JobHandle
from eval_platform.launching.pods import Told
from eval_platform.plan import Plan, launch_id, read_plan

log = logging.getLogger(__name__)

# Seconds. Between two looks at the log; for a connection and for an answer, while other workers' messages wait.
_LOOK = 3.0
_REQUEST = (3.0, 20.0)
# How long what only a person can mend may stand before we give up: a secret may be made just now, a registry come back.
_UNMENDED = 120.0
# ... a pod that no node has room for: an autoscaler may be adding one.
_NO_ROOM = 900.0
# ... an account that is refused in the midst of it.
_REFUSED = 60.0
# From a pod's deletion to the end of a node that answers; beyond, it is lost.
_LOST = 60.0
# How long after a worker's end its last words may come; and how long they are asked for when its node cannot say them.
_LATE = 3.0
_UNHEARD = 60.0
# How far back the log is read again: an answer may begin so much later than it was asked for, and clocks step.
_OVERLAP = sum(_REQUEST) + 5.0
_GRACE = 10  # a worker told to leave has left
# How long a job may have no pod, or one that is being made, until the cluster's warnings are asked for.
_WARNS_AFTER = 10.0

# As `worker.pipes_line` begins each; before it, on one line, may stand what something printed without an end of line.
_MESSAGE = '{"__dagster_pipes_version"'
_REACHED = "`kubectl cluster-info` says whether it can be reached from here"
_INSIDE_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")


class KubernetesError(ClusterError):
    """The API server cannot be asked, does not answer, or refuses. status: of HTTP, where it answered."""

    def __init__(self, message: str, *, remedy: str, status: int | None = None) -> None:
        super().__init__(message, remedy=remedy)
        self.status = status


@dataclass(frozen=True)
class Cluster:
    """One namespace through the official client. Every call raises KubernetesError."""

    namespace: str
    batch: Any
    core: Any

    def create(self, job: Mapping[str, Any]) -> None:
        self._ask("make jobs", self.batch.create_namespaced_job, self.namespace, job)

    def jobs(self, selector: str) -> list[dict[str, Any]]:
        return self._ask("list jobs", self.batch.list_namespaced_job, self.namespace, label_selector=selector)["items"]

    def job(self, name: str) -> dict[str, Any] | None:
        return self._ask("see jobs", self.batch.read_namespaced_job, name, self.namespace, absent=(404,))

    def pods(self, job: str) -> list[dict[str, Any]]:
        """Of the job, the oldest first."""
        selector = f"batch.kubernetes.io/job-name={job}"
        found = self._ask("list pods", self.core.list_namespaced_pod, self.namespace, label_selector=selector)
        return sorted(found["items"], key=lambda pod: pod["metadata"]["creationTimestamp"])

    def log(self, pod: str, since: int | None) -> str:
        """What its worker printed in the last `since` seconds, each line behind its time; empty before it begins."""
        within = {} if since is None else {"since_seconds": since}
        return self._text(
            "read the logs of pods",
            self.core.read_namespaced_pod_log,
            pod,
            self.namespace,
            container=manifests.CONTAINER,
            timestamps=True,
            absent=(400, 404),
            **within,
        )

    def warning(self, uid: str) -> tuple[str, str]:
        """(reason, message) of the last event about an object where that is a warning; empty where it is none (what was
        warned of is over), or we may not see it."""
        events = self._ask(
            "see events",
            self.core.list_namespaced_event,
            self.namespace,
            field_selector=f"involvedObject.uid={uid}",
            absent=(403,),
        )
        last = max((events or {}).get("items", []), key=pods.seen_last, default={})
        return (last.get("reason", ""), last.get("message", "")) if last.get("type") == "Warning" else ("", "")

    def nodes(self) -> list[dict[str, Any]] | None:
        """None where this account may not see them: they are no namespace's."""
        found = self._ask("see nodes", self.core.list_node, absent=(403,))
        return None if found is None else found["items"]

    def delete(self, job: str) -> None:
        """And with it its pods; what is gone already is no error."""
        self._ask(
            "delete jobs",
            self.batch.delete_namespaced_job,
            job,
            self.namespace,
            propagation_policy="Foreground",
            grace_period_seconds=_GRACE,
            absent=(404,),
        )

    def delete_pod(self, pod: str) -> None:
        self._ask(
            "delete pods",
            self.core.delete_namespaced_pod,
            pod,
            self.namespace,
            grace_period_seconds=_GRACE,
            absent=(404,),
        )

    def _ask(self, what: str, call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """The answer's JSON; None where the status is one of `absent`."""
        text = self._text(what, call, *arguments, **options)
        try:
            return json.loads(text) if text else None
        except ValueError as error:
            raise KubernetesError(
                f"what answers in place of the API server of Kubernetes is no JSON: {text[:100]!r}", remedy=_REACHED
            ) from error

    def _text(
        self, what: str, call: Callable[..., Any], *arguments: Any, absent: Sequence[int] = (), **options: Any
    ) -> str:
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        try:
            answer = call(*arguments, **options, _preload_content=False, _request_timeout=_REQUEST)
            return answer.data.decode("utf-8", errors="replace")
        except HTTPError as error:
            raise KubernetesError(f"the API server of Kubernetes does not answer: {error}", remedy=_REACHED) from error
        except ApiException as error:
            if error.status in absent:
                return ""
            if not error.status:  # no answer came: of TLS it has an error of this kind, too
                raise KubernetesError(
                    f"the API server of Kubernetes cannot be asked: {error.reason}", remedy=_REACHED
                ) from error
            message, remedy = self._refusal(what, error.status, _said(error.body, error.reason))
            raise KubernetesError(message, remedy=remedy, status=error.status) from error

    def _refusal(self, what: str, status: int, said: str) -> tuple[str, str]:
        """(what happened, what can be done)."""
        match status:
            case 401:
                return f"Kubernetes does not know who asks it: {said}", "log in again; `kubectl auth whoami` says more"
            case 403:
                return (
                    f"Kubernetes does not let us {what} in the namespace {self.namespace}: {said}",
                    "give the account the role of docs/kubernetes.md, or make room in the quota that is named",
                )
            case 404:
                return (
                    f"Kubernetes has no namespace {self.namespace}: {said}",
                    "name one that `kubectl get namespaces` lists in [kubernetes] namespace",
                )
            case 400 | 413 | 422:
                return f"Kubernetes refuses the job: {said}", "mend [kubernetes], or the manifest that it names"
        return f"Kubernetes answers with {status}: {said}", _REACHED


def _said(body: Any, otherwise: str | None) -> str:
    """The message of a Status object, or whatever stands in its place."""
    text = body.decode(errors="replace") if isinstance(body, bytes) else str(body or "")
    try:
        return json.loads(text)["message"]
    except (ValueError, KeyError, TypeError):
        return text[:200] or otherwise or "it does not say why"


def _connect(asked: Kubernetes) -> Cluster:
    """Inside a pod with its service account, elsewhere as kubectl does it."""
    try:
        from kubernetes import client, config
    except ModuleNotFoundError as error:
        raise ConfigError(
            'field worker.launcher: "kubernetes" needs the package kubernetes, which is not installed',
            remedy="pip install 'eval-platform[kubernetes]'",
        ) from error
    settings: Any = client.Configuration()
    is_inside = "KUBERNETES_SERVICE_HOST" in os.environ and asked.context is None and "KUBECONFIG" not in os.environ
    file = os.environ.get("KUBECONFIG")
    try:
        if is_inside:
            config.load_incluster_config(client_configuration=settings)
            usual = _INSIDE_NAMESPACE.read_text(encoding="utf-8").strip()
        else:
            config.load_kube_config(config_file=file, context=asked.context, client_configuration=settings)
            known: Any = config.list_kube_config_contexts(config_file=file)
            chosen = next((one for one in known[0] if one["name"] == asked.context), known[1])
            usual = chosen["context"].get("namespace", "default")
    except (config.ConfigException, OSError) as error:
        raise ConfigError(
            f"field kubernetes.context: there is no cluster to be reached: {error}",
            remedy="`kubectl config get-contexts` lists those that are known here; KUBECONFIG names their file",
        ) from error
    settings.retries = False  # we ask again ourselves; the client would do so at once, and look back too little
    api = client.ApiClient(settings)
    return Cluster(asked.namespace or usual, client.BatchV1Api(api), client.CoreV1Api(api))


@dataclass
class _Cursor:
    """How far a pod's log is read. last: its last line with its time; at: when it was asked for; ended_at: when the
    worker was first seen to have ended."""

    last: str | None = None
    at: float | None = None
    ended_at: float | None = None
    is_done: bool = False

    def since(self) -> int | None:
        return None if self.at is None else math.ceil(time.monotonic() - self.at + _OVERLAP)

    def new(self, text: str, *, is_all: bool) -> list[str]:
        """The whole lines of `text` that come after the last that was seen. Where that one is not in it, the log was
        quiet for longer than we look back, or begun anew by the node: all is new."""
        *lines, begun = text.split("\n")  # a progress bar's \r ends none
        if begun and is_all:
            lines.append(begun)
        seen = next((i for i in reversed(range(len(lines))) if lines[i] == self.last), -1)
        fresh = lines[seen + 1 :]
        if fresh:
            self.last = fresh[-1]
        return [line.partition(" ")[2] for line in fresh]


@dataclass
class KubernetesHandle(JobHandle[Told]):
    """A worker that is a Job of Kubernetes', or will be; see `face.Handle`."""

    cluster = "kubernetes"
    waiting = frozenset({"waiting"})
    ended = pods.ENDED
    by_itself = frozenset({"succeeded", "failed"})

    api: Cluster = field(kw_only=True)
    asked: Kubernetes = field(kw_only=True)
    told: Told = field(default=Told("waiting"), kw_only=True)
    _cursors: dict[str, _Cursor] = field(default_factory=dict)
    _kind: str = ""  # of what it waits for
    _since: float = 0.0  # when that began
    _hopeless: tuple[str, str] | None = None

    @property
    def name(self) -> str:
        return self.job.rpartition("/")[2]

    def _look_up(self) -> Told:
        try:
            return self._look()
        except KubernetesError as error:
            if error.status in (401, 403) and time.monotonic() - self._answered > _REFUSED:
                raise ConfigError(f"{error}\n  job {self.job} goes on, and the next run finds it") from error
            raise

    def _look(self) -> Told:
        job = self.api.job(self.name)
        lives = self.api.pods(self.name) if job is not None else []
        told = pods.tell(job, lives)
        may_be_late = [self._fetch(pod) for pod in lives]
        self._read()
        if told.state in self.ended and self._end is None and any(may_be_late):
            return Told("ending", node=told.node)
        if told.state == "waiting" and not told.reason and time.monotonic() - self._changed > _WARNS_AFTER:
            reason, message = self.api.warning((lives[-1] if lives else job or {})["metadata"]["uid"])
            told = Told("waiting", reason, told.node, message)
        return self._judged(told, lives)

    def _judged(self, told: Told, lives: Sequence[Mapping[str, Any]]) -> Told:
        """As it is told, unless it has been so for too long: then its node is lost, or it will never begin."""
        remedy = pods.unmended(told)
        kind = told.reason if told.reason == "Unschedulable" else told.state
        if remedy is not None:
            kind = "may come" if told.reason in pods.MAY_COME else "unmended"
        now = time.monotonic()
        if kind != self._kind:
            self._kind, self._since = kind, now
        stands = now - self._since
        if kind == "Unschedulable" and stands > _NO_ROOM:
            remedy = pods.never_fits(told, self.api.nodes(), self.asked.gpu_resource, self.asked.gpus)
            self._since = now  # where there is room when others have ended: looked at again after as long
        elif stands <= (_NO_ROOM if kind == "may come" else _UNMENDED):
            remedy = None
        if remedy is not None:
            self._hopeless = (f"job {self.job} cannot begin: {told.reason}: {told.message}", remedy)
        elif told.state == "ending" and stands > _LOST + lives[-1]["metadata"].get("deletionGracePeriodSeconds", 0):
            self.api.delete(self.name)  # else whoever comes next would find it, and wait too
            return replace(told, state="killed", reason="NodeLost")
        return told

    def _fetch(self, pod: Mapping[str, Any]) -> bool:
        """What its worker has said since the last look goes into the folder. True where it has ended, and may have
        said more than can be read yet."""
        cursor = self._cursors.setdefault(pod["metadata"]["uid"], _Cursor())
        state = pods.container_state(pod)
        if cursor.is_done or not ("running" in state or "terminated" in state):
            return False
        asked_at, has_ended = time.monotonic(), "terminated" in state
        if has_ended and cursor.ended_at is None:
            cursor.ended_at = asked_at
        for_seconds = 0.0 if cursor.ended_at is None else asked_at - cursor.ended_at
        try:
            text = self.api.log(pod["metadata"]["name"], cursor.since())
        except KubernetesError as error:
            if error.status is None or error.status < 500:
                raise
            log.warning("job %s: its log cannot be read now: %s", self.job, error)  # its node does not answer
            cursor.is_done = for_seconds > _UNHEARD
            return has_ended and not cursor.is_done
        cursor.at = asked_at
        cursor.is_done = for_seconds > _LATE
        said, printed = split(cursor.new(text, is_all=cursor.is_done))
        for name, lines in (("messages.jsonl", said), ("worker.log", printed)):
            if lines:
                with (self.folder / name).open("a", encoding="utf-8") as file:
                    file.writelines(f"{line}\n" for line in lines)
        return has_ended and not cursor.is_done

    def _fills_folder(self) -> bool:
        return True

    def _ask(self) -> None:
        super()._ask()
        self._ask_at = min(self._ask_at, time.monotonic() + _LOOK)

    def _end_it(self) -> None:
        self.api.delete(self.name)
        for pod in self.api.pods(self.name):
            # At once and with our own patience: the job's end would reach it later, and with the manifest's.
            self.api.delete_pod(pod["metadata"]["name"])
        if not self.ends_within(_GRACE + _LOST):
            raise KubernetesError(
                f"Kubernetes has not ended job {self.job} in {_GRACE + _LOST:.0f} s: it is {self.told.state}",
                remedy=f"`kubectl describe job {self.name} -n {self.api.namespace}` says more; its node may be lost",
            )

    def _has_ended(self, why: str) -> None:
        super()._has_ended(why)
        code = self.told.code
        if self._end is None and code is not None:
            self._code = code if code <= 128 else 128 - code

    def _never(self) -> tuple[str, str] | None:
        return self._hopeless

    def _in_words(self) -> tuple[str, str]:
        return pods.in_words(self.job, self.told)

    def _waits(self) -> dict[str, Any]:
        told = ": ".join(word for word in (self.told.reason, self.told.message) if word)
        return {**super()._waits(), "reason": f"job {self.job} waits in Kubernetes" + (f": {told}" if told else "")}


def split(lines: Sequence[str]) -> tuple[list[str], list[str]]:
    """(the worker's messages, all else) of the lines that a pod has said on both its streams."""
    said: list[str] = []
    printed: list[str] = []
    for line in lines:
        before, mark, rest = line.partition(_MESSAGE)
        if not mark or not _is_whole(mark + rest):
            printed.append(line)
            continue
        said.append(mark + rest)
        if before:
            printed.append(before)
    return said, printed


def _is_whole(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def launch(plan: Plan, plans: Sequence[Plan], config: Config) -> list[Shard]:
    """Submit a Job for each of `plans`, which share out `plan`, or find those that live already.

    What is found is shared out as it was when it was submitted. Raises ConfigError when Kubernetes refuses what
    [kubernetes] asks for, KubernetesError when it cannot be asked.
    """
    asked = config.kubernetes
    manifest = manifests.read_manifest(asked)
    plan, *plans = (replace(one, cache=asked.cache) for one in (plan, *plans))
    manifests.must_see(manifest, plan)
    api = _connect(asked)
    try:
        _let_go_of_ended(config, api)
        return _found(plan, manifest, config, api) or _submitted(plan, plans, manifest, config, api)
    except KubernetesError as error:
        if error.status == 409 and (found := _found(plan, manifest, config, api)):  # another driver was faster
            return found
        if error.status in (400, 401, 403, 404, 413, 422):  # a person must mend it
            raise ConfigError(str(error)) from error
        raise


def _let_go_of_ended(config: Config, api: Cluster) -> None:
    """Of jobs whose drivers were killed, and that ended since: who comes after them finds them no more."""
    for folder, job in jobs.submitted(config, "kubernetes"):
        namespace, _, name = job.rpartition("/")
        if namespace == api.namespace and ((told := api.job(name)) is None or not pods.is_living(told)):
            jobs.let_go(folder, job, "it ended with nobody looking")


def _same(plan: Plan, api: Cluster) -> list[dict[str, Any]]:
    """Every Job that was submitted for this plan and is not forgotten."""
    return api.jobs(f"{manifests.LAUNCH_ID}={launch_id(plan)}")


def _found(plan: Plan, manifest: Mapping[str, Any], config: Config, api: Cluster) -> list[Shard]:
    """The workers of this plan's last life, where one lives: the others too, whose words are read again.

    Those that are not there are submitted now: their driver was killed between two of them, or comes to it this moment.
    """
    same = _same(plan, api)
    life = max(map(_life, same), default=0)
    last = {int(job["metadata"]["labels"][manifests.SHARD]): job for job in same if _life(job) == life}
    if not any(pods.is_living(job) for job in last.values()):
        return []
    texts = {i: manifests.plan_in(job) for i, job in last.items()}
    asked = [json.loads(text) for text in texts.values()]
    if any(one["platform"] != __version__ for one in asked):
        return []  # its worker's words need not be ours; what it has leased is left to it
    shares = manifests.shares_in(next(iter(last.values())))
    plans = manifests.share(replace(plan, together=asked[0]["together"]), shares)
    names = [f"{api.namespace}/{_name(plan, life, i)}" for i in range(len(plans))]
    for folder, job in jobs.submitted(config, "kubernetes"):
        if job in names:
            jobs.let_go(folder, job, "whoever drives it now has a folder of its own")
    shards = []
    for i, (own, folder, name) in enumerate(zip(plans, folders.make_folders(plans, config), names, strict=True)):
        if i in texts:
            folders.write_whole(folder / "plan.json", texts[i])
        else:
            _create(plan, own, life, i, shares, manifest, api)
        shards.append(Shard(read_plan(folder / "plan.json"), _handle(folder, name, config, api, was_found=i in texts)))
    return shards


def _submitted(
    plan: Plan, plans: Sequence[Plan], manifest: Mapping[str, Any], config: Config, api: Cluster
) -> list[Shard]:
    life = 1 + max(map(_life, _same(plan, api)), default=0)
    shares = manifests.shares_of(plans)
    shards: list[Shard] = []
    try:
        for i, (own, folder) in enumerate(zip(plans, folders.make_folders(plans, config), strict=True)):
            _create(plan, own, life, i, shares, manifest, api)
            shards.append(Shard(own, _handle(folder, f"{api.namespace}/{_name(plan, life, i)}", config, api)))
    except BaseException:  # a share of the work is of no use to anybody
        for i, shard in enumerate(shards):
            try:
                shard.handle.stop()
            except EvalPlatformError as error:  # what is raised is why the launch failed
                log.error("job %s may go on, and the next run finds it: %s", _name(plan, life, i), error)
        raise
    return shards


def _create(whole: Plan, own: Plan, life: int, i: int, shares: str, manifest: Mapping[str, Any], api: Cluster) -> None:
    """The Job of shard i. That another driver has made it is an error for the first only, which says how all is shared
    out: the others were made from what stands there."""
    labels = {manifests.LAUNCH_ID: launch_id(whole), manifests.LIFE: str(life), manifests.SHARD: str(i)}
    try:
        api.create(manifests.job_of(manifest, own, _name(whole, life, i), labels, shares))
    except KubernetesError as error:
        if error.status != 409 or i == 0:
            raise


def _name(whole: Plan, life: int, i: int) -> str:
    """The first's is the same in however many the work is shared out, so that only one driver can make it."""
    return f"{jobs.name_of(whole)}-{life}" + (f"-{i}" if i else "")


def _handle(folder: Path, job: str, config: Config, api: Cluster, *, was_found: bool = False) -> KubernetesHandle:
    jobs.remember(folder, "kubernetes", job)
    return KubernetesHandle(job, folder, was_found=was_found, api=api, asked=config.kubernetes)


def _life(job: Mapping[str, Any]) -> int:
    return int(job["metadata"]["labels"][manifests.LIFE])
