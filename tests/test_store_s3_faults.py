"""Faults that no other file makes (docs/s3.md has all): a bucket that goes, a clock that is off, a wrong secret,
bursts, an upload without an end, a full cache, versions with delete markers, kill -9 between a worker's own writes.
"""

import os
import re
import signal
import subprocess
import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import timedelta

import boto3
import botocore.auth
import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from checkpoint_factory import make_checkpoint
from fault_tools import Place
from keeping_world import Dice, load
from machine import small_disk
from store_processes import kill_after
from warehouse_world import World, commit_record
from wire import Answer, Wire

from eval_platform import checkpoints, keeping, warehouse, worker
from eval_platform.config import S3, Root
from eval_platform.errors import SamplesPruned, StoreError, classify
from eval_platform.plan import Wanted, plan
from eval_platform.store import arrivals, commits, layout, open_store, s3_requests, watcher_id
from eval_platform.store.nearby import local_files
from eval_platform.store.s3 import S3Store
from eval_platform.tasks import read_lock, sync_tasks
from eval_platform.values import Incomplete

pytest_plugins = ["store_roots"]


@pytest.fixture
def settings(s3_session, s3_credentials):
    return S3(endpoint=s3_session.endpoint)


@pytest.fixture
def bucket(settings):
    return S3Store(f"s3://results/a b+c%20/ü/{uuid.uuid4().hex}", settings)


@pytest.fixture
def client(settings):
    return boto3.client("s3", endpoint_url=settings.endpoint)


def test_a_bucket_that_vanishes_is_named_and_work_goes_on_when_it_is_back(s3_session, settings, client):
    name = f"going-{uuid.uuid4().hex[:8]}"
    s3_session.make_bucket(name)
    store = S3Store(f"s3://{name}/team", settings)
    assert store.create("a b/k", b"1")
    client.delete_object(Bucket=name, Key="team/a b/k")
    client.delete_bucket(Bucket=name)
    for what, do in {
        "create": lambda: store.create("a b/k", b"2"),
        "write": lambda: store.put("a b/k", b"2"),
        "read": lambda: store.read("a b/k"),
        "list": lambda: list(store.list("a b/k")),
        "delete": lambda: store.delete("a b/k"),
    }.items():
        with pytest.raises(
            StoreError, match=rf"(?s)cannot {what} s3://{name}/team/a b/k: NoSuchBucket.*make the bucket"
        ):
            do()
    s3_session.make_bucket(name)
    assert store.create("a b/k", b"3")
    assert store.read("a b/k") == b"3"


def test_a_clock_that_is_off_is_told(bucket, s3_session, monkeypatch):
    if s3_session.moto:
        pytest.skip("moto looks at no signature: `make test-s3-real`")
    now = botocore.auth.get_current_datetime
    monkeypatch.setattr(botocore.auth, "get_current_datetime", lambda: now() + timedelta(minutes=20))
    with pytest.raises(
        StoreError, match=r"(?s)s3://results/a b\+c%20/ü/.*/k: RequestTimeTooSkewed.*set this machine's"
    ):
        bucket.create("k", b"")


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("AWS_SECRET_ACCESS_KEY", "a-secret-that-is-another-ones", "SignatureDoesNotMatch"),
        ("AWS_ACCESS_KEY_ID", "AKIANOBODYNOBODYNOBO", "InvalidAccessKeyId"),
    ],
)
def test_who_has_a_wrong_secret_is_refused_and_told(settings, s3_session, monkeypatch, name, value, code):
    if s3_session.moto:
        pytest.skip("moto looks at no signature: `make test-s3-real`")
    monkeypatch.setenv(name, value)
    store = S3Store("s3://results/refused", settings)
    for do in (lambda: store.create("k", b""), lambda: store.read("k"), lambda: list(store.list("k"))):
        with pytest.raises(
            StoreError, match=rf"(?s)s3://results/refused/k: {code}: .*remedy: .*AWS_PROFILE"
        ) as refused:
            do()
        assert value not in str(refused.value)


def test_a_burst_of_slow_down_under_many_writers_loses_and_doubles_nothing(bucket, s3_session, monkeypatch):
    monkeypatch.setattr(s3_requests, "_FIRST_WAIT_S", 0.001)
    with Wire(s3_session.port) as wire:
        store = S3Store(bucket.uri, S3(endpoint=wire.endpoint))
        store.create("first", b"")
        wire.breaks(Answer(503, "SlowDown"), times=60)
        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(lambda n: (n % 10, store.create(f"k/{n % 10}", f"{n}".encode())), range(30)))
    assert sorted(key for key, created in won if created) == list(range(10))
    assert len(list(bucket.list("k/"))) == 10


def test_an_upload_without_an_end_is_waited_for_and_stops_nothing_else(bucket, settings, client, tmp_path):
    model = make_checkpoint(tmp_path / "m")
    for name in ("begun", "whole"):
        for file in model.iterdir():
            if name == "whole" or file.name != "model.safetensors":
                bucket.put(f"{name}/{file.name}", file)
    where = {"Bucket": bucket.bucket, "Key": f"{bucket.prefix}begun/model.safetensors"}
    upload = client.create_multipart_upload(**where)["UploadId"]
    client.upload_part(**where, UploadId=upload, PartNumber=1, Body=(model / "model.safetensors").read_bytes())
    root, watch = Root(name="b", path=bucket.uri, quiet_seconds=0), checkpoints.Watch()
    for _ in range(3):
        waiting, found = sorted(checkpoints.discover([root], {}, watch, s3=settings), key=lambda one: one.key)
        assert isinstance(waiting, Incomplete)
        assert (waiting.key, found.key, waiting.refused) == ("b/begun", "b/whole", False)
        assert "weights" in waiting.reason
    client.abort_multipart_upload(**where, UploadId=upload)


def test_a_cache_without_room_is_told_and_the_download_goes_on_once_there_is(bucket, settings, tmp_path):
    """A real full disk: a small tmpfs, which then grows."""
    for file in make_checkpoint(tmp_path / "m", values=100_000).iterdir():
        bucket.put(f"r/1/{file.name}", file)
    root = Root(name="b", path=bucket.uri, quiet_seconds=0)
    [found] = checkpoints.discover([root], {}, checkpoints.Watch(), s3=settings)
    assert isinstance(found, checkpoints.Found)
    arrival = arrivals.register(bucket, watcher="w", **asdict(found))[0]
    with small_disk(tmp_path / "small", "1m") as mount:
        (mount / "others").write_bytes(bytes(900_000))
        with pytest.raises(StoreError, match=rf"(?s)No space left on device \({mount}/.*remedy: free") as full:
            checkpoints.stage(arrival, mount, lambda done, total: None, s3=settings)
        assert f"cannot stage {bucket.uri}/r/1 under {mount}" in str(full.value)
        assert classify(full.value) == "infrastructure"
        subprocess.run(["mount", "-o", "remount,size=4m", mount], check=True)
        staged = checkpoints.stage(arrival, mount, lambda done, total: None, s3=settings)
        assert staged.path is not None
        assert (staged.path / "model.safetensors").read_bytes() == (tmp_path / "m/model.safetensors").read_bytes()
        checkpoints.release(staged)


def test_a_versioned_bucket_shows_no_marker_and_what_is_pruned_there_is_gone(s3_session, settings, client, tmp_path):
    name = f"versions-{uuid.uuid4().hex[:8]}"
    s3_session.make_bucket(name)
    client.put_bucket_versioning(Bucket=name, VersioningConfiguration={"Status": "Enabled"})
    world = World(tmp_path)
    world.store = store = S3Store(f"s3://{name}/team", settings)
    if not s3_session.moto:  # Ceph 16 heeds If-None-Match only in buckets without versions
        with pytest.raises(StoreError, match="created twice: this server ignores If-None-Match"):
            store.create("k", b"")
        return
    world.task("t", "id")
    world.arrive("r/run/1", "c1")
    record = commit_record("c1", "t", "id")
    identity = record["evaluation_id"]
    written = commits.write_samples(store, identity, "t", pa.table({"score": [0.5] * 10}))
    assert world.publish("c1", "t", "id", samples=written) == identity
    board = "select key, task, value from leaderboard"
    before = warehouse.query(world.catalog, store, board).to_pylist()
    chosen = keeping.choose(store, world.catalog, keeping.Keep(published_only=True, every=7)).prune
    keeping.prune(store, chosen, actor="me", rule="test")
    assert client.list_object_versions(Bucket=name, Prefix="team/samples/")["DeleteMarkers"]
    assert list(store.list("samples/")) == []
    assert local_files(store, [written["key"]], tmp_path / "copies") == {}
    with pytest.raises(SamplesPruned):
        commits.read_samples(store, commits.read(store, identity, 1) or {})
    again = keeping.choose(store, world.catalog, keeping.Keep(published_only=True, every=7))
    assert (again.prune, warehouse.query(world.catalog, store, board).to_pylist()) == ((), before)


def test_parquet_under_any_name_is_read_as_it_was_written(bucket, tmp_path):
    names = ["a b+c.parquet", "a%20b%2B.parquet", "ü/日本.parquet", "=+&'(x).parquet"]
    for n, name in enumerate(names):
        pq.write_table(pa.table({"n": [n]}), tmp_path / "one.parquet")
        bucket.put(f"samples/{name}", tmp_path / "one.parquet")
    keys = [entry.key for entry in bucket.list("samples/")]
    assert keys == sorted(f"samples/{name}" for name in names)
    files = local_files(bucket, keys, tmp_path / "copies of ü+%20")
    for n, name in enumerate(names):
        file = files[f"samples/{name}"]
        assert pq.read_table(file).to_pylist() == [{"n": n}]
        assert duckdb.connect().execute("select n from read_parquet(?)", [str(file)]).fetchall() == [(n,)]


# ------------------------------------------------------------------------------------------------ kill -9


BEFORE = (r"^log/.*\+kind=evaluation\+", r"^evaluations/", r"^tries/evaluations/.*\.end\.json")


def test_killed_before_each_write_around_a_commit_others_complete_it(bucket, settings, tmp_path):
    """One dies between samples and log entry, the next before the commit, the next after it: asked once, one result."""
    place = Place(tmp_path)
    place.write_task("sums", 6)
    for file in make_checkpoint(tmp_path / "m").iterdir():
        bucket.put(f"arriving/a/step_1/{file.name}", file)
    store = open_store(f"{bucket.uri}/results", settings)
    roots = (Root(name="runs", path=f"{bucket.uri}/arriving", quiet_seconds=0),)
    config = place.config().model_copy(update={"s3": settings, "checkpoints": roots, "results": store.uri})
    [found] = checkpoints.discover(config.checkpoints, {}, checkpoints.Watch(), s3=settings)
    assert not sync_tasks(config.tasks, store, config.lock_path).errors
    arrival = arrivals.register(store, watcher=watcher_id(config.state_dir), **asdict(found))[0]
    todo = plan(arrival, Wanted(read_lock(config.lock_path)), config, store)

    def die_before(where, asks):
        create = S3Store.create

        def or_die(self, key, body):
            if re.search(where, key):
                os.kill(os.getpid(), signal.SIGKILL)
            return create(self, key, body)

        S3Store.create = or_die
        worker.work(todo, store, lambda message: None, load=asks)

    committed = []
    for where, asks in zip(BEFORE, (load, never_asked, never_asked), strict=True):
        kill_after(lambda where=where, asks=asks: die_before(where, asks))
        committed.append([entry.key for entry in store.list("evaluations/")])
        answered = {entry.key for entry in store.list("journal/")}
        assert len(answered) == 1
    assert [len(keys) for keys in committed] == [0, 0, 1]
    said = []
    assert worker.work(todo, store, said.append, load=never_asked) == 0, said
    assert [entry.key for entry in store.list("evaluations/")] == committed[-1]
    identity = committed[-1][0].split("/")[1]
    record = commits.read(store, identity, 1) or {}
    assert commits.read_samples(store, record).num_rows == 6
    assert sum(f"+kind=evaluation+evaluation_id={identity}" in entry.key for entry in store.list(layout.LOG)) == 2


def never_asked(path, run_settings):
    engine = Dice(path)

    def answer(requests):
        assert not list(requests), "asked again"
        return iter(())

    engine.answer = answer
    return engine
