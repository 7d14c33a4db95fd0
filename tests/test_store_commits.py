"""Commits: one result a slot, whoever crashed, slept or raced."""

import os
import signal

import pyarrow as pa
import pytest
from store_processes import Child, folders_only, kill_after, race

from eval_platform.errors import EvalPlatformError, SchemaError, StoreError
from eval_platform.store import commits, leases, log

pytest_plugins = ["store_roots"]

E = "e" * 32


def take(store, evaluation_id=E, ttl_s=30.0):
    lease = leases.acquire(store, evaluation_id, ttl_s)
    assert lease is not None
    return lease


def record(try_id, attempt=1, evaluation_id=E, answers_id="a" * 32):
    return {"evaluation_id": evaluation_id, "attempt": attempt, "answers_id": answers_id, "try": try_id, "scores": []}


def committed(store, try_id="t", **fields):
    evaluation = record(try_id, **fields)
    lease = take(store, evaluation["evaluation_id"])
    assert commits.commit(store, evaluation, lease)
    lease.release()


def test_a_commit_is_read_back_and_never_changed(store):
    lease = take(store)
    assert commits.read(store, E, 1) is None
    assert commits.commit(store, record("t"), lease)
    assert not commits.commit(store, record("u"), lease)
    assert commits.read(store, E, 1) == {"schema_version": 1, **record("t")}
    assert commits.attempts(store, E) == [1]
    assert commits.attempts(store, "f" * 32) == []


def test_only_the_holder_of_the_evaluations_own_lease_commits(store):
    lease = take(store)
    with pytest.raises(ValueError, match=r"\.1-2 does not commit"):
        commits.commit(store, record("t"), take(store, f"{E}.1-2"))
    lease.release()
    assert not commits.commit(store, record("t"), lease)
    assert commits.read(store, E, 1) is None
    assert list(store.list("answers/")) == []


@folders_only
def test_a_record_with_nan_is_refused(store):
    with pytest.raises(ValueError, match="JSON"):
        commits.commit(store, record("t") | {"seconds": float("nan")}, take(store))
    assert commits.read(store, E, 1) is None


def test_of_many_processes_that_all_believe_to_hold_the_lease_one_commits(store, fewer):
    """Each took the lease over and looked last when it held it: what decides is the file created once."""

    class AsleepSinceItLooked(leases.Lease):
        def held(self) -> bool:
            return True

    ids = [f"{i:032x}" for i in range(fewer(10))]

    def run(i: int) -> list[bool]:
        return [
            commits.commit(store, record(f"t{i}", evaluation_id=id_), AsleepSinceItLooked(store, id_, i + 1, 30))
            for id_ in ids
        ]

    won = race(4, run)
    for id_, wins in zip(ids, zip(*won, strict=True), strict=True):
        assert sum(wins) == 1
        assert commits.read(store, id_, 1)["try"] == f"t{wins.index(True)}"


def take_over_while_stopped(store, child):
    """The lease of a stopped child, as soon as it has been silent for its ttl."""
    os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    watch = leases.LeaseWatch(store, E)
    while (lease := watch.acquire(0.3)) is None:
        pass
    return lease


def test_a_worker_stopped_past_its_lease_commits_nothing_when_it_wakes(store):
    def work(tell, hear):
        lease = take(store, ttl_s=0.3)
        with lease.keep():
            os.kill(os.getpid(), signal.SIGSTOP)
            tell((lease.held(), commits.commit(store, record("sleeper"), lease)))

    with Child(work) as child:
        lease = take_over_while_stopped(store, child)
        child.signal(signal.SIGCONT)
        assert child.told() == (False, False)
        assert commits.commit(store, record("heir"), lease)
    assert commits.read(store, E, 1)["try"] == "heir"


def test_a_worker_stopped_between_its_last_look_and_the_commit_adopts(store, monkeypatch):
    write = log.write

    def work(tell, hear):
        def stop_then_write(*args, **fields):
            os.kill(os.getpid(), signal.SIGSTOP)
            return write(*args, **fields)

        monkeypatch.setattr(log, "write", stop_then_write)
        tell(commits.commit(store, record("sleeper"), take(store, ttl_s=0.3)))

    with Child(work) as child:
        lease = take_over_while_stopped(store, child)
        assert commits.commit(store, record("heir"), lease)
        child.signal(signal.SIGCONT)
        assert child.told() is False
    assert commits.read(store, E, 1)["try"] == "heir"
    assert commits.answered(store, "a" * 32) == [(E, 1)]


def test_killed_between_announcement_and_commit_leaves_a_look_too_many_and_another_takes_over(store, monkeypatch):
    write = log.write

    def work() -> None:
        def write_then_die(*args, **fields):
            write(*args, **fields)
            os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(log, "write", write_then_die)
        commits.commit(store, record("dead"), take(store))

    kill_after(work)
    assert [entry["kind"] for entry in log.read(store, log.dates(store))] == ["evaluation"]
    assert commits.read(store, E, 1) is None
    assert commits.answered(store, "a" * 32) == []
    committed(store, "heir")
    assert commits.answered(store, "a" * 32) == [(E, 1)]


def test_stored_answers_are_found_by_what_was_asked(store):
    committed(store, evaluation_id="e1", answers_id="a")
    committed(store, evaluation_id="e-2", answers_id="a")
    committed(store, evaluation_id="e3", answers_id="ab")
    assert commits.answered(store, "a") == [("e-2", 1), ("e1", 1)]
    assert commits.answered(store, "b") == []


@folders_only
def test_a_rerun_opens_the_next_slot_once_the_last_is_committed(store):
    assert commits.slot(store, E) == 1
    with pytest.raises(EvalPlatformError, match=r"attempt 1 of evaluation .* is open"):
        commits.open_rerun(store, E, "ada", "odd")
    committed(store)
    assert commits.slot(store, E) == 1
    assert commits.open_rerun(store, E, "ada", "odd") == 2
    assert commits.slot(store, E) == 2
    assert commits.attempts(store, E) == [1]
    with pytest.raises(EvalPlatformError, match=r"attempt 2 of evaluation .* is open"):
        commits.open_rerun(store, E, "ada", "odd")
    committed(store, attempt=2)
    assert commits.open_rerun(store, E, "ada", "still odd") == 3
    asked = [entry for entry in log.read(store, log.dates(store)) if entry["kind"] == "asked"]
    assert sorted((entry["action"], entry["attempt"]) for entry in asked) == [("rerun", 2), ("rerun", 3)]


@folders_only
def test_of_many_who_ask_for_a_rerun_one_opens_it(store):
    committed(store)

    def ask(i: int) -> int | None:
        try:
            return commits.open_rerun(store, E, f"person {i}", "odd")
        except EvalPlatformError:
            return None

    assert [attempt for attempt in race(4, ask) if attempt is not None] == [2]


def test_samples_are_read_back_as_committed_or_not_at_all(store):
    table = pa.table({"sample_id": ["s1", "s2"], "log_likelihood": [-0.5, float("nan")]})
    samples = commits.write_samples(store, E, "t", table)
    assert samples["key"] == f"samples/{E}/t.parquet"
    assert samples["rows"] == 2
    evaluation = record("t") | {"samples": samples}
    read = commits.read_samples(store, evaluation)
    assert read.schema == table.schema
    assert read["sample_id"].to_pylist() == ["s1", "s2"]
    with pytest.raises(StoreError, match="two writers"):
        commits.write_samples(store, E, "t", table)
    store.put(samples["key"], store.read(samples["key"])[:-1] + b"?")
    with pytest.raises(SchemaError, match=samples["key"]):
        commits.read_samples(store, evaluation)
    store.delete(samples["key"])
    with pytest.raises(StoreError, match=samples["key"]):
        commits.read_samples(store, evaluation)
