"""What is expected against a world whose truth is known, and work shared out against all ways there are."""

import itertools
import json
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_factory import make_checkpoint
from fault_tools import Place, forked
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from stub_engine import StubEngine
from warehouse_world import World

from eval_platform import checkpoints, launching, planning, status, worker
from eval_platform.checkpoints import count_parameters, held, hold
from eval_platform.config import Config, Queue, Tier
from eval_platform.drive import Outcome, drive
from eval_platform.errors import StoreError
from eval_platform.launching import Running, folders, jobs, local, ray, slurm
from eval_platform.plan import Plan, PlannedTask, Wanted, plan
from eval_platform.planning import cost
from eval_platform.planning.cost import Past, Rate
from eval_platform.planning.history import read_history
from eval_platform.planning.sharing import end_of_queue, share_out_costs
from eval_platform.store import arrivals, commits, tries
from eval_platform.tasks import Size, characters, read_lock
from eval_platform.terminal import print_status
from eval_platform.values import Arrival, Request, Response, RunSettings, make_request
from eval_platform.warehouse import connect, refresh

# ------------------------------------------------------------------------------------------------------------- the cost


class Device:
    """A machine that computes just as the model of its cost says, and a word for what its evaluations took."""

    def __init__(self, prefill: float, decode: float, load: float = 1e-8) -> None:
        self.rate = Rate(prefill, decode)
        self.load = load

    def answers(self, n_parameters: int, prompt: float, generated: float) -> float:
        assert self.rate.prefill
        assert self.rate.decode
        return n_parameters * prompt / self.rate.prefill + n_parameters * generated / self.rate.decode

    def took(self, run: str, n_parameters: int, task: str, prompt: float, generated: float, beside: float) -> Past:
        seconds = self.answers(n_parameters, prompt, generated)
        load = self.load * n_parameters
        return Past(run, task, n_parameters, beside + seconds, seconds, load, prompt + generated, generated)


def task_seconds(task: str, run: str, n_parameters: int | None, known: Sequence[Past]) -> float | None:
    return cost.task_seconds(task, n_parameters, cost.alike(run, n_parameters, known), known)


def new_task_seconds(size: Size, run: str, n_parameters: int, known: Sequence[Past]) -> float | None:
    return cost.new_task_seconds(size, n_parameters, cost.alike(run, n_parameters, known))


amounts = st.floats(1, 1e6, allow_nan=False)
sizes = st.integers(1_000, 10**11)


@settings(deadline=None)
@given(amounts, amounts, amounts, amounts, amounts, sizes, sizes)
def test_a_task_known_elsewhere_costs_its_tokens_at_this_devices_rate(
    prompt: float, generated: float, beside: float, here: float, factor: float, there: int, size: int
) -> None:
    """Another run, of another size on another machine, was asked it; this run was asked other tasks."""
    other, this = Device(1e9, 1e7), Device(here * 1e6, here * 1e6 / factor)
    known = [
        other.took("other", there, "task", prompt, generated, beside),
        this.took("this", size, "scored", 1_000, 0, 3.0),
        this.took("this", size, "drawn", 1_000, 100, 5.0),
    ]
    expected = task_seconds("task", "this", size, known)
    assert expected == pytest.approx(beside + this.answers(size, prompt, generated), rel=1e-6, abs=1e-4)


@settings(deadline=None)
@given(sizes, sizes, st.lists(sizes, min_size=1, max_size=4))
def test_a_size_that_nobody_has_asked_goes_by_the_nearest(task_size: int, size: int, others: list[int]) -> None:
    """Where nobody counted tokens: by the ratio of the sizes, of the model nearest to it."""
    known = [Past(f"run{n}", "task", n, 2.0 + n * 1e-6, n * 1e-6) for n in {task_size, *others}]
    expected = task_seconds("task", "new", size, known)
    assert expected == pytest.approx(2.0 + size * 1e-6, rel=0.02)  # "the same size" may be one part in a hundred away


def test_what_the_run_took_itself_goes_before_all_else() -> None:
    """The median, so that what was slow once is no more than that; else that of models as large."""
    own = [Past("this", "task", 100, seconds, 1.0) for seconds in (10.0, 11.0, 500.0)]
    elsewhere = [Past("other", "task", 100, 3.0, 1.0), Past("small", "task", 10, 1.0, 0.5)]
    assert task_seconds("task", "this", 100, [*elsewhere, *own]) == 11.0
    assert task_seconds("task", "new", 100, [*elsewhere, *own]) == 10.5  # of the four of this size
    assert cost.load_seconds("new", 100, own) is None


def test_what_nobody_knows_is_not_invented() -> None:
    known = [Past("this", "task", 100, 10.0, 1.0, 4.0), Past("other", "else", 200, 7.0, 1.0, 9.0)]
    assert task_seconds("new task", "this", 100, known) is None
    assert task_seconds("task", "new", None, known) is None  # of a model that lies in a bucket
    assert task_seconds("else", "this", 100, known) == 6.5  # six beside the model, which is half as large
    assert cost.parameters_of("this", known) == 100
    assert cost.parameters_of("this", [*known, Past("this", "task", 200, 7.0, 1.0)]) is None
    assert (cost.load_seconds("this", 100, known), cost.load_seconds("new", 400, known)) == (4.0, 18.0)
    assert cost.answer_seconds(1, 1, 100, Rate(1.0, None)) is None


def test_a_folder_of_models_of_many_sizes_is_no_one_model() -> None:
    small = [Past("models", "task", 70_000_000, 10.0, 8.0, 1.0) for _ in range(5)]
    assert task_seconds("task", "models", 12_000_000_000, small) == pytest.approx(2.0 + 8.0 * 12_000 / 70)
    assert cost.load_seconds("models", 140_000_000, small) == 2.0
    large = Past("models", "task", 12_000_000_000, 900.0, 890.0)
    assert task_seconds("task", "models", 12_000_000_000, [*small, large]) == 900.0
    assert task_seconds("task", "models", 90_000_000, small) == 10.0  # tied weights that were saved twice
    assert task_seconds("task", "served", None, [Past("served", "task", None, 5.0, 4.0)]) == 5.0


def test_another_kind_of_device_tells_tokens_but_no_time() -> None:
    far, here = Device(1e12, 1e10), Device(1e9, 1e7)
    there = replace(far.took("this", 100, "task", 1_000, 50, 3.0), is_here=False)
    assert task_seconds("task", "this", 100, [there]) is None
    assert cost.load_seconds("this", 100, [there]) is None
    uncounted = replace(there, computed_tokens=None)
    known = [here.took("this", 100, "scored", 500, 0, 1.0), here.took("this", 100, "drawn", 500, 10, 1.0)]
    assert task_seconds("task", "this", 100, [*known, uncounted]) is None
    assert task_seconds("task", "this", 100, [*known, there]) == pytest.approx(3.0 + here.answers(100, 1_000, 50))


def test_a_rate_needs_what_was_counted() -> None:
    device = Device(1e9, 1e7)
    scored, drawn = device.took("a", 1000, "s", 50, 0, 1.0), device.took("a", 1000, "d", 50, 20, 1.0)
    found = cost.rate([scored, drawn])
    assert (found.prefill, found.decode) == (pytest.approx(1e9), pytest.approx(1e7))
    assert cost.rate([drawn]) == Rate(None, None)  # what of it was prefill nobody can tell
    assert cost.rate([replace(scored, computed_tokens=None), Past("b", "t", None, 1.0, 1.0)]) == Rate(None, None)


@settings(deadline=None)
@given(amounts, amounts, st.floats(0.1, 1.0), st.floats(0, 0.1), st.floats(1, 300), st.integers(0, 1000))
def test_a_new_task_costs_its_characters_at_this_runs_rate(
    requests: float, letters: float, token: float, beside: float, drawn: float, longest: int
) -> None:
    """The run's model makes `token` tokens of a character, and ends a completion after `drawn`."""
    device, size = Device(1e9, 1e7), Size(10, round(requests), round(letters), longest)

    def was_asked(run: str, task: str, n: int, letters: int, length: float = 0.0) -> Past:
        one = device.took(run, 1_000, task, letters * token, n * length, n * beside)
        return replace(one, requests=n, characters=letters)

    known = [was_asked("this", "scored", 50, 9_000), was_asked("this", "drawn", 20, 7_000, drawn)]
    generated = size.requests * min(drawn, longest)
    oracle = size.requests * beside + device.answers(1_000, size.characters * token, generated)
    assert new_task_seconds(size, "this", 1_000, known) == pytest.approx(oracle, rel=1e-6, abs=1e-6)
    assert new_task_seconds(size, "new", 1_000, known) == pytest.approx(oracle, rel=1e-6, abs=1e-6)
    assert new_task_seconds(size, "new", 5_000, known) is None  # of this size nobody has been asked anything
    without = [replace(one, characters=None) for one in known]  # of an older release
    assert new_task_seconds(size, "this", 1_000, without) is None
    scored_alone = new_task_seconds(size, "this", 1_000, known[:1])
    assert (scored_alone is None) == bool(longest)  # how long a completion is nobody knows


@given(st.lists(st.tuples(st.text("ab", max_size=9), st.none() | st.text("ab", min_size=1, max_size=3)), min_size=1))
def test_characters_are_those_of_the_tree_of_prompts(asked: list[tuple[str, str | None]]) -> None:
    requests = [make_request("choice" if behind else "rolling", prompt, behind) for prompt, behind in asked]
    nodes = {prompt[:end] for prompt, _ in asked for end in range(1, len(prompt) + 1)}
    assert characters(requests) == len(nodes) + sum(len(behind) for _, behind in set(asked) if behind)


def test_parameters_are_counted_from_headers_alone(tmp_path: Path) -> None:
    save_file({"a": np.zeros((3, 5), np.float16), "b": np.zeros(7, np.float32)}, tmp_path / "model-1.safetensors")
    mask = np.zeros((1, 1, 9, 9), np.bool_)
    save_file({"c": np.zeros((2, 2, 2), np.float32), "bias": mask}, tmp_path / "model-2.safetensors")
    save_file({"all": np.zeros(30, np.float32)}, tmp_path / "consolidated.safetensors")  # the same once more
    assert count_parameters(tmp_path) is None
    files = {"a": "model-1.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    assert count_parameters(tmp_path) == 15 + 7 + 8
    save_file({"d": np.zeros(11, np.float32)}, tmp_path / "model.safetensors")  # goes before the index
    assert count_parameters(tmp_path) == 11
    (tmp_path / "adapter_config.json").write_text("{}")
    assert count_parameters(tmp_path) is None
    assert count_parameters(tmp_path / "nowhere") is None
    assert count_parameters(tmp_path / ("n" * 300)) is None  # which the file system refuses to look at


# ------------------------------------------------------------------------------------------------ what was asked before


class Told(World):
    """A world whose evaluations say what they took."""

    def asked(self, checkpoint: str, task: str = "t", **fields: Any) -> str:
        whole = {"n_requests": 10, "asked_requests": 10, "load_seconds": 1.0, "n_parameters": 100, "seconds": 5.0}
        key, checkpoint_id = f"r/{checkpoint}", f"c-{checkpoint}"
        return self.publish(checkpoint_id, task, f"id of {task}", key=key, **{**whole, **fields})

    def past(self, run: str = "run", limit: int | None = None, chat: bool | None = False) -> list[Past]:
        refresh(self.store, self.catalog)
        with connect(self.catalog, self.store, samples=False) as con:
            history = read_history(con, runs=[run], task_ids=["id of t"], limit=limit, chat=chat)
        return history.seen_on(history.devices.get(run))

    def took(self, **asked: Any) -> list[float]:
        return sorted(one.seconds for one in self.past(**asked) if one.is_here)


def test_of_what_was_asked_before_only_what_tells_counts(tmp_path: Path) -> None:
    told = Told(tmp_path)
    for step in range(9):
        told.arrive(f"r/{step}", f"c-{step}", step)
    told.asked("0")
    assert told.took() == [4.0]  # loading is apart
    told.asked("1", seconds=50.0, asked_requests=3)  # gone on with after an interruption
    told.asked("2", seconds=51.0, asked_requests=None, load_seconds=None)  # of an older release
    told.asked("3", seconds=52.0, origin="rescored", answer_seconds=0.0, asked_requests=0)
    told.asked("4", seconds=53.0, settings={"chat": True})
    told.asked("5", seconds=8.0, limit=5)
    assert told.took() == [4.0]
    assert (told.took(chat=True), told.took(chat=None)) == ([52.0], [4.0, 52.0])
    assert told.took(limit=5) == [2.0, 7.0]  # of ten items half, and what was asked so
    told.asked("6", "other", seconds=6.0)
    assert [told.took(run=run) for run in ("run", "nobody's")] == [[4.0, 5.0], []]  # any task on this run
    told.asked("7", devices=["cuda:0, cuda:1"], seconds=1.5, finished_at="2026-01-03T00:00:00Z")
    assert told.took() == [0.5]  # the run has moved to a GPU
    assert len(told.past()) == 3


def test_a_run_goes_by_the_devices_of_the_platform_that_found_it(tmp_path: Path) -> None:
    told = Told(tmp_path)
    for run, watcher in (("laptop", "one"), ("cluster", "two"), ("new", "one"), ("newer", "three")):
        kept = {"key": f"r/{run}", "uri": run, "fingerprint": "f", "run": run, "step": 1, "tags": {}}
        told.identify(arrivals.register(told.store, watcher=watcher, **kept)[0], f"c-{run}")
    told.asked("laptop", seconds=90.0)
    told.asked("cluster", seconds=3.0, devices=["cuda:3"], finished_at="2026-01-03T00:00:00Z")
    assert (told.took(run="new"), told.took(run="cluster"), told.took(run="newer")) == ([89.0], [2.0], [])
    told.asked("new", seconds=2.0, devices=["cuda"], finished_at="2026-01-04T00:00:00Z")
    assert told.took(run="laptop") == [89.0]  # its own goes before what was used since
    runs = ("laptop", "cluster", "new", "newer", "nobody's", "nor this one")
    models = [planning.Model(run, n, chat) for run in runs for n in (None, 100, 5_000) for chat in (True, "auto")]
    tasks = {"t": PlannedTask("t", "id of t", "ask")}
    with connect(told.catalog, told.store, samples=False) as con:
        one_by_one = {model: planning.expected(con, [model], tasks)[model] for model in models}
        assert planning.expected(con, models, tasks) == one_by_one
    assert len({str(one) for one in one_by_one.values()}) > 4


def test_a_new_task_is_expected_to_take_what_its_characters_do(tmp_path: Path) -> None:
    """Known: 200 tokens a second, two characters a token, a tenth of a second beside each request."""
    told = Told(tmp_path)
    told.arrive("r/0", "c-0")
    counted = {"computed_tokens": 600, "generated_tokens": 0, "characters": 1_200}
    told.asked("0", seconds=5.0, answer_seconds=3.0, load_seconds=1.0, **counted)
    refresh(told.store, told.catalog)
    tasks = {
        "t": PlannedTask("t", "id of t", "ask", size=Size(10, 10, 1_200, 0)),
        "new": PlannedTask("new", "id of new", "ask", size=Size(100, 300, 4_000, 0)),
        "older": PlannedTask("older", "id of older", "ask"),  # of a lock that does not say
    }
    with connect(told.catalog, told.store, samples=False) as con:
        model = planning.Model("run", 100, chat=False)

        def expected(limit: int | None) -> dict[str, float]:
            return planning.expected(con, [model], tasks, limit=limit)[model].tasks

        assert expected(None) == pytest.approx({"t": 4.0, "new": 300 * 0.1 + 2_000 / 200})
        assert expected(5) == pytest.approx({"t": 2.0, "new": (300 * 0.1 + 2_000 / 200) / 20})


def test_the_newest_five_of_each_size_count(tmp_path: Path) -> None:
    told = Told(tmp_path)
    for step in range(8):
        told.arrive(f"r/{step}", f"c-{step}", step)
        size = 100 if step < 7 else 900
        told.asked(str(step), seconds=11.0 + step, n_parameters=size, finished_at=f"2026-01-0{step + 1}T00:00:00Z")
    assert told.took() == [12.0, 13.0, 14.0, 15.0, 16.0, 17.0]


def test_nothing_is_expected_of_what_the_worker_finds_answered(tmp_path: Path) -> None:
    told = Told(tmp_path)
    for step in range(2):
        told.arrive(f"r/{step}", f"c-{step}", step)
    how: dict[str, Any] = {"dtype": "float32", "max_length": 128, **dict.fromkeys(("limit", "system_prompt"))}
    how |= {"seed": 0, "chat": False, "backend": "transformers", "trust_remote_code": False}
    evaluations = {task: told.asked("0", task, settings=how) for task in ("t", "u")}
    told.asked("1", "v", settings=how)
    arrival = arrivals.get(told.store, "r/0", 1)
    assert arrival is not None
    config = Two(tmp_path).config()

    def expected(names: str, **settings: Any) -> tuple[dict[str, float], float | None]:
        tasks = tuple(PlannedTask(name, f"id of {name}", f"ask-{name}") for name in names)
        whole = replace(made_up("", {}, None), arrival=arrival, tasks=tasks, settings=RunSettings(**settings))
        found = planning.expect(whole, config, told.store)
        return dict(found.expected_seconds), found.expected_load_seconds

    assert expected("tuv") == ({"t": 0.0, "u": 0.0, "v": 4.0}, 1.0)
    assert expected("tu") == ({"t": 0.0, "u": 0.0}, 0.0)  # nothing is loaded to say so
    for others in ({"max_length": 64}, {"dtype": "float16"}, {"seed": 1}, {"limit": 5}):
        assert expected("t", **others) == ({"t": 4.0 if "limit" not in others else 2.0}, 1.0)
    assert expected("t", chat=True) == ({}, None)
    assert expected("t", dtype="float32", chat="auto") == ({"t": 0.0}, 0.0)
    commits.open_rerun(told.store, evaluations["t"], "me", "once more")
    assert expected("tuv") == ({"t": 4.0, "u": 0.0, "v": 4.0}, 1.0)
    changed = replace(made_up("", {}, None), arrival=arrival, tasks=(PlannedTask("u", "scored otherwise", "ask-u"),))
    assert dict(planning.expect(changed, config, told.store).expected_seconds) == {"u": 0.0}


# ---------------------------------------------------------------------------------------------------------- sharing out


def ends(costs: Sequence[float], shards: Sequence[Sequence[int]]) -> float:
    return max(sum(costs[i] for i in shard) for shard in shards)


def best_end(costs: Sequence[float], n: int) -> float:
    """Of all ways to give the costs to n workers."""
    ways = itertools.product(range(n), repeat=len(costs))
    return min(max(sum(c for c, k in zip(costs, way, strict=True) if k == own) for own in range(n)) for way in ways)


@settings(deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=6), st.floats(0, 100), st.integers(1, 3))
def test_every_task_is_in_one_shard_and_sharing_pays(costs: list[int], load: float, most: int) -> None:
    shards = share_out_costs(costs, load, most)
    assert sorted(itertools.chain(*shards)) == list(range(len(costs)))
    assert 1 <= len(shards) <= min(most, len(costs))
    n = len(shards)
    # Another worker's loading is won back by the time that all are done, or it is not begun.
    assert ends(costs, shards) + n * load <= sum(costs) + load + 1e-9
    bound = 4 / 3 - 1 / (3 * n)
    assert ends(costs, shards) <= bound * best_end(costs, n) + 1e-9
    if load > sum(costs):
        assert n == 1


def test_no_worker_is_begun_that_brings_the_end_no_nearer() -> None:
    assert share_out_costs([100, 10, 10], 5, 4) == [[0], [1, 2]]  # the long one is the end, whoever does the others
    assert share_out_costs([10, 10], 20, 2) == [[0, 1]]
    assert share_out_costs([50, 50, 50, 50], 20, 4) == [[0], [1], [2], [3]]  # three end no earlier than two


def by_the_second(at_work: Sequence[int], waiting: Sequence[int], slots: int) -> int:
    """The same, one second after the other."""
    left, queue, second = [*at_work], [*waiting], 0
    while True:
        left = [one for one in left if one]
        while queue and len(left) < slots:
            first = queue.pop(0)
            left += [first] if first else []
        if not left:
            return second
        left = [one - 1 for one in left]
        second += 1


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), max_size=3), st.lists(st.integers(0, 9), max_size=6), st.integers(3, 4))
def test_the_queue_ends_when_whoever_counts_the_seconds_says(at_work: list[int], queue: list[int], slots: int) -> None:
    assert end_of_queue(at_work, queue, slots) == by_the_second(at_work, queue, slots)


def made_up(names: Sequence[str], expected: dict[str, float], load: float | None) -> Plan:
    arrival = Arrival("runs/a", 1, "f", "s3://bucket/a", "a")
    tasks = tuple(PlannedTask(name, f"id of {name}", name) for name in names)
    return Plan(
        arrival,
        tasks,
        RunSettings(),
        "/results",
        "/cache",
        "/cache",
        30.0,
        1.0,
        expected_seconds=expected,
        expected_load_seconds=load,
    )


def test_a_plan_is_shared_out_whole() -> None:
    whole = made_up("abcd", {"a": 30.0, "b": 10.0, "c": 20.0}, 1.0)
    first, second = planning.share_out(whole, 2)
    assert [[task.name for task in one.tasks] for one in (first, second)] == [["a", "b"], ["c", "d"]]  # d: as the mean
    assert (planning.expected_seconds(first), planning.expected_seconds(second)) == (41.0, None)
    assert first.together == second.together != ""
    for one in (first, second):
        assert replace(one, tasks=(), expected_seconds={}, together="") == replace(whole, tasks=(), expected_seconds={})
    answered = made_up("abcde", {"a": 0.0, "b": 0.0, "c": 20.0, "d": 20.0}, 1.0)  # e: as c and d, not as all four
    assert [planning.expected_seconds(one) for one in planning.share_out(answered, 3)].count(21.0) == 2
    # Nothing is known of what pays, or nothing but that the rest is answered.
    for alone in (made_up("abcd", {}, 1.0), made_up("abcd", {"a": 30.0}, None), made_up("abcd", {"a": 0.0}, 1.0)):
        assert planning.share_out(alone, 4) == [alone]
    assert planning.share_out(whole, 1) == [whole]


def test_a_run_says_who_does_what_and_when_it_ends() -> None:
    now = datetime(2026, 1, 1, 12, 0, tzinfo=UTC)
    shards: list[dict[str, Any]] = [
        {"tasks": ["a", "b"], "expected_seconds": 40.0},
        {"tasks": ["c"], "expected_seconds": 30.0},
    ]
    assert planning.planned({"shards": shards, "begun": True}, now) == (
        "2 workers share the tasks out; expected to end at 12:00:40 UTC, 40 s after the start: a, b (40 s expected); "
        "c (30 s expected)"
    )
    unknown = [{"tasks": ["a"], "expected_seconds": None}]
    for begun in (True, False):
        told = planning.planned({"shards": unknown, "begun": begun}, now)
        assert told == "one worker for 1 task; when it ends is not known yet"
    # Of what may wait in a cluster's queue nobody knows when it begins.
    assert planning.planned({"shards": shards[:1], "begun": False}, now) == (
        "one worker for 2 tasks; expected to take 40 s once it has begun"
    )
    assert planning.planned({"shards": shards, "begun": False}, now).startswith(
        "2 workers share the tasks out; expected to take 40 s once all have begun: a, b"
    )
    assert planning.took([{**shards[0], "seconds": 44.2}]) == "2 tasks: 40 s expected, took 44 s"
    assert [planning.duration(s) for s in (0.2, 99, 100, 3599, 7500)] == [
        "0 s",
        "99 s",
        "2 min",
        "1 h 0 min",
        "2 h 5 min",
    ]


# ------------------------------------------------------------------------------------------------------------ for real


BATCHES = 5  # of a task of 40 questions with two choices


class Slow(StubEngine):
    """Takes its time; what it answers depends on the weights, as the gate wants it."""

    def __init__(self, control: Path, weights: Path) -> None:
        super().__init__(self._computes)
        self.control = control
        self.shift = zlib.crc32(weights.read_bytes()) / 2**32

    def _computes(self, batch: int) -> None:
        with (self.control / "batches").open("ab") as file:
            file.write(b".")
        time.sleep(60.0 if (self.control / "for_ever").exists() else 0.02)

    def answer(self, requests: Sequence[Request]) -> Iterator[Response]:
        for response in super().answer(requests):
            yield replace(response, log_likelihood=(response.log_likelihood or 0.0) - self.shift)


class Two(Place):
    """A machine with two slots, on both of which one checkpoint may be."""

    def config(self, state: str = "state") -> Config:
        config = super().config(state)
        return config.model_copy(update={"worker": config.worker.model_copy(update={"slots": 2, "shards": 2})})

    def driven(self, arrival: Arrival, hear: Callable[[dict[str, Any]], None]) -> list[Outcome]:
        config = self.config()
        todo = plan(arrival, Wanted(read_lock(config.lock_path)), config, self.store)
        return list(drive(todo, config, self.store, actor="test", on_message=hear))

    def batches(self) -> int:
        return (self.control / "batches").stat().st_size


def of(said: Sequence[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [one for one in said if one["type"] == kind]


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Two]:
    """Of two tasks that take the same time."""
    place = Two(tmp_path)
    for name in ("sums", "more"):
        place.write_task(name)
    place.sync()
    for seed in range(3):
        make_checkpoint(place.checkpoints / "a" / f"step_{seed}", seed)

    def load(path: Path, settings: RunSettings) -> Slow:
        return Slow(place.control, path / "model.safetensors")

    monkeypatch.setattr(worker, "load_engine", load)
    with forked(place):
        yield place


@pytest.mark.slow
def test_two_workers_share_a_checkpoint_out_once_something_is_known(two: Two) -> None:
    """And are both stopped where their driver stumbles."""
    first, second, third = [two.arrive(f"a/step_{seed}") for seed in range(3)]
    said: list[dict[str, Any]] = []
    assert [one.status for one in two.driven(first, said.append)] == ["published"] * 2
    (planned,) = of(said, "planned")
    assert [one["expected_seconds"] for one in planned["shards"]] == [None]  # nobody has asked it yet

    assert hold(second, two.config().cache_dir)
    said.clear()
    outcomes = two.driven(second, said.append)
    assert sorted((one.task, one.status) for one in outcomes) == [("more", "published"), ("sums", "published")]
    (planned,), (took,) = of(said, "planned"), of(said, "took")
    assert sorted(one["tasks"] for one in planned["shards"]) == [["more"], ["sums"]]
    assert all(one["expected_seconds"] > 0 and one["seconds"] > 0 for one in took["shards"])
    assert len({message["pid"] for message in of(said, "hello")}) == 2
    assert two.batches() == 2 * 2 * BATCHES  # of each checkpoint all once
    assert not held(two.config().cache_dir)

    two.command("for_ever")
    begun: list[str] = []

    def hear(message: dict[str, Any]) -> None:
        if message["type"] == "started":
            begun.append(message["task"])
        if len(begun) == 2:
            raise KeyError("a fault of its own")

    started = time.monotonic()
    with pytest.raises(KeyError):
        two.driven(third, hear)
    assert time.monotonic() - started < 10
    assert launching.running(two.config()) == []

    rows = two.sql("select load_seconds, expected_seconds, seconds, computed_tokens from evaluations")
    assert sum(row["load_seconds"] > 0 for row in rows) == 3
    assert sum(row["expected_seconds"] is not None for row in rows) == 2
    assert {row["computed_tokens"] for row in rows} == {None}  # the stub does not count


@pytest.mark.slow
def test_what_befalls_two_workers_at_once_counts_once_and_the_hold_stays_until_all_is_done(
    two: Two, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = two.arrive("a/step_0"), two.arrive("a/step_1")
    subject, cache = tries.arrival_subject(second), two.config().cache_dir
    real = checkpoints.stage

    def stage(*args: Any, **keys: Any) -> Any:
        if (two.control / "away").exists():
            raise StoreError("the file server is away", remedy="wait")
        return real(*args, **keys)

    monkeypatch.setattr(checkpoints, "stage", stage)
    assert [one.status for one in two.driven(first, lambda message: None)] == ["published"] * 2
    assert hold(second, cache)

    two.command("away")
    for launches in (1, 2):
        assert {one.status for one in two.driven(second, lambda message: None)} == {"failed"}
        assert len(tries.history(two.store, subject)) == 2 * launches
    assert tries.state(two.store, subject) is None  # four tries, which were two
    assert held(cache)
    two.revoke("away")

    (b,) = plan(second, Wanted(read_lock(two.config().lock_path), ["sums"]), two.config(), two.store).tasks

    def of_lost(plan: Plan, most: int) -> list[Plan]:
        """As if the folder of the worker with the task `more` were gone."""
        return [replace(plan, tasks=tasks) for tasks in ((b,), ())]

    with monkeypatch.context() as patched:
        patched.setattr(planning, "share_out", of_lost)
        outcomes = two.driven(second, lambda message: None)
    assert {one.task: one.status for one in outcomes} == {"sums": "published", "more": "failed"}
    assert held(cache)  # both workers ended well, and one task was never asked
    assert [one.status for one in two.driven(second, lambda message: None)] == ["published"] * 2
    assert not held(cache)


@pytest.mark.slow
def test_a_later_tier_finds_a_checkpoint_that_its_trainer_has_deleted(two: Two) -> None:
    """What is held is left to the next tier; without tiers nothing is left."""
    plain, arrival = two.config(), two.arrive("a/step_0")
    tiered = plain.model_copy(update={"queue": Queue(tiers=(Tier(name="quick", tasks=("sums",)),))})
    assert hold(arrival, plain.cache_dir)
    shutil.rmtree(arrival.uri)
    left: list[int] = []
    for config, task in ((tiered, "sums"), (plain, "more")):
        todo = plan(arrival, Wanted(read_lock(config.lock_path), [task]), config, two.store)
        assert [one.status for one in drive(todo, config, two.store, actor="test")] == ["published"]
        left.append(len(held(config.cache_dir)))
    assert left == [1, 0]


def test_of_what_is_left_of_an_array_each_worker_has_its_own_tasks(tmp_path: Path) -> None:
    """The folder of the other element is gone."""
    config, whole = Two(tmp_path).config(), made_up("ab", {"a": 1.0, "b": 1.0}, 0.1)
    parts = planning.share_out(whole, 2)
    assert len(parts) == 2
    left, gone = folders.make_folders(parts, config)
    gone.rename(tmp_path / "gone")
    name = jobs.name_of(whole)
    (shard,) = slurm._living(name, whole, [("71_0", "RUNNING", name, str(left / "job.sh"))], config)
    assert shard.plan == parts[0]
    told = {f"{name}-1": ray.Job("RUNNING", place=jobs.place_of(left))}
    (shard,) = ray._living(whole, told, config)
    assert shard.plan == parts[0]


class Stubborn:
    """A worker that cannot be stopped, or is."""

    def __init__(self, stopped: list[str], name: str, *, is_deaf: bool) -> None:
        self.stopped, self.name, self.is_deaf = stopped, name, is_deaf

    def stop(self) -> None:
        self.stopped.append(self.name)
        if self.is_deaf:
            raise StoreError("it does not hear", remedy="none")


def test_where_one_cannot_be_started_all_that_were_are_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped: list[str] = []
    begun = [Stubborn(stopped, "first", is_deaf=True), Stubborn(stopped, "second", is_deaf=False)]

    def start(folder: Path, slot: object, config: Config) -> Any:
        if not begun:
            raise OSError("no more processes")
        return begun.pop(0)

    monkeypatch.setattr(local, "_start", start)
    config = Two(tmp_path).config()
    config = config.model_copy(update={"worker": config.worker.model_copy(update={"slots": 3, "shards": 3})})
    with pytest.raises(StoreError):
        local.launch(made_up("a", {}, None), lambda places: [made_up("a", {}, None)] * places, config)
    assert sorted(stopped) == ["first", "second"]


def test_what_waits_goes_before_a_second_worker(tmp_path: Path) -> None:
    config, whole = Two(tmp_path).config(), made_up("ab", {}, None)

    def places(others: int) -> int:
        seen: list[int] = []

        def split(places: int) -> list[Plan]:
            seen.append(places)
            return []  # nobody is to be started here

        assert launching.launch(whole, config, split=split, others=others) == []
        return seen[0]

    assert [places(others) for others in (0, 1, 7)] == [2, 1, 1]


def test_of_a_job_in_a_clusters_queue_no_time_left_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    waits = Running(made_up("a", {}, None), (), 1, is_orphan=False, job="slurm 71")
    hello = {"type": "hello", "host": "node4", "devices": None}
    assert [one.waits for one in (waits, replace(waits, messages=(hello,)), replace(waits, job=None))] == [
        True,
        False,
        False,
    ]
    of_job = status.CheckpointStatus("a", "queued", where=waits.where, seconds_left=64.0, workers=(64.0,))
    print_status([of_job, replace(of_job, waits_for_cluster=True)], all_tasks=False)
    told = [line.strip() for line in capsys.readouterr().out.splitlines() if "slurm 71" in line]
    assert told == ["on slurm 71; about 64 s left", "on slurm 71; about 64 s once it has begun"]


def test_status_says_when_all_is_done() -> None:
    whole = made_up("abc", {"a": 30.0, "b": 10.0, "c": 20.0}, 4.0)

    def message(kind: str, task: str, time: float, **more: int) -> dict[str, Any]:
        return {"type": kind, "task": task, "time": time, **more}

    begins = Running(whole, (), 1, is_orphan=False)
    assert status._worker_left(begins) == 64.0
    messages = (
        message("started", "a", 1.0, total=100),  # of an earlier life of its job
        message("progress", "a", 2.0, done=0, total=100),
        message("started", "a", 10.0, total=100),
        {"type": "loaded", "time": 70.0},
        message("progress", "a", 70.0, done=20, total=100),  # the journal had them
    )
    assert status._worker_left(replace(begins, messages=messages[:3])) == 64.0
    assert status._worker_left(replace(begins, messages=messages)) == 0.8 * 30.0 + 10.0 + 20.0
    messages = (*messages, message("progress", "a", 80.0, done=45, total=100), message("committed", "b", 81.0))
    assert status._worker_left(replace(begins, messages=messages)) == 22.0 + 20.0  # 25 took 10 s
    unknown = Running(made_up("ab", {"a": 1.0}, 1.0), (), 1, is_orphan=False)
    assert status._worker_left(unknown) is None
    # One task of it has failed, one is queued in a run of another tier: its worker goes on all the same.
    at_work = status.CheckpointStatus("a", "failed", workers=(50.0,))
    queued = [status.CheckpointStatus(str(i), "queued", waiting=40.0) for i in range(3)]
    assert status.queue_left([at_work, *queued], 2) == 90.0
    assert status.queue_left([replace(at_work, waiting=45.0), *queued], 2) == 125.0
    both = status.CheckpointStatus("a", "queued", workers=(100.0, 100.0))  # they load
    assert status.queue_left([both, status.CheckpointStatus("b", "queued", waiting=100.0)], 2) == 200.0
    for unknown_ in (status.CheckpointStatus("?", "queued", waiting=None), replace(at_work, workers=(None,))):
        assert status.queue_left([at_work, *queued, unknown_], 2) is None
    assert status.queue_left([status.CheckpointStatus("done", "published")], 2) is None
