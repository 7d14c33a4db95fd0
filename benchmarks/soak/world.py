"""The soak's bucket, its machines' configurations, and the checkpoints that go on arriving."""

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.soak import bucket, truth
from eval_platform.checkpoints.announce import announce, upload
from eval_platform.config import Config, load_config
from eval_platform.store import Store, open_store
from eval_platform.tasks import sync_tasks
from tests.checkpoint_factory import make_checkpoint
from tests.s3_server import CREDENTIALS, S3Server, s3_server

# Every so many a checkpoint arrives under two names at once: the same content, asked for by two drivers.
COPY_EVERY = 8
_TOML = """
results = "{results}"
state = "state"

[[checkpoints]]
name = "runs"
path = "{checkpoints}"
require_success = true

[tasks]
folders = ["../tasks"]

[engine]
device = "cpu"
dtype = "float32"
max_length = 256

[worker]
slots = {slots}
lease_seconds = {lease_seconds}
retry_wait_seconds = 0.1

[sensor]
interval_seconds = 1

[s3]
endpoint = "{endpoint}"
"""


@dataclass
class World:
    """One results root and one place where checkpoints arrive, a bucket each; machines are folders here."""

    folder: Path
    endpoint: str
    results: str
    arriving: str
    dropped: dict[str, str] = field(default_factory=dict)  # key -> digest of its weights

    @property
    def control(self) -> Path:
        return self.folder / "control"

    def machine(self, name: str, *, slots: int, lease_seconds: float) -> Config:
        """The configuration of a machine, its tasks synced."""
        home = self.folder / name
        home.mkdir()
        text = _TOML.format(
            results=self.results,
            checkpoints=self.arriving,
            endpoint=self.endpoint,
            slots=slots,
            lease_seconds=lease_seconds,
        )
        (home / "eval_platform.toml").write_text(text)
        config = self.config(name)
        report = sync_tasks(config.tasks, self.store(config), config.lock_path)
        if report.errors:
            raise RuntimeError(f"the soak's own tasks: {report.errors}")
        return config

    def config(self, name: str) -> Config:
        return load_config(self.folder / name / "eval_platform.toml")

    def store(self, config: Config) -> Store:
        return open_store(self.results, config.s3)

    def drop(self, config: Config) -> list[str]:
        """The next checkpoint arrives, now and then under two names; its keys."""
        n = len(self.dropped)
        folder = make_checkpoint(self.folder / "made" / f"{n}", seed=n, shards=2, values=2_000)
        names = [f"a/step_{n}"] + [f"b/step_{n}"] * (n % COPY_EVERY == 1)
        for name in names:
            announce(folder, run=name[0], step=n)
            upload(folder, f"{self.arriving}/{name}", config.s3)
            self.dropped[f"runs/{name}"] = truth.weights_digest(folder)
        return [f"runs/{name}" for name in names]


@contextmanager
def world(folder: Path, server: S3Server | None = None) -> Iterator[World]:
    """An empty world in `folder`, on `server` or one of its own; the process's environment has its credentials."""
    if server is None:
        with s3_server() as own, world(folder, own) as made:
            yield made
        return
    os.environ.update(CREDENTIALS)
    here = uuid.uuid4().hex[:8]
    for name in ("soak", "arriving"):
        server.make_bucket(f"{name}-{here}")
    bucket.keep_versions(server.endpoint, f"soak-{here}")
    one = World(folder, server.endpoint, f"s3://soak-{here}/results", f"s3://arriving-{here}/runs")
    for made_folder in (one.control, folder / "tasks"):
        made_folder.mkdir(parents=True)
    for name, rows, body in truth.task_files():
        (folder / "tasks" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        definition = {**body, "task": name, "documents": {"file": f"{name}.jsonl"}}
        (folder / "tasks" / f"{name}.yaml").write_text(json.dumps(definition))  # JSON is YAML
    yield one
