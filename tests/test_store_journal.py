"""The journal: what was answered before a kill is there after it, bit for bit."""

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from machine import small_disk
from store_processes import kill_after

from eval_platform.errors import SchemaError, StoreError
from eval_platform.store import LocalStore
from eval_platform.store.journal import Journal
from eval_platform.values import Response

pytest_plugins = ["store_roots"]


def bits(value):
    return value if value is None else struct.pack(">d", value)


def exact(response):
    return (*(getattr(response, name) for name in FIELDS), bits(response.log_likelihood))


FIELDS = [name for name in Response.__slots__ if name != "log_likelihood"]
EVERY_FLOAT = st.integers(0, 2**64 - 1).map(lambda n: struct.unpack(">d", n.to_bytes(8, "big"))[0])
SPECIAL = st.sampled_from(
    [float("nan"), -float("nan"), float("inf"), -float("inf"), -0.0, 5e-324, 1.7976931348623157e308]
)
RESPONSES = st.builds(
    Response,
    request_id=st.text(min_size=1, max_size=5),
    repeat=st.integers(0, 3),
    log_likelihood=st.none() | SPECIAL | EVERY_FLOAT | st.floats(max_value=0),
    is_greedy=st.none() | st.booleans(),
    # A tokenizer may leave half a surrogate pair; line separators must not end a line.
    text=st.none() | st.text(st.characters(exclude_categories=())) | st.just("a\n\u2028b\ud800"),
    n_tokens=st.integers(0, 2**40),
    finish_reason=st.sampled_from(["scored", "stop", "length", "eos"]),
    truncated_left_tokens=st.integers(0, 10**6),
)


@given(batches=st.lists(st.lists(RESPONSES, max_size=6), max_size=4))
@settings(max_examples=40, deadline=None)
def test_every_answer_comes_back_bit_for_bit(tmp_path_factory, batches):
    store = LocalStore(tmp_path_factory.mktemp("store"))
    journal = Journal(store, "a", 1, "t")
    expected = {}
    for batch in batches:
        journal.append(batch)
        expected |= {(response.request_id, response.repeat): exact(response) for response in batch}
    assert {key: exact(response) for key, response in journal.finished().items()} == expected


def test_later_tries_read_earlier_ones_and_other_attempts_read_nothing(store):
    Journal(store, "a", 1, "one").append([Response("r1", 0, -1.0), Response("r1", 1, text="x", finish_reason="eos")])
    second = Journal(store, "a", 1, "two")
    second.append([Response("r2", 0, -2.0)])
    assert set(second.finished()) == {("r1", 0), ("r1", 1), ("r2", 0)}
    assert Journal(store, "a", 2, "three").finished() == {}
    assert Journal(store, "b", 1, "four").finished() == {}
    # Attempt 1 is no prefix of attempt 10, nor answers "a" of answers "ab".
    assert Journal(store, "a", 10, "five").finished() == {}


def test_what_was_appended_before_a_kill_is_there_after_it(store, fewer):
    written = [Response(f"r{i}", 0, -float(i)) for i in range(fewer(20))]

    def work() -> None:
        journal = Journal(store, "a", 1, "t")
        for response in written:
            journal.append([response])

    kill_after(work)
    assert sorted(Journal(store, "a", 1, "u").finished().values(), key=lambda r: -r.log_likelihood) == written


def test_a_torn_altered_or_foreign_segment_is_named(store, fewer):
    Journal(store, "a", 1, "t").append([Response("r1", 0, -1.5), Response("r2", 0, -2.5)])
    [entry] = store.list("journal/")
    whole = store.read(entry.key)
    altered = whole.replace(b"-1.5", b"-1.4")
    newer = whole.replace(b'"schema_version": 1', b'"schema_version": 2')
    for broken in [whole[:cut] for cut in range(0, len(whole), len(whole) // fewer(40))] + [whole[:-1], altered, newer]:
        store.put(entry.key, broken)
        with pytest.raises(SchemaError, match=entry.key):
            Journal(store, "a", 1, "u").finished()
    store.put(entry.key, whole)
    store.create("journal/a/2/t/000000001.jsonl", whole)
    with pytest.raises(SchemaError, match="attempt 2"):
        Journal(store, "a", 2, "u").finished()


def test_two_writers_of_one_try_are_refused(store):
    Journal(store, "a", 1, "t").append([Response("r1", 0, -1.0)])
    with pytest.raises(StoreError, match="two writers"):
        Journal(store, "a", 1, "t").append([Response("r2", 0, -1.0)])


@pytest.fixture
def full_root(tmp_path):
    """A real file system of 512 KiB."""
    with small_disk(tmp_path / "small", "512k") as folder:
        yield folder


def test_a_full_disk_is_an_infrastructure_error_and_what_was_written_stays(full_root):
    store = LocalStore(full_root)
    journal = Journal(store, "a", 1, "t")
    ballast = full_root / "ballast"
    ballast.write_bytes(b"\0" * 300_000)
    written: list[str] = []

    def append() -> None:
        batch = [Response(f"r{len(written)}", 0, text="x" * 20_000, finish_reason="stop")]
        journal.append(batch)
        written.append(batch[0].request_id)

    def fill() -> None:
        for _ in range(100):
            append()

    with pytest.raises(StoreError, match=r"(?s)No space left.*remedy: free space") as full:
        fill()
    assert full.value.class_ == "infrastructure"
    assert {request_id for request_id, _ in journal.finished()} == set(written) != set()
    ballast.unlink()
    append()
    assert {request_id for request_id, _ in Journal(store, "a", 1, "u").finished()} == set(written)
