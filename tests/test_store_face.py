"""What every store does alike, a folder or a bucket: created once, whole or not at all, listed in the order of keys."""

import random
import threading

import pytest
from store_processes import race

from eval_platform.errors import SchemaError
from eval_platform.store import LocalStore, create_record, find_record, read_record, s3

pytest_plugins = ["store_roots"]


def test_created_once(store):
    assert store.create("a/b.json", b"1")
    assert not store.create("a/b.json", b"2")
    assert store.read("a/b.json") == b"1"
    store.put("a/b.json", b"3")
    assert store.read("a/b.json") == b"3"
    store.delete("a/b.json")
    store.delete("a/b.json")
    with pytest.raises(KeyError):
        store.read("a/b.json")
    assert store.create("a/b.json", b"4")


def test_of_many_threads_that_create_one_wins_and_its_body_is_whole(store):
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


def test_of_six_processes_one_creates_each_of_a_hundred_keys(store):
    won = race(6, lambda i: [store.create(f"slots/{k}", f"{i}".encode()) for k in range(100)])
    winners = [wins.index(True) for wins in zip(*won, strict=True) if sum(wins) == 1]
    assert len(winners) == 100
    for k in range(0, 100, 7):
        assert store.read(f"slots/{k}") == f"{winners[k]}".encode()


def test_ranges(store):
    store.put("b", b"0123456789")
    store.put("empty", b"")
    asked = {(2, 5): b"234", (7, None): b"789", (0, 99): b"0123456789", (10, 12): b"", (20, None): b"", (3, 3): b""}
    assert {span: store.read("b", *span) for span in asked} == asked
    assert store.read("empty") == store.read("empty", 0, 1) == b""
    for span in [(0, None), (0, 1), (3, 3)]:
        with pytest.raises(KeyError):
            store.read("absent", *span)


def test_listing(store):
    keys = ["a/1", "a/2", "a-b", "ab/c/d", "b"]
    for key in keys:
        store.put(key, b"0123456789")
    assert [e.key for e in store.list("")] == sorted(keys)
    assert {e.size for e in store.list("")} == {10}
    assert [e.key for e in store.list("a/")] == ["a/1", "a/2"]
    assert [(e.key, e.size, e.etag) for e in store.list("", delimiter="/") if e.key.endswith("/")] == [
        ("a/", 0, ""),
        ("ab/", 0, ""),
    ]
    assert [e.key for e in store.list("", delimiter="/")] == ["a-b", "a/", "ab/", "b"]
    assert [e.key for e in store.list("", delimiter="/", after="a/")] == ["ab/", "b"]
    assert [e.key for e in store.list("", delimiter="/", after="a/1")] == ["ab/", "b"]
    assert [e.key for e in store.list("a/", after="a/1")] == ["a/2"]
    assert list(store.list("nothing/")) == []


def test_what_is_replaced_lists_with_another_etag(store):
    store.put("k", b"one")
    [before] = store.list("k")
    store.put("k", b"two!")
    [after] = store.list("k")
    assert (before.etag, before.size) != (after.etag, after.size)


def test_any_name_is_a_key(store):
    """With its neighbours in an escaping that is done once too often or not at all."""
    key = "a b"
    names = {key, "a+b", "a%20b", "a%2520b", "ü/日本", "e\u0301", "é", "a&<b>'\"", "q?x=1#f", "=2F", "~*()!$,;:@"}
    for name in names:
        assert store.create(f"d/{name}", name.encode())
    assert {store.read(f"d/{name}").decode() for name in names} == names
    assert [e.key for e in store.list("d/")] == sorted(f"d/{name}" for name in names)
    assert f"d/{key}" in [e.key for e in store.list(f"d/{key}")]
    store.delete(f"d/{key}")
    assert len(list(store.list("d/"))) == len(names) - 1


def test_every_store_lists_as_a_folder_does(store, tmp_path):
    rng = random.Random(5)
    names = ["a", "b", "a-", "a.", "=", "0", "aa"]
    paths = {"/".join(rng.choices(names, k=rng.randint(1, 3))) for _ in range(20)}
    keys = {k for k in paths if not any(other.startswith(f"{k}/") for other in paths)}
    folder = LocalStore(tmp_path / "same")
    for key in keys:
        folder.put(key, b"x")
        store.put(key, b"x")
    for prefix in ["", "a", "a/", "0/a"]:
        for delimiter in (None, "/"):
            for after in (None, rng.choice(sorted(keys))):
                mine = [(e.key, e.size) for e in store.list(prefix, delimiter, after)]
                assert mine == [(e.key, e.size) for e in folder.list(prefix, delimiter, after)], (prefix, delimiter)


def test_more_than_a_page_is_listed_whole_and_in_order(store, monkeypatch):
    monkeypatch.setattr(s3, "PAGE_KEYS", 7)
    keys = sorted(f"log/{i}/{i}.json" for i in range(20))
    for key in keys:
        store.put(key, b"")
    assert [e.key for e in store.list("log/")] == keys
    assert [e.key for e in store.list("log/", after=keys[-9])] == keys[-8:]
    assert [e.key for e in store.list("log/", delimiter="/")] == sorted(f"log/{i}/" for i in range(20))


@pytest.mark.parametrize("key", ["", "/abs", "a/../../b"])
def test_keys_stay_inside(store, key):
    for use in (store.read, store.delete, lambda key: store.put(key, b""), lambda key: store.create(key, b"")):
        with pytest.raises(ValueError, match="not a store key"):
            use(key)


@pytest.mark.parametrize("prefix", ["/", "//", "../"])
def test_listing_stays_inside(store, prefix):
    with pytest.raises(ValueError, match="not a prefix"):
        list(store.list(prefix))


def test_files_are_written_as_bytes_are(store, tmp_path):
    file = tmp_path / "body"
    file.write_bytes(b"0123456789" * 1000)
    assert store.create("created", file)
    assert not store.create("created", file)
    store.put("put", file)
    assert store.read("created") == store.read("put") == file.read_bytes()


def test_records_of_a_newer_version_are_refused_by_name(store):
    assert find_record(store, "x.json") is None
    assert create_record(store, "x.json", {"a": 1})
    assert read_record(store, "x.json")["a"] == 1
    store.put("y.json", b'{"schema_version": 99}')
    with pytest.raises(SchemaError, match=r"y\.json has schema version 99.*\n.*upgrade"):
        read_record(store, "y.json")
    store.put("z.json", b"half a reco")
    with pytest.raises(SchemaError, match=r"z\.json is not a record"):
        read_record(store, "z.json")
