"""Which tasks of which checkpoint, and what comes next: over random histories of arrivals, against what is promised."""

from collections import defaultdict
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from dagster_world import locked
from hypothesis import given, settings
from hypothesis import strategies as st

from eval_platform.config import load_config
from eval_platform.errors import ConfigError
from eval_platform.queueing import (
    FRONT,
    GAPS,
    Point,
    Tier,
    Waiting,
    has_ended,
    in_turn,
    numbers,
    points_of,
    superseded,
    tiers,
)
from eval_platform.tasks import SkippedTask, TaskLock

EXAMPLES = settings(max_examples=60, deadline=None)
START = datetime(2026, 1, 1, tzinfo=UTC)


def points(steps: list[int]) -> list[Point]:
    """Checkpoints of one run as they arrived."""
    return [Point(f"r/{step}", 1, step, (START + timedelta(hours=i)).isoformat()) for i, step in enumerate(steps)]


# ------------------------------------------------------------------------------------------- of which checkpoints


@EXAMPLES
@given(steps=st.lists(st.integers(0, 200), unique=True, max_size=40), k=st.integers(1, 6), data=st.data())
def test_every_kth_whatever_the_order_of_arrival(steps: list[int], k: int, data: st.DataObject) -> None:
    """Asked in batches of any size; what was asked stays asked."""
    tier = Tier("t", 0, frozenset("a"), every=k)
    asked: set[str] = set()
    come: list[Point] = []
    for point in points(steps):
        come.append(point)
        if data.draw(st.booleans()):
            asked |= {one.key for one in points_of(come, tier, asked, ended=False)}
    asked |= {one.key for one in points_of(come, tier, asked, ended=False)}
    assert points_of(come, tier, asked, ended=False) == []
    places = [0, *(i for i, step in enumerate(sorted(steps), 1) if f"r/{step}" in asked)]
    between = [after - before for before, after in pairwise(places)]
    assert all(k <= distance < 2 * k for distance in between)
    assert len(steps) - places[-1] < k
    if steps == sorted(steps):
        assert places == list(range(0, len(steps) + 1, k))


def test_the_last_of_a_run_is_known_by_silence_or_by_its_tag() -> None:
    tier = Tier("t", 0, frozenset("a"), every=None, last=True)
    run = points([10, 20, 30])
    assert points_of(run, tier, (), ended=False) == []
    assert [one.step for one in points_of(run, tier, (), ended=True)] == [30]
    assert points_of(run, tier, {"r/30"}, ended=True) == []
    told = [*run, Point("r/40", 1, 40, is_last=True)]
    assert [one.step for one in points_of(told, tier, (), ended=False)] == [40]
    # The tag of one that others follow says nothing any more.
    assert points_of([*told, Point("r/50", 1, 50)], tier, (), ended=False) == []

    newest = START + timedelta(hours=2)
    assert not has_ended(run, 30, newest + timedelta(minutes=29))
    assert has_ended(run, 30, newest + timedelta(minutes=30))
    assert not has_ended(run, 30, newest - timedelta(days=400))
    assert not has_ended([], 30, newest)


# --------------------------------------------------------------------------------------------------- in which order

ARRIVALS = st.tuples(st.sampled_from("abcd"), st.integers(0, 30), st.integers(0, 2))
HISTORIES = st.lists(st.one_of(st.none(), ARRIVALS), max_size=60)  # None: one is begun


@EXAMPLES
@given(history=HISTORIES)
def test_runs_take_turns_and_begin_with_their_newest(history: list[tuple[str, int, int] | None]) -> None:
    """Against the promise itself, and as Dagster's queue sees it: an integer each, set when something arrives."""
    waiting: dict[str, Waiting] = {}
    queued: dict[str, int] = {}  # id -> priority, as Dagster has it
    served: dict[tuple[int, str], float] = {}
    passed: dict[tuple[int, str], set[str]] = defaultdict(set)  # whoever had a turn while this run waited
    for now, event in enumerate(history):
        if event is not None:
            run, step, place = event
            waiting[str(now)] = Waiting(str(now), run, place, "t", step, (START + timedelta(seconds=now)).isoformat())
            queued = numbers(in_turn(waiting.values(), served))
            continue
        if not waiting:
            continue
        first = max(queued, key=lambda one: queued[one])
        one = waiting.pop(first)
        del queued[first]
        others = [other for other in waiting.values() if other.place == one.place]
        assert all(other.place >= one.place for other in waiting.values())
        assert all(other.order < one.order for other in others if other.run == one.run)
        never = float("-inf")
        mine = served.get((one.place, one.run), never)
        assert all(served.get((other.place, other.run), never) >= mine for other in others)
        served[one.place, one.run] = now
        passed.pop((one.place, one.run), None)
        for other in {other.run for other in others} - {one.run}:
            # Nobody has a second turn while another waits for its first.
            assert one.run not in passed[one.place, other]
            passed[one.place, other].add(one.run)
        # What is left needs no new numbers.
        assert [w.id for w in in_turn(waiting.values(), served)] == sorted(queued, key=lambda id: -queued[id])


def test_behind_the_front_the_newest_arrival_goes_first_and_no_tier_before_another() -> None:
    many = [
        Waiting(f"{place}-{i}", "r", place, "t", i, (START + timedelta(seconds=i)).isoformat())
        for place in (0, 1, GAPS)
        for i in range(FRONT)
    ]
    order = in_turn(many, {})
    found = numbers(order)
    assert sorted(found, key=lambda one: -found[one]) == [one.id for one in order]
    # One more changes the numbers of the front, and of the one that is pushed out of it; none behind.
    new = Waiting("new", "r", 0, "t", FRONT, (START + timedelta(seconds=FRONT)).isoformat())
    after = numbers(in_turn([*many, new], {}))
    assert sum(after[one] != found[one] for one in found) <= FRONT
    assert after["new"] == max(after.values())


# ------------------------------------------------------------------------------------------------- what is passed over


@EXAMPLES
@given(arrived=st.lists(ARRIVALS, max_size=40), begun=st.lists(ARRIVALS, max_size=5), beyond=st.integers(1, 10))
def test_only_what_is_far_behind_and_has_a_newer_one_is_passed_over(
    arrived: list[tuple[str, int, int]], begun: list[tuple[str, int, int]], beyond: int
) -> None:
    waiting = [
        Waiting(str(i), run, place, None if run == "d" else f"tier{place}", step, f"2026-01-01T00:00:{i:02}+00:00")
        for i, (run, step, place) in enumerate(arrived)
    ]
    had: dict[tuple[str, str], tuple[int, str]] = {}
    for run, step, place in begun:
        had[f"tier{place}", run] = max(had.get((f"tier{place}", run), (-1, "")), (step, "2026"))
    order = in_turn(waiting, {})
    over = superseded(order, beyond, had)
    gone = {one.id for one, _ in over}
    assert not gone & {one.id for one in order[:beyond]}
    for one, newest in over:
        assert one.run != "d"
        assert newest >= (one.step or 0)
    left = [one for one in order if one.id not in gone]
    for one in order[beyond:]:
        newer = [o for o in left if (o.tier, o.run) == (one.tier, one.run) and o.order > one.order]
        had_newer = (one.tier or "", one.run) in had and had[one.tier or "", one.run] > one.order[:2]
        # Its run's newest waits still, or was begun.
        assert (one.id in gone) == (one.run != "d" and (bool(newer) or had_newer))
    # Looked at again, nothing more is.
    assert superseded(left, beyond, had) == []


# ------------------------------------------------------------------------------------------------- what is configured

LOCK = TaskLock(
    {name: locked(f"{name}1") for name in ("copying", "addition", "parity", "drop")},
    {"mmlu": SkippedTask("mmlu", "no data", "get it")},
)


def configured(tmp_path: Path, text: str) -> Any:
    (tmp_path / "eval_platform.toml").write_text(text)
    config = load_config(tmp_path / "eval_platform.toml")
    return tiers(config.queue, config.suites, LOCK)


def test_tiers_share_out_the_tasks_and_forget_none(tmp_path: Path) -> None:
    text = """
        [suites]
        mine = ["copying", "parity"]
        [[queue.tiers]]
        name = "quick"
        suites = ["mine"]
        [[queue.tiers]]
        name = "full"
        tasks = ["addition", "copying", "mmlu"]
        every = 10
        last = true
        [[queue.tiers]]
        name = "none_here"
        tasks = ["mmlu"]
    """
    assert configured(tmp_path, text) == (
        Tier("quick", 0, frozenset({"copying", "parity"})),
        Tier("full", 1, frozenset({"addition"}), every=10, last=True),
        Tier("other", 3, frozenset({"drop"})),
    )
    everything = frozenset(LOCK.tasks)
    assert configured(tmp_path, "") == configured(tmp_path, "[queue]") == (Tier("other", 0, everything),)
    (all_last,) = configured(tmp_path, '[[queue.tiers]]\nname = "final"\nlast = true')
    assert all_last == Tier("final", 0, everything, every=None, last=True)
    assert all_last.told == "the last of a run"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('name = "t"\nsuites = ["nosuch"]', r"queue\.tiers\.0\.suites\.0 \(tier t\): there is no suite 'nosuch'"),
        ('name = "t"\ntasks = ["parit"]', r"queue\.tiers\.0 \(tier t\): no task named parit .*did you mean 'parity'"),
        ('name = "t"\nevery = 0', r"queue\.tiers\.0\.every: .*greater than or equal to 1"),
        ('name = "t"\n[[queue.tiers]]\nname = "t"', r"queue\.tiers: .*two called t"),
        ('name = "other"', r"queue\.tiers: .*'other'"),
        ('name = "t"\nwhen = "always"', r"queue\.tiers\.0\.when: Extra"),
        ('name = "t"\n[[queue.tiers]]\nname = "u"\ntasks = ["drop"]', r"queue\.tiers\.1 \(tier u\) asks nothing"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_its_field(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        configured(tmp_path, f"[[queue.tiers]]\n{text}\n")


def test_how_many_may_wait_is_at_least_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"queue\.skip_superseded_beyond: .*greater than or equal to 1"):
        configured(tmp_path, "[queue]\nskip_superseded_beyond = 0")
