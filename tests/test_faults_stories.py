"""A checkpoint deleted, uploaded again or asked otherwise while it waits or runs; and clocks that step."""

import os
import shutil
from datetime import UTC, datetime, timedelta

import pytest
from fault_tools import Place, forked
from tiny_models import make_checkpoint

from eval_platform import checkpoints, quality, warehouse
from eval_platform.errors import EvalPlatformError
from eval_platform.store import arrivals, commits, log, records, tries
from eval_platform.warehouse import catalog as catalog_module
from eval_platform.worker import EXIT_DONE, EXIT_TRY_AGAIN

pytestmark = pytest.mark.slow

NAME = "a/step_1"
KEY = f"runs/{NAME}"
WEIGHTS = "model.safetensors"
PAUSE = 70  # of 80 requests: one segment of 64 is journaled


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Checkpoints A and B: same architecture and tokenizer, other weights."""
    folder = tmp_path_factory.mktemp("models")
    return {letter: make_checkpoint(folder / letter, seed=seed) for seed, letter in enumerate("AB")}


@pytest.fixture
def place(tmp_path, models):
    """A root with one task of 80 requests and checkpoint A under NAME; workers are forked."""
    one = Place(tmp_path)
    one.write_task("sums")
    one.sync()
    shutil.copytree(models["A"], one.checkpoints / NAME)
    with forked(one):
        yield one


def overwrite(place, model):
    """As a trainer that writes into the same files."""
    target = place.checkpoints / NAME / WEIGHTS
    inode = target.stat().st_ino
    with target.open("r+b") as file:
        file.write((model / WEIGHTS).read_bytes())
    assert target.stat().st_ino == inode


def replace(place, model):
    """As a trainer that writes aside and renames."""
    aside = place.checkpoints / NAME / "new.tmp"
    shutil.copyfile(model / WEIGHTS, aside)
    os.replace(aside, place.checkpoints / NAME / WEIGHTS)


def statuses(place, arrival, **keys):
    return [o.status for o in place.drive(arrival, **keys)]


def log_likelihoods(place, row):
    record = commits.read(place.store, row["evaluation_id"], row["attempt"])
    assert record is not None
    samples = commits.read_samples(place.store, record).to_pylist()
    return [choice["log_likelihood"] for sample in samples for choice in sample["choices"]]


def test_held_for_a_planted_nan_then_rerun(place):
    place.command("plant_nan")
    arrival = place.arrive()
    (held,) = place.drive(arrival)
    assert held.status == "held"
    assert "NaN" in " ".join(held.reasons)
    assert place.board() == []
    evaluation_id = held.record["evaluation_id"]
    with pytest.raises(EvalPlatformError, match="cannot be released"):
        quality.release(place.store, evaluation_id, 1, "ann", "I want it")
    assert statuses(place, arrival) == ["held"]  # asking again answers from the store
    assert len(place.asked()) == 80

    place.revoke("plant_nan")
    assert quality.rerun(place.store, evaluation_id, "ann", "the engine is mended") == 2
    assert statuses(place, arrival) == ["published"]

    assert sorted(place.asked()[80:]) == sorted(place.asked()[:80])  # a rerun truly asks again
    rows = place.sql("select attempt, status, primary_value from evaluations order by attempt")
    assert [(row["attempt"], row["status"]) for row in rows] == [(1, "held"), (2, "published")]
    assert rows[0]["primary_value"] is None
    assert [(row[0], row[-1]) for row in place.board()] == [(KEY, 2)]


def test_overwritten_in_place_while_its_first_evaluation_runs(place, models):
    clean = place.folder / "clean"
    shutil.copytree(models["A"], place.checkpoints / "b" / "step_1")
    a = place.arrive()
    place.command("pause_answer", PAUSE)
    worker = place.launch(a)
    place.paused()
    overwrite(place, models["B"])
    place.revoke("pause_answer")

    assert worker.process.wait() == EXIT_TRY_AGAIN
    last = [m for told in worker.messages() for m in told if m["type"] == "failed"]
    assert [(m["task"], m["class"]) for m in last] == [(None, "infrastructure")]
    assert f"{WEIGHTS} was overwritten" in last[0]["reason"]
    assert place.commits() == []
    assert len(place.journaled()) == 64  # nothing that was answered after the overwriting

    b = place.arrive()
    assert (b.key, b.n) == (a.key, 2)
    assert statuses(place, b) == ["published"]
    overwrite(place, models["A"])  # and back again: the journal of the dropped try may be read now
    assert statuses(place, place.arrive()) == ["published"]
    rows = place.sql(
        "select a.n, e.* from arrivals a join evaluations e using (checkpoint_id) where a.key = '" + KEY + "'"
    )
    assert sorted((row["n"], row["status"]) for row in rows) == [(1, "published"), (2, "published"), (3, "published")]

    undisturbed = Place(clean)
    undisturbed.write_task("sums")
    undisturbed.sync()
    for letter, n in (("A", 3), ("B", 2)):
        shutil.copytree(models[letter], undisturbed.checkpoints / letter)
        (wanted,) = undisturbed.drive(undisturbed.arrive(letter))
        (row,) = [row for row in rows if row["n"] == n]
        assert row["evaluation_id"] == wanted.record["evaluation_id"]
        assert log_likelihoods(place, row) == pytest.approx(log_likelihoods(undisturbed, row), abs=1e-4)


def test_replaced_while_its_first_evaluation_runs(place, models):
    a = place.arrive()
    place.command("pause_answer", PAUSE)
    worker = place.launch(a)
    place.paused()
    replace(place, models["B"])
    b = place.arrive()
    assert (b.key, b.n) == (a.key, 2)
    place.revoke("pause_answer")

    assert worker.process.wait() == EXIT_DONE  # the old content was answered whole
    assert statuses(place, b) == ["published"]
    rows = place.sql("""select a.n, a.newest, e.evaluation_id, e.attempt, e.arrival
        from arrivals a join evaluations e using (checkpoint_id) order by a.n""")
    assert [(row["n"], row["newest"], row["arrival"]) for row in rows] == [(1, False, 1), (2, True, 2)]
    ((key, _, _, _, evaluation_id, _),) = place.board()
    assert (key, evaluation_id) == (KEY, rows[1]["evaluation_id"])


def test_templates_edited_then_only_the_scorer(place):
    arrival = place.arrive()
    assert statuses(place, arrival) == ["published"]
    place.write_task("sums", doc_to_text="Now say: {{question}}\nAnswer:")
    place.sync()
    assert statuses(place, arrival) == ["published"]
    asked = place.asked()
    assert len(asked) == len(set(asked)) == 160
    rows = place.sql("select stale, origin from evaluations order by finished_at")
    assert rows == [{"stale": True, "origin": "asked"}, {"stale": False, "origin": "asked"}]
    assert len(place.board()) == 1

    place.write_task(
        "sums",
        doc_to_text="Now say: {{question}}\nAnswer:",
        metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
        primary_metric="acc_norm",
    )
    place.sync()
    assert statuses(place, arrival) == ["published"]

    assert place.asked() == asked
    assert place.loads() == 2
    rows = place.sql("select stale, origin, ask_id, answers_id from evaluations order by finished_at")
    assert [(row["stale"], row["origin"]) for row in rows] == [(True, "asked"), (True, "asked"), (False, "rescored")]
    assert rows[1]["answers_id"] == rows[2]["answers_id"] != rows[0]["answers_id"]
    assert [row["metric"] for row in place.sql("select metric from leaderboard")] == ["acc_norm"]


def test_each_of_two_evaluations_that_ask_the_same_is_asked_again_when_it_is_rerun(place):
    """Their attempts share a journal: the second rerun is not given the answers of the first."""
    arrival = place.arrive()
    scorings = ({}, {"metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]})
    evaluations = []
    for keys in scorings:
        place.write_task("sums", 4, **keys)
        place.sync()
        (outcome,) = place.drive(arrival)
        evaluations.append(outcome.record["evaluation_id"])
    assert len(set(evaluations)) == 2
    assert len(place.asked()) == 8

    for evaluation_id, keys in zip(evaluations, scorings, strict=True):
        before = place.asked()
        assert quality.rerun(place.store, evaluation_id, "ann", "to see") == 2
        place.write_task("sums", 4, **keys)
        place.sync()
        assert statuses(place, arrival) == ["published"]
        assert sorted(place.asked()[len(before) :]) == sorted(before[:8])


def test_a_tasks_chat_edited_asks_no_base_model_again(place):
    arrival = place.arrive()
    for chat, stale in ((None, []), ({"system_prompt": "Be brief."}, [True]), ({"shots_as_turns": False}, [True] * 2)):
        place.write_task("sums", **({} if chat is None else {"chat": chat}))
        place.sync()
        assert statuses(place, arrival) == ["published"]
        rows = place.sql("select stale, origin, answers_id from evaluations order by finished_at")
        assert [row["stale"] for row in rows] == [*stale, False]
        assert {row["origin"] for row in rows[1:]} <= {"rescored"}
        assert len({row["answers_id"] for row in rows}) == 1
    assert len(place.asked()) == 80
    assert place.loads() == 1


def test_weights_a_b_a_under_one_name(place, models):
    first = place.arrive()
    assert statuses(place, first) == ["published"]
    replace(place, models["B"])
    assert statuses(place, place.arrive()) == ["published"]
    asked = place.asked()
    assert len(asked) == 160
    replace(place, models["A"])
    third = place.arrive()

    outcomes = place.drive(third)

    assert [(o.status, o.linked) for o in outcomes] == [("published", True)]
    assert place.asked() == asked
    rows = place.sql("select n, checkpoint_id, newest from arrivals order by n")
    assert [(row["n"], row["newest"]) for row in rows] == [(1, False), (2, False), (3, True)]
    a, b, again = (row["checkpoint_id"] for row in rows)
    assert a == again != b
    assert len(place.commits()) == 2
    ((_, _, _, _, evaluation_id, _),) = place.board()
    assert evaluation_id == outcomes[0].record["evaluation_id"]


@pytest.mark.parametrize("is_held", [True, False])
def test_deleted_while_queued(place, models, is_held):
    shutil.copytree(models["B"], place.checkpoints / "a" / "step_2")
    deleted, other = place.arrive(), place.arrive("a/step_2")
    config = place.config()
    if is_held:
        assert checkpoints.hold(deleted, config.cache_dir)
    shutil.rmtree(place.checkpoints / NAME)

    first = place.drive(deleted)

    assert statuses(place, other) == ["published"]
    if is_held:
        assert [o.status for o in first] == ["published"]
        assert {row[0] for row in place.board()} == {KEY, "runs/a/step_2"}
        assert not list((config.cache_dir / "held").iterdir())
        return
    assert [o.status for o in first] == ["failed"]
    assert "was deleted before it was evaluated" in first[0].reasons[0]
    (row,) = place.sql("select key, failure_class from failed")
    assert row == {"key": KEY, "failure_class": "gone"}
    told = tries.history(place.store, tries.arrival_subject(deleted))
    assert [t.outcome for t in told] == ["failed"]  # one try: nobody tried again
    failure = tries.state(place.store, tries.arrival_subject(deleted))
    assert failure is not None
    assert failure.class_ == "gone"
    assert len(place.asked()) == 80
    assert [row[0] for row in place.board()] == ["runs/a/step_2"]


def test_the_clock_steps_back_an_hour_over_midnight(place, models, monkeypatch):
    shift = timedelta(0)

    class Stepping(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) + shift

    for module in (records, log, catalog_module):
        monkeypatch.setattr(module, "datetime", Stepping)
    now = datetime.now(UTC)
    midnight = (now + timedelta(days=1)).replace(hour=0, minute=20, second=0, microsecond=0)
    shift = midnight - now
    first = place.arrive()
    assert statuses(place, first) == ["published"]
    assert len(place.board()) == 1

    shift -= timedelta(hours=1)
    replace(place, models["B"])
    second = place.arrive()
    assert second.n == 2
    assert second.arrived_at is not None
    assert first.arrived_at is not None
    assert second.arrived_at < first.arrived_at
    assert statuses(place, second) == ["published"]
    quality.retract(place.store, place.board()[0][4], 1, "ann", "to see it go")
    assert place.board() == []
    shift -= timedelta(hours=1)
    quality.release(place.store, place.sql("select evaluation_id from held")[0]["evaluation_id"], 1, "ann", "and back")

    assert len(log.dates(place.store)) == 2
    ((key, _, _, _, evaluation_id, _),) = place.board()
    newest = arrivals.newest(place.store, KEY)
    assert newest is not None
    assert newest.n == 2
    assert key == KEY
    (row,) = place.sql(
        f"select a.n from arrivals a join evaluations e using (checkpoint_id) where e.evaluation_id = '{evaluation_id}'"
    )
    assert row["n"] == 2
    tables = {
        table: f"select * from {table} order by all" for table in ("arrivals", "evaluations", "scores", "decisions")
    }
    seen = {table: place.sql(text) for table, text in tables.items()}
    assert [len(seen[table]) for table in ("arrivals", "evaluations", "decisions")] == [2, 2, 4]
    warehouse.rebuild(place.store, place.config().catalog_path)
    assert {table: place.sql(text) for table, text in tables.items()} == seen
    assert place.problems() == []
