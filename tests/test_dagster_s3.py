"""Checkpoints and results in buckets: Dagster's sensors do what they do on folders, in few requests."""

import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import dagster as dg
import pytest
from checkpoint_factory import make_checkpoint
from dagster_world import DagsterWorld, dagster_world
from s3_server import S3Server

from assets.maintenance import record_bundles
from eval_platform import status
from eval_platform.checkpoints.announce import announce, upload
from eval_platform.store import arrivals, bundles, open_store
from eval_platform.tasks import read_lock
from resources.store import StoreResource

pytestmark = pytest.mark.dagster
pytest_plugins = ["store_roots"]

STEPS = 4


@pytest.fixture
def world(tmp_path: Path, s3_session: S3Server, s3_credentials: None) -> Iterator[DagsterWorld]:
    root = f"s3://results/{uuid.uuid4().hex}"
    with dagster_world(tmp_path, f'[s3]\nendpoint = "{s3_session.endpoint}"\n') as one:
        text = one.file.read_text()
        for field, name in (("results", "results"), ("path", "checkpoints")):
            text = text.replace(f'{field} = "{name}"', f'{field} = "{root}/{name}"')
        one.file.write_text(text)
        one.store = open_store(one.config.results, one.config.s3)
        one.catalog = one.config.catalog_path
        one.lock(a="a1", b="b1")
        yield one


def drop(world: DagsterWorld, step: int, seed: int = 0) -> None:
    folder = make_checkpoint(world.folder / f"step_{step}-{seed}", seed=seed)
    announce(folder, run="a", step=step)
    upload(folder, f"{world.config.checkpoints[0].path}/a/step_{step}", world.config.s3)


def test_what_arrives_in_a_bucket_is_asked_for_shown_and_looked_at_again(
    world: DagsterWorld, s3_asked: Callable[[], Counter[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in range(STEPS):
        drop(world, step, seed=step)
    found = world.tick("new_checkpoints").run_requests
    keys = [f"runs/a/step_{step}" for step in range(STEPS)]
    assert sorted(request.run_key for request in found) == [f"{key}@1" for key in keys]
    assert world.partitions() == set(keys)
    world.tick("new_checkpoints")  # reads once what the keys arrived as

    # Nothing has changed: the listings of the watched bucket, and of the store what its keys lie between.
    s3_asked()
    assert not world.tick("new_checkpoints").run_requests
    asked = s3_asked()
    assert asked == {"LIST": asked["LIST"]}
    assert asked["LIST"] <= 4  # the top, a/, all below it; in the store all arrivals

    drop(world, 2, seed=33)
    [again] = world.tick("new_checkpoints").run_requests
    assert again.run_key == "runs/a/step_2@2"

    for run in world.runs():
        world.end(run)
    arrival = arrivals.newest(world.store, keys[-1])
    assert arrival is not None
    world.identify(arrival, "c")
    for task, task_id in (("a", "a1"), ("b", "b1")):
        world.publish("c", task, task_id, key=arrival.key, arrival=arrival.n)
    world.tick("reconciliation")
    shown = world.events(["results", "a"], keys[-1])[0]
    assert shown.metadata["score"].value == 0.5
    assert str(shown.metadata["samples"].value).startswith("s3://results/")
    assert world.check("a", keys[-1])[0] is False  # published with a warning
    assert world.events("summary", keys[-1])

    world.tick("reconciliation")
    s3_asked()
    world.tick("reconciliation")
    asked = s3_asked()
    assert asked.total() <= 6, asked

    lock = read_lock(world.config.lock_path)
    states = {one.key: one.state for one in status.status(world.config, world.store, lock)}
    assert states == {key: "published" if key == keys[-1] else "queued" for key in keys}
    s3_asked()
    status.status(world.config, world.store, lock)
    asked = s3_asked()
    assert asked.total() <= 8, asked

    monkeypatch.setattr(bundles, "AT_LEAST", 1)
    resources = {"store": StoreResource(config_file=str(world.file))}
    for bundled in (True, False):  # the second time there is nothing new
        assert dg.materialize([record_bundles], instance=world.instance, resources=resources).success
        assert bool(world.events("record_bundles")[0].metadata["records bundled"].value) is bundled
    assert len(list(world.store.list("bundles/"))) == 1
