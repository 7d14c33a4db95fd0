"""The local store: created once, whole or not at all, listed as S3 lists."""

import subprocess
import sys
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from machine import small_disk

from eval_platform.errors import SchemaError, StoreError
from eval_platform.store import LocalStore, create_record, find_record, open_store, read_record


def test_created_once(tmp_path):
    store = LocalStore(tmp_path)
    assert store.create("a/b.json", b"1")
    assert not store.create("a/b.json", b"2")
    assert store.read("a/b.json") == b"1"
    store.put("a/b.json", b"3")
    assert store.read("a/b.json") == b"3"
    store.delete("a/b.json")
    store.delete("a/b.json")
    with pytest.raises(KeyError):
        store.read("a/b.json")


def test_of_many_creators_one_wins_and_its_body_is_whole(tmp_path):
    store = LocalStore(tmp_path)
    won: list[int] = []

    def create(i: int) -> None:
        if store.create("slot", bytes([i]) * 100_000):
            won.append(i)

    threads = [threading.Thread(target=create, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert store.read("slot") == bytes([won[0]]) * 100_000
    assert [entry.key for entry in store.list("")] == ["slot"]  # nothing left aside


def test_range_and_listing(tmp_path):
    store = LocalStore(tmp_path)
    for key in ("a/1", "a/2", "a-b", "ab/c/d", "b"):
        store.put(key, b"0123456789")
    assert store.read("b", 2, 5) == b"234"
    assert [e.key for e in store.list("")] == sorted(["a/1", "a/2", "a-b", "ab/c/d", "b"])
    assert [e.key for e in store.list("a/")] == ["a/1", "a/2"]
    assert [e.key for e in store.list("", delimiter="/")] == ["a-b", "a/", "ab/", "b"]
    assert [e.key for e in store.list("a/", after="a/1")] == ["a/2"]
    assert list(store.list("nothing/")) == []


names = st.text(alphabet="ab-.=0", min_size=1, max_size=3).filter(lambda s: s not in {".", ".."})


@settings(max_examples=50, deadline=None)
@given(
    keys=st.sets(st.lists(names, min_size=1, max_size=3).map("/".join), max_size=8),
    prefix=st.from_regex(r"([ab-]/?){0,2}", fullmatch=True),
)
def test_listing_is_the_sorted_keys_with_that_prefix(tmp_path_factory, keys, prefix):
    # A key may not be a folder of another one on a file system.
    keys = {k for k in keys if not any(other.startswith(k + "/") for other in keys)}
    store = LocalStore(tmp_path_factory.mktemp("store"))
    for key in keys:
        store.put(key, b"x")
    assert [e.key for e in store.list(prefix)] == sorted(k for k in keys if k.startswith(prefix))


@pytest.mark.parametrize("key", ["", "/abs", "a/../../b"])
def test_keys_stay_inside(tmp_path, key):
    with pytest.raises(ValueError, match="not a store key"):
        LocalStore(tmp_path).put(key, b"")


@pytest.mark.parametrize("prefix", ["/", "//", "../"])
def test_listing_stays_inside(tmp_path, prefix):
    with pytest.raises(ValueError, match="not a prefix"):
        list(LocalStore(tmp_path).list(prefix))


def test_records_of_a_newer_version_are_refused_by_name(tmp_path):
    store = LocalStore(tmp_path)
    assert find_record(store, "x.json") is None
    assert create_record(store, "x.json", {"a": 1})
    assert read_record(store, "x.json")["a"] == 1
    store.put("y.json", b'{"schema_version": 99}')
    with pytest.raises(SchemaError, match=r"y\.json has schema version 99.*\n.*upgrade"):
        read_record(store, "y.json")
    store.put("z.json", b"half a reco")
    with pytest.raises(SchemaError, match=r"z\.json is not a record"):
        read_record(store, "z.json")


def test_a_full_disk_is_named_and_leaves_nothing_behind(tmp_path):
    with small_disk(tmp_path / "small", "64k") as folder:
        store = LocalStore(folder)
        assert store.create("small", b"x" * 1000)
        with pytest.raises(StoreError, match=r"cannot write .*/large: No space left(.|\n)*free space"):
            store.create("large", b"x" * 1_000_000)
        assert [e.key for e in store.list("")] == ["small"]
        assert store.create("after", b"x")


def test_a_root_that_cannot_be_written_is_named(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(StoreError, match="cannot write"):
        LocalStore(file).put("a", b"")
    with pytest.raises(StoreError, match="gopher"):
        open_store("gopher://x")


def test_killed_while_writing_leaves_no_half_object(tmp_path):
    program = (
        "import sys; from eval_platform.store import LocalStore\n"
        "s = LocalStore(sys.argv[1])\n"
        "print('go', flush=True)\n"
        "for i in range(10**6): s.put('k', bytes([i % 256]) * 3_000_000)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    store = LocalStore(tmp_path)
    while not any(True for _ in store.list("")):
        pass
    child.kill()
    child.wait()
    body = store.read("k")
    assert len(body) == 3_000_000
    assert len(set(body)) == 1
