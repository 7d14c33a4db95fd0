"""Leases: one holder, taken over when it is dead or silent, whatever the wall clock says."""

import signal
import time

import psutil
import pytest
from store_processes import Child, folders_only, kill_after, race

from eval_platform.errors import StoreError
from eval_platform.store import LocalStore, create_record, leases, process

pytest_plugins = ["store_roots"]


class Clock:
    """A monotonic clock that the test moves."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def elsewhere(monkeypatch):
    """As if every holder were on another machine: nobody can be known dead."""
    monkeypatch.setattr(process, "_machine", lambda: None)


def take(store, name="e", ttl_s=30.0):
    lease = leases.acquire(store, name, ttl_s)
    assert lease is not None
    return lease


def test_one_holder_until_it_releases(store):
    lease = take(store)
    assert lease.held()
    assert leases.acquire(store, "e", 30) is None
    assert leases.acquire(store, "e.1-2", 30) is not None  # a shard's lease is another name
    lease.release()
    lease.release()
    assert not lease.held()
    assert leases.holder(store, "e") is None
    again = take(store)
    assert (again.generation, again.held(), lease.held()) == (2, True, False)


def test_a_beating_holder_keeps_it_and_a_silent_one_loses_it_after_the_ttl(store, elsewhere):
    clock = Clock()
    lease = take(store)
    watch = leases.LeaseWatch(store, "e", clock)
    for _ in range(5):
        assert watch.acquire(30) is None
        lease.beat()
        clock.now += 100  # longer than the ttl, but every look sees another beat
    assert watch.beats_seen == 5
    assert watch.acquire(30) is None  # sees the last beat only now
    clock.now += 29.9
    assert not watch.may_take_over(30)
    clock.now += 0.2
    assert watch.may_take_over(30)
    taken = watch.acquire(30)
    assert taken is not None
    assert (taken.generation, taken.held(), lease.held()) == (2, True, False)
    # The new holder has its ttl from the first look at it, however long the old one was silent.
    assert watch.acquire(30) is None


def test_a_holder_that_never_beat_is_taken_over_too(store, elsewhere):
    take(store)
    clock = Clock()
    watch = leases.LeaseWatch(store, "e", clock)
    assert watch.acquire(30) is None
    clock.now += 31
    assert watch.acquire(30) is not None


@folders_only
def test_the_old_holders_beats_do_not_count_for_the_new_one(store, elsewhere):
    clock = Clock()
    old = take(store)
    watch = leases.LeaseWatch(store, "e", clock)
    watch.acquire(30)
    clock.now += 31
    new = watch.acquire(30)
    assert new is not None
    watch.acquire(30)
    clock.now += 31
    old.beat()  # it woke up and knows nothing yet
    assert watch.acquire(30) is not None
    old.release()  # nor may it release what is not its own
    assert leases.acquire(store, "e", 30) is None


@folders_only
@pytest.mark.parametrize("step_s", [-3600, 3600])
def test_the_wall_clock_stepping_an_hour_changes_nothing(store, elsewhere, monkeypatch, step_s):
    clock = Clock()
    wall = time.time
    lease = take(store)
    watch = leases.LeaseWatch(store, "e", clock)
    assert watch.acquire(30) is None
    monkeypatch.setattr(time, "time", lambda: wall() + step_s)
    monkeypatch.setattr(leases, "utc_now", lambda: "1999-12-31T23:00:00.000000Z")
    clock.now += 29
    assert watch.acquire(30) is None
    lease.beat()
    clock.now += 29
    assert watch.acquire(30) is None
    clock.now += 31
    assert watch.acquire(30) is not None


def test_of_many_processes_one_takes_each_lease(store, fewer):
    names = [f"e{i}" for i in range(fewer(15))]
    taken = race(4, lambda i: [leases.acquire(store, name, 30) is not None for name in names])
    assert [sum(one) for one in zip(*taken, strict=True)] == [1] * len(names)


def test_of_many_processes_one_takes_over(store, fewer):
    names = [f"e{i}" for i in range(fewer(10))]
    kill_after(lambda: [take(store, name) for name in names])
    taken = race(4, lambda i: [(lease := leases.acquire(store, name, 30)) and lease.generation for name in names])
    assert [sorted(filter(None, one)) for one in zip(*taken, strict=True)] == [[2]] * len(names)


def test_a_killed_holder_is_taken_over_at_once(store):
    kill_after(lambda: take(store))
    assert take(store).generation == 2


def test_a_killed_holder_that_nobody_has_reaped_is_dead_too(store):
    def hold(tell, hear):
        tell(take(store).generation)
        hear()

    with Child(hold) as child:
        assert child.told() == 1
        assert leases.acquire(store, "e", 30) is None
        child.signal(signal.SIGKILL)
        while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
            time.sleep(0.01)
        assert take(store).generation == 2


@folders_only
def test_a_later_process_with_the_holders_number_is_not_the_holder(store):
    mine = process.this_process()
    create_record(store, "leases/e/1.json", {"process": {**mine, "started": mine["started"] - 1}, "time": ""})
    assert take(store).generation == 2


def test_a_process_of_another_machine_or_container_is_never_known_dead():
    gone = {**process.this_process(), "pid": kill_after(lambda: None)}
    assert process.known_dead(gone)
    assert not process.known_dead({**gone, "machine": "another boot/pid:[1]"})
    assert not process.known_dead({**gone, "machine": None})
    assert not process.known_dead(process.this_process())


def test_the_holder_shows_how_far_it_is(store):
    assert leases.holder(store, "e") is None
    lease = take(store)
    assert leases.holder(store, "e").beat == 0
    lease.beat({"task": "t", "done": 3})
    lease.beat()
    found = leases.holder(store, "e")
    assert (found.generation, found.beat, found.progress) == (1, 2, {"task": "t", "done": 3})
    assert process.same_process(found.process, process.this_process())


def test_keep_beats_with_the_progress_and_releases(store):
    lease = take(store, ttl_s=0.2)
    with lease.keep():
        lease.progress = {"done": 7}
        watch = leases.LeaseWatch(store, "e")
        while watch.beats_seen < 3:
            assert not watch.may_take_over(30)
        assert leases.holder(store, "e").progress == {"done": 7}
    assert leases.acquire(store, "e", 30) is not None


def test_keep_releases_when_the_work_fails(store):
    with pytest.raises(RuntimeError), take(store).keep():
        raise RuntimeError
    assert take(store).generation == 2


def test_a_release_that_cannot_be_written_hides_no_failure(tmp_path):
    store = LocalStore(tmp_path)
    lease = take(store)
    (tmp_path / "leases" / "e" / "1.json").rename(tmp_path / "kept")
    (tmp_path / "leases" / "e").rmdir()
    (tmp_path / "leases" / "e").write_text("in the way")
    with pytest.raises(StoreError):
        lease.release()
    with pytest.raises(RuntimeError, match="the work's own"), lease.keep():
        raise RuntimeError("the work's own")


def test_a_beat_that_cannot_be_written_is_an_error_and_the_thread_goes_on(tmp_path):
    store = LocalStore(tmp_path)
    lease = take(store)
    in_the_way = tmp_path / "leases" / "e" / "1.beat"
    in_the_way.mkdir()
    with pytest.raises(StoreError):
        lease.beat()
    with lease.keep(interval_s=0.01):
        time.sleep(0.05)
        in_the_way.rmdir()
        deadline = time.monotonic() + 10
        while not in_the_way.is_file():
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_stopped_holder_loses_the_lease_and_knows_it_when_it_wakes(tmp_path):
    store = LocalStore(tmp_path)
    ttl_s = 1.5

    def hold(tell, hear):
        lease = take(store, ttl_s=ttl_s)
        with lease.keep(interval_s=0.1):
            tell(lease.held())
            hear()
            tell(lease.held())

    with Child(hold) as child:
        assert child.told() is True
        watch = leases.LeaseWatch(store, "e")
        lives_until = time.monotonic() + 1.2 * ttl_s
        while time.monotonic() < lives_until:
            assert watch.acquire(ttl_s) is None
            time.sleep(0.02)
        child.signal(signal.SIGSTOP)
        stopped = time.monotonic()
        while (taken := watch.acquire(ttl_s)) is None:
            time.sleep(0.02)
        assert ttl_s / 2 < time.monotonic() - stopped < 20
        child.signal(signal.SIGCONT)
        child.say("awake?")
        assert child.told() is False
        assert taken.held()
