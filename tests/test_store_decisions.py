"""Decisions: appended, the highest stands, one gate decides."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_processes import folders_only, race

from eval_platform.store import LocalStore, decisions, log
from eval_platform.values import Check

pytest_plugins = ["store_roots"]

E = "e" * 32


def decide(store, status="published", action="gate", actor="a", attempt=1, checks=(), reasons=()):
    return decisions.append(
        store,
        E,
        attempt,
        status=status,
        checks=checks,
        reasons=reasons,
        gate_version="1",
        actor=actor,
        action=action,
    )


def test_a_decision_is_read_back_with_its_checks(store):
    checks = [
        Check("finite", False, "error", "2 scores are NaN", {"n": 2, "of": [1, 2.5, None]}),
        Check("chance", True, "warning"),
    ]
    decision = decide(store, "held", checks=checks, reasons=["2 scores are NaN"])
    assert (decision.n, decision.status, decision.action) == (1, "held", "gate")
    assert decision.checks == tuple(checks)
    assert decision.reasons == ("2 scores are NaN",)
    assert decisions.standing(store, E, 1) == decision
    assert decisions.standing(store, E, 2) is None
    assert [(e["kind"], e["n"]) for e in log.read(store, log.dates(store))] == [("decision", 1)]


@folders_only
@pytest.mark.parametrize("observed", [math.nan, [1.0, -math.inf], {"worst": math.inf}, object(), {1: (2, 3)}])
def test_whatever_a_check_observed_can_be_kept(store, observed):
    check = decide(store, "held", checks=[Check("c", False, "error", "r", observed)]).checks[0]
    assert check.observed is not None
    assert decisions.standing(store, E, 1).checks == (check,)


@folders_only
def test_what_is_not_finite_is_kept_by_name(store):
    decision = decide(store, "held", checks=[Check("c", False, "error", "r", [math.nan, -math.inf, 0.5])])
    assert decision.checks[0].observed == ["nan", "-inf", 0.5]


def test_the_highest_stands(store, fewer):
    steps = [("held", "gate"), ("published", "release"), ("held", "retract"), ("published", "recheck")]
    for n, (status, action) in enumerate(steps, 1):
        assert decide(store, status, action).n == n
        assert decisions.standing(store, E, 1).status == status
    assert [(d.status, d.action) for d in decisions.history(store, E, 1)] == steps
    last = 5 + fewer(7)
    for n in range(5, last):
        decide(store, "held" if n % 2 else "published", "recheck")
    assert decisions.standing(store, E, 1).n == last - 1


@folders_only
def test_a_second_gate_adopts_and_overrules_nobody(store):
    decide(store, "published")
    decide(store, "held", "retract", actor="ada")
    late = decide(store, "published", actor="a slow gate")
    assert (late.n, late.status, late.actor) == (2, "held", "ada")


@folders_only
def test_of_many_gates_one_decides_and_of_many_people_all_are_recorded(store, fewer):
    gates = race(4, lambda i: decide(store, "published" if i % 2 else "held", actor=f"gate {i}"))
    assert len({(decision.n, decision.actor) for decision in gates}) == 1
    each = fewer(4)
    people = race(4, lambda i: [decide(store, "held", "retract", actor=f"person {i}").n for _ in range(each)])
    assert sorted(n for ns in people for n in ns) == list(range(2, 4 * each + 2))
    assert [decision.n for decision in decisions.history(store, E, 1)] == list(range(1, 4 * each + 2))


@given(st.lists(st.tuples(st.integers(1, 12), st.sampled_from(["published", "held"])), max_size=15))
@settings(max_examples=25, deadline=None)
def test_boards_show_the_lowest_attempt_that_stands_published(tmp_path_factory, made):
    store = LocalStore(tmp_path_factory.mktemp("store"))
    stands: dict[int, str] = {}
    for attempt, status in made:
        decide(store, status, "recheck", attempt=attempt)
        stands[attempt] = status
    expected = min((attempt for attempt, status in stands.items() if status == "published"), default=None)
    assert decisions.standing_attempt(store, E) == expected


@folders_only
def test_the_clock_stepping_back_changes_nothing(store, monkeypatch):
    times = (f"2026-03-01T{hour:02}:00:00.000000Z" for hour in range(23, 0, -1))
    for module in (decisions, log):
        monkeypatch.setattr(module, "utc_now", lambda: next(times))
    decide(store, "held")
    decide(store, "published", "release")
    assert decisions.standing(store, E, 1).status == "published"
