"""Is everything there that the platform needs? Looks, says what it found, and what to do about it."""

import http.client
import importlib.metadata
import os
import shutil
import sys
import urllib.error
import urllib.request
import uuid
from dataclasses import dataclass
from pathlib import Path

from eval_platform import __version__, queueing
from eval_platform.config import S3, Config, Root, load_config
from eval_platform.devices import memory_bytes, missing_devices
from eval_platform.errors import EvalPlatformError
from eval_platform.instance import postgres_place
from eval_platform.sandbox import describe as describe_sandbox
from eval_platform.served import ServedModel
from eval_platform.store import Store, layout, open_store, read_record
from eval_platform.tasks import check_tasks, read_lock
from eval_platform.values import IMPORTED

PACKAGES = ("dagster", "dagster-webserver", "torch", "transformers", "duckdb", "great-expectations", "pyarrow")
LOW_DISK_GB = 5.0
ANSWER_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at."""

    what: str
    ok: bool
    found: str
    remedy: str = ""


def examine(config_file: Path | None) -> list[Finding]:
    """Every finding, the configuration's error as one of them; nothing is changed but for a file made and removed."""
    findings = [_python(), *_packages(), _device()]
    try:
        config = load_config(config_file)
    except EvalPlatformError as error:
        return [*findings, Finding("configuration", False, str(error), "mend the file, then look again")]
    findings.append(Finding("configuration", True, str(config.file or "defaults (no eval_platform.toml here)")))
    findings += _worker_devices(config)
    findings += [_root(root, config.s3) for root in config.roots]
    findings += _queue(config)
    findings += _references(config)
    findings += [_writable("results", config.results, config.s3), state := _writable("state", config.state)]
    if state.ok:
        findings += [_disk("state", config.state_dir), _links(config), _dagster_home(config), *_postgres()]
    return [*findings, *_tasks(config), _sandbox(config), *(_served(entry) for entry in config.served)]


def _queue(config: Config) -> list[Finding]:
    """Whether the tiers of [queue] mean tasks of the lock; nothing where there is no such section."""
    if config.queue is None:
        return []
    try:
        found = queueing.tiers(config.queue, config.suites, read_lock(config.lock_path))
    except EvalPlatformError as error:
        return [Finding("queue", False, str(error), error.remedy or "")]
    said = "; ".join(f"{tier.name}: {len(tier.tasks)} tasks of {tier.told}" for tier in found)
    return [Finding("queue", True, said or "no tasks yet")]


def _references(config: Config) -> list[Finding]:
    """[[references]] by a key under which nothing can arrive: their lines would be missing without a word."""
    arriving = {"adhoc", IMPORTED, *(root.name for root in config.checkpoints)}
    return [
        Finding(
            f"reference {entry.name}",
            False,
            f"nothing arrives under the key {entry.key}",
            "a key begins with the name of a [[checkpoints]] root, or is that of a [[served]] model; see `status`",
        )
        for entry in config.references
        if entry.key is not None and entry.key.partition("/")[0] not in arriving and config.served_at(entry.key) is None
    ]


def _served(entry: ServedModel) -> Finding:
    """Whether lm-evaluation-harness is there to ask it, and its endpoint answers at all; no key is sent."""
    what = f"served {entry.name}"
    try:
        importlib.metadata.version("lm_eval")
    except importlib.metadata.PackageNotFoundError:
        remedy = 'pip install -c constraints.txt -e ".[lm-eval]"'
        return Finding(what, False, "lm-evaluation-harness is not installed", remedy)
    if entry.endpoint is None:
        return Finding(what, True, f"{entry.provider} model {entry.model}; the provider's own endpoint is not asked")
    try:
        with urllib.request.urlopen(entry.endpoint, timeout=ANSWER_SECONDS) as reply:
            status = reply.status
    except urllib.error.HTTPError as error:  # it wants a POST and perhaps a key: it answers
        status = error.code
    except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
        found = f"{entry.endpoint} does not answer: {getattr(error, 'reason', error)}"
        return Finding(what, False, found, "start the server, or mend `endpoint` in [[served]]")
    return Finding(what, True, f"{entry.endpoint} answers (HTTP {status} to a GET)")


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    return Finding(
        "python", sys.version_info >= (3, 11), f"{version}, eval-platform {__version__}", "use 3.11 or newer"
    )


def _packages() -> list[Finding]:
    found = []
    for name in PACKAGES:
        try:
            found.append(Finding(name, True, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            found.append(Finding(name, False, "not installed", "pip install -c constraints.txt -e ."))
    return found


def _device() -> Finding:
    import torch

    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        return Finding("device", True, names)
    return Finding("device", True, f"no GPU seen; CPU with {torch.get_num_threads()} threads")


def _worker_devices(config: Config) -> list[Finding]:
    """Whether the GPUs that [worker] names are there, how large they are, and how many workers share each."""
    names = config.worker.devices
    if not names or config.engine.device == "cpu":
        return []
    found = missing_devices(names)
    if found is None:
        return [Finding("worker devices", False, "no NVIDIA driver answers here", "mend it, or leave out `devices`")]
    missing, count = found
    told = f"{', '.join(missing)} not among {count} GPUs"
    if not missing:
        sizes = [f"{size / 1e9:.0f} GB" for size in memory_bytes(names) or ()]
        shared = config.worker.slots_a_device
        told = ", ".join(
            [f"{', '.join(names)} of {count} GPUs", *sizes, *([f"{shared} workers on each"] if shared > 1 else [])]
        )
    return [Finding("worker devices", not missing, told, "name in [worker] devices what `nvidia-smi -L` shows")]


def _root(root: Root, s3: S3) -> Finding:
    """Whether checkpoints can be looked for there."""
    what = f"checkpoints {root.name}"
    if root.path.startswith("s3://"):
        try:
            next(iter(open_store(root.path, s3).list("", delimiter="/")), None)
        except EvalPlatformError as error:
            return Finding(what, False, str(error), error.remedy or "")
        return Finding(what, True, root.path)
    if root.path.startswith("hf://"):
        from eval_platform.checkpoints.revisions import revisions_of  # botocore and more

        try:
            found = revisions_of(root)
        except EvalPlatformError as error:
            return Finding(what, False, str(error), error.remedy or "")
        return Finding(what, bool(found), f"{root.path}: {len(found)} revisions", "mend `revisions` in [[checkpoints]]")
    path = Path(root.path)
    return Finding(
        what,
        path.is_dir() and os.access(path, os.R_OK | os.X_OK),
        str(path) if path.is_dir() else f"{path} does not exist",
        "create the folder, or mend [[checkpoints]] path; checkpoints are picked up once it is there",
    )


def _writable(what: str, place: str, s3: S3 | None = None) -> Finding:
    key = f".doctor-{uuid.uuid4().hex}"
    try:
        store = open_store(place, s3)
        store.create(key, b"")
        store.delete(key)
    except EvalPlatformError as error:
        return Finding(what, False, str(error), f"make {place} writable, or set another folder or bucket")
    return Finding(what, True, place)


def _disk(what: str, folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free / 1e9
    return Finding(f"disk of {what}", free >= LOW_DISK_GB, f"{free:.0f} GB free", "free some space")


def _links(config: Config) -> Finding:
    """Hard links hold a checkpoint that its trainer deletes while it waits; without them it is copied later."""
    mounts = {_mount(Path(root.path)) for root in config.checkpoints if Path(root.path).is_dir()}
    if not mounts:
        if config.checkpoints and all("://" in root.path for root in config.checkpoints):
            return Finding("hard links", True, "not needed: checkpoints are downloaded")
        return Finding("hard links", True, "no folder of checkpoints is there: nothing is held while it waits")
    same = mounts <= {_mount(config.state_dir)}
    found = "checkpoints and state are on one mount" if same else "checkpoints are on another mount"
    return Finding("hard links", True, found + ("" if same else ": one deleted while it waits is lost, not held"))


def _mount(folder: Path) -> tuple[int, str]:
    """As far as hard links reach: one file system, in one place (a container's folders are a mount each)."""
    descriptor = os.open(folder, getattr(os, "O_PATH", os.O_RDONLY))
    try:
        told = Path(f"/proc/self/fdinfo/{descriptor}").read_text() if Path("/proc/self/fdinfo").is_dir() else ""
        return os.fstat(descriptor).st_dev, next((line for line in told.splitlines() if line.startswith("mnt_id")), "")
    finally:
        os.close(descriptor)


def _tasks(config: Config) -> list[Finding]:
    """The lock, and every task file that is broken now (its name goes on standing for what the lock says)."""
    sync = "run `eval-platform tasks sync`"
    try:
        lock = read_lock(config.lock_path)
        broken = check_tasks(config.tasks, config.suites)
    except EvalPlatformError as error:
        return [Finding("tasks", False, str(error), sync)]
    found = f"{len(lock.tasks)} in {config.lock_path}"
    findings = [Finding("task file", False, str(error), f"mend the file, then {sync}") for error in broken]
    # Nothing is out of order for want of data: what is skipped is told, and how to get it.
    skipped = [Finding("task skipped", True, f"{name}: no data: {one.reason}") for name, one in lock.skipped.items()]
    return [*findings, *skipped, Finding("tasks", bool(lock.tasks), found, sync)]


def _sandbox(config: Config) -> Finding:
    """Whether a program that a model wrote could be run, found out by running one. A fault only where one shall be."""
    needed = [name for name, runs in _runs_programs(config).items() if runs]
    try:
        return Finding("sandbox", True, describe_sandbox(config.sandbox.mode))
    except EvalPlatformError as error:
        found = f"{error.args[0].splitlines()[0]} ({', '.join(needed) or 'no task here'} runs programs)"
        return Finding("sandbox", not needed, found, error.remedy or "")


def _runs_programs(config: Config) -> dict[str, bool]:
    """Of every task in the lock, whether its answers are programs; nothing where lock or store cannot be read."""
    try:
        store = open_store(config.results, config.s3)
        locked = read_lock(config.lock_path).tasks
        return {name: _has_code(store, task.task_id) for name, task in locked.items()}
    except EvalPlatformError:  # which is a finding of its own
        return {}


def _has_code(store: Store, task_id: str) -> bool:
    try:
        return read_record(store, layout.task(task_id))["definition"].get("code") is not None
    except KeyError:  # never synced to this store
        return False


def _dagster_home(config: Config) -> Finding:
    home = config.dagster_home
    if not home.exists():
        return Finding("Dagster home", True, f"{home} (made by `eval-platform up`)")
    there = (home / "dagster.yaml").is_file()
    return Finding("Dagster home", there, str(home), f"{home} has no dagster.yaml: remove it, `up` makes it anew")


def _postgres() -> list[Finding]:
    """Where a team's runs are kept; nothing to say of one box, whose SQLite files are in Dagster's home."""
    what = "Dagster storage"
    try:
        place = postgres_place()
    except EvalPlatformError as error:
        return [Finding(what, False, str(error).splitlines()[0], error.remedy or "")]
    return [Finding(what, True, f"PostgreSQL, {place}")] if place else []
