"""From a commit to a decision, and what people may do about it, on a real store and catalog."""

import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quality_cases import evaluate, failed, with_log_likelihood

from eval_platform import adopt, config, quality, tasks, warehouse
from eval_platform.errors import EvalPlatformError, SchemaError
from eval_platform.identity import content_id
from eval_platform.quality.gate import committed
from eval_platform.store import LocalStore, arrivals, commits, decisions, leases, open_root, tries
from eval_platform.values import Check, Checkpoint, Failure


class Platform:
    """A results root with one synced task, its catalog, and commits as a worker makes them."""

    def __init__(self, folder):
        self.store = LocalStore(folder / "results")
        self.catalog = folder / "catalog.duckdb"
        open_root(self.store)
        source = folder / "tasks"
        source.mkdir(parents=True)
        (source / "documents.jsonl").write_text(
            "".join(json.dumps({"question": f"q{n}", "answer": n % 3}) + "\n" for n in range(6))
        )
        said = {
            "task": "letters",
            "documents": {"file": "documents.jsonl"},
            "output_type": "multiple_choice",
            "doc_to_text": "question",
            "doc_to_target": "answer",
            "doc_to_choice": ["a", "b", "c"],
        }
        (source / "letters.yaml").write_text(yaml.safe_dump(said))
        selected = config.Tasks(folders=(str(source),), include=("letters",))
        report = tasks.sync_tasks(selected, self.store, folder / "lock.json")
        assert not report.errors
        self.task = report.lock.tasks["letters"]

    def commit(self, step=10, attempt=1, *, planted=None, skill=0.9, **fields):
        """Commit an evaluation of the checkpoint of `step`; returns its evaluation_id."""
        record, samples, _ = evaluate(seed=step, skill=skill)
        if planted is not None:
            samples = planted(samples)
        arrival, _ = arrivals.register(
            self.store, key=f"root/run/{step}", uri="", fingerprint=str(step), run="run", step=step, watcher="w"
        )
        checkpoint_id = content_id(["checkpoint", step])
        record |= {
            "evaluation_id": content_id(["evaluation", step]),
            "attempt": attempt,
            "try": f"try{step}-{attempt}",
            "checkpoint_id": checkpoint_id,
            "weights_id": content_id(["weights", step]),
            "answers_id": content_id(["answers", step]),
            "answers_digest": content_id(["digest", step, attempt]),
            "key": arrival.key,
            "arrival": arrival.n,
            "task": "letters",
            "task_id": self.task.task_id,
            "ask_id": self.task.ask_id,
            "settings": {"limit": None},
            "scores": [score | {"task": "letters"} for score in record["scores"]],
            **fields,
        }
        arrivals.record_identity(
            self.store, arrival, Checkpoint(checkpoint_id, record["weights_id"], None, "transformers")
        )
        lease = leases.acquire(self.store, record["evaluation_id"], 60)
        assert lease is not None
        record["samples"] = commits.write_samples(self.store, record["evaluation_id"], record["try"], samples)
        assert commits.commit(self.store, record, lease)
        lease.release()
        return record["evaluation_id"]

    def adopt(self, evaluation_id, attempt=1, actor="dagster"):
        warehouse.refresh(self.store, self.catalog)
        return adopt.adopt(self.store, self.catalog, evaluation_id, attempt, actor)

    def board(self):
        """(step, attempt) of every row on the leaderboard."""
        warehouse.refresh(self.store, self.catalog)
        rows = warehouse.query(self.catalog, self.store, "select step, attempt from leaderboard order by step")
        return [(row["step"], row["attempt"]) for row in rows.to_pylist()]


@pytest.fixture
def platform(tmp_path):
    return Platform(tmp_path)


def one_nan(samples):
    return with_log_likelihood(samples, 3, 1, math.nan)


def moved(samples):
    value = samples["choices"][3].as_py()[1]["log_likelihood"]
    return with_log_likelihood(samples, 3, 1, value - 0.5)


def nothing_scored(step):
    """Fields of a commit whose scores are all missing."""
    nothing = {"value": None, "standard_error": None, "ci_low": None, "ci_high": None, "interval_method": "none: gone"}
    record = evaluate(seed=step)[0]
    return {
        "scores": [score | nothing for score in record["scores"]],
        "primary": record["primary"] | {"value": None},
    }


def test_what_passes_is_published_once_and_on_the_board(platform):
    evaluation_id = platform.commit()
    decision = platform.adopt(evaluation_id)
    assert (decision.n, decision.status, decision.reasons, decision.actor) == (1, "published", (), "dagster")
    assert decision.gate_version == quality.GATE_VERSION
    assert failed(decision.checks) == set()
    assert platform.adopt(evaluation_id, actor="somebody else") == decision
    assert platform.board() == [(10, 1)]


def test_a_nan_is_held_and_only_a_rerun_helps(platform):
    evaluation_id = platform.commit(planted=one_nan, **nothing_scored(10))
    decision = platform.adopt(evaluation_id)
    assert decision.status == "held"
    assert any(reason.startswith("log_likelihood_present: 1 of 72") for reason in decision.reasons)
    assert platform.board() == []
    with pytest.raises(EvalPlatformError, match=r"(?s)cannot be released: its primary score acc is missing.*rerun"):
        quality.release(platform.store, evaluation_id, 1, "ann", "looks fine to me")

    assert quality.rerun(platform.store, evaluation_id, "ann", "the engine is mended") == 2
    with pytest.raises(EvalPlatformError, match="has no result for attempt 2: it has the attempts 1"):
        platform.adopt(evaluation_id, 2)
    platform.commit(attempt=2)
    decision = platform.adopt(evaluation_id, 2)
    assert decision.status == "published"
    assert "reproducible" not in {check.name for check in decision.checks}  # the held attempt is no standard
    assert platform.board() == [(10, 2)]


def test_a_missing_score_of_a_subset_cannot_be_released_either(platform):
    scores = evaluate(seed=10)[0]["scores"]
    assert scores[-1]["subset"]
    missing = [*scores[:-1], scores[-1] | {"value": None}]
    evaluation_id = platform.commit(scores=missing)
    assert platform.adopt(evaluation_id).status == "held"
    with pytest.raises(EvalPlatformError, match=f"acc_norm of {scores[-1]['subset']}"):
        quality.release(platform.store, evaluation_id, 1, "ann", "looks fine")


def test_release_and_retract_are_recorded_over_the_gate(platform):
    platform.adopt(platform.commit(step=5, answers_digest="same"))
    evaluation_id = platform.commit(step=10, answers_digest="same")
    held = platform.adopt(evaluation_id)
    assert held.status == "held"
    assert failed(held.checks) == {"own_answers"}
    assert "root/run/5" in held.reasons[0]
    assert platform.board() == [(5, 1)]

    released = quality.release(platform.store, evaluation_id, 1, "ann", "the same weights, saved anew")
    assert (released.n, released.status, released.action, released.actor) == (2, "published", "release", "ann")
    assert released.reasons == ("the same weights, saved anew",)
    assert released.checks == held.checks
    assert platform.board() == [(5, 1), (10, 1)]
    with pytest.raises(EvalPlatformError, match="is published already"):
        quality.release(platform.store, evaluation_id, 1, "ann", "again")

    retracted = quality.retract(platform.store, evaluation_id, 1, "bob", "not so sure")
    assert (retracted.n, retracted.status, retracted.action) == (3, "held", "retract")
    assert platform.board() == [(5, 1)]
    with pytest.raises(EvalPlatformError, match="is held already"):
        quality.retract(platform.store, evaluation_id, 1, "bob", "again")
    # The gate comes late, a second time: the person's word stands.
    assert platform.adopt(evaluation_id) == retracted


@pytest.mark.parametrize(("actor", "reason"), [("ann", ""), ("ann", " \n"), ("", "because")])
def test_an_act_without_a_name_or_a_reason_is_refused(platform, actor, reason):
    evaluation_id = platform.commit()
    platform.adopt(evaluation_id)
    subject = tries.evaluation_subject(evaluation_id, 1)
    for act in (
        lambda: quality.retract(platform.store, evaluation_id, 1, actor, reason),
        lambda: quality.release(platform.store, evaluation_id, 1, actor, reason),
        lambda: quality.recheck(platform.store, platform.catalog, evaluation_id, 1, actor, reason),
        lambda: quality.rerun(platform.store, evaluation_id, actor, reason),
        lambda: quality.retry(platform.store, subject, actor, reason),
    ):
        with pytest.raises(EvalPlatformError, match="must say"):
            act()
    assert [d.n for d in decisions.history(platform.store, evaluation_id, 1)] == [1]
    assert commits.slot(platform.store, evaluation_id) == 1


def test_what_is_not_there_or_not_decided_cannot_be_released(platform):
    with pytest.raises(EvalPlatformError, match="nothing is committed under that id"):
        quality.release(platform.store, "0" * 32, 1, "ann", "why not")
    evaluation_id = platform.commit()
    with pytest.raises(EvalPlatformError, match="has not been through the gate"):
        quality.release(platform.store, evaluation_id, 1, "ann", "why not")


def test_a_recheck_judges_the_stored_result_anew(platform):
    evaluation_id = platform.commit()
    platform.adopt(evaluation_id)
    quality.retract(platform.store, evaluation_id, 1, "ann", "a doubt")
    again = quality.recheck(platform.store, platform.catalog, evaluation_id, 1, "ann", "the doubt is gone")
    assert (again.n, again.status, again.action) == (3, "published", "recheck")
    assert again.reasons == ("rechecked: the doubt is gone",)
    assert {check.name for check in again.checks} >= {"planned_rows", "own_answers"}


def test_samples_that_were_altered_are_not_judged(platform):
    evaluation_id = platform.commit()
    record = committed(platform.store, evaluation_id, 1)
    path = platform.store.path(record["samples"]["key"])
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(SchemaError, match="SHA-256 differs"):
        platform.adopt(evaluation_id)
    assert decisions.standing(platform.store, evaluation_id, 1) is None


def test_a_rerun_that_contradicts_holds_both_until_a_person_decides(platform):
    evaluation_id = platform.commit()
    assert platform.adopt(evaluation_id).status == "published"
    quality.rerun(platform.store, evaluation_id, "ann", "is it deterministic?")
    platform.commit(attempt=2, planted=moved)
    second = platform.adopt(evaluation_id, 2)
    first = decisions.standing(platform.store, evaluation_id, 1)
    assert first is not None
    for decision in (first, second):
        assert decision.status == "held"
        assert failed(decision.checks) == {"reproducible"}
    assert len(first.checks) == len(second.checks)
    assert platform.board() == []

    quality.release(platform.store, evaluation_id, 1, "ann", "the second ran on a broken card")
    assert platform.adopt(evaluation_id, 2) == second
    assert platform.board() == [(10, 1)]


def test_a_rerun_that_agrees_is_published_too(platform):
    evaluation_id = platform.commit()
    platform.adopt(evaluation_id)
    quality.rerun(platform.store, evaluation_id, "ann", "is it deterministic?")
    platform.commit(attempt=2)
    second = platform.adopt(evaluation_id, 2)
    assert second.status == "published"
    assert {check.name: check.passed for check in second.checks}["reproducible"]
    assert platform.board() == [(10, 1)]


def test_a_crash_between_the_two_holds_is_mended_by_the_next_adopter(platform):
    evaluation_id = platform.commit()
    platform.adopt(evaluation_id)
    quality.rerun(platform.store, evaluation_id, "ann", "is it deterministic?")
    platform.commit(attempt=2, planted=moved)
    found = Check("reproducible", passed=False, severity="error", reason="differs", observed={"attempts": [1]})
    decisions.append(
        platform.store,
        evaluation_id,
        2,
        status="held",
        checks=[found],
        reasons=["differs"],
        gate_version=quality.GATE_VERSION,
        actor="dagster",
    )
    assert platform.board() == [(10, 1)]
    platform.adopt(evaluation_id, 2)
    assert platform.board() == []
    assert len(decisions.history(platform.store, evaluation_id, 1)) == 2
    platform.adopt(evaluation_id, 2)
    assert len(decisions.history(platform.store, evaluation_id, 1)) == 2


def test_a_fall_on_the_runs_own_curve_is_warned_of(platform):
    platform.adopt(platform.commit(step=5, skill=1.0))
    decision = platform.adopt(platform.commit(step=10, skill=0.3))
    assert "score_steady" in failed(decision.checks)
    assert decision.status == "published"
    reason = next(check.reason for check in decision.checks if check.name == "score_steady")
    assert "at step 5 (root/run/5)" in reason
    # An earlier step is not compared with a later one.
    assert "score_steady" not in {check.name for check in platform.adopt(platform.commit(step=2)).checks}


def test_prompts_that_changed_are_held(platform):
    platform.adopt(platform.commit(step=5))
    decision = platform.adopt(platform.commit(step=10, prompts_id="f" * 32))
    assert failed(decision.checks) == {"same_prompts"}


def test_two_adopters_make_one_decision(platform):
    evaluation_id = platform.commit()
    record = committed(platform.store, evaluation_id, 1)
    at_once = threading.Barrier(4)

    def judge(n):
        error = Check("planned_rows", passed=n % 2 == 0, severity="error", reason="differs")
        at_once.wait()
        return quality.decide(platform.store, record, [error], f"adopter {n}")

    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(judge, range(4)))
    assert len(set(map(repr, made))) == 1
    assert decisions.history(platform.store, evaluation_id, 1) == [made[0]]


def test_retry_forgives_what_failed(platform):
    subject = tries.evaluation_subject("e" * 32, 1)
    with pytest.raises(EvalPlatformError, match="no failed try"):
        quality.retry(platform.store, subject, "ann", "mended")
    tries.start(platform.store, subject).end("failed", Failure("deterministic", "broken"))
    assert tries.state(platform.store, subject) is not None
    assert len(quality.retry(platform.store, subject, "ann", "mended")) == 1
    assert tries.state(platform.store, subject) is None


@given(acts=st.lists(st.sampled_from(["release", "retract"]), max_size=6))
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_decisions_are_numbered_and_alternate(acts, tmp_path_factory):
    store = LocalStore(tmp_path_factory.mktemp("acts"))
    record, samples, _ = evaluate()
    lease = leases.acquire(store, record["evaluation_id"], 60)
    assert lease is not None
    record["samples"] = commits.write_samples(store, record["evaluation_id"], "t", samples)
    commits.commit(store, record, lease)
    lease.release()
    quality.decide(store, record, [], "gate")
    published, expected = True, 1
    for act in acts:
        allowed = published is (act == "retract")
        if allowed:
            decision = getattr(quality, act)(store, record["evaluation_id"], 1, "ann", "because")
            published, expected = not published, expected + 1
            assert (decision.n, decision.status == "published") == (expected, published)
        else:
            with pytest.raises(EvalPlatformError, match="already"):
                getattr(quality, act)(store, record["evaluation_id"], 1, "ann", "because")
    numbers = [decision.n for decision in decisions.history(store, record["evaluation_id"], 1)]
    assert numbers == list(range(1, expected + 1))


def test_shuffled_samples_are_held_not_lost(platform):
    def reversed_rows(samples: pa.Table) -> pa.Table:
        return samples.take(list(range(samples.num_rows))[::-1])

    decision = platform.adopt(platform.commit(planted=reversed_rows))
    assert failed(decision.checks) == {"planned_sample_ids"}
