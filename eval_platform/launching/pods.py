"""What do a Job of Kubernetes' and its pods say of the worker in them? Pure functions of what the API server answers.

A pod is one life of a worker: where it was disturbed, the Job makes another, and the newest counts. Words in CamelCase
are Kubernetes' own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from eval_platform.launching import jobs
from eval_platform.launching.manifests import CONTAINER

Json = Mapping[str, Any]

ENDED = frozenset({"succeeded", "failed", "killed", "gone"})
# Reasons of a container that waits as every one does.
_BEING_MADE = frozenset({"", "ContainerCreating", "PodInitializing"})
# What the cluster warns of and tries again, as a volume that is still another node's.
MAY_COME = ("FailedMount", "FailedAttachVolume", "FailedCreatePodSandBox")
# Why a worker cannot begin until a person has mended something, and what.
_UNMENDED = {
    **dict.fromkeys(
        ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError"),
        "name an image that the nodes can pull in [kubernetes] image; where its registry asks for a password, name a "
        "secret under imagePullSecrets in [kubernetes] manifest",
    ),
    "CreateContainerConfigError": "make the secret or config map that [kubernetes] manifest names",
    "CreateContainerError": "mend the container in [kubernetes] manifest",
    "RunContainerError": "mend the container in [kubernetes] manifest, or the image",
    "FailedCreate": "make what it names (a service account, a quota, what the namespace's policy allows), or mend "
    "[kubernetes] manifest",
    **dict.fromkeys(
        MAY_COME,
        "mend the volume, secret or config map that it names (`kubectl describe pod`), or volumes in [kubernetes] "
        "manifest",
    ),
}
_DISTURBED = {
    "PreemptionByScheduler": "a more urgent pod took its place",
    "EvictionByEvictionAPI": "its node was drained",
    "DeletionByTaintManager": "its node may run it no more, or does not answer",
    "DeletionByPodGC": "its node is gone",
    "TerminationByKubelet": "its node ran out of something, or was shut down",
}


@dataclass(frozen=True)
class Told(jobs.Told):
    """A worker as the API server tells of it; reason and message are Kubernetes' own. code: of the worker's process.

    waiting: for a place, an image or the next life. ending: it was told to leave, or its node is lost. failed: by its
    own doing; killed: by Kubernetes'. gone: the Job is not there.
    """

    message: str = ""
    code: int | None = None


def tell(job: Json | None, pods: Sequence[Json]) -> Told:
    """What is so now. pods: of the Job, the newest last."""
    if job is None:
        return Told("gone")
    life = _life(pods[-1]) if pods else _without_pod(job)
    ended = finished(job)
    if ended is None:
        # Between two lives: its pod has ended, and the Job says neither that it is over nor that there is another.
        return replace(life, state="waiting") if life.state in ENDED else life
    kind, reason, message = ended
    if kind == "Complete":
        return replace(life, state="succeeded")
    if reason in ("BackoffLimitExceeded", "PodFailurePolicy") and life.state in ENDED:
        return life  # that a pod failed is known; its own reason is the cause
    return replace(life, state="killed", reason=reason, message=message)


def finished(job: Json) -> tuple[str, str, str] | None:
    """("Complete" or "Failed", reason, message) of a Job that is over; None of any other."""
    for one in job.get("status", {}).get("conditions", []):
        if one["type"] in ("Complete", "Failed") and one["status"] == "True":
            return one["type"], one.get("reason", ""), one.get("message", "")
    return None


def is_living(job: Json) -> bool:
    return finished(job) is None and "deletionTimestamp" not in job["metadata"]


def _without_pod(job: Json) -> Told:
    if job["spec"].get("suspend"):
        return Told("waiting", "Suspended", message="by Kueue until there is room, or by somebody")
    return Told("waiting")


def _life(pod: Json) -> Told:
    """Of one pod alone."""
    status, node = pod.get("status", {}), pod["spec"].get("nodeName", "")
    phase = status.get("phase", "Pending")
    ended = container_state(pod).get("terminated", {})
    code = ended.get("exitCode")
    disturbed = _condition(pod, "DisruptionTarget", "True")
    if phase == "Succeeded":
        return Told("succeeded", node=node, code=code)
    if phase == "Failed":
        # What the kubelet did; what was done to its node or its place; what the process did.
        for why in (status, disturbed or {}, ended):
            if why.get("reason", "Error") != "Error":
                return Told("killed", why["reason"], node, why.get("message", ""), code)
        return Told("failed", "", node, ended.get("message", ""), code)
    if phase == "Unknown" or status.get("reason") == "NodeLost":
        return Told("ending", "NodeLost", node, status.get("message", ""), code)
    if "deletionTimestamp" in pod["metadata"]:
        why = disturbed or {}
        return Told("ending", why.get("reason", ""), node, why.get("message", ""), code)
    if phase == "Running":
        return Told("running", node=node, code=code)
    waits = _condition(pod, "PodScheduled", "False") or _container_waits(pod)
    return Told("waiting", waits.get("reason", ""), node, waits.get("message", ""))


def _condition(pod: Json, kind: str, status: str) -> Json | None:
    found = pod.get("status", {}).get("conditions", [])
    return next((one for one in found if one["type"] == kind and one["status"] == status), None)


def container_state(pod: Json) -> Json:
    """`waiting`, `running` or `terminated` of the worker's container, each with what is said of it."""
    found = pod.get("status", {}).get("containerStatuses", [])
    return next((one.get("state", {}) for one in found if one["name"] == CONTAINER), {})


def _container_waits(pod: Json) -> Json:
    """Of all containers that wait, those before the worker's too, what is said of the first that does not merely wait
    its turn."""
    status = pod.get("status", {})
    containers = (*status.get("initContainerStatuses", []), *status.get("containerStatuses", []))
    waiting = (one.get("state", {}).get("waiting", {}) for one in containers)
    return next((waits for waits in waiting if waits.get("reason", "") not in _BEING_MADE), {})


def seen_last(event: Json) -> str:
    """When: an event that comes again is counted, not made anew."""
    series = (event.get("series") or {}).get("lastObservedTime")
    return series or event.get("lastTimestamp") or event.get("eventTime") or event["metadata"]["creationTimestamp"]


def unmended(told: Told) -> str | None:
    """What a person must do before this worker can begin; None where waiting may be enough."""
    if told.state != "waiting" or "exceeded quota" in told.message:
        return None
    return _UNMENDED.get(told.reason)


def never_fits(told: Told, nodes: Sequence[Json] | None, resource: str, count: int) -> str | None:
    """What to do about a pod for which no node there is has room even when it is idle; None where one may have.

    nodes: None where this account may not see them.
    """
    if told.reason != "Unschedulable":
        return None
    if "Insufficient" not in told.message:
        return "mend nodeSelector, tolerations or volumes in [kubernetes] manifest"
    if not count or nodes is None or f"Insufficient {resource}" not in told.message:
        return None
    most = max((int(node.get("status", {}).get("allocatable", {}).get(resource, 0)) for node in nodes), default=0)
    if most >= count:
        return None
    return f"no node has more than {most} {resource}: ask for so many in [kubernetes] gpus, or for another gpu_resource"


def in_words(job: str, told: Told) -> tuple[str, str]:
    """(what happened, what can be done) for a worker that ended without its own word."""
    kept = "what was answered is in the journal, and the next try asks only the rest"
    again = "the next run asks again"
    on = f" on node {told.node}" if told.node else ""
    says = f": {told.message}" if told.message else ""
    match told.reason:
        case _ if told.state == "gone":
            return f"somebody deleted job {job}; {kept}", "run it again when it is wanted"
        case "DeadlineExceeded":
            return (
                f"Kubernetes ended job {job} at its deadline{says}; {kept}",
                "raise activeDeadlineSeconds in [kubernetes] manifest, or let as many runs as it takes follow",
            )
        case "OOMKilled":
            return (
                f"the worker of job {job} used more main memory than its limit{on}; {kept}",
                "raise the memory under resources in [kubernetes] manifest, or lower [engine] batch_tokens",
            )
        case "Evicted":
            return (
                f"the worker of job {job} was evicted{on}{says}; {kept}",
                "give it room in [kubernetes] manifest: ephemeral-storage, sizeLimit of the volume `state`, memory",
            )
        case "NodeLost":
            return (
                f"the node {told.node or 'of the worker'} does not answer, with the worker of job {job} on it; {kept}",
                "the next run begins on another node",
            )
        case reason if reason in _DISTURBED:
            return (
                f"the worker of job {job} was ended{on}: {_DISTURBED[reason]} ({reason}){says}; {kept}",
                "podFailurePolicy as in eval_platform/launching/worker_job.yaml lets Kubernetes begin it anew by "
                "itself; else the next run does",
            )
        case "StartError" | "ContainerCannotRun":
            return (
                f"the container of job {job} could not start{on}{says}",
                "the image must have the worker as its entrypoint, as docker/worker.Dockerfile has, or [kubernetes] "
                "manifest must say its command",
            )
        case "" if told.code is not None and told.code > 128:
            return f"the worker of job {job} was killed by signal {told.code - 128}{on}; {kept}", again
        case "" if told.code is not None:
            return f"the worker of job {job} ended with code {told.code}{on} without a word", again
        case reason:
            return f"job {job} failed: {reason or 'Kubernetes does not say why'}{says}; {kept}", again
