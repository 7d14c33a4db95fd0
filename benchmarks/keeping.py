"""How long do `rebuild` and `verify` take on a large root? Writes one of N evaluations, as a platform would.

    python -m benchmarks.keeping --evaluations 20000

    python -m benchmarks.keeping --evaluations 20000 --s3      the same root in moto's memory: `rebuild` from a bucket

The records are those of the catalog's tests (tests/warehouse_world.py) with a small samples file each: sizes are true,
contents are made up, and so `verify` finds what is made up, which is not what is timed. Figures go to docs/log.md.
"""

import argparse
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from s3_server import CREDENTIALS, FILLED_WITH, INDEXED, s3_server  # pyright: ignore[reportMissingImports]
from warehouse_world import World, commit_record  # pyright: ignore[reportMissingImports]

from benchmarks.s3_listing import cpu_of
from benchmarks.s3_results import counted
from eval_platform import keeping, warehouse
from eval_platform.config import S3
from eval_platform.store import commits, layout, log, open_store
from eval_platform.store.bundles import bundle
from eval_platform.store.records import encode

TASKS = 20


def write_root(world: World, evaluations: int) -> None:
    """N evaluations of TASKS tasks: a commit, a decision, an answers pointer, samples and two log entries of each."""
    for number in range(TASKS):
        world.task(f"task{number}", f"id{number}")
    store = world.store
    samples = pa.table({"sample_id": [f"{n:032x}" for n in range(100)], "score": [0.5] * 100})
    for number in range(evaluations):
        checkpoint, task = divmod(number, TASKS)
        key = f"r/run/{checkpoint}"
        if task == 0:
            world.arrive(key, f"c{checkpoint}", step=checkpoint)
        record = commit_record(f"c{checkpoint}", f"task{task}", f"id{task}", key=key)
        identity = record["evaluation_id"]
        record["samples"] = commits.write_samples(store, identity, "t", samples)
        pointer = {"try": "t", "time": record["finished_at"]}
        store.create(layout.answers(record["answers_id"], identity, 1), encode(pointer))
        log.write(store, "evaluation", evaluation_id=identity, attempt=1)
        store.create(layout.evaluation(identity, 1), encode(record))
        world.decide(identity)


def timed(what: str, do: Callable[[], Any]) -> Any:
    began, cpu = time.perf_counter(), time.process_time()
    found = do()
    took, used = time.perf_counter() - began, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{what:<46} {took:8.1f} s   {used:8.1f} s of a core   peak {peak:6.0f} MiB", flush=True)
    return found


def steps(folder: Path, evaluations: int) -> Iterator[tuple[str, Callable[[], Any]]]:
    world = World(folder)
    store, catalog = world.store, world.catalog
    yield f"writing {evaluations} evaluations", lambda: write_root(world, evaluations)
    yield "rebuild: log and catalog", lambda: keeping.rebuild(store, catalog)
    yield "a refresh after it, nothing new", lambda: warehouse.refresh(store, catalog)

    def without_log() -> int:
        shutil.rmtree(folder / "results" / "log")
        return keeping.rebuild(store, catalog)

    yield "rebuild, the log lost", without_log
    yield "verify: every file, log and catalog", lambda: keeping.verify(store, catalog)
    yield "prune --keep-last 1: choosing", lambda: keeping.choose(store, catalog, keeping.Keep(last=1))


def in_a_bucket(folder: Path, evaluations: int, *, bundled: bool) -> None:
    """`rebuild` of a root in a bucket on a machine that has seen nothing: with last night's bundles, or without any."""
    world = World(folder)
    timed(f"writing {evaluations} evaluations", lambda: write_root(world, evaluations))
    if bundled:
        timed("bundling them", lambda: bundle(world.store))
    filled = folder / "objects.jsonl"
    with filled.open("w", encoding="utf-8") as lines:
        for entry in world.store.list(""):
            body = world.store.read(entry.key).decode("latin-1")
            lines.write(json.dumps(["evals", f"team/{entry.key}", body]) + "\n")
    with s3_server(**{FILLED_WITH: str(filled), INDEXED: "1"}) as server:  # a rebuild of a whole root writes nothing
        assert server.pid is not None
        store, before = open_store("s3://evals/team", S3(endpoint=server.endpoint)), cpu_of(server.pid)
        with counted() as requests:
            what = "with bundles" if bundled else "nothing bundled"
            timed(f"rebuild from a bucket, {what}", lambda: keeping.rebuild(store, world.catalog))
        asked = ", ".join(f"{n:,} {verb}" for verb, n in requests.most_common())
        print(f"  {asked}; {cpu_of(server.pid) - before:.0f} s of a core were moto's", flush=True)
        timed("a refresh after it, nothing new", lambda: warehouse.refresh(store, world.catalog))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluations", type=int, default=20_000)
    parser.add_argument("--folder", type=Path, help="where the root is made; default: a temporary one")
    parser.add_argument("--s3", action="store_true", help="the root in a bucket of moto's")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        if given.s3:
            os.environ.update(CREDENTIALS)
            in_a_bucket(Path(folder, "bundled"), given.evaluations, bundled=True)
            in_a_bucket(Path(folder, "plain"), given.evaluations // 10, bundled=False)
            return
        for what, do in steps(Path(folder), given.evaluations):
            found = timed(what, do)
            if isinstance(found, int) and not isinstance(found, bool):
                print(f"  {found} log entries were missing")
            elif isinstance(found, keeping.Verified):
                print("  " + json.dumps({"files": found.files, "bytes": found.n_bytes}))


if __name__ == "__main__":
    main()
