"""Checkpoints in a bucket: found, judged, described and identified as their copies in folders are; downloaded once."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from dataclasses import asdict, replace

import pytest
from fault_tools import until
from store_processes import kill_after
from tiny_models import make_checkpoint
from wire import Answer, Cut, Wire

from eval_platform.checkpoints import Found, Watch, discover, downloads, release, sketched, stage
from eval_platform.checkpoints.buckets import bucket_listing, inspect_bucket
from eval_platform.checkpoints.inspection import inspect
from eval_platform.checkpoints.turns import in_turn
from eval_platform.config import S3, Root
from eval_platform.engine.sizes import loaded_bytes
from eval_platform.errors import CheckpointChanged, CheckpointError, CheckpointGone
from eval_platform.store.s3 import S3Store
from eval_platform.values import Arrival

pytest_plugins = ["store_roots"]


def nothing(done, total):
    pass


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model") / "m", seed=1)


@pytest.fixture
def wire(s3_session, s3_credentials):
    with Wire(s3_session.port) as wire:
        yield wire


@pytest.fixture
def settings(wire):
    return S3(endpoint=wire.endpoint)


@pytest.fixture
def bucket(settings):
    return S3Store(f"s3://results/runs {uuid.uuid4().hex}", settings)


def upload(bucket, folder, prefix, leave_out=()):
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.is_file() and name not in leave_out:
            bucket.put(f"{prefix}/{name}", file.read_bytes())


def look(bucket, settings, known=None, sweep=(), watch=None, **root):
    roots = [Root(name="b", path=bucket.uri, quiet_seconds=root.pop("quiet_seconds", 0), **root)]
    return list(discover(roots, known or {}, watch or Watch(), sweep, settings))


def arrived(found):
    assert isinstance(found, Found)
    fields = asdict(found)
    fields.pop("served")
    return Arrival(n=1, **fields)


# ------------------------------------------------------------------------------------------------ completeness


def broken(model, folder, fault):
    shutil.copytree(model, folder)
    weights = folder / "model.safetensors"
    body = weights.read_bytes()
    match fault:
        case "cut":
            weights.write_bytes(body[:-100])
        case "cut in its header":
            weights.write_bytes(body[:100])
        case "five bytes":
            weights.write_bytes(body[:5])
        case "empty":
            weights.write_bytes(b"")
        case "longer":
            weights.write_bytes(body + b"x")
        case "no safetensors":
            weights.write_bytes(b"\xff" * 1000)
        case "header is no JSON":
            weights.write_bytes(body[:8] + b"?" + body[9:])
        case "pickle":
            weights.rename(folder / "pytorch_model.bin")
        case "no tokenizer":
            for file in folder.glob("tokenizer*"):
                file.unlink()
        case "config is no JSON":
            (folder / "config.json").write_text("{")
        case "a shard is missing":
            index = {"weight_map": {"a": "model-1.safetensors"}}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        case "adapter":
            (folder / "config.json").unlink()
            weights.rename(folder / "adapter_model.safetensors")
            (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "no name"}')
    return folder


FAULTS = ["none", "cut", "cut in its header", "five bytes", "empty", "longer", "no safetensors", "header is no JSON"]
FAULTS += ["pickle", "no tokenizer", "config is no JSON", "a shard is missing", "adapter"]


def test_a_bucket_is_judged_as_a_folder_is(model, tmp_path, bucket):
    for fault in FAULTS:
        folder = broken(model, tmp_path / fault, fault)
        upload(bucket, folder, fault)
        wanted, found = inspect(folder), inspect_bucket(bucket, bucket_listing(bucket, f"{fault}/"), "")
        assert (found.kind, found.reason, found.refused) == (wanted.kind, wanted.reason, wanted.refused), fault
        assert found.listing.defining == wanted.listing.defining
        assert found.complete == (fault == "none")


def test_weights_are_not_downloaded_to_be_judged_or_measured(tmp_path, bucket, wire, settings):
    header = json.dumps(
        {f"t{i}": {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i in range(3000)}
    )
    head = len(header).to_bytes(8, "little") + header.encode()
    assert len(head) > 1 << 16  # more than is read at first
    bucket.put("c/model.safetensors", head + bytes(12_000))
    bucket.put("c/big/ignored.bin", b"")
    for name in ("config.json", "tokenizer.json"):
        bucket.put(f"c/{name}", b"{}")
    wire.requests.clear()
    listing = bucket_listing(bucket, "c/")
    assert inspect_bucket(bucket, listing, bucket.uri).complete
    ranges = [line for request in wire.requests for line in request.split("\r\n") if line.lower().startswith("range")]
    assert ranges == ["Range: bytes=0-65535", f"Range: bytes=65536-{len(head) - 1}"]
    assert len(wire.requests) == 1 + 1 + 2  # the listing, config.json, the header
    arrival = Arrival("runs/c", 1, listing.fingerprint, f"{bucket.uri}/c", "runs")
    with sketched(arrival, tmp_path, settings) as folder:
        assert loaded_bytes(folder, "bfloat16") == 6000
    with sketched(replace(arrival, uri=f"{bucket.uri}/nowhere"), tmp_path, settings) as folder:
        assert loaded_bytes(folder, "bfloat16") is None


# ------------------------------------------------------------------------------------------------ discovery


def test_found_described_and_numbered_as_in_a_folder(model, tmp_path, bucket, settings):
    for name in ("a b/step_10", "a b/step_20", "ü+%/checkpoint-7"):
        shutil.copytree(model, tmp_path / "local" / name)
    about = {"run": "told", "step": 21, "tokens_seen": 5, "tags": {"lr": "1"}}
    (tmp_path / "local" / "a b" / "step_20" / "checkpoint.json").write_text(json.dumps(about))
    for folder in sorted((tmp_path / "local").glob("*/*")):
        upload(bucket, folder, folder.relative_to(tmp_path / "local").as_posix())
    bucket.put("notes.txt", b"")
    bucket.put("two//slashes/config.json", b"{}")
    bucket.put(".hidden/config.json", b"{}")
    local = list(discover([Root(name="b", path=str(tmp_path / "local"), quiet_seconds=0)], {}, Watch()))
    here = look(bucket, settings)

    def told(found):
        return sorted((one.key, one.run, one.step, one.tokens_seen, dict(one.tags)) for one in found)

    assert told(here) == told(local)
    assert len(here) == 3
    assert {one.uri for one in here} == {
        f"{bucket.uri}/{name}" for name in ("a b/step_10", "a b/step_20", "ü+%/checkpoint-7")
    }


def test_what_is_known_is_not_entered_and_a_sweep_sees_an_upload_in_place(model, bucket, settings, wire):
    for step in (1, 2):
        upload(bucket, model, f"r/{step}")
    known = {one.key: one.fingerprint for one in look(bucket, settings)}
    wire.requests.clear()
    assert look(bucket, settings, known) == []
    assert len(wire.requests) == 2  # the top and r/
    bucket.put("r/1/config.json", (model / "config.json").read_bytes() + b" ")
    assert look(bucket, settings, known) == []
    [found] = look(bucket, settings, known, sweep=["b/r/1"])
    assert isinstance(found, Found)
    assert found.key == "b/r/1"
    assert found.fingerprint != known["b/r/1"]


def test_many_new_folders_cost_one_listing(bucket, settings, wire, monkeypatch):
    from eval_platform.checkpoints import buckets

    monkeypatch.setattr(buckets, "_LIST_WHOLE", 5)
    for step in range(8):
        bucket.put(f"r/{step}/config.json", b"{}")
    bucket.put("r/3/deeper/model.safetensors", b"")
    wire.requests.clear()
    found = look(bucket, settings)
    listings = [request for request in wire.requests if "list-type" in request]
    assert len(listings) == 3  # the top, r/, all below r/
    assert {one.key for one in found} == {f"b/r/{step}" for step in range(8) if step != 3} | {"b/r/3/deeper"}


def test_a_sweep_is_one_listing_also_when_something_new_lies_far_from_it(bucket, settings, wire):
    for step in range(10, 34):
        bucket.put(f"r/{step}/config.json", b"{}")
    known = {f"b/r/{step}": "as it was" for step in range(10, 33)}
    wire.requests.clear()
    swept = [f"b/r/{step}" for step in range(12, 18)]
    found = {one.key for one in look(bucket, settings, known, sweep=swept)}
    assert found == {*swept, "b/r/33"}
    listings = [request.partition(" HTTP")[0] for request in wire.requests if "list-type" in request]
    assert len(listings) == 4, listings  # the top, r/, what is swept, what is new


def test_runs_most_of_whose_checkpoints_are_known_are_not_listed_whole(bucket, settings, wire, monkeypatch):
    from eval_platform.checkpoints import buckets
    from eval_platform.store import s3

    monkeypatch.setattr(s3, "PAGE_KEYS", 4)  # as if a run had as many objects as a page has
    monkeypatch.setattr(buckets, "PAGE_KEYS", 4)
    for run in "abcdef":
        for step in range(4):
            bucket.put(f"{run}/{step}/config.json", b"{}")
    known = {f"b/{run}/{step}": "as it was" for run in "abcdef" for step in range(4)}
    del known["b/f/3"]
    wire.requests.clear()
    assert [one.key for one in look(bucket, settings, known)] == ["b/f/3"]
    listings = [request for request in wire.requests if "list-type" in request]
    assert len(listings) <= 2 + 2 + 6 + 1, listings  # the top, the attempt, each run, the new one


def test_a_look_that_has_no_time_left_goes_on_the_next_time(model, bucket, settings, wire, monkeypatch):
    from eval_platform.checkpoints import buckets
    from eval_platform.store import s3

    monkeypatch.setattr(s3, "PAGE_KEYS", 4)  # as if a run had as many objects as a page has
    monkeypatch.setattr(buckets, "PAGE_KEYS", 4)
    runs = [f"run-{n:02}" for n in range(11)]
    for run in runs:
        for step in range(4):
            bucket.put(f"{run}/{step}/config.json", b"{}")
    upload(bucket, model, "run-05/new")
    bucket.put("config.json", b"{}")  # the training's own: no checkpoint, whoever of its runs has been looked at
    known = {f"b/{run}/{step}": "as it was" for run in runs for step in range(4)}
    roots, watch = [Root(name="b", path=bucket.uri, quiet_seconds=0)], Watch()
    looks = []
    for _ in range(len(runs) + 2):
        wire.requests.clear()
        found = {one.key for one in discover(roots, known, watch, (), settings, patience=0.0)}
        listed = {request.partition(" HTTP")[0] for request in wire.requests if "list-type" in request}
        looks.append((found, {run for run in runs if any(f"{run}%2F&" in one or f"{run}/&" in one for one in listed)}))
        watch = Watch.from_json(watch.to_json())  # as a sensor's cursor carries it
    assert set().union(*(entered for _, entered in looks[: len(runs)])) == set(runs)  # a round
    first = next(n for n, (found, _) in enumerate(looks) if found)
    assert all(found == ({"b/run-05/new"} if n >= first else set()) for n, (found, _) in enumerate(looks))
    assert all("run-05" in entered for _, entered in looks[first:])  # where something is new it is looked at each time
    # What a sweep asks for is looked at, whoever's turn it is; of more than there is time for, the first. It is the
    # only one that sees what is new below what is known.
    for folder in "abc":
        bucket.put(f"run-09/1/{folder}/config.json", b"{}")
    for sweep in (["b/run-09/1"], ["b/run-02/1", "b/run-03/1", "b/run-10/1"]):
        swept = {one.key for one in discover(roots, known, watch, sweep, settings, patience=0.0)}
        assert sweep[0] in swept
        assert {key for key in sweep if key in watch.left} == set(sweep) - swept
        assert {f"b/run-09/1/{folder}" in swept for folder in "abc"} == {sweep[0] == "b/run-09/1"}


def test_a_sweep_of_many_runs_never_keeps_a_new_run_from_being_found(bucket, settings, monkeypatch):
    """On a server so slow that the sweep alone takes all the time there is; and a run that is broken for ever."""
    from eval_platform.checkpoints import buckets
    from eval_platform.store import s3

    monkeypatch.setattr(s3, "PAGE_KEYS", 4)
    monkeypatch.setattr(buckets, "PAGE_KEYS", 4)
    swept = [f"run-{n:02}" for n in range(12)]
    for run in swept:
        for step in range(4):
            bucket.put(f"{run}/{step}/config.json", b"{}")
    others = [f"x-{n:02}" for n in range(3)]
    for run in others:
        bucket.put(f"{run}/1/config.json", b"{}")
    known = {f"b/{run}/{step}": "as it was" for run in swept for step in range(4)}
    roots, watch, found = [Root(name="b", path=bucket.uri, quiet_seconds=0)], Watch(), set()
    for _ in range(len(swept) + len(others)):
        sweep = [key for key in known if key.endswith("/1")]
        found |= {one.key for one in discover(roots, known, watch, sweep, settings, patience=0.0)}
        watch = Watch.from_json(watch.to_json())
    assert {f"b/{run}/1" for run in others} <= found


def test_every_folder_has_its_turn_however_little_time_there_is(bucket, settings):
    """Trees drawn at random, and a server so slow that each look ends after the least it does."""
    drawn = random.Random(7)
    for n in range(3):
        parts = [f"{one}{sign}" for one in range(3) for sign in "-.0=é"]
        folders = {"/".join(drawn.choices(parts, k=drawn.randrange(1, 5))) for _ in range(9)}
        top = S3Store(f"{bucket.uri}/{n}", settings)
        for folder in sorted(folders):
            top.put(f"{folder}/model.safetensors", b"")
        roots, watch, seen = [Root(name="b", path=top.uri, quiet_seconds=0)], Watch(), set()
        known: dict[str, str] = {}
        for _ in range(len(folders)):
            now = {one.key for one in discover(roots, known, watch, (), settings, patience=0.0)}
            assert now
            seen |= now
            watch = Watch.from_json(watch.to_json())
        assert seen == {one.key for one in discover(roots, known, Watch(), (), settings)}
        assert len(seen) == len(folders)


def test_a_round_goes_on_behind_what_it_was_done_with():
    assert in_turn(["c", "a", "a-b"], "") == (["a-b", "a", "c"], [])  # the order of a listing: "a-b/" before "a/"
    assert in_turn(["c", "a", "a-b"], "a") == (["c"], ["a-b", "a"])
    assert in_turn(["c", "a", "a-b"], "a/0") == (["a", "c"], ["a-b"])
    assert in_turn(["c", "a", "a-b"], "b, deleted since") == (["c"], ["a-b", "a"])


def test_many_new_folders_are_read_page_by_page_while_there_is_time(bucket, settings, wire, monkeypatch):
    from eval_platform.checkpoints import buckets
    from eval_platform.store import s3

    monkeypatch.setattr(s3, "PAGE_KEYS", 8)
    monkeypatch.setattr(buckets, "PAGE_KEYS", 8)
    for step in range(10, 40):
        bucket.put(f"r/{step}/config.json", b"{}")
    roots, watch, seen = [Root(name="b", path=bucket.uri, quiet_seconds=0)], Watch(), []
    for _ in range(6):
        seen.append({one.key for one in discover(roots, {}, watch, (), settings, patience=0.0)})
    assert all(0 < len(one) < 30 for one in seen[:2])
    assert set().union(*seen) == {f"b/r/{step}" for step in range(10, 40)}


def test_an_upload_under_way_waits(model, bucket, settings):
    upload(bucket, model, "r/1", leave_out=["model.safetensors"])
    [waiting] = look(bucket, settings)
    assert "no weights yet" in waiting.reason or "model.safetensors" in waiting.reason
    bucket.put("r/1/model.safetensors", (model / "model.safetensors").read_bytes())
    watch = Watch()
    [waiting] = look(bucket, settings, watch=watch, quiet_seconds=60)
    assert "unchanged for 0 of the 60 s" in waiting.reason
    [waiting] = look(bucket, settings, require_success=True)
    assert "_SUCCESS" in waiting.reason
    bucket.put("r/1/_SUCCESS", b"")
    [found] = look(bucket, settings, watch=watch, require_success=True, quiet_seconds=60)
    assert isinstance(found, Found)


def test_a_bucket_that_cannot_be_listed_stops_nothing_else(model, bucket, settings, tmp_path):
    shutil.copytree(model, tmp_path / "local" / "1")
    roots = [
        Root(name="gone", path="s3://nowhere/x", quiet_seconds=0),
        Root(name="local", path=str(tmp_path / "local"), quiet_seconds=0),
    ]
    failed, found = sorted(discover(roots, {}, Watch(), (), settings), key=lambda one: one.key)
    assert (failed.key, found.key) == ("gone", "local/1")
    assert "NoSuchBucket" in failed.reason
    assert "make the bucket" in failed.reason


# ------------------------------------------------------------------------------------------------ staging


def test_the_same_weights_in_a_folder_and_in_a_bucket_are_one_checkpoint(model, bucket, settings, tmp_path, wire):
    upload(bucket, model, "r/1")
    [found] = look(bucket, settings)
    [local] = discover([Root(name="l", path=str(model.parent), quiet_seconds=0)], {}, Watch())
    here = stage(arrived(local), tmp_path / "one", nothing)
    told = []
    wire.breaks(Cut(down=5_000), times=3, on="GET .*model.safetensors")
    wire.breaks(Answer(503, "SlowDown"), times=3, on="^GET")
    there = stage(arrived(found), tmp_path / "two", lambda done, total: told.append((done, total)), s3=settings)
    assert (there.checkpoint_id, there.weights_id, there.kind) == (here.checkpoint_id, here.weights_id, here.kind)
    assert told[0][0] == 0
    assert told[-1][0] == told[-1][1] > 0
    assert told == sorted(told)
    assert there.path is not None
    assert (there.path / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    wire.requests.clear()
    release(there)
    again = stage(arrived(found), tmp_path / "two", nothing, s3=settings)
    assert again.checkpoint_id == here.checkpoint_id
    assert [request for request in wire.requests if "list-type" not in request] == []
    release(again)
    release(here)


def test_a_download_goes_on_where_a_kill_stopped_it(model, bucket, settings, tmp_path, wire, monkeypatch):
    monkeypatch.setattr(downloads, "CHUNK_BYTES", 20_000)
    upload(bucket, model, "r/1")
    [found] = look(bucket, settings)
    size = (model / "model.safetensors").stat().st_size
    assert size > 200_000

    def die(done, total):
        if done > size // 2:
            os.kill(os.getpid(), signal.SIGKILL)

    kill_after(lambda: stage(arrived(found), tmp_path, die, s3=settings))
    wire.requests.clear()
    staged = stage(arrived(found), tmp_path, nothing, s3=settings)
    asked = [request for request in wire.requests if "model.safetensors" in request]
    header, *rest = [int(request.split("bytes=")[1].split("-")[0]) for request in asked]
    assert header == 0  # it is judged again before anything is downloaded
    assert min(rest) >= 100_000
    assert staged.path is not None
    assert (staged.path / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    release(staged)


def test_what_was_replaced_or_deleted_since_it_arrived_is_told(model, bucket, settings, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "CHUNK_BYTES", 20_000)
    upload(bucket, model, "r/1")
    [found] = look(bucket, settings)
    weights = (model / "model.safetensors").read_bytes()

    def replace_midway(done, total):
        if 100_000 < done < 150_000:
            bucket.put("r/1/model.safetensors", weights[:-1] + bytes([weights[-1] ^ 1]))

    with pytest.raises(CheckpointChanged, match="no longer what arrived as b/r/1@1"):
        stage(arrived(found), tmp_path, replace_midway, s3=settings)
    with pytest.raises(CheckpointChanged, match="no longer what arrived as b/r/1@1"):
        stage(arrived(found), tmp_path, nothing, s3=settings)
    for entry in list(bucket.list("r/1/")):
        bucket.delete(entry.key)
    with pytest.raises(CheckpointGone, match="deleted"):
        stage(arrived(found), tmp_path, nothing, s3=settings)


def test_the_cache_is_bounded_and_what_is_in_use_stays(model, bucket, settings, tmp_path):
    size = sum(file.stat().st_size for file in model.rglob("*"))
    two = settings.model_copy(update={"cache_gb": 2.5 * size / 1e9})
    for step in range(4):
        upload(bucket, model, f"r/{step}")
        bucket.put(f"r/{step}/generation_config.json", f'{{"a": {step}}}'.encode())
    arrivals = [arrived(found) for found in sorted(look(bucket, settings), key=lambda found: found.key)]
    in_use = stage(arrivals[0], tmp_path, nothing, s3=two)
    for arrival in arrivals[1:]:
        release(stage(arrival, tmp_path, nothing, s3=two))
    kept = [one for one in (tmp_path / "downloads").iterdir() if one.is_dir()]
    assert len(kept) == 2
    assert in_use.path is not None
    weights = (in_use.path / "model.safetensors").stat().st_ino
    assert weights in {(one / "model.safetensors").stat().st_ino for one in kept}
    release(in_use)


def test_two_that_begin_at_once_both_have_it(model, bucket, settings, tmp_path, monkeypatch):
    """Also while neither lets go: whoever fills the cache goes on to use it."""
    upload(bucket, model, "r/1")
    [found] = look(bucket, settings)
    is_whole, begun, together = downloads._is_whole, threading.local(), threading.Barrier(2)

    def looked_at(folder, listing):
        answer = is_whole(folder, listing)
        if not hasattr(begun, "once"):
            begun.once = True
            together.wait(10)  # both have seen that it is not whole
        return answer

    monkeypatch.setattr(downloads, "_is_whole", looked_at)
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(stage, arrived(found), tmp_path, nothing, s3=settings) for _ in range(2)]
        ended, _ = wait(both, timeout=20)
        for one in as_completed(both):
            release(one.result())
    assert len(ended) == 2


FILL = """
import pathlib, shutil, sys
folder = pathlib.Path(sys.argv[1], "other")
while True:
    folder.mkdir()
    for name in "abcdefgh":
        part = folder / f"{name}.part"
        part.write_bytes(b"12")
        part.rename(folder / name)
    shutil.rmtree(folder)
"""


def test_room_is_made_while_others_fill_and_remove(tmp_path):
    with subprocess.Popen([sys.executable, "-S", "-c", FILL, str(tmp_path)]) as other:
        try:
            until(lambda: (tmp_path / "other").exists(), "another to begin")
            for _ in range(1000):
                downloads._make_room(tmp_path, tmp_path / "ours", 1, 1000)
            assert other.poll() is None
        finally:
            other.kill()


def test_a_checkpoint_that_brings_pickles_only_is_refused_as_in_a_folder(model, bucket, settings, tmp_path):
    upload(bucket, broken(model, tmp_path / "p", "pickle"), "r/1")
    [refused] = look(bucket, settings)
    assert refused.refused
    assert "pickle weights only" in refused.reason
    arrival = Arrival("b/r/1", 1, bucket_listing(bucket, "r/1/").fingerprint, f"{bucket.uri}/r/1", "r")
    with pytest.raises(CheckpointError, match="pickle weights only"):
        stage(arrival, tmp_path / "cache", nothing, s3=settings)
