"""Strangers' SQL: it reads the catalog and the samples, and can do nothing else."""

import hashlib
import os
import signal
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from warehouse_world import World, rows

from eval_platform import answers, warehouse
from eval_platform.errors import QueryError
from eval_platform.scoring import SAMPLE_SCHEMA
from eval_platform.store import commits


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = World(tmp_path_factory.mktemp("sql"))
    world.task("add", "add-1")
    world.arrive("r/run/1", "A", step=1)
    for settings_id, held in (("s", False), ("other", True)):
        evaluation = world.commit("A", "add", "add-1", settings_id=settings_id)
        world.decide(evaluation, "held" if held else "published")
        write_samples(world, f"samples/{evaluation}/t1.parquet", settings_id)
    prompts = pa.table({"sample_id": ["i0", "i1"], "prompt": ["2+2=", "3+3="]})
    world.store.create("prompts/prompts-add.parquet", parquet(prompts))
    pruned = world.publish("A", "add", "add-1", settings_id="pruned")
    commits.prune_samples(world.store, commits.read(world.store, pruned, 1) or {}, actor="me", rule="a test's")
    # Beside what evaluations name lies what a dead try left: never to be counted.
    write_samples(world, "samples/" + "0" * 32 + "/dead.parquet", "dead")
    warehouse.refresh(world.store, world.catalog)
    return world


def write_samples(world, key, response):
    base = dict.fromkeys(SAMPLE_SCHEMA.names)
    made = [{**base, "sample_id": f"i{i}", "position": i, "repeat": 0, "response": response} for i in range(2)]
    world.store.create(key, parquet(pa.Table.from_pylist(made, schema=SAMPLE_SCHEMA)))


def parquet(table):
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def ask(world, sql, **options):
    return rows(warehouse.query(world.catalog, world.store, sql, **options))


def fingerprint(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def places(world, tmp_path_factory):
    """What attacks name: a file outside, the catalog, a sample, a link inside the results that points outside."""
    outside = tmp_path_factory.mktemp("outside")
    (outside / "secret.csv").write_text("password\n1234\n")
    (outside / "secret.parquet").write_bytes(parquet(pa.table({"password": [1234]})))
    link = world.store.folder / "samples" / "link.parquet"
    link.symlink_to(outside / "secret.parquet")
    sample = next(path for path in world.store.folder.glob("samples/*/t1.parquet"))
    return {"out": outside, "catalog": world.catalog, "sample": sample, "link": link, "results": world.store.folder}


ATTACKS = [
    # writing
    "create table evil (i int)",
    "create table memory.main.evil as select 1",
    "create temp table evil as select 1",
    "create view evil as select 1",
    "create macro evil() as 1",
    "create secret (type s3, key_id 'a', secret 'b')",
    "insert into scores select * from scores",
    "update scores set value = 1",
    "delete from scores",
    "drop table scores",
    "alter table scores add column evil int",
    "truncate scores",
    "copy scores to '{out}/evil.csv'",
    "copy (select 1) to '{sample}' (format parquet)",
    "copy scores from '{out}/secret.csv'",
    "export database '{out}/evil'",
    "import database '{out}'",
    "with x as (copy (select 1) to '{out}/evil.csv') select 1",
    "with x as (copy (select 1) to '{sample}') select 1",
    "with x as (insert into scores (task) values ('evil') returning task) select * from x",
    "with x as (delete from scores returning task) select * from x",
    "select * from (copy (select 1) to '{sample}')",
    "from query('copy (select 1) to ''{sample}''')",
    "from query('create table memory.main.evil as select 1')",
    "from json_execute_serialized_sql('{{}}')",
    "explain analyze copy (select 1) to '{sample}'",
    "explain analyze create table memory.main.evil as select 1",
    "explain explain analyze copy (select 1) to '{sample}'",
    "begin",
    "commit",
    "checkpoint",
    "vacuum",
    # several statements
    "select 1; select 2",
    "select 1; drop table scores",
    "select 1); copy (select 1) to '{sample}'; select (1",
    # loading and settings
    "install httpfs",
    "load httpfs",
    "load '{out}/evil.duckdb_extension'",
    "attach '{out}/evil.duckdb'",
    "attach '{catalog}' as again",
    "detach catalog",
    "use memory",
    "set enable_external_access = true",
    "set allowed_directories = ['/']",
    "set lock_configuration = false",
    "set variable evil = 1",
    "reset memory_limit",
    "pragma database_list",
    "pragma enable_profiling",
    "call enable_logging()",
    "from enable_logging(storage = 'file', storage_path = '{out}/evil')",
    "from enable_profiling(save_location = '{out}/evil')",
    "prepare p as select 1",
    "execute p",
    # reading elsewhere
    "from read_csv('/etc/passwd')",
    "from '/etc/passwd'",
    "from '{out}/secret.csv'",
    "from read_parquet('{out}/secret.parquet')",
    "from read_parquet('{results}/../outside/secret.parquet')",
    "from read_parquet('{link}')",
    "from read_text('{out}/secret.csv')",
    "from read_blob('{out}/secret.csv')",
    "from read_json('{out}/secret.csv')",
    "from glob('/etc/*')",
    "from glob('{results}/**')",
    "from read_text('{results}/tasks/by-name/add/1.json')",
    "from sniff_csv('{out}/secret.csv')",
    "from parquet_metadata('{out}/secret.parquet')",
    "from read_duckdb('{out}/evil.duckdb')",
    "from 'http://127.0.0.1:9/evil.csv'",
    "from read_parquet('s3://bucket/evil.parquet')",
    "from duckdb_secrets()",
    "from which_secret('s3://bucket', 's3')",
    "select getenv('HOME')",
    # Python's own variables
    "from python_table",
    "from rows",
    # no query at all
    "",
    " ; ",
    "-- only a comment",
]


@pytest.mark.parametrize("attack", ATTACKS)
def test_whatever_is_not_a_question_to_the_catalog_is_refused(world, places, attack):
    python_table = pa.table({"password": [1234]})
    assert python_table.num_rows == 1
    before = fingerprint(world.store.folder), fingerprint(places["out"]), world.catalog.read_bytes()
    with pytest.raises(QueryError) as refused:
        ask(world, attack.format(**places))
    assert refused.value.remedy
    assert "1234" not in str(refused.value)
    assert (fingerprint(world.store.folder), fingerprint(places["out"]), world.catalog.read_bytes()) == before
    assert {path.name for path in world.catalog.parent.iterdir()} == {"catalog.duckdb", "catalog.duckdb.lock"}


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("select task, value from leaderboard where settings_id = 's'", [("add", 0.5)]),
        ("select 1;", [(1,)]),
        ("select 1 -- and a comment", [(1,)]),
        ("with x as (select 41 as i) select i + 1 from x", [(42,)]),
        ("values (2), (1) order by 1", [(1,), (2,)]),
        ("from range(3) order by range desc", [(2,), (1,), (0,)]),
        ("select 'it''s {}%'", [("it's {}%",)]),
        ("select count(*) from (show tables) where name = 'leaderboard'", [(1,)]),
        ("select column_name from (describe leaderboard) limit 1", [("key",)]),
        ("select tags['lr'] from arrivals", [("0.1",)]),
    ],
)
def test_what_a_select_may_do(world, question, answer):
    assert ask(world, question) == answer


@pytest.mark.parametrize(
    "question",
    [
        "show tables",
        "describe samples",
        "summarize scores",
        "EXPLAIN select 1 from scores",
        "explain analyze from samples",
    ],
)
def test_questions_about_the_tables_themselves(world, question):
    assert warehouse.query(world.catalog, world.store, question).num_rows > 0


def test_show_tables_lists_what_the_errors_list(world):
    shown = {name for (name,) in ask(world, "show tables")}
    assert {"leaderboard", "learning_curves", "held", "failed", "evaluations", "scores"} <= shown
    assert not [name for name in shown if name.startswith("_") or "bookkeeping" in name]


@pytest.mark.parametrize(
    ("mistake", "help_"),
    [
        ("select * from leaderbord", "perhaps leaderboard is meant"),
        ("select * from sample", "perhaps samples is meant"),
        ("select vale from leaderboard", "leaderboard has the columns key, run, step"),
        ("selec 1", "perhaps|views"),
        ("select 'a'::int", "views"),
    ],
)
def test_a_mistake_is_answered_with_what_there_is(world, mistake, help_):
    with pytest.raises(QueryError, match=help_) as refused:
        ask(world, mistake)
    assert "from query(?)" not in str(refused.value)


def test_samples_are_those_that_evaluations_name_with_who_was_asked_what(world):
    sql = "select key, run, step, task, status, attempt, sample_id, response, prompt from samples order by all"
    assert ask(world, sql) == [
        ("r/run/1", "run", 1, "add", "held", 1, "i0", "other", "2+2="),
        ("r/run/1", "run", 1, "add", "held", 1, "i1", "other", "3+3="),
        ("r/run/1", "run", 1, "add", "published", 1, "i0", "s", "2+2="),
        ("r/run/1", "run", 1, "add", "published", 1, "i1", "s", "3+3="),
    ]
    assert ask(
        world,
        "select distinct response from SAMPLES s join evaluations e using (evaluation_id) where e.status = 'published'",
    ) == [("s",)]


def test_samples_that_are_lost_are_missed_in_no_silence(tmp_path):
    """A query that would count them fails and says whose they are; a query about others answers."""
    world = World(tmp_path)
    world.task("add", "add-1")
    world.arrive("r/run/1", "A", step=1)
    there = world.publish("A", "add", "add-1", settings_id="there")
    write_samples(world, f"samples/{there}/t1.parquet", "there")
    lost = world.publish("A", "add", "add-1", settings_id="lost")
    for sql in (
        "select count(*) from samples",
        "select * from samples limit 1",
        "select count(*) from samples where response = 'there'",
        "select avg(position) from samples where prompt is null and position < 1",
        f"select count(*) from samples where evaluation_id = '{lost}'",
    ):
        with pytest.raises(QueryError, match=rf"(?s)samples/{lost}/t1.parquet.*not in.*eval-platform rerun"):
            ask(world, sql)
    assert ask(world, f"select count(*), min(response) from samples where evaluation_id <> '{lost}'") == [(2, "there")]
    assert ask(world, "select response from samples where settings_id = 'there' and position = 1") == [("there",)]
    assert ask(world, "select count(*) from evaluations") == [(2,)]
    columns = [name for (name,) in ask(world, "select column_name from (describe samples)")]
    # What people are shown of another task (`eval-platform samples --task copy`).
    world.task("copy", "copy-1")
    write_samples(world, f"samples/{world.publish('A', 'copy', 'copy-1')}/t1.parquet", "copied")
    shown = f"with shown as ({answers._SHOWN}) select response from shown where newest and not stale and task = 'copy'"
    assert ask(world, shown) == [("copied",), ("copied",)]

    # Pruned while the catalog does not know it yet.
    commits.prune_samples(world.store, commits.read(world.store, lost, 1) or {}, actor="me", rule="a test's")
    with warehouse.connect(world.catalog, world.store) as con:
        assert con.execute("select count(*) from samples").fetchall() == [(4,)]
        assert [row[0] for row in con.execute("describe samples").fetchall()] == columns


def test_a_store_without_samples_has_the_view_with_its_columns(tmp_path):
    empty = World(tmp_path)
    assert ask(empty, "select count(*) from samples") == [(0,)]
    columns = {name for (name,) in ask(empty, "select column_name from (describe samples)")}
    assert set(SAMPLE_SCHEMA.names) | {"key", "run", "step", "task", "prompt", "status"} <= columns
    assert ask(empty, "from leaderboard") == []


def test_a_sample_cannot_be_overwritten_though_it_can_be_read(world, places):
    """`allowed_paths` alone would let COPY write there: the SELECT-only road is what stands in between."""
    before = places["sample"].read_bytes()
    with pytest.raises(QueryError):
        ask(world, f"with samples as (copy (select 1) to '{places['sample']}') select 1")
    assert places["sample"].read_bytes() == before


def test_a_long_query_is_stopped(world):
    begun = time.monotonic()
    with pytest.raises(QueryError, match=r"longer than 0.5 s"):
        ask(
            world,
            "select count(*) from range(1000000) a, range(1000000) b where a.range * b.range % 7 = 3",
            timeout_s=0.5,
        )
    assert time.monotonic() - begun < 20


def test_too_much_memory_is_an_error_and_no_spill(world):
    with pytest.raises(QueryError, match=r"(?i)memory"):
        ask(world, "select list(a.range::varchar || repeat('x', 1000)) from range(100000000) a")


def test_ctrl_c_stops_a_query(world):
    # In the background of a shell a program starts with SIGINT ignored, and so do its children.
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import sys; from pathlib import Path; from eval_platform import warehouse; from eval_platform.store import *\n"
        "print('ready', flush=True)\n"
        "warehouse.query(Path(sys.argv[1]), LocalStore(sys.argv[2]), 'select count(*) from range(1000000) a, "
        "range(1000000) b where a.range * b.range % 7 = 3')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(world.catalog), world.store.uri],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(3)
    os.kill(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=30)  # well before the query's own 60 s are over
    assert "KeyboardInterrupt" in errors
    assert "QueryError" not in errors


def test_our_own_connection_is_locked_down_too(world):
    import duckdb

    con = warehouse.connect(world.catalog, world.store)
    try:
        assert con.execute("select count(*) from samples").fetchall() == [(4,)]
        for sql in ("drop table scores", "from read_csv('/etc/passwd')", "set lock_configuration = false"):
            with pytest.raises(duckdb.Error):
                con.execute(sql)
    finally:
        con.close()
