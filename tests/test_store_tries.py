"""Tries: what may pass by itself is tried three times, what will not once."""

import pytest
from store_processes import Child, folders_only, kill_after, race

from eval_platform.errors import EvalPlatformError
from eval_platform.store import leases, log, process, tries
from eval_platform.values import Arrival, Failure

pytest_plugins = ["store_roots"]

EVALUATION = tries.evaluation_subject("e" * 32, 1)
ARRIVAL = tries.arrival_subject(Arrival("runs/a", 2, "f", "/x", "r"))
INFRASTRUCTURE = Failure("infrastructure", "disk full")


def fail(store, subject, failure=INFRASTRUCTURE, detail=""):
    tries.start(store, subject).end("failed", failure, detail=detail)


@folders_only
@pytest.mark.parametrize("subject", [EVALUATION, ARRIVAL])
def test_three_infrastructure_failures_are_final(store, subject):
    for _ in range(3):
        assert tries.state(store, subject) is None
        fail(store, subject)
    failure = tries.state(store, subject)
    assert failure is not None
    assert failure.class_ == "infrastructure"
    assert "3 tries" in failure.reason
    assert "disk full" in failure.reason


@folders_only
def test_what_hinders_all_that_were_begun_together_counts_once(store):
    for together in ("first", "second", "third"):
        assert tries.state(store, ARRIVAL) is None
        for begun in [tries.start(store, ARRIVAL, together=together) for _ in range(4)]:
            begun.end("failed", INFRASTRUCTURE)
    failure = tries.state(store, ARRIVAL)
    assert failure is not None
    assert "3 tries" in failure.reason
    assert len(tries.retry(store, ARRIVAL, "me", "mended")) == 12
    assert tries.state(store, ARRIVAL) is None


@folders_only
@pytest.mark.parametrize("class_", ["deterministic", "gone"])
def test_what_will_not_pass_by_itself_is_final_at_once(store, class_):
    fail(store, ARRIVAL)
    fail(store, ARRIVAL, Failure(class_, "why"))
    fail(store, ARRIVAL)
    assert tries.state(store, ARRIVAL) == Failure(class_, "why")


def test_subjects_do_not_share_failures(store):
    # The arrival "runs/a/2" 1 lies below the folder of the arrival "runs/a" 2.
    below = tries.arrival_subject(Arrival("runs/a/2", 1, "f", "/x", "r"))
    fail(store, below, Failure("gone", "deleted"))
    assert tries.state(store, ARRIVAL) is None
    fail(store, EVALUATION, Failure("deterministic", "why"))
    assert tries.state(store, tries.evaluation_subject("e" * 32, 2)) is None


@folders_only
def test_lost_interrupted_and_what_came_before_a_success_do_not_count(store):
    for outcome in ["lost", "interrupted"] * 3:
        tries.start(store, EVALUATION).end(outcome)
    fail(store, EVALUATION)
    fail(store, EVALUATION)
    assert tries.state(store, EVALUATION) is None
    tries.start(store, EVALUATION).end("done")
    fail(store, EVALUATION)
    assert tries.state(store, EVALUATION) is None


@pytest.mark.parametrize("subject", [EVALUATION, ARRIVAL])
def test_three_kills_in_a_row_are_final(store, subject):
    def work() -> None:
        assert leases.acquire(store, subject[1], 30)
        tries.start(store, subject)

    for _ in range(3):
        assert tries.state(store, subject) is None
        pid = kill_after(work)
    failure = tries.state(store, subject)
    assert failure is not None
    assert failure.class_ == "infrastructure"
    assert f"process {pid} on " in failure.reason


def test_a_try_at_work_does_not_count_and_one_whose_lease_was_taken_does(store, monkeypatch):
    fail(store, EVALUATION)
    fail(store, EVALUATION)

    def work(tell, hear):
        tell(leases.acquire(store, EVALUATION[1], 30) is not None)
        tries.start(store, EVALUATION)
        tell("started")
        hear()

    with Child(work) as child:
        assert [child.told(), child.told()] == [True, "started"]
        assert tries.state(store, EVALUATION) is None
        monkeypatch.setattr(process, "_machine", lambda: "another machine")  # where nobody here can be known dead
        assert tries.state(store, EVALUATION) is None
        watch = leases.LeaseWatch(store, EVALUATION[1])
        assert watch.acquire(0) is None  # the first look
        assert watch.acquire(0) is not None
        failure = tries.state(store, EVALUATION)
        assert failure is not None
        assert f"process {child.pid} on " in failure.reason


@folders_only
def test_a_retry_forgives_what_was_and_not_what_comes(store):
    for _ in range(3):
        fail(store, EVALUATION)
    forgiven = tries.retry(store, EVALUATION, "ada", "disk replaced")
    assert forgiven == [told.try_id for told in tries.history(store, EVALUATION)]
    for _ in range(3):
        assert tries.state(store, EVALUATION) is None
        fail(store, EVALUATION)
    assert tries.state(store, EVALUATION) is not None
    assert len(tries.retry(store, EVALUATION, "ada", "again")) == 3
    assert tries.state(store, EVALUATION) is None
    assert [told.forgiven for told in tries.history(store, EVALUATION)] == [True] * 6
    with pytest.raises(EvalPlatformError, match=r"attempt 1 of evaluation e.* has no failed try"):
        tries.retry(store, EVALUATION, "ada", "once more")


@folders_only
def test_a_deleted_checkpoint_that_came_back_can_be_retried(store):
    fail(store, ARRIVAL, Failure("gone", "deleted"))
    tries.retry(store, ARRIVAL, "ada", "restored from backup")
    assert tries.state(store, ARRIVAL) is None


def test_history_tells_how_each_try_ended(store):
    fields = {"task": "t", "checkpoint_id": "c"}
    first = tries.start(store, EVALUATION, evaluation=fields)
    fail(store, EVALUATION, detail="x" * 50_000 + "the last line")
    one, two = tries.history(store, EVALUATION)
    assert (one.k, one.try_id, one.outcome, one.evaluation) == (1, first.try_id, None, fields)
    assert process.same_process(one.process, process.this_process())
    assert (two.outcome, two.failure) == ("failed", INFRASTRUCTURE)
    assert len(two.detail) < 20_000
    assert two.detail.endswith("the last line")


def test_a_try_ends_once_and_says_why_it_failed(store):
    one = tries.start(store, EVALUATION)
    with pytest.raises(ValueError, match="failed"):
        one.end("failed")
    with pytest.raises(ValueError, match="committed"):
        one.end("committed", INFRASTRUCTURE)
    one.end("committed")
    with pytest.raises(ValueError, match="ended already"):
        one.end("lost")


def test_processes_that_start_at_once_get_numbers_of_their_own(store, fewer):
    each = fewer(5)
    started = race(4, lambda i: [tries.start(store, EVALUATION).k for _ in range(each)])
    assert sorted(k for one in started for k in one) == list(range(1, 4 * each + 1))


def test_starts_failures_and_retries_are_announced(store):
    fail(store, EVALUATION, Failure("deterministic", "why"))
    tries.retry(store, EVALUATION, "ada", "mended")
    tries.start(store, ARRIVAL)
    entries = log.read(store, log.dates(store))
    told = [(e["kind"], e.get("evaluation_id") or e["key"], e.get("attempt") or e["n"]) for e in entries]
    of_evaluation = ("e" * 32, 1)
    assert sorted(told) == [
        ("asked", *of_evaluation),
        ("try", *of_evaluation),  # its start
        ("try", *of_evaluation),  # its failure
        ("try", "runs/a", 2),
    ]
