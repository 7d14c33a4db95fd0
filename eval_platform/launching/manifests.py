"""Which Job is submitted to Kubernetes for a plan? The user's manifest, or `worker_job.yaml`, with what a worker needs.

The plan travels in an annotation of the pod, which the pod sees as a file (a downward API volume): one object, made in
one request, needs no right but that to make jobs, and is gone when the job is. It says where the worker was meant to
run, too, so that a driver that has lost its own files reads it there.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from eval_platform.config import Kubernetes
from eval_platform.errors import ConfigError
from eval_platform.launching.local import WORKER_ENV
from eval_platform.plan import Plan, PlannedTask

OWN_MANIFEST = Path(__file__).parent / "worker_job.yaml"
LAUNCH_ID = "eval-platform/launch-id"  # label: `plan.launch_id` of the whole plan
LIFE = "eval-platform/life"  # label: how often the same was asked of the cluster before, and 1
SHARD = "eval-platform/shard"  # label: which of the workers that share the whole plan out, from 0
SHARES = "eval-platform/shares"  # annotation: of each of these workers the beginnings of its task_ids
PLAN = "eval-platform/plan"  # annotation of the pod
CONTAINER = "worker"
PLAN_FOLDER = "/etc/eval-platform"
_PLAN_VOLUME = "eval-platform-plan"
# Kubernetes' own limit for all annotations of an object, less room for others'.
_MOST_PLAN_BYTES = 250_000


def read_manifest(asked: Kubernetes) -> dict[str, Any]:
    """The Job that every worker's is made of, as [kubernetes] asks for it.

    Raises ConfigError where the manifest cannot be read or is not a Job of one worker, and where no image is named.
    """
    file = OWN_MANIFEST if asked.manifest is None else Path(asked.manifest)
    try:
        job = _without_nulls(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(
            f"{file}: field kubernetes.manifest cannot be read: {error}",
            remedy="name a file with one Job in YAML; the platform's own is a pattern (docs/kubernetes.md)",
        ) from error
    for problem, remedy in _problems(job):
        raise ConfigError(f"{file}: {problem}", remedy=remedy)
    container = _container(job)
    if asked.image is not None:
        container["image"] = asked.image
    if not container.get("image"):
        raise ConfigError(
            "field kubernetes.image: no image is named for the worker",
            remedy="build docker/worker.Dockerfile, push it to a registry of yours, and name it there",
        )
    if asked.gpus:
        limits = container.setdefault("resources", {}).setdefault("limits", {})
        limits[asked.gpu_resource] = str(asked.gpus)
    return job


def _problems(job: Any) -> Iterator[tuple[str, str]]:
    """(what is wrong, what to do): where it is no Job with one container of a worker's, run once."""
    if not isinstance(job, dict) or (job.get("apiVersion"), job.get("kind")) != ("batch/v1", "Job"):
        yield "is no Job of batch/v1", "begin with eval_platform/launching/worker_job.yaml"
        return
    try:
        spec = job["spec"]
        pod = spec["template"]["spec"]
        names = [container["name"] for container in pod["containers"]]
    except (KeyError, TypeError) as error:
        yield f"field {error} is missing, or not of the right kind", "`kubectl create --dry-run=server -f` says more"
        return
    if CONTAINER not in names:
        yield f"no container is called {CONTAINER!r}, but {', '.join(names)}", f"name the worker's {CONTAINER!r}"
    if pod.get("restartPolicy") != "Never":
        yield "restartPolicy must be Never", "the log of a container that is begun anew in its pod would be lost"
    if spec.get("parallelism", 1) != 1 or spec.get("completions", 1) != 1:
        yield "parallelism and completions must be 1", "leave both out: each worker is a job of its own"


def _without_nulls(value: Any) -> Any:
    """To Kubernetes a field that is null is one that is not there."""
    match value:
        case dict():
            return {name: _without_nulls(one) for name, one in value.items() if one is not None}
        case list():
            return [_without_nulls(one) for one in value]
        case _:
            return value


def must_see(job: Mapping[str, Any], plan: Plan) -> None:
    """Raises ConfigError for a folder of the plan's that the pod would not have: what it writes there would be lost."""
    mounts = [PurePosixPath(mount["mountPath"]) for mount in _container(job).get("volumeMounts", [])]
    folders = {"results": plan.store, "the checkpoint": plan.arrival.uri, "[kubernetes] cache": plan.cache}
    for what, folder in folders.items():
        if "://" not in folder and not any(PurePosixPath(folder).is_relative_to(mount) for mount in mounts):
            raise ConfigError(
                f"{what} is the folder {folder}, and the worker's container mounts nothing there",
                remedy="mount a shared volume under the same path in [kubernetes] manifest, or put it in a bucket",
            )


def shares_of(plans: Sequence[Plan]) -> str:
    """How these plans share the whole out; `share` reads it."""
    return json.dumps([[_short(task) for task in plan.tasks] for plan in plans])


def share(plan: Plan, shares: str) -> list[Plan]:
    """The plans that share out `plan` in this way."""
    parts = [set(part) for part in json.loads(shares)]
    if len(parts) == 1:
        return [plan]
    of = [tuple(task for task in plan.tasks if _short(task) in part) for part in parts]
    return [replace(plan, tasks=tasks) for tasks in of]


def _short(task: PlannedTask) -> str:
    return task.task_id[:16]


def job_of(
    manifest: Mapping[str, Any], plan: Plan, name: str, labels: Mapping[str, str], shares: str
) -> dict[str, Any]:
    """The Job to submit. Raises ConfigError for a plan that is too large to travel with it."""
    text = json.dumps(json.loads(plan.to_json()))  # on one line
    if len(text.encode()) > _MOST_PLAN_BYTES:
        raise ConfigError(
            f"the plan of {len(plan.tasks)} tasks has {len(text.encode()):,} bytes, and a pod's annotations can have "
            f"{_MOST_PLAN_BYTES:,}",
            remedy="ask fewer tasks at once: tiers of [queue], or `eval-platform run --task`",
        )
    job = deepcopy(dict(manifest))
    template = job["spec"]["template"]
    shown = {"eval-platform/arrival": f"{plan.arrival.key}@{plan.arrival.n}"}
    for one, more in ((job, {**shown, SHARES: shares}), (template, {**shown, PLAN: text})):
        metadata = one.setdefault("metadata", {})
        metadata["labels"] = {**metadata.get("labels", {}), **labels}
        metadata["annotations"] = {**metadata.get("annotations", {}), **more}
    job["metadata"].pop("generateName", None)
    job["metadata"]["name"] = name
    job["spec"]["backoffLimit"] = 0  # what a worker could not do is the next run's
    pod = template["spec"]
    items = [{"path": "plan.json", "fieldRef": {"fieldPath": f"metadata.annotations['{PLAN}']"}}]
    pod.setdefault("volumes", []).append({"name": _PLAN_VOLUME, "downwardAPI": {"items": items}})
    container = _container(job)
    container.setdefault("volumeMounts", []).append({"name": _PLAN_VOLUME, "mountPath": PLAN_FOLDER, "readOnly": True})
    container["args"] = [PLAN_FOLDER, "--messages=stdout"]
    env = container.setdefault("env", [])
    said = {one["name"] for one in env}
    env += [{"name": name, "value": value} for name, value in WORKER_ENV.items() if name not in said]
    return job


def plan_in(job: Mapping[str, Any]) -> str:
    """The plan, as JSON, that a Job was submitted with."""
    return job["spec"]["template"]["metadata"]["annotations"][PLAN]


def shares_in(job: Mapping[str, Any]) -> str:
    """How the whole was shared out when this Job was submitted, the same for all its workers."""
    return job["metadata"]["annotations"][SHARES]


def _container(job: Mapping[str, Any]) -> dict[str, Any]:
    return next(one for one in job["spec"]["template"]["spec"]["containers"] if one["name"] == CONTAINER)
