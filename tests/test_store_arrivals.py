"""Arrivals: numbered by what was seen, whoever sees it, by no clock."""

import itertools
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from store_processes import folders_only, race

from eval_platform.errors import CheckpointChanged, StoreError
from eval_platform.store import LocalStore, arrivals, log
from eval_platform.values import Checkpoint

pytest_plugins = ["store_roots"]


def see(store, fingerprint, key="runs/a", watcher="w"):
    return arrivals.register(store, key=key, uri=f"/x/{key}", fingerprint=fingerprint, run="r", watcher=watcher)


def test_an_arrival_is_read_back_as_it_was_registered(store):
    arrival, new = arrivals.register(
        store,
        key="runs/a=20b/step-5",
        uri="/data/a b/step-5",
        fingerprint="f",
        run="a b",
        step=5,
        tokens_seen=10**13,
        tags={"lr": "1e-3", "über": "ja"},
        watcher="w",
    )
    assert new
    assert (arrival.n, arrival.step, arrival.tokens_seen, arrival.tags["über"]) == (1, 5, 10**13, "ja")
    assert arrivals.newest(store, arrival.key) == arrivals.get(store, arrival.key, 1) == arrival
    assert arrivals.history(store, arrival.key) == [arrival]
    assert arrivals.newest(store, "runs/b") is None
    assert arrivals.get(store, arrival.key, 2) is None


def test_a_b_a_again_is_1_2_3(store):
    seen = [see(store, fingerprint) for fingerprint in "AABBAA"]
    assert [arrival.n for arrival, _ in seen] == [1, 1, 2, 2, 3, 3]
    assert [new for _, new in seen] == [True, False] * 3


@given(st.lists(st.tuples(st.sampled_from("AB"), st.sampled_from(["both", "second first", "first only"]))))
@settings(max_examples=30, deadline=None)
def test_watchers_that_see_alike_number_every_change_once(sightings):
    """The first watcher sees every state of the folder, the second some, in either order: as if one had watched."""
    with tempfile.TemporaryDirectory() as folder:
        store = LocalStore(folder)
        for fingerprint, who in sightings:
            order = {"both": ("first", "second"), "second first": ("second", "first"), "first only": ("first",)}[who]
            for watcher in order:
                see(store, fingerprint, watcher=watcher)
        states = [fingerprint for fingerprint, _ in itertools.groupby(fingerprint for fingerprint, _ in sightings)]
        assert [arrival.fingerprint for arrival in arrivals.history(store, "runs/a")] == states


@folders_only
def test_watchers_that_see_one_folder_differently_do_not_take_turns(store):
    for _ in range(5):
        see(store, "at 10:00:00.5", watcher="local")
        see(store, "at 10:00:00", watcher="over NFS")
    assert [arrival.n for arrival in arrivals.history(store, "runs/a")] == [1, 2]


def test_a_return_is_new_though_another_watcher_registered_the_change(store):
    see(store, "A", watcher="one")
    see(store, "B", watcher="two")
    assert see(store, "B", watcher="one") == (arrivals.newest(store, "runs/a"), False)
    arrival, new = see(store, "A", watcher="one")
    assert (arrival.n, new) == (3, True)


@settings(max_examples=25, stateful_step_count=15, deadline=None)
class Numbering(RuleBasedStateMachine):
    """Any watchers, keys and fingerprints, against the rule written on lists."""

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.store = LocalStore(self.folder)
        self.arrived: dict[str, list[str]] = {}
        self.stood_by: dict[tuple[str, str], int] = {}

    def teardown(self):
        shutil.rmtree(self.folder)

    @rule(
        key=st.sampled_from(["runs/a", "runs/a/1", "runs/a-b"]),
        fingerprint=st.sampled_from("ABC"),
        watcher=st.sampled_from(["one", "two"]),
    )
    def look(self, key, fingerprint, watcher):
        arrived = self.arrived.setdefault(key, [])
        own = self.stood_by.get((key, watcher))
        same_as_newest = bool(arrived) and arrived[-1] == fingerprint
        same_as_own = own is not None and arrived[own - 1] == fingerprint
        expect_new = not same_as_newest and not same_as_own
        if expect_new:
            arrived.append(fingerprint)
        if expect_new or same_as_newest:
            self.stood_by[key, watcher] = own = len(arrived)
        arrival, new = see(self.store, fingerprint, key, watcher)
        assert (arrival.n, arrival.fingerprint, new) == (own, fingerprint, expect_new)

    @invariant()
    def numbered_without_gaps(self):
        for key, arrived in self.arrived.items():
            history = arrivals.history(self.store, key)
            assert [(one.n, one.fingerprint) for one in history] == list(enumerate(arrived, 1))
        assert arrivals.numbers(self.store) == {key: len(arrived) for key, arrived in self.arrived.items()}
        assert arrivals.keys(self.store) == sorted(self.arrived)


TestNumbering = Numbering.TestCase


def test_of_many_processes_that_see_one_change_one_registers_it(store, fewer):
    keys = [f"runs/{i}" for i in range(fewer(15))]
    new = race(4, lambda i: [see(store, "A", key, watcher=f"w{i}")[1] for key in keys])
    assert [sum(one) for one in zip(*new, strict=True)] == [1] * len(keys)
    assert arrivals.numbers(store) == dict.fromkeys(keys, 1)


@folders_only
def test_processes_that_see_different_changes_number_them_without_gap_or_loss(store, fewer):
    each = fewer(8)
    race(4, lambda i: [see(store, f"{i}-{j}", watcher=f"w{i}") for j in range(each)])
    history = arrivals.history(store, "runs/a")
    assert [one.n for one in history] == list(range(1, 4 * each + 1))
    assert {one.fingerprint for one in history} == {f"{i}-{j}" for i in range(4) for j in range(each)}


@folders_only
def test_the_clock_stepping_back_changes_no_number(store, monkeypatch):
    times = (f"2026-03-01T{hour:02}:00:00.000000Z" for hour in range(23, 0, -1))
    for module in (arrivals, log):
        monkeypatch.setattr(module, "utc_now", lambda: next(times))
    assert [see(store, fingerprint)[0].n for fingerprint in "ABA"] == [1, 2, 3]
    assert arrivals.newest(store, "runs/a").n == 3


def test_every_arrival_is_announced(store):
    for fingerprint in "AAB":
        see(store, fingerprint)
    announced = [(entry["kind"], entry["key"], entry["n"]) for entry in log.read(store, log.dates(store))]
    assert sorted(announced) == [("arrival", "runs/a", 1), ("arrival", "runs/a", 2)]


def test_an_arrival_that_cannot_be_announced_is_not_registered(tmp_path):
    store = LocalStore(tmp_path)
    (tmp_path / "log").write_text("in the way")
    with pytest.raises(StoreError):
        see(store, "A")
    assert arrivals.newest(store, "runs/a") is None


def test_a_file_system_that_lists_late_ends_in_an_error_not_in_a_loop(tmp_path):
    """As NFS may: the file is there, the cached listing is from before."""

    class Late(LocalStore):
        def list(self, prefix, delimiter=None, after=None):
            return iter(())

    see(LocalStore(tmp_path), "A")
    with pytest.raises(StoreError, match=r"(?s)exists but is not listed.*remedy"):
        see(Late(tmp_path), "B")


def test_identity_is_recorded_once_and_may_not_change(store):
    arrival, _ = see(store, "A")
    assert arrivals.identity(store, arrival.key, 1) is None
    model = Checkpoint("c" * 32, "d" * 32, None, "transformers")
    arrivals.record_identity(store, arrival, model)
    arrivals.record_identity(store, arrival, model)
    assert arrivals.identity(store, arrival.key, 1) == arrivals.Identity("c" * 32, "d" * 32)
    with pytest.raises(CheckpointChanged, match="arrival 1 of runs/a"):
        arrivals.record_identity(store, arrival, Checkpoint("e" * 32, "d" * 32, None, "transformers"))
    assert [entry["kind"] for entry in log.read(store, log.dates(store))].count("identity") == 1
