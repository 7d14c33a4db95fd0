"""Results are looked over, thinned out and carried elsewhere: nothing is lost, doubled or asked again."""

import json
import os
import shutil
from pathlib import Path

import pytest
from fault_tools import Place, die_at_write
from keeping_world import command, copied, load, make_world, never, work
from store_processes import kill_after

from eval_platform import keeping, warehouse
from eval_platform.errors import ConfigError, SamplesPruned, SchemaError
from eval_platform.store import LocalStore, arrivals, bundles, commits, decisions, journal, layout, log, read_record
from eval_platform.store.announcements import announcement
from eval_platform.store.s3 import S3Store
from eval_platform.values import Checkpoint, Response

pytest_plugins = ["store_roots"]

QUERIES = (
    "select * from leaderboard order by all",
    "select * exclude (tags), tags::varchar as tags from arrivals order by all",
    "select * from learning_curves order by all",
    "select * exclude (metrics, extracted), metrics::varchar as m from samples order by evaluation_id, position",
    *(f"from {name} order by all" for name in ("evaluations", "scores", "decisions", "checks", "tasks", "datasets")),
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def place(world: Place, tmp_path: Path) -> Place:
    return copied(world, tmp_path)


def answers(store, catalog, queries=QUERIES):
    warehouse.refresh(store, catalog)
    with warehouse.connect(catalog, store, samples=queries is QUERIES) as con:
        return [con.sql(query).to_arrow_table().to_pylist() for query in queries]


def files(store):
    """What lies in the root, but for the log, whose names are random, and the root's own id."""
    return {e.key: store.read(e.key) for e in store.list("") if not e.key.startswith(("log/", "root.json"))}


def slots(place):
    """(task, step) -> evaluation_id."""
    found = {}
    for entry in place.store.list("evaluations/"):
        record = json.loads(place.store.read(entry.key))
        found[record["task"], int(record["key"][-1])] = record["evaluation_id"]
    return found


def decided(store, slot, status, actor, action):
    told = {"status": status, "actor": actor, "action": action}
    decisions.append(store, slot, 1, checks=[], reasons=["so"], gate_version="1", **told)


# --- verify


def test_verify_names_each_damage_and_only_those(place, monkeypatch):
    store, results = place.store, place.results
    warehouse.refresh(store, place.config().catalog_path)
    monkeypatch.setattr(bundles, "AT_LEAST", 1)
    bundles.bundle(store)
    [bundle] = [entry.key for entry in store.list("bundles/")]
    slot = slots(place)
    record = {key: commits.read(store, identity, 1) for key, identity in slot.items()}
    altered = results / record["choices", 1]["samples"]["key"]
    shutil.copy(results / record["choices", 2]["samples"]["key"], altered)
    lost_samples = record["words", 1]["samples"]["key"]
    store.delete(lost_samples)
    lost_commit = layout.evaluation(slot["choices", 2], 1)
    store.delete(lost_commit)
    lost_pointer = layout.answers(record["words", 2]["answers_id"], slot["words", 2], 1)
    store.delete(lost_pointer)
    other_score = layout.evaluation(slot["words", 3], 1)
    store.put(other_score, store.read(other_score).replace(b'"truncated": 0', b'"truncated": 1'))
    other_model = layout.evaluation(slot["choices", 3], 1)
    store.put(other_model, store.read(other_model).replace(record["choices", 3]["checkpoint_id"].encode(), b"0" * 32))
    torn = layout.decision(slot["words", 1], 1, 1)
    store.put(torn, store.read(torn)[:-20])
    documents = next(entry.key for entry in store.list("datasets/") if entry.key.endswith("documents.parquet"))
    shutil.copy(results / record["words", 2]["samples"]["key"], results / documents)
    segment = next(store.list("journal/")).key
    store.put(segment, store.read(segment)[:-2])
    unseen = layout.arrival(record["words", 3]["key"], 1)
    for entry in store.list("log/"):
        if json.loads(store.read(entry.key)).get("kind") == "arrival" and b"step_3" in store.read(entry.key):
            store.delete(entry.key)
    told_by_name = next(entry.key for entry in store.list("log/") if "+kind=identity" in entry.key)
    store.put(told_by_name, b"{")
    (results / "notes.txt").write_text("mine")
    store.create("tries/evaluations/astray/1.end.json", b'{"schema_version": 1}')

    told = command(place, "verify", "--json")
    assert told.code == 1
    found: dict[str, str] = {}
    for one in told.json["findings"]:
        if one["kind"] == "damage":
            assert one["remedy"]
            found[one["key"]] = found.get(one["key"], "") + one["problem"]
    mirror = str(place.config().catalog_path)
    altered_key, identity = str(altered.relative_to(results)), layout.arrival_identity(record["choices", 3]["key"], 1)
    assert set(found) == {
        *(altered_key, lost_samples, lost_commit, lost_pointer, other_model, torn, documents),
        *(segment, unseen, identity, mirror, told_by_name, bundle),
    }
    assert "SHA-256" in found[altered_key]
    assert f"the samples that {layout.evaluation(slot['words', 1], 1)} names are lost" in found[lost_samples]
    # Nothing in the commit guards a figure of its own: that the catalog read it before does.
    assert "the table evaluations" in found[mirror]
    leftover = {one["key"]: one["problem"] for one in told.json["findings"] if one["kind"] == "leftover"}
    assert leftover.keys() >= {"notes.txt", record["choices", 2]["samples"]["key"]}
    announced = [key for key, problem in leftover.items() if "announces is not there" in problem]
    assert [key for key in announced if "+kind=evaluation" in key and slot["choices", 2] in key] == announced
    assert announced


def test_a_lost_log_and_catalog_are_rebuilt_from_the_files(place):
    before = answers(place.store, place.config().catalog_path, QUERIES[:3])
    shutil.rmtree(place.results / "log")
    told = command(place, "rebuild", "--json")
    assert told.code == 0
    announced = sum(announcement(entry.key) is not None for entry in place.store.list(""))
    assert 6 * 3 < told.json["announced"] <= announced
    assert keeping.announce_again(place.store) == 0
    answer = command(place, "verify")
    assert answer.code == 0
    assert "whole; 0 leftovers" in answer.out
    assert answers(place.store, place.config().catalog_path, QUERIES[:3]) == before


def test_a_root_that_has_lost_its_own_record_and_what_a_killed_verify_left(place, monkeypatch):
    catalog = place.config().catalog_path
    place.store.create("log/2026-01-01/000000-ab+kind==FF.json", b"{")  # no name that we give, nor a record
    assert keeping.rebuild(place.store, catalog) == 0
    place.store.delete("log/2026-01-01/000000-ab+kind==FF.json")
    before = {path.name for path in catalog.parent.iterdir()}

    def die(what, done, total):
        if "catalog" in what and done == total:
            os.kill(os.getpid(), 9)

    kill_after(lambda: keeping.verify(place.store, catalog, die))
    assert {path.name for path in catalog.parent.iterdir()} > before
    place.store.delete(layout.ROOT)
    [found] = [one for one in keeping.verify(place.store, catalog).findings if one.kind == "damage"]
    assert (found.key, "tasks sync" in found.remedy) == (layout.ROOT, True)
    left = {path.name for path in catalog.parent.iterdir()} - before
    assert all(name.endswith(".lock") for name in left), left


def test_results_of_a_newer_layout_are_not_taken_over(place, tmp_path):
    place.store.put(layout.ROOT, b'{"schema_version": 1, "root_id": "x", "layout": 2}')
    target = LocalStore(tmp_path / "target")
    with pytest.raises(SchemaError, match=r"layout version 2.*\n.*upgrade"):
        keeping.transfer(place.store, target)
    assert list(target.list("")) == []


# --- prune


def test_what_is_pruned_is_told_and_never_asked_again(place):
    store = place.store
    rules = ("prune", "--keep-last", "1", "--json")
    catalog = place.config().catalog_path
    before = answers(store, catalog, QUERIES[:3])
    size = sum(entry.size for entry in store.list("samples/"))
    dry = command(place, *rules).json
    assert {(one["step"], one["task"]) for one in dry["pruned"]} == {
        (s, t) for s in (1, 2) for t in ("choices", "words")
    }
    assert (dry["done"], dry["kept"]) == (False, 2)
    assert sum(entry.size for entry in store.list("samples/")) == size
    # Another evaluation of the same answers is at work on what it asks more.
    of_another = journal.Journal(store, commits.read(store, slots(place)["words", 1], 1)["answers_id"], 1, "f" * 32)
    of_another.append([Response("r", 1, None, None, "Yes", 1, "stop", 0)])
    assert command(place, *rules, "--yes").json["pruned"] == dry["pruned"]
    assert list(of_another.finished()) == [("r", 1)]
    assert sum(entry.size for entry in store.list("samples/")) == size - dry["bytes"]

    assert answers(store, catalog, QUERIES[:3]) == before
    looked = command(place, "samples", "--checkpoint", "runs/a/step_1", "--task", "choices")
    assert looked.code == 2
    assert "were pruned at 20" in looked.err
    assert "--keep-last 1" in looked.err
    assert keeping.verify(store, catalog).findings == ()

    arrival = arrivals.newest(store, "runs/a/step_1")
    assert arrival is not None
    said = work(place, store, arrival, never)
    assert [message["type"] for message in said] == ["linked", "linked"]
    with pytest.raises(SamplesPruned, match="its scores stand"):
        commits.read_samples(store, commits.read(store, said[0]["evaluation_id"], 1) or {})


def test_a_task_scored_anew_is_asked_where_its_answers_were_pruned(place):
    """Not an error that the answers are gone, and no figure from half of them."""
    keeping.prune(
        place.store,
        keeping.choose(place.store, place.config().catalog_path, keeping.Keep(last=1)).prune,
        actor="me",
        rule="test",
    )
    place.write_task("choices", 6, metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}])
    place.sync()
    for step, origin in ((1, "asked"), (3, "rescored")):
        arrival = arrivals.newest(place.store, f"runs/a/step_{step}")
        assert arrival is not None
        (message,) = [one for one in work(place, place.store, arrival, load) if one["type"] == "committed"]
        assert (message["task"], message["origin"]) == ("choices", origin)


def test_the_rules_keep(world, tmp_path):
    both = ("choices", "words")
    for keep, gone in (
        (keeping.Keep(published_only=True), {("choices", 2)}),
        (keeping.Keep(every=2), {(task, step) for task in both for step in (1, 3)}),
        (keeping.Keep(last=2, published_only=True), {("choices", 1), ("words", 1), ("choices", 2)}),
        (keeping.Keep(last=1, every=2), {("choices", 1), ("words", 1)}),
    ):
        chosen = keeping.choose(world.store, tmp_path / "catalog.duckdb", keep)
        assert {(one.task, one.step) for one in chosen.prune} == gone, keep
        assert chosen.kept == 6 - len(gone)


def test_the_newest_steps_are_steps_and_not_folders(place, tmp_path):
    """A run's end often lies there twice, as its last checkpoint and as the model that goes out."""
    first = json.loads(place.store.read(layout.arrival_identity("runs/a/step_1", 1)))
    last = arrivals.newest(place.store, "runs/a/step_3")
    assert last is not None
    told = {"uri": "u", "fingerprint": "f", "run": last.run, "step": 3, "watcher": "w"}
    final, _ = arrivals.register(place.store, key="runs/a/final", **told)
    arrivals.record_identity(
        place.store, final, Checkpoint(first["checkpoint_id"], first["weights_id"], None, "transformers")
    )
    assert keeping.choose(place.store, tmp_path / "catalog.duckdb", keeping.Keep(last=2)).prune == ()


def test_the_best_is_kept_and_what_is_not_decided(place, tmp_path):
    catalog = tmp_path / "catalog.duckdb"
    slot = slots(place)
    place.store.delete(layout.decision(slot["choices", 2], 1, 1))
    values = {step: commits.read(place.store, slot["choices", step], 1)["primary"]["value"] for step in (1, 3)}
    best = max((3, 1), key=lambda step: values[step])
    chosen = keeping.choose(place.store, catalog, keeping.Keep(best=("choices",)))
    gone = {("words", 2), *((task, 4 - best) for task in ("choices", "words"))}
    assert {(one.task, one.step) for one in chosen.prune} == gone
    assert keeping.choose(place.store, catalog, keeping.Keep(best=("choices:acc",))) == chosen
    for keep in (keeping.Keep(), keeping.Keep(best=("nothing",)), keeping.Keep(best=("choices:nothing",))):
        with pytest.raises(ConfigError, match="remedy"):
            keeping.choose(place.store, catalog, keep)


def test_a_prune_that_was_killed_goes_on(place, tmp_path):
    chosen = keeping.choose(place.store, tmp_path / "catalog.duckdb", keeping.Keep(last=1)).prune

    def half() -> None:
        die_at_delete(4)
        keeping.prune(place.store, chosen, actor="me", rule="first")

    kill_after(half)
    catalog = tmp_path / "catalog.duckdb"
    report = keeping.verify(place.store, catalog)
    assert [one.kind for one in report.findings] == ["leftover"]
    left = keeping.choose(place.store, catalog, keeping.Keep(last=1)).prune
    assert 0 < len(left) < len(chosen)
    keeping.prune(place.store, left, actor="me", rule="second")
    told = [commits.tombstone(place.store, one.evaluation_id, one.attempt) for one in chosen]
    assert {one["rule"] for one in told if one} == {"first", "second"}


def die_at_delete(n):
    """kill -9 of this process when it would remove its n-th file."""
    real, count = LocalStore.delete, iter(range(n - 1))

    def delete(self, key):
        if next(count, None) is None:
            os.kill(os.getpid(), 9)
        real(self, key)

    LocalStore.delete = delete


# --- export and import


def test_there_and_back_sql_says_the_same(place, new_s3_store, tmp_path):
    told = answers(place.store, place.config().catalog_path)
    assert all(rows for rows in told)
    bucket = new_s3_store()
    assert keeping.transfer(place.store, bucket).evaluations == 6
    back = Place(tmp_path / "back")
    with pytest.raises(ConfigError, match="both source and target"):
        keeping.transfer(bucket, bucket)
    moved = keeping.transfer(bucket, back.store)
    assert (moved.ok, moved.evaluations, moved.present) == (True, 6, 0)
    assert answers(back.store, back.config().catalog_path) == told
    wanted = {
        key: body for key, body in files(place.store).items() if not key.startswith(("tries/", "leases/", "journal"))
    }
    assert files(back.store).items() >= {k: v for k, v in wanted.items() if ".seen-" not in k}.items()

    # Again only what is new is written: a person's word.
    slot = slots(back)["choices", 2]
    decisions.append(
        back.store,
        slot,
        1,
        status="published",
        checks=[],
        reasons=["so"],
        gate_version="1",
        actor="me",
        action="release",
    )
    assert command(place, "import", str(back.results)).code == 0
    standing = decisions.standing(place.store, slot, 1)
    assert standing is not None
    assert (standing.n, standing.status, standing.actor) == (2, "published", "me")
    log = len(list(bucket.list("log/")))
    again = keeping.transfer(back.store, bucket)
    assert (again.files, again.evaluations, again.present, again.said) == (1, 0, 6, [])
    assert len(list(bucket.list("log/"))) == log + 1

    # What is pruned in the bucket arrives without its samples elsewhere, and is whole there as well.
    catalog = tmp_path / "of_the_bucket.duckdb"
    keeping.prune(bucket, keeping.choose(bucket, catalog, keeping.Keep(last=1)).prune, actor="me", rule="test")
    assert keeping.verify(bucket, catalog).findings == ()
    thinned = Place(tmp_path / "thinned")
    assert keeping.transfer(bucket, thinned.store).evaluations == 6
    assert len(list(thinned.store.list("samples/"))) == len(list(bucket.list("samples/"))) == 2
    assert keeping.transfer(thinned.store, back.store).files == 0
    assert len(list(back.store.list("samples/"))) == 6


def test_killed_at_any_write_it_goes_on(world, tmp_path):
    whole = LocalStore(tmp_path / "whole")
    keeping.transfer(world.store, whole)
    n_files = len(files(whole))
    for n in range(1, 2 * n_files, 41):
        target = LocalStore(tmp_path / f"killed{n}")

        def until_killed(n=n, target=target):
            die_at_write(n)
            keeping.transfer(world.store, target)
            os.kill(os.getpid(), 9)  # there were fewer writes

        kill_after(until_killed)
        before = {slot for entry in target.list("evaluations/") if (slot := entry.key)}
        assert all(layout_whole(target, key) for key in before)
        assert keeping.transfer(world.store, target).ok
        assert files(target) == files(whole)


def test_export_and_import_killed_half_way_into_a_bucket_go_on(place, new_s3_store, tmp_path, monkeypatch):
    """Each killed with other uploads in flight: what a commit there names is there, and once more brings the rest."""
    whole = LocalStore(tmp_path / "whole")
    keeping.transfer(place.store, whole)
    expected, bucket = files(whole), new_s3_store()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", bucket.settings.endpoint)  # of the export's configuration

    def export():
        return command(place, "export", bucket.uri)

    def import_():
        return command(place, "import", str(place.results), store=bucket)

    there = 0
    for run in (export, import_):

        def until_killed(run=run):
            die_at_create(len(expected) // 2)
            run()

        kill_after(until_killed)
        assert there < len(files(bucket)) < len(expected)
        there = len(files(bucket))
        assert all(layout_whole(bucket, entry.key) for entry in bucket.list("evaluations/"))
    answer = export()
    assert answer.code == 0, answer
    assert files(bucket) == expected
    told = [entry["evaluation_id"] for entry in log.read(bucket, log.dates(bucket)) if entry["kind"] == "evaluation"]
    assert set(told) == set(slots(place).values())


def die_at_create(n):
    """kill -9 of this process when it would create its n-th object, whatever its other threads are at."""
    real, count = S3Store.create, iter(range(n - 1))

    def create(self, key, body):
        if next(count, None) is None:
            os.kill(os.getpid(), 9)
        return real(self, key, body)

    S3Store.create = create


def layout_whole(store, key):
    """Whether all that the commit names is there."""
    record = json.loads(store.read(key))
    store.read(record["samples"]["key"])
    store.read(layout.prompts(record["prompts_id"]))
    return True


def test_what_the_target_has_stands_and_what_is_lost_is_refused_by_name(place, world, tmp_path):
    slot = slots(place)
    target = LocalStore(tmp_path / "target")
    keeping.transfer(world.store, target)

    def rewrite(store, key, old, new):
        body = store.read(key)
        assert old in body
        store.put(key, body.replace(old, new))

    def value(one):
        return commits.read(place.store, slot[one], 1)

    # Another try's result with the same scores; another with other scores; samples damaged on the way.
    own = value(("words", 1))["try"].encode()
    rewrite(target, layout.evaluation(slot["words", 1], 1), own, b"f" * 32)
    other = json.loads(target.read(layout.evaluation(slot["words", 2], 1)))
    other["scores"][0]["value"] = 0.123
    target.put(layout.evaluation(slot["words", 2], 1), json.dumps(other).encode())
    target.delete(layout.evaluation(slot["words", 3], 1))
    place.store.put(value(("words", 3))["samples"]["key"], b"no samples")
    target.delete(value(("words", 3))["samples"]["key"])
    # Decided otherwise there.
    decided(target, slot["choices", 1], "held", "me", "retract")
    decided(place.store, slot["choices", 1], "published", "you", "recheck")
    moved = keeping.transfer(place.store, target)
    told = {one.key: (one.kind, one.reason) for one in moved.said}
    assert {key: kind for key, (kind, _) in told.items()} == {
        layout.evaluation(slot["words", 1], 1): "kept",
        layout.evaluation(slot["words", 2], 1): "refused",
        layout.evaluation(slot["words", 3], 1): "refused",
        layout.decision(slot["choices", 1], 1, 2): "refused",
    }
    assert "0.123" not in told[layout.evaluation(slot["words", 2], 1)][1]  # the primary value is named, not a part
    assert "damaged" in told[layout.evaluation(slot["words", 3], 1)][1]
    assert commits.read(target, slot["words", 3], 1) is None
    assert command(place, "export", str(tmp_path / "target")).code == 1


def test_a_name_goes_on_standing_for_the_targets_task(place, tmp_path):
    """A laptop's newer definition comes over with its results, and does not become what is asked there."""
    target = LocalStore(tmp_path / "target")
    keeping.transfer(place.store, target)
    names = {store: [e.key for e in store.list(layout.task_names("words"))] for store in (place.store, target)}
    standing = read_record(target, names[target][-1])["task_id"]
    place.write_task("words", 3)
    place.sync()
    newer = read_record(place.store, layout.newest_numbered(place.store, layout.task_names("words"))[1])["task_id"]
    assert newer != standing

    moved = keeping.transfer(place.store, target)

    assert [entry.key for entry in target.list(layout.task_names("words"))] == names[target]
    assert read_record(target, layout.task(newer))["task_id"] == newer  # what was asked is known there
    assert [(one.kind, one.key) for one in moved.said] == [("kept", layout.task_names("words"))]
    assert "count as stale" in moved.said[0].reason
    # Where the name is new it comes with its history; what a kill left out of that is filled in.
    fresh = LocalStore(tmp_path / "fresh")
    keeping.transfer(place.store, fresh)
    assert [entry.key for entry in fresh.list(layout.task_names("words"))] == [
        layout.task_name("words", n) for n in (1, 2)
    ]
    fresh.delete(layout.task_name("words", 1))
    assert keeping.transfer(place.store, fresh).files == 1


def test_nothing_damaged_is_carried_on(place, tmp_path):
    """What is created stands for ever: a file that is torn here would be torn there, and never mended."""
    store, slot = place.store, slots(place)
    torn = layout.decision(slot["words", 1], 1, 1)
    identity = layout.arrival_identity("runs/a/step_3", 1)
    prompts = layout.prompts((commits.read(store, slot["choices", 1], 1) or {})["prompts_id"])
    for key in (torn, identity, prompts):
        store.put(key, store.read(key)[:-20])
    target = LocalStore(tmp_path / "target")
    moved = keeping.transfer(store, target)
    assert {(one.kind, one.key) for one in moved.said} == {
        *(("refused", key) for key in (torn, prompts, layout.arrival("runs/a/step_3", 1))),
        *(("refused", layout.evaluation(slot[one], 1)) for one in slot if one[0] == "choices" or one[1] == 3),
    }
    assert moved.evaluations == 2
    assert keeping.verify(target, tmp_path / "catalog.duckdb").ok
    assert commits.read(target, slot["words", 1], 1) is not None


def test_a_rerun_comes_over_as_one_that_is_answered_and_never_beside_another_result(place, world, tmp_path):
    slot = slots(place)
    target = LocalStore(tmp_path / "target")
    keeping.transfer(world.store, target)
    doubted = layout.evaluation(slot["words", 1], 1)
    other = json.loads(target.read(doubted))
    other["scores"][0]["value"] = 0.123
    target.put(doubted, json.dumps(other).encode())
    for one in (("words", 1), ("words", 2)):
        assert commits.open_rerun(place.store, slot[one], "me", "again") == 2
        record = {**(commits.read(place.store, slot[one], 1) or {}), "attempt": 2}
        place.store.create(layout.evaluation(slot[one], 2), json.dumps(record).encode())
    moved = keeping.transfer(place.store, target)
    assert [(one.kind, one.key) for one in moved.said] == [
        ("refused", key) for key in (doubted, layout.evaluation(slot["words", 1], 2))
    ]
    assert commits.attempts(target, slot["words", 1]) == [1]
    assert commits.attempts(target, slot["words", 2]) == [1, 2]
    target.read(layout.evaluation_asked(slot["words", 2], 2))
    # Until its result is there, whoever sees that it was asked for would ask the model.
    told = [one["kind"] for one in log.read(target, log.dates(target)) if one.get("attempt") == 2]
    assert told == ["evaluation", "asked"]


def test_a_key_that_is_another_checkpoint_there_is_refused(place, world, tmp_path):
    target = LocalStore(tmp_path / "target")
    keeping.transfer(world.store, target)
    for entry in list(target.list("evaluations/")):
        target.delete(entry.key)
    for suffix, field in ((".json", b'"fingerprint": "'), (".identity.json", b'"checkpoint_id": "')):
        key = f"arrivals/runs/a/step_2/1{suffix}"
        target.put(key, target.read(key).replace(field, field + b"x"))
    moved = keeping.transfer(place.store, target)
    assert {one.key for one in moved.said} == {
        layout.arrival("runs/a/step_2", 1),
        *(layout.evaluation(slots(place)[task, 2], 1) for task in ("choices", "words")),
    }
    assert moved.evaluations == 4

    # A checkpoint root of the same name elsewhere: before anything is written.
    target = LocalStore(tmp_path / "another")
    target.create("roots/runs.json", place.store.read("roots/runs.json").replace(b"checkpoints", b"others"))
    answer = command(place, "export", target.uri)
    assert answer.code == 2
    assert "one key would be two checkpoints" in answer.err
    assert files(target).keys() == {"roots/runs.json"}
    with pytest.raises(ConfigError, match="no results in"):
        keeping.transfer(LocalStore(tmp_path / "nothing"), place.store)
