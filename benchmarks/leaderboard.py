"""How fast does the leaderboard answer at 10,000 checkpoints x 20 tasks, and what does one more evaluation cost?

Run from the repository's root: `python -m benchmarks.leaderboard [--checkpoints 10000] [--tasks 20]`. The catalog is
filled by SQL with made-up rows (3 scores, 1 decision and 10 checks an evaluation); the evaluation that comes on top is
written to the store and read by a real refresh. Prints one figure a line; exits 1 when the leaderboard's median is
over 0.5 s.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb

from eval_platform import warehouse
from eval_platform.store import LocalStore, arrivals, create_record, layout, log
from eval_platform.values import Checkpoint

LIMIT_SECONDS = 0.5
REPEATS = 7

QUERIES = {
    "leaderboard, all of it": "select * from leaderboard",
    "leaderboard, best 20 of a task": "select * from leaderboard where task = 'task-3' order by value desc limit 20",
    "leaderboard, one run": "select * from leaderboard where run = 'run-7' order by step, task",
    "leaderboard, mean by run and task": "select run, task, avg(value) from leaderboard group by all",
    "learning curves, one run": "select * from learning_curves where run = 'run-7' order by task, metric, step",
    "evaluations by status": "select status, count(*) from evaluations group by all",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--checkpoints", type=int, default=10_000)
    parser.add_argument("--tasks", type=int, default=20)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        return _measure(Path(folder), arguments.checkpoints, arguments.tasks)


def _measure(folder: Path, checkpoints: int, tasks: int) -> int:
    store, catalog = LocalStore(folder / "results"), folder / "catalog.duckdb"
    warehouse.rebuild(store, catalog)
    _fill(catalog, checkpoints, tasks)
    print(f"{checkpoints:,} checkpoints x {tasks} tasks, catalog of {catalog.stat().st_size / 2**20:.0f} MiB")
    board = 0.0
    for name, sql in QUERIES.items():
        rows, median, worst = _timed(lambda sql=sql: warehouse.query(catalog, store, sql).num_rows)
        print(f"{name:<34} {median:7.3f} s median, {worst:7.3f} s worst of {REPEATS}; {rows:,} rows")
        board = max(board, median) if name.startswith("leaderboard") else board
    extra = iter(range(REPEATS))
    _, median, worst = _timed(lambda: _one_more(store, next(extra)), lambda: warehouse.refresh(store, catalog))
    print(f"{'refresh after one evaluation':<34} {median:7.3f} s median, {worst:7.3f} s worst of {REPEATS}")
    _, median, worst = _timed(lambda: warehouse.behind(store, catalog))
    print(f"{'is it behind? (nothing new)':<34} {median:7.3f} s median, {worst:7.3f} s worst of {REPEATS}")
    if board > LIMIT_SECONDS:
        print(f"too slow: the leaderboard must answer in {LIMIT_SECONDS} s", file=sys.stderr)
        return 1
    return 0


def _timed(prepare: Callable[[], Any], timed: Callable[[], Any] | None = None) -> tuple[Any, float, float]:
    """(last result, median, worst) of `timed` after `prepare`, or of `prepare` itself."""
    seconds, result = [], None
    for _ in range(REPEATS):
        if timed is not None:
            prepare()
        begun = time.perf_counter()
        result = (timed or prepare)()
        seconds.append(time.perf_counter() - begun)
    return result, statistics.median(seconds), max(seconds)


def _fill(catalog: Path, checkpoints: int, tasks: int) -> None:
    """100 checkpoints a run; every 20th evaluation is held."""
    con = duckdb.connect(str(catalog))
    numbers = [checkpoints, tasks]
    evaluations = "range(?) c, range(?) t"
    con.execute(
        """
        insert into arrivals by name
        select format('root/run-{}/step-{}', range // 100, range % 100) as key, 1 as n, true as newest,
            md5(range::varchar) as fingerprint, md5(range::varchar) as checkpoint_id,
            md5('w' || range) as weights_id, 'run-' || range // 100 as run,
            range % 100 * 1000 as step, map {'lr': '0.1'} as tags, now() as arrived_at, false as failed
        from range(?)
        """,
        [checkpoints],
    )
    con.execute(
        """
        insert into tasks by name
        select 'task-' || range as name, 1 as n, md5('task' || range) as task_id, true as current,
            'acc' as primary_metric, true as higher_is_better, 0.25 as chance from range(?)
        """,
        [tasks],
    )
    con.execute(
        f"""
        insert into evaluations by name
        select md5(c.range || '-' || t.range) as evaluation_id, 1 as attempt,
            if((c.range + t.range) % 20 = 0, 'held', 'published') as status,
            status = 'published' as shown, false as stale, [] as reasons,
            if(t.range % 5 = 0, ['chance: not above chance'], []) as warnings, 'task-' || t.range as task,
            md5('task' || t.range) as task_id, md5('ask' || t.range) as ask_id,
            md5('a' || c.range || '-' || t.range) as answers_id, md5('p' || t.range) as prompts_id,
            md5('d' || c.range || '-' || t.range) as answers_digest, md5(c.range::varchar) as checkpoint_id,
            md5('w' || c.range) as weights_id, md5('tokenizer') as tokenizer_id, md5('settings') as settings_id,
            '{{"dtype": "float32"}}' as settings, 1 as arrival,
            format('root/run-{{}}/step-{{}}', c.range // 100, c.range % 100) as key, 'acc' as primary_metric,
            random() as primary_value, true as higher_is_better, 'asked' as origin, 'float32' as dtype,
            ['cpu'] as devices, now() as started_at, now() as finished_at, 4.0 as seconds,
            format('samples/{{}}/{{}}.parquet', md5(c.range || '-' || t.range), md5(random()::varchar)) as samples_key
        from {evaluations}
        """,
        numbers,
    )
    con.execute(
        f"""
        insert into scores by name
        select md5(c.range || '-' || t.range) as evaluation_id, 1 as attempt, 'task-' || t.range as task, '' as subset,
            unnest(['acc', 'acc_norm', 'f1']) as metric, random() as value, 0.01 as standard_error, 0.1 as ci_low,
            0.9 as ci_high, 'wilson' as interval_method, 1000 as n,
            if((c.range + t.range) % 20 = 0, 'held', 'published') as status, status = 'published' as shown,
            if(t.range % 5 = 0, ['chance: not above chance'], []) as warnings, md5('task' || t.range) as task_id,
            md5(c.range::varchar) as checkpoint_id, md5('settings') as settings_id
        from {evaluations}
        """,
        numbers,
    )
    con.execute(
        f"""
        insert into decisions by name
        select md5(c.range || '-' || t.range) as evaluation_id, 1 as attempt, 1 as n, true as stands,
            'published' as status, 'gate' as action, 'benchmark' as actor, now() as time
        from {evaluations}
        """,
        numbers,
    )
    con.execute(
        f"""
        insert into checks by name
        select md5(c.range || '-' || t.range) as evaluation_id, 1 as attempt, 1 as n,
            'check-' || unnest(range(10)) as name, true as passed, 'error' as severity, '' as reason
        from {evaluations}
        """,
        numbers,
    )
    con.close()


def _one_more(store: LocalStore, n: int) -> None:
    """A new checkpoint, evaluated on one task and published, as files of the store."""
    arrival, _ = arrivals.register(
        store, key=f"root/new/step-{n}", uri="new", fingerprint=str(n), run="new", step=n, watcher="benchmark"
    )
    arrivals.record_identity(store, arrival, Checkpoint(f"checkpoint-{n}", f"weights-{n}", None, "transformers"))
    evaluation_id = f"evaluation-{n}"
    score = {"task": "task-3", "subset": "", "metric": "acc", "value": 0.5, "n": 1000}
    log.write(store, "evaluation", evaluation_id=evaluation_id, attempt=1)
    record = {
        "checkpoint_id": f"checkpoint-{n}",
        "task": "task-3",
        "task_id": "task-id-3",
        "key": arrival.key,
        "arrival": arrival.n,
        "settings_id": "settings",
        "scores": [score],
    }
    create_record(store, layout.evaluation(evaluation_id, 1), record)
    log.write(store, "decision", evaluation_id=evaluation_id, attempt=1, n=1)
    create_record(store, layout.decision(evaluation_id, 1, 1), {"status": "published", "checks": []})


if __name__ == "__main__":
    sys.exit(main())
