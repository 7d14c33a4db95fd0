"""What is staged is what arrived, whatever its trainer does meanwhile; and content alone makes the ids."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from multiprocessing import get_context
from pathlib import Path

import pytest
from checkpoint_factory import make_adapter, make_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from machine import small_disk

from eval_platform.checkpoints import (
    Found,
    Watch,
    discover,
    hashing,
    hold,
    identify,
    release,
    release_hold,
    stage,
    staging,
    tokenizer_id,
    verify_unchanged,
)
from eval_platform.checkpoints.identification import Identity, identity_of
from eval_platform.checkpoints.inspection import inspect
from eval_platform.config import Root
from eval_platform.errors import CheckpointChanged, CheckpointError, CheckpointGone, StoreError, classify
from eval_platform.values import Arrival, Checkpoint


def nothing(done, total):
    pass


def arrive(folder: Path, key: str | None = None, n: int = 1) -> Arrival:
    key = key or f"r/{folder.name}"
    return Arrival(key, n, inspect(folder).listing.fingerprint, str(folder), "run")


def age(folder: Path, seconds: float = 100):
    """Older than the file system's clock could confuse (hashing._RACY_NS)."""
    then = time.time_ns() - int(seconds * 1e9)
    for file in folder.rglob("*"):
        os.utime(file, ns=(then, then))


def ids(folder: Path, cache: Path):
    identity = identify(folder, cache, nothing)
    return identity.checkpoint_id, identity.weights_id


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "state" / "cache"


@pytest.fixture
def other_device():
    """A folder on another file system, where hard links cannot reach."""
    shared_memory = Path("/dev/shm")
    if not shared_memory.is_dir() or not os.access(shared_memory, os.W_OK):
        pytest.skip("what hard links cannot reach is tested over two file systems, and there is no second at /dev/shm")
    folder = shared_memory / f"eval-platform-test-{os.getpid()}-{time.time_ns()}"
    folder.mkdir()
    yield folder
    shutil.rmtree(folder)


# Identity


def test_ids_are_the_hash_the_contract_states(tmp_path, cache):
    folder = make_checkpoint(tmp_path / "c", shards=2)
    (folder / "optimizer.pt").write_bytes(b"x")

    def over(names):
        pairs = [[name, hashlib.sha256((folder / name).read_bytes()).hexdigest()] for name in sorted(names)]
        text = json.dumps(pairs, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    weights = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    rest = "config.json generation_config.json model.safetensors.index.json tokenizer.json tokenizer_config.json"
    assert ids(folder, cache) == (over([*weights, *rest.split()]), over(weights))


def test_copy_and_rename_are_the_same_checkpoint(tmp_path, cache):
    folder = make_checkpoint(tmp_path / "c")
    before = ids(folder, cache)
    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    assert ids(tmp_path / "copy", cache) == before
    assert ids(folder.rename(tmp_path / "renamed"), cache) == before


def test_trainer_state_changes_no_id(tmp_path, cache):
    folder = make_checkpoint(tmp_path / "c")
    before = ids(folder, cache)
    for name in ["optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth", "_SUCCESS"]:
        (folder / name).write_bytes(b"{}")
    (folder / "checkpoint.json").write_text('{"step": 3}')
    assert ids(folder, cache) == before


def test_any_changed_byte_is_another_checkpoint(tmp_path, cache):
    folder = make_checkpoint(tmp_path / "c")
    before = ids(folder, cache)
    seen = {before[0]}
    for file in sorted(folder.iterdir()):
        body = bytearray(file.read_bytes())
        kept = bytes(body)
        if file.suffix == ".safetensors":
            body[-1] ^= 1
        else:
            body += b" "
        file.write_bytes(body)
        changed = ids(folder, cache)
        assert changed[0] not in seen, file.name
        assert (changed[1] == before[1]) == (file.suffix != ".safetensors")
        seen.add(changed[0])
        file.write_bytes(kept)
    assert ids(folder, cache) == before


@given(
    st.dictionaries(
        st.sampled_from(["model.safetensors", "config.json", "tokenizer.json", "merges.txt"]),
        st.text("0123456789abcdef", min_size=64, max_size=64),
        min_size=1,
    ),
    st.randoms(),
)
def test_the_order_in_which_files_are_seen_is_no_part_of_identity(digests, random):
    shuffled = list(digests.items())
    random.shuffle(shuffled)
    assert identity_of(dict(shuffled)) == identity_of(digests)
    base = Identity("0" * 32, "1" * 32)
    assert identity_of(digests, base) != identity_of(digests)


def test_an_adapters_id_covers_its_base(tmp_path, cache):
    base = make_checkpoint(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    before = ids(adapter, cache)
    staged = stage(arrive(adapter), cache, nothing)
    assert staged.kind == "adapter"
    assert (staged.checkpoint_id, staged.weights_id) == before
    make_checkpoint(base, seed=5)
    os.utime(base / "model.safetensors", ns=(0, time.time_ns() + 10**9))
    with pytest.raises(CheckpointChanged, match="overwritten"):
        verify_unchanged(staged)
    after = ids(adapter, cache)
    assert before[0] != after[0]
    assert before[1] != after[1]
    release(staged)


def test_where_nothing_can_be_linked_an_adapter_is_staged_all_the_same(tmp_path, cache, monkeypatch):
    base = make_checkpoint(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", base)
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    before = ids(adapter, cache)

    def no_link(source, target):
        raise OSError(errno.ENOTSUP, "Operation not supported", source)

    monkeypatch.setattr(os, "link", no_link)
    staged = stage(arrive(adapter), cache, nothing)
    assert (staged.checkpoint_id, staged.weights_id) == before
    for file in (adapter / "chat_template.jinja", *base.iterdir()):
        assert (staged.path / file.name).read_bytes() == file.read_bytes()
    verify_unchanged(staged)
    release(staged)


def test_tokenizer_id_is_over_what_tokenizes(tmp_path):
    one = make_checkpoint(tmp_path / "a")
    two = make_checkpoint(tmp_path / "b", seed=7)
    assert tokenizer_id(one) == tokenizer_id(two)
    (two / "chat_template.jinja").write_text("{{ messages }}")
    assert tokenizer_id(one) != tokenizer_id(two)
    assert tokenizer_id(make_adapter(tmp_path / "adapter", one)) == tokenizer_id(one)


# Staging


def test_staged_files_are_links_with_their_ids(tmp_path, cache):
    folder = make_checkpoint(tmp_path / "c", shards=2)
    (folder / "optimizer.pt").write_bytes(b"x")
    told = []
    staged = stage(arrive(folder), cache, lambda done, total: told.append((done, total)))
    assert (staged.checkpoint_id, staged.weights_id) == ids(folder, cache)
    assert staged.path is not None
    assert staged.path.is_relative_to(cache)
    names = {file.name for file in folder.iterdir()} - {"optimizer.pt"}
    assert {file.name for file in staged.path.iterdir()} == names
    assert all((staged.path / name).samefile(folder / name) for name in names)
    size = sum((folder / name).stat().st_size for name in names)
    assert told[0] == (0, size)
    assert told[-1] == (size, size)
    assert told == sorted(told)
    verify_unchanged(staged)
    release(staged)
    release(staged)
    assert not staged.path.exists()
    assert all((folder / name).exists() for name in names)


def test_across_file_systems_it_is_copied(tmp_path, other_device):
    folder = make_checkpoint(tmp_path / "c", shards=2, values=300_000)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/rag.jinja").write_text("x")
    arrival = arrive(folder)
    assert hold(arrival, other_device) is False
    assert list((other_device / "held").iterdir()) == []
    told = []
    staged = stage(arrival, other_device, lambda done, total: told.append((done, total)))
    assert (staged.checkpoint_id, staged.weights_id) == ids(folder, tmp_path / "another cache")
    assert told[-1][0] == told[-1][1] == inspect(folder).listing.size
    assert staged.path is not None
    assert inspect(staged.path).listing.fingerprint == arrival.fingerprint
    # a copy is ours alone
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"overwritten")
    verify_unchanged(staged)
    release(staged)


def test_the_hub_caches_links_are_followed_to_their_blobs(tmp_path, cache):
    blobs = make_checkpoint(tmp_path / "blobs")
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    assert hold(arrive(snapshot), cache)
    staged = stage(arrive(snapshot), cache, nothing)
    assert staged.checkpoint_id == ids(blobs, cache)[0]
    assert staged.path is not None
    assert not any(file.is_symlink() for file in staged.path.iterdir())
    release(staged)


def test_held_while_it_waits_then_deleted_then_staged(tmp_path, cache):
    folder = make_checkpoint(tmp_path / "c")
    expected = ids(folder, cache)
    arrival = arrive(folder)
    assert hold(arrival, cache)
    assert hold(arrival, cache)
    shutil.rmtree(folder)
    staged = stage(arrival, cache, nothing)
    assert (staged.checkpoint_id, staged.weights_id) == expected
    release_hold(arrival, cache)
    release_hold(arrival, cache)
    verify_unchanged(staged)
    assert staged.path is not None
    assert inspect(staged.path).complete
    release(staged)
    with pytest.raises(CheckpointGone, match="save_total_limit"):
        stage(arrival, cache, nothing)


def test_two_arrivals_of_one_key_and_keys_below_it_are_held_apart(tmp_path, cache):
    one, two = make_checkpoint(tmp_path / "a"), make_checkpoint(tmp_path / "b", seed=1)
    arrivals = [arrive(one, "r/x", 1), arrive(two, "r/x", 2), arrive(two, "r/x/1", 1)]
    assert all(hold(arrival, cache) for arrival in arrivals)
    release_hold(arrivals[1], cache)
    assert hold(arrivals[2], cache)
    staged = [stage(arrival, cache, nothing) for arrival in arrivals]
    assert staged[0].checkpoint_id != staged[1].checkpoint_id == staged[2].checkpoint_id


def test_deleted_before_anything_held_it_is_gone(tmp_path, cache):
    folder = make_checkpoint(tmp_path / "c")
    arrival = arrive(folder)
    shutil.rmtree(folder)
    assert hold(arrival, cache) is False
    with pytest.raises(CheckpointGone) as caught:
        stage(arrival, cache, nothing)
    assert classify(caught.value) == "gone"
    folder.mkdir()  # a deletion under way: the files went first
    with pytest.raises(CheckpointGone):
        stage(arrival, cache, nothing)
    assert not list((cache / "staged").glob("*/model*"))


def test_what_changed_since_it_arrived_is_not_staged_under_the_old_name(tmp_path, cache):
    folder = make_checkpoint(tmp_path / "c")
    arrival = arrive(folder)
    make_checkpoint(folder, seed=1)
    os.utime(folder / "model.safetensors", ns=(0, time.time_ns() + 10**9))
    assert hold(arrival, cache) is False
    with pytest.raises(CheckpointChanged, match="no longer what arrived") as caught:
        stage(arrival, cache, nothing)
    assert classify(caught.value) == "infrastructure"


def test_a_changed_optimizer_is_no_change(tmp_path, cache):
    folder = make_checkpoint(tmp_path / "c")
    arrival = arrive(folder)
    (folder / "optimizer.pt").write_bytes(b"later")
    release(stage(arrival, cache, nothing))


def test_an_overwrite_in_place_shows_through_the_links(tmp_path, cache):
    folder = make_checkpoint(tmp_path / "c")
    arrival = arrive(folder)
    assert hold(arrival, cache)
    staged = stage(arrival, cache, nothing)
    weights = folder / "model.safetensors"
    before = weights.stat()
    with weights.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    os.utime(weights, ns=(0, before.st_mtime_ns + 1))
    with pytest.raises(CheckpointChanged, match=r"model\.safetensors was overwritten"):
        verify_unchanged(staged)
    release(staged)
    with pytest.raises(CheckpointChanged):
        stage(arrival, cache, nothing)


def test_a_replaced_source_leaves_what_is_staged_intact(tmp_path, cache):
    folder = make_checkpoint(tmp_path / "c")
    arrival = arrive(folder)
    assert hold(arrival, cache)
    expected = ids(folder, cache)
    staged = stage(arrival, cache, nothing)
    other = make_checkpoint(tmp_path / "other", seed=1)
    os.replace(other / "model.safetensors", folder / "model.safetensors")
    verify_unchanged(staged)
    # and the hold still has what arrived
    again = stage(arrival, cache, nothing)
    assert (again.checkpoint_id, again.weights_id) == expected
    release(staged)
    release(again)


def test_a_removed_staged_folder_is_noticed(tmp_path, cache):
    staged = stage(arrive(make_checkpoint(tmp_path / "c")), cache, nothing)
    assert staged.path is not None
    (staged.path / "tokenizer.json").unlink()
    with pytest.raises(CheckpointChanged, match="deleted"):
        verify_unchanged(staged)


def test_a_served_model_has_nothing_to_verify():
    served = Checkpoint("0" * 32, "1" * 32, None, "served")
    verify_unchanged(served)
    release(served)


def test_a_change_while_it_is_hashed_is_caught(tmp_path, cache):
    folder = make_checkpoint(tmp_path / "c", values=3_000_000)
    arrival = arrive(folder)

    def overwrite_midway(done, total):
        if 0 < done < total:
            with (folder / "model.safetensors").open("r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(bytes([done % 251]))

    with pytest.raises(CheckpointChanged):
        stage(arrival, cache, overwrite_midway)
    assert [file for file in (cache / "staged").iterdir() if file.is_dir()] == []


def test_deletion_while_it_is_hashed_does_not_matter(tmp_path, cache):
    folder = make_checkpoint(tmp_path / "c", values=3_000_000)
    expected = ids(folder, cache)

    def delete_midway(done, total):
        if done:
            shutil.rmtree(folder, ignore_errors=True)

    staged = stage(arrive(folder), cache, delete_midway)
    assert not folder.exists()
    assert (staged.checkpoint_id, staged.weights_id) == expected
    verify_unchanged(staged)
    release(staged)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"), "pickle weights only"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "no tokenizer"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is not JSON"),
    ],
)
def test_what_cannot_be_evaluated_fails_for_good_and_says_why(tmp_path, cache, spoil, reason):
    folder = make_checkpoint(tmp_path / "c")
    spoil(folder)
    with pytest.raises(CheckpointError, match=reason) as caught:
        stage(arrive(folder), cache, nothing)
    assert classify(caught.value) == "deterministic"


def test_own_python_code_needs_a_persons_word(tmp_path, cache):
    folder = make_checkpoint(tmp_path / "c")
    config = {"model_type": "my_own", "auto_map": {"AutoModelForCausalLM": "modeling_own.Own"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling_own.py").write_text("raise SystemExit")
    arrival = arrive(folder)
    with pytest.raises(CheckpointError, match="trust_remote_code = true"):
        stage(arrival, cache, nothing)
    staged = stage(arrival, cache, nothing, trust_remote_code=True)
    assert staged.path is not None
    assert (staged.path / "modeling_own.py").exists()
    # A model that transformers knows is loaded by transformers' own code, whatever lies beside it.
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    release(stage(arrive(folder), cache, nothing))
    release(staged)


def test_no_other_than_local_folders_yet(cache):
    with pytest.raises(CheckpointError, match="from folders, s3:// and hf:// only"):
        stage(Arrival("r/c", 1, "f", "gs://bucket/c", "run"), cache, nothing)


def test_a_cache_that_cannot_be_written_is_told_with_the_remedy(tmp_path):
    folder = make_checkpoint(tmp_path / "c")
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    for attempt in (lambda: hold(arrive(folder), blocked), lambda: stage(arrive(folder), blocked, nothing)):
        with pytest.raises(StoreError, match="set `state` to another disk") as caught:
            attempt()
        assert classify(caught.value) == "infrastructure"


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path):
    """A real one: a small tmpfs."""
    folder = make_checkpoint(tmp_path / "c", values=100_000)
    with small_disk(tmp_path / "small", "256k") as mount:
        with pytest.raises(StoreError, match="No space left") as caught:
            stage(arrive(folder), mount, nothing)
        assert classify(caught.value) == "infrastructure"
        assert [file for file in (mount / "staged").iterdir() if file.is_dir()] == []


def test_links_refused_for_other_reasons_are_not_taken_for_another_device():
    assert errno.ENOSPC not in staging._NO_LINK
    assert errno.ENOENT not in staging._NO_LINK


# The hash cache


@pytest.fixture
def read(monkeypatch):
    """Names of the files that were truly read."""
    names = []
    through = hashing.read_through

    def counting(path, meter, sink=None):
        names.append(Path(path).name)
        return through(path, meter, sink)

    monkeypatch.setattr(hashing, "read_through", counting)
    return names


def test_an_unchanged_file_is_read_once_per_machine(tmp_path, cache, read):
    folder = make_checkpoint(tmp_path / "c", values=200_000)
    age(folder)
    first = stage(arrive(folder), cache, nothing)
    assert read.count("model.safetensors") == 1
    told = []
    # linked, held, renamed: still the same inode
    folder = folder.rename(tmp_path / "d")
    hold(arrive(folder), cache)
    second = stage(arrive(folder), cache, lambda done, total: told.append((done, total)))
    assert read.count("model.safetensors") == 1
    assert second.checkpoint_id == first.checkpoint_id
    assert told[-1][0] == told[-1][1]
    os.utime(folder / "model.safetensors")
    identify(folder, cache, nothing)
    assert read.count("model.safetensors") == 2
    release(first)
    release(second)


def test_a_file_written_just_now_is_not_trusted_to_the_cache(tmp_path, cache, read):
    folder = make_checkpoint(tmp_path / "c", values=200_000)
    identify(folder, cache, nothing)
    identify(folder, cache, nothing)
    assert read.count("model.safetensors") == 2


def test_a_torn_cache_entry_is_hashed_again_and_mended(tmp_path, cache, read):
    folder = make_checkpoint(tmp_path / "c", values=200_000)
    age(folder)
    expected = identify(folder, cache, nothing)
    (entry,) = [file for file in (cache / "hashes").rglob("*") if file.is_file()]
    for torn in (b"", entry.read_bytes()[:40]):
        entry.write_bytes(torn)
        assert identify(folder, cache, nothing) == expected
        assert len(entry.read_bytes()) == 64


def _identify(folder, cache):
    return identify(folder, cache, nothing).checkpoint_id


def test_many_processes_hash_and_stage_at_once(tmp_path, cache):
    folder = make_checkpoint(tmp_path / "c", values=400_000)
    age(folder)
    with get_context("fork").Pool(4) as pool:
        found = pool.starmap(_identify, [(folder, cache)] * 12)
    assert len(set(found)) == 1
    files = [file for file in (cache / "hashes").rglob("*") if file.is_file()]
    assert [len(file.read_bytes()) for file in files] == [64]


# What a killed worker leaves


def test_what_a_killed_worker_staged_is_removed_by_the_next_and_only_that(tmp_path, cache):
    folder = make_checkpoint(tmp_path / "c")
    arrival = arrive(folder)
    program = textwrap.dedent(
        """
        import sys, time
        from pathlib import Path
        from eval_platform.checkpoints import stage
        from eval_platform.values import Arrival
        uri, fingerprint, cache = sys.argv[1:]
        print(stage(Arrival("r/c", 1, fingerprint, uri, "run"), Path(cache), lambda *_: None).path, flush=True)
        time.sleep(60)
        """
    )
    command = [sys.executable, "-c", program, arrival.uri, arrival.fingerprint, str(cache)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker:
        assert worker.stdout is not None
        theirs = Path(worker.stdout.readline().strip())
        ours = stage(arrival, cache, nothing)
        assert ours.path is not None
        assert theirs.is_dir()  # alive: left alone
        worker.send_signal(signal.SIGKILL)
    third = stage(arrival, cache, nothing)
    assert not theirs.parent.exists()
    verify_unchanged(ours)
    release(ours)
    release(third)


def test_from_discovery_to_staging(tmp_path, cache):
    folder = make_checkpoint(tmp_path / "runs/a/step_7")
    (folder / "_SUCCESS").touch()
    (found,) = discover([Root(name="r", path=str(tmp_path / "runs"))], {}, Watch())
    assert isinstance(found, Found)
    arrival = Arrival(found.key, 1, found.fingerprint, found.uri, found.run, found.step)
    staged = stage(arrival, cache, nothing)
    assert staged.kind == "transformers"
    release(staged)
