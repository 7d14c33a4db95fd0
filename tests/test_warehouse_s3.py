"""A results root in a bucket: the catalog is the one that a folder gives, and costs few requests."""

import random
import threading
from collections import Counter
from functools import partial

import pytest
from warehouse_world import World, dump

from eval_platform import warehouse
from eval_platform.store import LocalStore, bundles, layout, tries
from eval_platform.warehouse import catalog as catalog_module
from eval_platform.warehouse.listed import bundles_of, listed_for

pytest_plugins = ["store_roots"]


@pytest.fixture
def local(tmp_path):
    """Published, held, linked, failed, at work, asked again: of everything something."""
    world = World(tmp_path)
    world.task("add", "add-1")
    for step, name in enumerate("abc"):
        # Of keys, one may lie below another, and sort between another's files.
        arrival = world.arrive(f"r/run-{'/'.join('abc'[: step + 1])}", f"c-{name}", step=step)
        begun = tries.start(world.store, tries.arrival_subject(arrival))
        begun.end("done")
        evaluation = world.commit(f"c-{name}", "add", "add-1", key=arrival.key)
        if name != "c":
            world.decide(evaluation, "held" if name == "b" else "published")
    world.decide(evaluation, "published")
    world.decide(evaluation, "held", action="retract")
    world.arrive("r/run-a", "c-a2", step=9)
    broken = world.arrive("r/run-z", None, step=9)
    world.fail(tries.arrival_subject(broken))
    world.fail(("evaluations", "f" * 32, 1), key="r/run-a", arrival=1, task="add", task_id="add-1")
    tries.start(world.store, ("evaluations", "e" * 32, 1), evaluation={"task": "add"})
    return world


@pytest.fixture
def bucket(local, new_s3_store, tmp_path):
    world = World(tmp_path / "bucket")
    world.store = new_s3_store()
    for entry in local.store.list(""):
        if not entry.key.startswith(("leases/", "answers/")):  # no catalog reads them
            world.store.put(entry.key, local.store.read(entry.key))
    return world


def test_a_catalog_built_from_a_bucket_is_the_folders_and_one_evaluation_more_costs_little(
    local, bucket, s3_asked, monkeypatch
):
    monkeypatch.setattr(catalog_module, "_ASKED_SINGLY", 2)  # as where there are many
    warehouse.refresh(local.store, local.catalog)
    records = sum(not entry.key.startswith(("log/", "leases/", "answers/", "tries/")) for entry in local.store.list(""))
    s3_asked()
    warehouse.refresh(bucket.store, bucket.catalog)
    asked = s3_asked()
    assert dump(bucket.catalog) == dump(local.catalog)
    # Every record once, the log by its names; what is left are the tries and the root's own.
    assert asked["GET"] <= records + 30, asked
    assert asked["LIST"] <= 25, asked

    for world in (local, bucket):
        world.publish("c-new", "add", "add-1")
    monkeypatch.undo()
    s3_asked()
    assert warehouse.refresh(bucket.store, bucket.catalog)
    asked = s3_asked()
    assert asked.total() <= 36, asked  # three tries that did not end well are looked at again
    warehouse.refresh(local.store, local.catalog)
    sql = "select evaluation_id, attempt, status from evaluations order by all"
    answers = [warehouse.query(world.catalog, world.store, sql).to_pylist() for world in (local, bucket)]
    assert answers[0] == answers[1]

    monkeypatch.setattr(catalog_module, "_ASKED_SINGLY", 2)
    monkeypatch.setattr(bundles, "AT_LEAST", 1)
    bundled = bundles.bundle(bucket.store)
    assert bundled >= records - 3  # the task's and the root's records are none of a catalog's many
    assert bundles.bundle(bucket.store) == 0
    local.publish("c-newer", "add", "add-1")
    bucket.publish("c-newer", "add", "add-1")
    s3_asked()
    warehouse.rebuild(bucket.store, bucket.catalog)
    asked = s3_asked()
    assert asked["GET"] <= 20, asked
    warehouse.rebuild(local.store, local.catalog)
    answers = [warehouse.query(world.catalog, world.store, sql).to_pylist() for world in (local, bucket)]
    assert answers[0] == answers[1]


class Meanwhile(LocalStore):
    """A folder that is read as a bucket is, and in which somebody does something before some of the requests."""

    requests_at_once = 2

    def __init__(self, folder, acts, chance):
        super().__init__(folder)
        self.acts, self.chance, self.turn = acts, chance, threading.Lock()
        self.asked = Counter()

    def _between(self):
        with self.turn:
            if self.acts and self.chance.random() < 0.5:
                self.acts.pop()()

    def list(self, prefix, delimiter=None, after=None):
        self.asked["list"] += 1
        self._between()
        for entry in super().list(prefix, delimiter, after):
            yield entry
            self._between()

    def read(self, key, start=0, end=None):
        self.asked["read"] += 1
        self._between()
        return super().read(key, start, end)


@pytest.mark.parametrize("seed", range(2))
def test_who_reads_while_records_are_written_and_bundled_misses_nothing_and_sees_nothing_twice(
    tmp_path, monkeypatch, seed
):
    chance = random.Random(seed)
    monkeypatch.setattr(bundles, "AT_LEAST", chance.choice([1, 3, 10]))
    monkeypatch.setattr(bundles, "AT_MOST", chance.choice([5, 1000]))
    monkeypatch.setattr(catalog_module, "_BATCH_SUBJECTS", chance.choice([2, 5, 1000]))
    monkeypatch.setattr(catalog_module, "_ASKED_SINGLY", chance.choice([1, 1000]))
    world = World(tmp_path)
    world.task("add", "add-1")

    def evaluate(n):
        arrival = world.arrive(f"r/run/{n}", f"c-{n}", step=n)
        world.publish(f"c-{n}", "add", "add-1", key=arrival.key)

    for n in range(4):
        evaluate(n)
    acts = [partial(evaluate, n) for n in range(4, 8)] + [partial(bundles.bundle, world.store)] * 4
    chance.shuffle(acts)
    seen = Meanwhile(world.store.folder, acts, chance)
    board = "select key, value from leaderboard order by step"
    while True:
        warehouse.rebuild(seen, world.catalog)
        with warehouse.connect(world.catalog, world.store, samples=False) as con:
            keys = [key for key, _ in con.sql(board).fetchall()]
        assert len(keys) == len(set(keys))
        assert set(keys) >= {f"r/run/{n}" for n in range(4)}
        if not acts:
            break
    warehouse.refresh(seen, world.catalog)
    after_all = dump(world.catalog)
    warehouse.rebuild(world.store, world.catalog)
    assert after_all == dump(world.catalog)
    assert warehouse.query(world.catalog, world.store, board).num_rows == 8


def test_what_was_listed_for_many_says_what_the_store_says_of_each(local, monkeypatch):
    store = Meanwhile(local.store.folder, [], random.Random(0))
    subjects = [("evaluation", entry.key.split("/")[1]) for entry in store.list("evaluations/", delimiter="/")]
    subjects += [("arrival", "r/run-a/b"), ("arrival", "r/run-a/b/c")]
    seen = listed_for(store, subjects, bundles_of(store))
    prefixes = [f"{top}{name}/" for kind, name in subjects for top in ("evaluations/", "decisions/", "arrivals/")]
    for prefix in (*prefixes, "arrivals/r/run-a/b/c/", "arrivals/r/run-a/b/", "log/", "tries/arrivals/r/run-a/b/1/"):
        for delimiter in (None, "/"):
            entries = list(store.list(prefix, delimiter))
            assert list(seen.list(prefix, delimiter)) == entries
            for after in [entry.key for entry in entries][:2]:
                assert list(seen.list(prefix, delimiter, after)) == list(store.list(prefix, delimiter, after))
    with pytest.raises(KeyError):
        seen.read("arrivals/r/run-a/b/7.json")
    assert seen.read("arrivals/r/run-a/b/1.json") == store.read("arrivals/r/run-a/b/1.json")

    keys = {entry.key for entry in store.list("decisions/")}
    wanted = keys | {"decisions/none/1-1.json", "arrivals/none/1.json"}
    found = catalog_module._existing(store, wanted)
    monkeypatch.setattr(catalog_module, "_ASKED_SINGLY", 2)
    store.asked.clear()
    assert catalog_module._existing(store, wanted) == found == keys
    assert store.asked == {"list": 1, "read": 1}


def test_a_bundle_that_is_deleted_while_a_catalog_is_built_is_done_without(tmp_path, monkeypatch):
    monkeypatch.setattr(bundles, "AT_LEAST", 1)
    world = World(tmp_path)
    world.task("add", "add-1")
    world.publish("c", "add", "add-1", key=world.arrive("r/run/1", "c").key)
    assert bundles.bundle(world.store)

    class Deleting(Meanwhile):
        def list(self, prefix, delimiter=None, after=None):
            for entry in super().list(prefix, delimiter, after):
                if prefix == layout.BUNDLES:
                    self.delete(entry.key)
                yield entry

    warehouse.rebuild(Deleting(world.store.folder, [], random.Random(0)), world.catalog)
    assert warehouse.query(world.catalog, world.store, "from leaderboard").num_rows == 1
