"""The worker killed, stopped, told to leave, out of disk: one commit an attempt, nothing asked twice, nothing lost."""

import os
import shutil
import signal
import time
from contextlib import suppress

import pytest
from fault_tools import WORDS, Place, forked
from machine import small_disk

from eval_platform.store import commits, layout, leases, read_record, tries
from eval_platform.worker import EXIT_DONE, EXIT_FAILED, EXIT_TRY_AGAIN, FLUSH_RESPONSES

pytestmark = pytest.mark.slow

PAUSE = 70  # of 80 requests: one segment of 64 is journaled, 6 answers are in hand
DEAD = -signal.SIGKILL


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The same checkpoint and tasks evaluated with no fault: what every other run must come to."""
    place = Place(tmp_path_factory.mktemp("undisturbed"))
    place.write_task("sums")
    place.write_task("words", 6, **WORDS)
    place.sync()
    place.checkpoint()
    with forked(place):
        assert [o.status for o in place.drive(place.arrive())] == ["published", "published"]
    return place


@pytest.fixture
def place(tmp_path, undisturbed):
    """A root with the tasks synced and one checkpoint arrived, nothing evaluated; workers are forked."""
    for name in ("tasks", "checkpoints"):
        shutil.copytree(undisturbed.folder / name, tmp_path / name)
    one = Place(tmp_path)
    one.sync()
    with forked(one):
        yield one


def result(place, task="sums"):
    """(scores, samples without their log-likelihoods, log-likelihoods) of the task's one evaluation."""
    scores = place.sql(
        f"select metric, subset, value, standard_error, n from scores where task = '{task}' order by all"
    )
    (key,) = [
        layout.evaluation(row["evaluation_id"], 1)
        for row in place.sql(f"select evaluation_id from evaluations where task = '{task}'")
    ]
    samples = commits.read_samples(place.store, read_record(place.store, key)).to_pylist()
    values = [choice.pop("log_likelihood") for row in samples for choice in row["choices"] or ()]
    return scores, samples, values


def must_be_as_undisturbed(place, undisturbed, *tasks):
    """Equal in all but the last bits of log-likelihoods: after a crash other requests share a batch."""
    for task in tasks or ("sums", "words"):
        scores, samples, values = result(place, task)
        wanted_scores, wanted_samples, wanted_values = result(undisturbed, task)
        assert scores == wanted_scores != []
        assert samples == wanted_samples != []
        assert values == pytest.approx(wanted_values, abs=1e-4)
    assert place.problems() == []


def journal_of_the_killed(place):
    found = place.journaled()
    assert len(found) == len(set(found)) == FLUSH_RESPONSES
    return set(found)


def test_kill_9_in_mid_task(place, undisturbed):
    arrival = place.arrive()
    place.command("pause_answer", PAUSE)
    first = place.launch(arrival)
    assert place.paused() == first.process.pid
    journaled = journal_of_the_killed(place)
    asked = place.asked()
    first.process.kill()
    assert first.process.wait() == DEAD
    place.revoke("pause_answer")

    outcomes = place.drive(arrival)

    assert [(o.task, o.status, o.linked) for o in outcomes] == [
        ("sums", "published", False),
        ("words", "published", False),
    ]
    again = place.asked()[len(asked) :]
    assert journaled.isdisjoint(again)
    assert set(asked) - journaled <= set(again)
    assert len(again) == len(set(again)) == 80 - 64 + 6
    assert sorted(place.commits()) == sorted(layout.evaluation(o.record["evaluation_id"], 1) for o in outcomes)
    sums = outcomes[0].record["evaluation_id"]
    told = tries.history(place.store, tries.evaluation_subject(sums, 1))
    assert [t.outcome for t in told] == [None, "committed"]
    must_be_as_undisturbed(place, undisturbed)


def test_the_third_kill_is_the_last_until_a_person_says_retry(place, undisturbed):
    arrival = place.arrive()
    for kill in range(3):
        place.command("pause_answer", 10 if kill else PAUSE)
        handle = place.launch(arrival)
        place.paused()
        handle.process.kill()
        handle.process.wait()
    place.revoke("pause_answer")

    outcomes = {o.task: o for o in place.drive(arrival)}

    assert outcomes["words"].status == "published"  # one task's failure never takes the others with it
    assert outcomes["sums"].status == "failed"
    assert "killed" in outcomes["sums"].reasons[0]
    assert "eval-platform retry" in outcomes["sums"].reasons[0]
    (row,) = place.sql("select key, task, failure_class, evaluation_id from failed")
    assert (row["key"], row["task"], row["failure_class"]) == (arrival.key, "sums", "infrastructure")

    subject = tries.evaluation_subject(row["evaluation_id"], 1)
    assert len(tries.retry(place.store, subject, "ann", "the machine is mended")) == 3
    before = len(place.asked())
    journaled = set(place.journaled())
    assert [(o.task, o.status, o.linked) for o in place.drive(arrival)] == [
        ("sums", "published", False),
        ("words", "published", True),
    ]
    assert len(place.asked()) - before == 80 + 6 - len(journaled)
    assert journaled.isdisjoint(place.asked()[before:])
    assert place.sql("select * from failed") == []
    must_be_as_undisturbed(place, undisturbed)


def test_killed_between_samples_and_commit_another_takes_over(place, undisturbed):
    arrival = place.arrive()
    place.command("pause_commit")
    first = place.launch(arrival)
    place.paused()
    first.process.kill()
    first.process.wait()
    place.revoke("pause_commit")
    assert len(list(place.store.list("samples/"))) == 1
    assert place.commits() == []
    asked = place.asked()

    outcomes = place.drive(arrival, state="another machine", tasks=["sums"])

    assert [(o.task, o.status) for o in outcomes] == [("sums", "published")]
    assert place.asked() == asked  # all of it was journaled
    assert place.loads() == 1  # so that not even the model was loaded again
    assert len(place.commits()) == 1
    record = outcomes[0].record
    assert commits.read_samples(place.store, record).num_rows == 40
    must_be_as_undisturbed(place, undisturbed, "sums")


def test_a_worker_stopped_past_its_lease_and_woken(place, undisturbed):
    place.lease_seconds = 1.0
    arrival = place.arrive()
    place.command("pause_answer", PAUSE)
    sleeper = place.launch(arrival, state="sleeper")
    place.paused()
    journaled = journal_of_the_killed(place)
    os.kill(sleeper.process.pid, signal.SIGSTOP)
    place.revoke("pause_answer")
    asked = len(place.asked())

    statuses = [o.status for o in place.drive(arrival, state="awake", tasks=["sums"])]
    assert statuses == ["published"]
    (committed,) = place.commits()
    before = place.store.read(committed)
    assert journaled.isdisjoint(place.asked()[asked:])

    os.kill(sleeper.process.pid, signal.SIGCONT)
    assert sleeper.process.wait() == EXIT_DONE
    messages = [m for told in sleeper.messages() for m in told if m.get("task") == "sums"]
    assert messages[-1]["type"] == "linked"
    assert place.store.read(committed) == before
    told = tries.history(place.store, tries.evaluation_subject(messages[-1]["evaluation_id"], 1))
    assert [t.outcome for t in told] == ["lost", "committed"]
    assert [o.status for o in place.drive(arrival, state="sleeper")] == ["published", "published"]
    must_be_as_undisturbed(place, undisturbed)


def test_a_worker_that_beats_is_waited_for_not_taken_over(place):
    place.lease_seconds = 1.0
    arrival = place.arrive()
    place.command("pause_answer", PAUSE)
    first = place.launch(arrival, state="first")
    place.paused()  # its lease thread goes on beating
    asked = len(place.asked())

    outcomes = place.drive(arrival, state="second", tasks=["sums"])

    assert [(o.task, o.status) for o in outcomes] == [("sums", "waiting")]
    assert len(place.asked()) == asked
    place.revoke("pause_answer")
    assert first.process.wait() == EXIT_DONE
    assert [(o.status, o.linked) for o in place.drive(arrival, state="second")] == [("published", True)] * 2
    assert len(place.asked()) == len(set(place.asked())) == 86


def test_sigterm_leaves_within_seconds_and_keeps_what_was_answered(place, undisturbed):
    arrival = place.arrive()
    place.command("pause_answer", PAUSE)
    first = place.launch(arrival)
    place.paused()
    started = time.monotonic()

    first.process.terminate()

    assert first.process.wait(10) == EXIT_TRY_AGAIN
    assert time.monotonic() - started < 10
    place.revoke("pause_answer")
    journaled = place.journaled()
    assert len(journaled) == PAUSE  # those in hand too
    (held,) = [entry.key.split("/")[1] for entry in place.store.list("leases/") if entry.key.endswith("/1.json")]
    assert leases.holder(place.store, held) is None  # the next need not wait
    told = tries.history(place.store, tries.evaluation_subject(held, 1))
    assert [t.outcome for t in told] == ["interrupted"]
    asked = len(place.asked())
    assert [o.status for o in place.drive(arrival)] == ["published", "published"]
    assert set(journaled).isdisjoint(place.asked()[asked:])
    assert len(place.asked()) - asked == 10 + 6
    must_be_as_undisturbed(place, undisturbed)


def test_killed_at_each_of_its_writes(place, undisturbed, tmp_path_factory):
    """Wherever the worker dies, what it leaves is whole, and the next worker completes it without asking again."""
    place.write_task("short", 3)
    (place.tasks / "sums.yaml").unlink()
    (place.tasks / "words.yaml").unlink()
    place.config().lock_path.unlink()
    place.sync()
    fresh = place.folder / "fresh"
    shutil.copytree(place.results, fresh)
    died, n = 0, 1
    results = []
    while died == n - 1:
        shutil.rmtree(place.results)
        shutil.copytree(fresh, place.results)
        (place.control / "asked.jsonl").unlink(missing_ok=True)
        arrival = place.arrive()
        place.command("die_at_write", n)
        died += place.launch(arrival).process.wait() == DEAD
        place.revoke("die_at_write")
        journaled, asked = place.journaled(), len(place.asked())

        assert place.launch(arrival).process.wait() == EXIT_DONE, f"killed at write {n}"

        assert set(journaled).isdisjoint(place.asked()[asked:]), f"killed at write {n}"
        (committed,) = place.commits()
        record = read_record(place.store, committed)
        samples = commits.read_samples(place.store, record)
        results.append((committed, record["answers_digest"], record["scores"], samples.to_pylist()))
        n += 1
    assert n > 15  # it was killed at every write that an undisturbed worker makes
    assert all(result == results[0] for result in results)
    assert [o.status for o in place.drive(arrival)] == ["published"]
    assert place.problems() == []


@pytest.fixture
def small_root(place, tmp_path):
    """The place's results root on a file system of 2 MB."""
    with small_disk(tmp_path / "disk", "2m") as mount:
        shutil.copytree(place.results, mount / "results")
        place.use(mount / "results")
        yield mount


def fill(file):
    """Write until the disk is full."""
    descriptor = os.open(file, os.O_CREAT | os.O_WRONLY)
    with suppress(OSError):
        while True:
            os.write(descriptor, b"0" * 4096)
    os.close(descriptor)
    free = os.statvfs(file).f_bavail
    assert free == 0


def test_the_disk_of_the_results_root_fills_up(place, small_root, undisturbed):
    place.lease_seconds = 1.0  # a lease cannot be let go on a full disk, so it is waited for
    arrival = place.arrive()
    words = place.drive(arrival, tasks=["words"])
    assert [o.status for o in words] == ["published"]
    committed = {key: place.store.read(key) for key in place.commits()}
    place.command("pause_answer", PAUSE)
    worker = place.launch(arrival)
    place.paused()
    journaled = set(place.journaled())
    filler = small_root / "filler"
    fill(filler)
    place.revoke("pause_answer")

    assert worker.process.wait() in (EXIT_TRY_AGAIN, EXIT_FAILED)
    said = [m for told in worker.messages() for m in told if m["type"] == "failed"]
    assert {(m["task"], m["class"]) for m in said} == {("sums", "infrastructure")}
    assert "No space left on device" in said[0]["reason"]
    assert str(place.results) in said[0]["reason"]
    assert "remedy: free space" in said[0]["reason"]
    assert {m["task"] for told in worker.messages() for m in told if m["type"] == "linked"} == {"words"}

    asked = len(place.asked())
    filler.unlink()
    assert {key: place.store.read(key) for key in place.commits()} == committed
    assert [o.status for o in place.drive(arrival)] == ["published", "published"]
    assert journaled.isdisjoint(place.asked()[asked:])
    must_be_as_undisturbed(place, undisturbed)
