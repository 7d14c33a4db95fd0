"""One settings object: where checkpoints arrive, where results go, which tasks. One TOML file plus environment.

The file is found by, in this order: the `path` given, `$EVAL_PLATFORM_CONFIG`, `./eval_platform.toml`. Without any,
defaults apply: checkpoints arrive in `./checkpoints`, results go to `./results`. Relative paths are relative to the
folder of the file (without one: to the working directory). `docs/configuration.md` shows every field.

Environment variables win over the file: EVAL_PLATFORM_RESULTS, EVAL_PLATFORM_STATE, EVAL_PLATFORM_DEVICE,
EVAL_PLATFORM_DTYPE, EVAL_PLATFORM_WEBHOOK. In the environment alone stands EVAL_PLATFORM_DATA, the folder of public
datasets that `tasks sync` looks in (`tasks/catalogue/`): no configuration should carry it to another machine; and
EVAL_PLATFORM_POSTGRES, where a team's Dagster keeps its runs (`instance.py`): it holds a password.
"""

import os
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from eval_platform.errors import ConfigError
from eval_platform.identity import content_id, escape_key
from eval_platform.served import ROOT as SERVED_ROOT
from eval_platform.served import ServedModel
from eval_platform.values import IMPORTED, RunSettings

CONFIG_NAME = "eval_platform.toml"
LOCK_NAME = "eval_platform.lock.json"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


# A suite is a group of assets in Dagster; these are groups there already.
RESERVED_SUITES = frozenset({"results", "boards", "checkpoints", "datasets", "maintenance"})
SuiteName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+$")]


_DEVICE_NAME = re.compile(r"\d+|(?:GPU|MIG)-[A-Za-z0-9/-]+")


# Off: published numbers of base models are without a template, and of many chat models too.
ApplyChat = bool | Literal["auto"]


_HUB_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_HUB_ADDRESS = re.compile(rf"hf://({_HUB_NAME}(?:/{_HUB_NAME})?)(?:@([^\s?#%\\]+))?")


def hub_address(text: str) -> tuple[str, str | None] | None:
    """(repository, revision or None) of hf://org/model or hf://org/model@revision; None for anything else."""
    match = _HUB_ADDRESS.fullmatch(text)
    if match is None or ".." in text:
        return None
    return match[1], match[2]


class Root(_Section):
    """A place where checkpoints arrive: `[[checkpoints]]`."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$", description="first part of every key found here")
    path: str = Field(description="folder; every folder below it that holds a model is a checkpoint")
    revisions: tuple[str, ...] = Field(
        default=(), description="of hf://org/model: which branches and tags are checkpoints, with * and ?; empty: all"
    )
    pattern: str | None = Field(
        default=None,
        description="how run and step stand in the path, e.g. '{run}/step_{step}'; "
        "checkpoint.json and trainer_state.json win over it",
    )
    require_success: bool = Field(default=False, description="wait for a file _SUCCESS beside the weights")
    quiet_seconds: float = Field(default=10.0, ge=0, description="without _SUCCESS: unchanged for this long")
    chat: ApplyChat | None = Field(default=None, description="for checkpoints found here, in place of [chat] apply")

    @model_validator(mode="after")
    def _is_an_address(self) -> Self:
        if self.path.startswith("hf:"):
            address = hub_address(self.path)
            if address is None:
                raise ValueError(f"path {self.path!r} must be like hf://org/model or hf://org/model@revision")
            if "revisions" in self.model_fields_set and address[1] is not None:
                raise ValueError("path names one revision already; leave out `revisions`, or the part after @")
        elif "revisions" in self.model_fields_set:
            raise ValueError("revisions are of a repository: path must be like hf://org/model")
        return self


class Reference(_Section):
    """A model that every curve is compared with: `[[references]]`, by `path` or, of one that is known, by `key`."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$", description="what its line is called")
    path: str | None = Field(default=None, description="the checkpoint itself: a folder, s3:// or hf://...@revision")
    key: str | None = Field(default=None, description="of a checkpoint or a served model that arrives anyway")

    @model_validator(mode="after")
    def _is_one_model(self) -> Self:
        if (self.path is None) == (self.key is None):
            raise ValueError(f"reference {self.name!r} must have a path, or the key of a known checkpoint; not both")
        address = hub_address(self.path) if self.path is not None and self.path.startswith("hf:") else None
        if self.path is not None and self.path.startswith("hf:") and (address is None or address[1] is None):
            raise ValueError(f"path {self.path!r} must name one revision, like hf://org/model@main")
        return self

    @property
    def known_as(self) -> str:
        """The key that it is found under."""
        if self.key is not None or self.path is None:
            return self.key or self.name
        address = hub_address(self.path)
        return self.name if address is None or address[1] is None else f"{self.name}/{escape_key(address[1])}"


class Tasks(_Section):
    """Which tasks every checkpoint is asked: `[tasks]`."""

    include: tuple[str, ...] = Field(
        default=(), description="names of tasks; empty, and no suites: every task of `folders`"
    )
    suites: tuple[str, ...] = Field(default=(), description="names of suites, shipped or of `[suites]`")
    folders: tuple[str, ...] = Field(default=(), description="folders of task files of your own")
    lm_eval: tuple[str, ...] = Field(
        default=(), description="names of tasks and groups of lm-evaluation-harness, asked as it asks them"
    )
    on_task_change: Literal["new_only", "backfill"] = "new_only"


class Engine(_Section):
    """How the model runs: `[engine]`."""

    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_length: int | None = Field(default=None, gt=0)
    rolling_stride: int | None = Field(
        default=None, gt=0, description="perplexity: new tokens in each later window; default: disjoint windows"
    )
    seed: int = 0
    batch_tokens: int | None = Field(default=None, gt=0, description="tokens in one forward pass; default by device")
    path: Literal["auto", "tree", "plain"] = Field(
        default="auto", description="tree shares prefixes; plain is transformers as it is; auto: tree where it can"
    )
    deterministic: bool = Field(default=False, description="fixed kernels and threads: repeats to the last digit")
    trust_remote_code: bool = Field(default=False, description="run the checkpoint's own Python; recorded when set")


class Chat(_Section):
    """Whether and how checkpoints are asked through their chat template: `[chat]`."""

    apply: ApplyChat = Field(default=False, description="auto: where the checkpoint's tokenizer has a template")
    system_prompt: str | None = Field(default=None, description="in place of each task's own")
    shots_as_turns: bool | None = Field(
        default=None, description="every shot a turn of its own, or all in the question's; default: as the task says"
    )


class Worker(_Section):
    """How work is shared out: `[worker]`."""

    launcher: Literal["subprocess", "slurm", "ray", "kubernetes"] = Field(
        default="subprocess",
        description="what a worker is: a process of this machine, or a job of Slurm's (`[slurm]`), Ray's (`[ray]`) or "
        "Kubernetes' (`[kubernetes]`)",
    )
    slots: int = Field(default=1, ge=1, description="workers at once; each loads one checkpoint")
    shards: int = Field(
        default=1,
        ge=1,
        description="at most so many workers on one checkpoint, its tasks shared out among them, where slots are free "
        "and it pays (docs/planning.md)",
    )
    devices: tuple[str, ...] = Field(
        default=(),
        description="names for CUDA_VISIBLE_DEVICES, shared out evenly to the slots, several of which may share one; "
        "empty: workers see what the platform sees",
    )
    lease_seconds: float = Field(default=30.0, gt=0, description="a worker silent for this long is taken over")
    retry_wait_seconds: float = Field(default=10.0, ge=0, description="first wait after an infrastructure error")
    exchange: str | None = Field(
        default=None,
        description="s3://bucket/prefix through which a cluster's workers get their plans and say their messages, "
        "where its nodes do not share `state`",
    )
    nursery: bool = Field(
        default=True,
        description="`eval-platform up` keeps a process that has imported torch and forks workers, and one that forks "
        "Dagster's runs: seconds less for every checkpoint, some 800 MB of memory",
    )

    @field_validator("devices", mode="before")
    @classmethod
    def _numbers_are_names(cls, devices: Any) -> Any:
        if not isinstance(devices, list | tuple):
            return devices
        return tuple(str(name) if type(name) is int else name for name in devices)

    @model_validator(mode="after")
    def _are_this_machines(self) -> Self:
        if self.devices and self.launcher != "subprocess":
            raise ValueError(f"devices: they are of this machine; with launcher = {self.launcher!r} leave them out")
        return self

    @model_validator(mode="after")
    def _is_exchanged_with_a_cluster(self) -> Self:
        if self.exchange is None:
            return self
        if not re.fullmatch(r"s3://[^/\s]+/.*[^/\s]", self.exchange):
            raise ValueError(f"exchange: {self.exchange!r} must be like s3://bucket/prefix")
        if self.launcher not in ("slurm", "ray"):
            raise ValueError(
                f"exchange: it is for Slurm's and Ray's workers; with launcher = {self.launcher!r} leave it out"
            )
        return self

    @model_validator(mode="after")
    def _are_shared_out_evenly(self) -> Self:
        for name in self.devices:
            if not _DEVICE_NAME.fullmatch(name):
                raise ValueError(f"devices: {name!r} is no device: give numbers, or names like GPU-... and MIG-...")
        twice = sorted({name for name in self.devices if self.devices.count(name) > 1})
        if twice:
            raise ValueError(f"devices: {', '.join(twice)} stands there twice")
        if self.devices and len(self.devices) % self.slots and self.slots % len(self.devices):
            raise ValueError(
                f"devices: {len(self.devices)} devices cannot be shared out evenly to slots = {self.slots}; give a "
                "number of slots that divides them, or a multiple of it"
            )
        return self

    def devices_of(self, slot: int) -> tuple[str, ...]:
        """What the slot of this number owns, or has its share of; empty where no devices are configured."""
        count = len(self.devices)
        if count and self.slots > count:  # neighbours on different devices
            return (self.devices[slot % count],)
        return self.devices[slot * count // self.slots : (slot + 1) * count // self.slots]

    @property
    def slots_a_device(self) -> int:
        """How many slots share a device; 1: none is shared."""
        return max(1, self.slots // len(self.devices)) if self.devices else 1


# Tasks that no tier names have this one.
OTHER_TIER = "other"


class Tier(_Section):
    """Some of the tasks, and the checkpoints that they are asked of: `[[queue.tiers]]`, the most urgent first."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$", description="shown with every run of it")
    tasks: tuple[str, ...] = Field(default=(), description="names of tasks; neither these nor suites: every task")
    suites: tuple[str, ...] = Field(default=(), description="names of suites, shipped or of `[suites]`")
    every: int | None = Field(default=None, ge=1, description="every k-th checkpoint of a run by step; default: each")
    last: bool = Field(default=False, description="the last checkpoint of a run; without `every`, that one alone")


class Queue(_Section):
    """In which order checkpoints are evaluated, and what is asked of which of them: `[queue]`."""

    tiers: tuple[Tier, ...] = ()
    idle_minutes: float = Field(default=60.0, gt=0, description="a run without a new checkpoint for so long has ended")
    skip_superseded_beyond: int | None = Field(
        default=None,
        ge=1,
        description="when more than this many wait, older checkpoints of a run that has newer ones are passed over",
    )

    @field_validator("tiers")
    @classmethod
    def _tier_names_differ(cls, tiers: tuple[Tier, ...]) -> tuple[Tier, ...]:
        names = [tier.name for tier in tiers]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"the name of every tier must be its own; there are two called {', '.join(twice)}")
        if OTHER_TIER in names:
            raise ValueError(f"no tier may be called {OTHER_TIER!r}: so the tasks are called that no tier names")
        return tiers


class Slurm(_Section):
    """What a worker asks for as a job of Slurm, with `[worker] launcher = "slurm"`: `[slurm]`."""

    partition: str | None = Field(default=None, description="as sbatch has it; default: the cluster's own")
    account: str | None = Field(default=None, description="who pays, where the cluster wants to know")
    gres: str | None = Field(default=None, description="GPUs of one worker, such as gpu:1 or gpu:h100:2")
    time_limit: str | None = Field(default=None, description="minutes, H:MM:SS or D-HH:MM:SS; default: the partition's")
    requeue: bool = Field(default=True, description="begin anew by itself after a node's failure or a preemption")
    arguments: tuple[str, ...] = Field(default=(), description="further options of sbatch, each as --name=value")
    variables: tuple[str, ...] = Field(default=(), description="further environment variables that workers need")

    @field_validator("arguments")
    @classmethod
    def _are_options(cls, arguments: tuple[str, ...]) -> tuple[str, ...]:
        ours = {
            *("--job-name", "--output", "--open-mode", "--export", "--parsable", "--wrap", "--array", "--ntasks"),
            *("--partition", "--account", "--gres", "--time", "--requeue", "--no-requeue", "--chdir", "--clusters"),
            *("--error", "--wait", "--test-only", "--export-file"),
        }
        for argument in arguments:
            name = argument.partition("=")[0]
            if not re.fullmatch(r"--[a-z][a-z-]+", name):
                raise ValueError(f"{argument!r} must be one option written whole, such as '--mem=32G'")
            if name in ours:
                raise ValueError(f"{name} is set by the platform, or by a field of its own")
        return arguments

    @field_validator("partition", "account", "gres", "time_limit")
    @classmethod
    def _is_one_word(cls, value: str | None) -> str | None:
        if value is not None and (not value or any(sign.isspace() for sign in value)):
            raise ValueError("must be one word")
        return value


class Ray(_Section):
    """What a worker asks for as a job of a Ray cluster, with `[worker] launcher = "ray"`: `[ray]`."""

    address: str = Field(
        default="http://127.0.0.1:8265", description="of the job server, as `ray job submit --address` has it"
    )
    num_gpus: float = Field(default=0.0, ge=0, description="GPUs of one worker; less than one: it shares a GPU")
    num_cpus: float = Field(default=1.0, gt=0, description="CPUs of one worker, and its threads")
    resources: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default={}, description="further resources as Ray names them, such as {'accelerator_type:H100' = 0.001}"
    )
    variables: tuple[str, ...] = Field(
        default=(), description="further environment variables for workers; Ray's dashboard shows their values"
    )

    @field_validator("address")
    @classmethod
    def _is_a_url(cls, address: str) -> str:
        if not address.startswith(("http://", "https://")):
            raise ValueError("must begin with http:// or https://: it is the job server's, by default port 8265")
        if "@" in address:
            raise ValueError("must hold no credentials: a token belongs in RAY_AUTH_TOKEN")
        return address.rstrip("/")

    @field_validator("num_gpus")
    @classmethod
    def _is_a_share_or_whole(cls, num_gpus: float) -> float:
        if num_gpus > 1 and not num_gpus.is_integer():
            raise ValueError("must be a whole number where it is more than one, as Ray has it")
        return num_gpus

    @field_validator("resources")
    @classmethod
    def _have_no_field_of_their_own(cls, resources: dict[str, float]) -> dict[str, float]:
        if own := sorted({"CPU", "GPU", "memory"} & resources.keys()):
            raise ValueError(f"{', '.join(own)}: give num_cpus and num_gpus; memory cannot be asked for")
        return resources


class Kubernetes(_Section):
    """What a worker is as a Job of Kubernetes', with `[worker] launcher = "kubernetes"`: `[kubernetes]`."""

    image: str | None = Field(default=None, description="of docker/worker.Dockerfile; default: as the manifest says")
    gpus: int = Field(default=1, ge=0, description="of one worker")
    gpu_resource: str = Field(default="nvidia.com/gpu", description="what the cluster calls a GPU")
    manifest: str | None = Field(
        default=None, description="YAML of a Job of yours, in place of eval_platform/launching/worker_job.yaml"
    )
    namespace: str | None = Field(default=None, description="default: the context's, or that of the pod we are in")
    context: str | None = Field(default=None, description="of the kubeconfig; default: the current one, or the pod")
    cache: str = Field(default="/state/cache", description="folder in the pod for downloaded checkpoints")

    @field_validator("cache")
    @classmethod
    def _is_absolute(cls, cache: str) -> str:
        if not cache.startswith("/"):
            raise ValueError("must begin with /: it is a path in the pod")
        return cache

    @field_validator("gpu_resource")
    @classmethod
    def _is_a_resource(cls, name: str) -> str:
        if not re.fullmatch(r"[a-z0-9.-]+/[A-Za-z0-9._-]+", name):
            raise ValueError("must be like nvidia.com/gpu: `kubectl describe node` lists them under Allocatable")
        return name


class Sandbox(_Section):
    """Where programs that a model wrote are run: `[sandbox]`."""

    mode: Literal["cold", "warm", "unsafe"] = Field(
        default="cold",
        description="cold: a new bubblewrap and Python for every program; warm: a fork of one that is ready, faster; "
        "unsafe: plain processes that can read and change what you can, said in every result",
    )


class Sensor(_Section):
    """How often Dagster looks: `[sensor]`."""

    # Dagster's loop looks every 5 s; an interval of 5 s misses every other look, so that an arrival waits up to 10 s.
    interval_seconds: int = Field(default=1, ge=1)
    new_per_tick: int = Field(default=25, ge=1)
    sweep_per_tick: int = Field(default=500, ge=1, description="known folders looked at again in one tick")


class Alerts(_Section):
    """Who is told: `[alerts]`."""

    webhook: str | None = Field(default=None, description="URL that gets a JSON POST for a held or failed evaluation")


class S3(_Section):
    """How S3 is reached, beyond what the usual AWS settings (AWS_PROFILE, AWS_REGION, a role) say: `[s3]`."""

    endpoint: str | None = Field(default=None, description="URL of a server other than Amazon's")
    path_style: bool | None = Field(
        default=None, description="bucket in the path, not in the host name; default: where `endpoint` is set"
    )
    encryption: Literal["AES256", "aws:kms"] | None = Field(
        default=None, description="server-side encryption to ask for; default: what the bucket does"
    )
    kms_key: str | None = Field(default=None, description="key of `aws:kms`; default: the account's own")
    storage_class: str | None = Field(default=None, description="of objects of 128 KiB and more")
    cache_gb: float = Field(
        default=100.0, gt=0, description="how much of the checkpoints downloaded from buckets and the hub is kept here"
    )

    @field_validator("endpoint")
    @classmethod
    def _is_a_url(cls, endpoint: str | None) -> str | None:
        if endpoint is not None and not endpoint.startswith(("http://", "https://")):
            raise ValueError("must begin with http:// or https://")
        if endpoint is not None and "@" in endpoint:
            raise ValueError("must hold no credentials: they belong in AWS_PROFILE or AWS_ACCESS_KEY_ID")
        return endpoint

    @field_validator("storage_class")
    @classmethod
    def _can_be_read(cls, storage_class: str | None) -> str | None:
        if storage_class in ("GLACIER", "DEEP_ARCHIVE"):
            raise ValueError(f"{storage_class} must be restored before it is read; use GLACIER_IR or STANDARD_IA")
        return storage_class

    @model_validator(mode="after")
    def _key_has_its_use(self) -> Self:
        if self.kms_key is not None and self.encryption != "aws:kms":
            raise ValueError('kms_key needs encryption = "aws:kms"')
        return self


class Ui(_Section):
    """`[ui]`: the Dagster web server of `eval-platform up`."""

    host: str = "127.0.0.1"
    port: int | None = Field(default=None, description="default: a free one")


class Config(_Section):
    """Everything that is configured. Paths are absolute after `load_config`."""

    folder: Path
    file: Path | None = None
    results: str = "results"
    state: str = Field(default=".eval_platform", description="this machine's own: Dagster home, catalog, cache, logs")
    checkpoints: tuple[Root, ...] = (Root(name="checkpoints", path="checkpoints"),)
    served: tuple[ServedModel, ...] = ()
    references: tuple[Reference, ...] = ()
    tasks: Tasks = Tasks()
    suites: dict[SuiteName, tuple[str, ...]] = Field(default={}, description="suites of your own: name = [tasks]")
    engine: Engine = Engine()
    chat: Chat = Chat()
    worker: Worker = Worker()
    slurm: Slurm = Slurm()
    ray: Ray = Ray()
    kubernetes: Kubernetes = Kubernetes()
    queue: Queue | None = Field(default=None, description="without the section every checkpoint is asked every task")
    sandbox: Sandbox = Sandbox()
    sensor: Sensor = Sensor()
    alerts: Alerts = Alerts()
    s3: S3 = S3()
    ui: Ui = Ui()

    @model_validator(mode="after")
    def _slots_use_their_devices(self) -> Self:
        share, device = len(self.worker.devices_of(0)), self.engine.device
        if share > 1 and device.startswith("cuda:"):
            raise ValueError(
                f"worker.devices: each slot owns {share} devices, and with engine.device = {device!r} a model lies on "
                'one; set engine.device = "auto", or as many slots as devices'
            )
        if self.worker.slots_a_device > 1 and device == "map":
            raise ValueError(
                'worker.devices: with engine.device = "map" each worker takes all of its devices, and here '
                f'{self.worker.slots_a_device} slots share each; set engine.device = "auto", or fewer slots'
            )
        return self

    @field_validator("checkpoints")
    @classmethod
    def _names_differ(cls, roots: tuple[Root, ...]) -> tuple[Root, ...]:
        names = [root.name for root in roots]
        if len(set(names)) != len(names) or {"adhoc", SERVED_ROOT, IMPORTED} & set(names):
            raise ValueError(
                f"the name of every [[checkpoints]] root must be its own, not 'adhoc', '{SERVED_ROOT}' or '{IMPORTED}'"
            )
        return roots

    @field_validator("served")
    @classmethod
    def _served_names_differ(cls, served: tuple[ServedModel, ...]) -> tuple[ServedModel, ...]:
        names = [entry.name for entry in served]
        if len(set(names)) != len(names):
            raise ValueError("the name of every [[served]] model must be its own")
        return served

    @model_validator(mode="after")
    def _reference_names_differ(self) -> Self:
        names = [entry.name for entry in self.references]
        taken = {"adhoc", SERVED_ROOT, IMPORTED, *(root.name for root in self.checkpoints)}
        twice = sorted({name for name in names if names.count(name) > 1 or name in taken})
        if twice:
            raise ValueError(
                f"references: {', '.join(twice)} is called so already; the name must be no other reference's and no "
                f"root's, nor 'adhoc', '{SERVED_ROOT}' or '{IMPORTED}'"
            )
        if len(self.reference_keys) < len(self.references):
            raise ValueError("references: two of them are the same key; one line can have one name")
        return self

    @field_validator("suites")
    @classmethod
    def _suites_named(cls, suites: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        for name, tasks in suites.items():
            if name in RESERVED_SUITES:
                raise ValueError(f"a suite cannot be called {name!r}, which is a group in Dagster already; rename it")
            if not tasks:
                raise ValueError(f"suite {name!r} names no task")
        return suites

    @property
    def roots(self) -> tuple[Root, ...]:
        """Where checkpoints are looked for: the watched roots, and each reference as a root that is a checkpoint."""
        own = (Root(name=entry.name, path=entry.path) for entry in self.references if entry.path is not None)
        return (*self.checkpoints, *own)

    @property
    def reference_keys(self) -> dict[str, str]:
        """Key -> what the reference is called."""
        return {entry.known_as: entry.name for entry in self.references}

    def beside_reference(self, key: str) -> str | None:
        """Why nothing can be taken up under this key, where it lies below a reference and is not it."""
        for entry in self.references:
            if entry.path is not None and key.partition("/")[0] == entry.name and key != entry.known_as:
                return f"path of [[references]] {entry.name!r} must be the checkpoint itself, not a folder above it"
        return None

    @property
    def _gives_gpus(self) -> bool:
        """Whether each worker is given GPUs by name or number."""
        if self.worker.launcher == "ray":
            return self.ray.num_gpus > 0
        if self.worker.launcher == "kubernetes":
            return self.kubernetes.gpus > 0
        asked = (self.slurm.gres or "", *(one for one in self.slurm.arguments if one.startswith("--gpu")))
        return bool(self.worker.devices) or (self.worker.launcher == "slurm" and any("gpu" in one for one in asked))

    @property
    def state_dir(self) -> Path:
        return Path(self.state)

    @property
    def catalog_path(self) -> Path:
        """A mirror of its own for every results root: `run --results` elsewhere leaves this one's as it is."""
        elsewhere = (
            self.s3.endpoint if self.results.startswith("s3://") else None
        )  # servers may have buckets of one name
        root = [elsewhere, self.results] if elsewhere else self.results
        return self.state_dir / f"catalog-{content_id(root)[:8]}.duckdb"

    @property
    def cache_dir(self) -> Path:
        return self.state_dir / "cache"

    @property
    def dagster_home(self) -> Path:
        return self.state_dir / "dagster"

    @property
    def lock_path(self) -> Path:
        """Beside the configuration, and of its name where that is not the usual one: two may lie in one folder."""
        if self.file is None or self.file.name == CONFIG_NAME:
            return self.folder / LOCK_NAME
        return self.folder / f"{self.file.stem}.lock.json"

    def run_settings(
        self,
        *,
        key: str | None = None,
        limit: int | None = None,
        trust_remote_code: bool | None = None,
        chat: bool | None = None,
        system_prompt: str | None = None,
    ) -> RunSettings:
        """The settings of this configuration for the checkpoint `key`, not yet resolved against it.

        chat and system_prompt, where given, go before what is configured. Raises ConfigError for a system prompt
        where there is no chat, and for a chat that a served model's back end has not, or has always.
        """
        engine = self.engine
        entry = self.served_at(key)
        if entry is not None:
            return self._served_settings(entry, limit, chat, system_prompt)
        apply = self._applies_chat(key) if chat is None else chat
        if system_prompt is not None and apply is False:
            raise ConfigError("a system prompt is part of a conversation, and chat is off", remedy="give --chat too")
        return RunSettings(
            chat=apply,
            # What is configured for conversations says nothing where there is none.
            system_prompt=(self.chat.system_prompt if system_prompt is None else system_prompt) if apply else None,
            shots_as_turns=self.chat.shots_as_turns if apply else None,
            dtype=engine.dtype,
            # Who names GPUs wants them used: where one is gone, a worker must not go on with the CPU in silence.
            device="cuda" if self._gives_gpus and engine.device == "auto" else engine.device,
            max_length=engine.max_length,
            seed=engine.seed,
            limit=limit,
            trust_remote_code=engine.trust_remote_code if trust_remote_code is None else trust_remote_code,
            batch_tokens=engine.batch_tokens,
            rolling_stride=engine.rolling_stride,
            engine_path=engine.path,
            deterministic=engine.deterministic,
        )

    def served_at(self, key: str | None) -> ServedModel | None:
        """The `[[served]]` entry whose key this is."""
        return next((entry for entry in self.served if entry.key == key), None)

    def _served_settings(
        self, entry: ServedModel, limit: int | None, chat: bool | None, system_prompt: str | None
    ) -> RunSettings:
        """Resolved already: of [engine] a server is told the seed only, and its back end decides about chat."""
        if chat not in (None, entry.is_chat):
            kind = "conversations" if entry.is_chat else "plain text"
            raise ConfigError(
                f"{entry.key}: the back end {entry.provider} takes {kind} only",
                remedy="leave out --chat and --no-chat, or name another provider in [[served]]",
            )
        if system_prompt is not None and not entry.is_chat:
            raise ConfigError(
                f"{entry.key}: a system prompt is part of a conversation, and {entry.provider} takes plain text",
                remedy="leave it out, or name a provider of chat completions",
            )
        window = entry.arguments.get("max_length")
        return RunSettings(
            dtype="unknown",
            backend=entry.provider,
            chat=entry.is_chat,
            system_prompt=(self.chat.system_prompt if system_prompt is None else system_prompt)
            if entry.is_chat
            else None,
            shots_as_turns=self.chat.shots_as_turns if entry.is_chat else None,
            max_length=window if isinstance(window, int) else None,
            seed=self.engine.seed,
            limit=limit,
            arguments=entry.hashed_arguments or None,
        )

    @property
    def asks_chat(self) -> bool:
        """Whether a checkpoint may be asked through its chat template without someone saying so by hand."""
        return any(self._applies_chat(root.name) is not False for root in self.checkpoints)

    def _applies_chat(self, key: str | None) -> ApplyChat:
        named = key.partition("/")[0] if key is not None else None
        for root in self.checkpoints:
            if root.name == named and root.chat is not None:
                return root.chat
        return self.chat.apply


def _absolute(text: str, folder: Path) -> str:
    if "://" in text:
        return text
    return str((folder / Path(text).expanduser()).resolve())


def load_config(path: str | Path | None = None) -> Config:
    """Read the configuration; see the module's text for where it is looked for.

    Raises ConfigError naming the file, the field and what it should be.
    """
    named = path or os.environ.get("EVAL_PLATFORM_CONFIG")
    file = Path(named) if named else Path(CONFIG_NAME)
    raw: dict[str, Any] = {}
    if file.is_file():
        try:
            raw = tomllib.loads(file.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file} is not TOML: {error}", remedy="mend the line it names") from error
        folder, used = file.resolve().parent, file.resolve()
    elif named:
        raise ConfigError(f"no configuration file at {file}", remedy="give --config the path of an eval_platform.toml")
    else:
        folder, used = Path.cwd(), None

    for variable, section, field in (
        ("EVAL_PLATFORM_RESULTS", None, "results"),
        ("EVAL_PLATFORM_STATE", None, "state"),
        ("EVAL_PLATFORM_DEVICE", "engine", "device"),
        ("EVAL_PLATFORM_DTYPE", "engine", "dtype"),
        ("EVAL_PLATFORM_WEBHOOK", "alerts", "webhook"),
    ):
        value = os.environ.get(variable)
        if value:
            target = raw.setdefault(section, {}) if section else raw
            target[field] = value

    try:
        config = Config(**raw, folder=folder, file=used)
    except (ValidationError, TypeError) as error:
        raise ConfigError(_explain(error, used), remedy="see docs/configuration.md for every field") from error
    return config.model_copy(
        update={
            "results": _absolute(config.results, folder),
            "state": _absolute(config.state, folder),
            "kubernetes": config.kubernetes.model_copy(
                update={"manifest": config.kubernetes.manifest and _absolute(config.kubernetes.manifest, folder)}
            ),
            "checkpoints": tuple(
                root.model_copy(update={"path": _absolute(root.path, folder)}) for root in config.checkpoints
            ),
            "references": tuple(
                entry if entry.path is None else entry.model_copy(update={"path": _absolute(entry.path, folder)})
                for entry in config.references
            ),
            "tasks": config.tasks.model_copy(
                update={"folders": tuple(_absolute(text, folder) for text in config.tasks.folders)}
            ),
        }
    )


def _explain(error: ValidationError | TypeError, file: Path | None) -> str:
    where = str(file) if file else "the configuration"
    if isinstance(error, TypeError):
        return f"{where}: {error}"
    lines = [f"{where} is not a valid configuration:"]
    for problem in error.errors():
        field = ".".join(str(part) for part in problem["loc"])
        lines.append(f"  field {field}: {problem['msg']}")
    return "\n".join(lines)
