"""What does the leaderboard cost on a results root in a bucket? Seconds and requests, against moto on this machine.

Run from the repository's root: `python -m benchmarks.s3_results [--checkpoints 125] [--tasks 8]`. Records of so many
evaluations are made in a folder by the store's own functions and copied to a bucket; then a machine that has seen
nothing asks for the leaderboard, asks again, and asks after one evaluation more; then the records are bundled, and
another such machine asks. Exits 1 when its answer takes over 15 s, the same again over 2 s, or one evaluation more is
over 50 requests. moto is one Python process on the same cores: a real service answers many requests at once.
"""

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from eval_platform import warehouse
from eval_platform.config import S3
from eval_platform.store import Store, arrivals, open_store, tries
from eval_platform.store.bundles import bundle
from eval_platform.store.s3_requests import Requests
from tests.s3_server import CREDENTIALS, s3_server
from tests.warehouse_world import World

FIRST_SECONDS, AGAIN_SECONDS, ONE_MORE_REQUESTS = 15.0, 2.0, 50
BOARD = "select * from leaderboard"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--checkpoints", type=int, default=125)
    parser.add_argument("--tasks", type=int, default=8)
    arguments = parser.parse_args()
    os.environ.update(CREDENTIALS)
    with tempfile.TemporaryDirectory() as folder, s3_server() as server:
        server.make_bucket("results")
        store = open_store("s3://results/team", S3(endpoint=server.endpoint))
        return _measure(store, Path(folder), arguments.checkpoints, arguments.tasks)


def _measure(store: Store, folder: Path, checkpoints: int, tasks: int) -> int:
    local = World(folder)
    for task in range(tasks):
        local.task(f"task-{task}", f"id-{task}")
    for checkpoint in range(checkpoints):
        _evaluate(local, checkpoint, tasks)
    copied = _copy(local.store, store)
    print(f"{checkpoints:,} checkpoints x {tasks} tasks: {copied:,} objects; load {os.getloadavg()[0]:.1f}", flush=True)

    catalog, other = (folder / "state" / f"{name}.duckdb" for name in ("catalog", "other"))
    _timed("first leaderboard, nothing bundled", lambda: warehouse.query(catalog, store, BOARD))
    again, _ = _timed("the same again", lambda: warehouse.query(catalog, store, BOARD))
    bucket = World(folder / "other")
    bucket.store = store  # type: ignore[assignment] -- a folder's store is what tests give it
    _evaluate(bucket, checkpoints, 1)
    _, requests = _timed("after one evaluation more", lambda: warehouse.query(catalog, store, BOARD))
    _timed("compact", lambda: bundle(store))
    first, _ = _timed("first leaderboard, bundled", lambda: warehouse.query(other, store, BOARD))
    if first > FIRST_SECONDS or again > AGAIN_SECONDS or requests > ONE_MORE_REQUESTS:
        print(
            f"too much: at most {FIRST_SECONDS:.0f} s, {AGAIN_SECONDS:.0f} s and {ONE_MORE_REQUESTS} requests",
            file=sys.stderr,
        )
        return 1
    return 0


def _evaluate(world: World, checkpoint: int, tasks: int) -> None:
    """One arrival, evaluated and published as a worker and its driver leave it."""
    key, checkpoint_id = f"runs/a/step_{checkpoint:06}", f"{checkpoint:032x}"
    arrival = world.arrive(key, None, step=checkpoint, run="a")
    begun = tries.start(world.store, tries.arrival_subject(arrival))
    world.identify(arrival, checkpoint_id)
    begun.end("done")
    for task in range(tasks):
        evaluation = world.publish(checkpoint_id, f"task-{task}", f"id-{task}", key=key, arrival=arrival.n)
        tries.start(world.store, tries.evaluation_subject(evaluation, 1)).end("committed")
    assert arrivals.newest(world.store, key) == arrival


def _copy(source: Store, target: Store) -> int:
    keys = [entry.key for entry in source.list("")]
    with ThreadPoolExecutor(target.requests_at_once) as pool:
        for _ in pool.map(lambda key: target.put(key, source.read(key)), keys):
            pass
    return len(keys)


def _timed(what: str, ask: Callable[[], Any]) -> tuple[float, int]:
    """(seconds, requests), printed."""
    with counted() as requests:
        began = time.perf_counter()
        answer = ask()
        seconds = time.perf_counter() - began
    told = ", ".join(f"{count:,} {verb}" for verb, count in requests.most_common())
    found = f"{answer:,} records" if isinstance(answer, int) else f"{answer.num_rows:,} rows"
    print(f"{what:<34} {seconds:7.2f} s, {requests.total():,} requests ({told}); {found}", flush=True)
    return seconds, requests.total()


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """How often which kind of request was made meanwhile ("read", "list", "create")."""
    counts: Counter[str] = Counter()
    run = Requests.run

    def counting(self: Requests, what: str, call: Callable[[Any], Any]) -> Any:
        counts[what.partition(" ")[0]] += 1
        return run(self, what, call)

    with patch.object(Requests, "run", counting):
        yield counts


if __name__ == "__main__":
    sys.exit(main())
