"""What does it cost to look at a large bucket? Seconds, requests, memory, and whose processor time it is.

Run from the repository's root: `python -m benchmarks.s3_listing [--checkpoints 10000] [--runs 100]`. The checkpoints,
of ten objects each, are in moto's memory from the start; all but two are known. Listed is everything; then come ticks,
as the sensor makes them: a look with a sweep of fifty known ones. moto is one Python process on the same cores, and
looks at every key of a bucket for each page that it lists (with `--indexed` it has an index, as real servers have):
its processor time is read apart from ours. A tick lists runs for about a second and goes on with the others in the
next, so that what is new is found within a round. Exits 1 when a listing is wrong, a tick takes over 2 s or adds over
50 MB, or what is new is not found.
"""

import argparse
import gc
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.s3_results import counted
from benchmarks.sensor_tick import peak_mb
from eval_platform.checkpoints import Found, Watch, discover
from eval_platform.checkpoints.buckets import bucket_listing
from eval_platform.config import S3, Root
from eval_platform.store import Entry
from eval_platform.store.s3 import S3Store
from tests.s3_server import CREDENTIALS, FILLED_WITH, INDEXED, s3_server

TICK_SECONDS, TICK_MB, SWEEP, TICKS = 2.0, 50.0, 50, 4
PATIENCE = 1.0  # as the sensor has it
_HEAD = json.dumps({"w": {"dtype": "I64", "shape": [1], "data_offsets": [0, 8]}})
FILES = {
    "config.json": '{"model_type": "llama"}',
    "generation_config.json": "{}",
    "tokenizer.json": "{}",
    "tokenizer_config.json": "{}",
    "special_tokens_map.json": "{}",
    "optimizer.bin": "x" * 100,
    "scheduler.bin": "x" * 100,
    "trainer_state.json": "{}",
    "_SUCCESS": "",
}


@dataclass
class Cost:
    """What one piece of work has cost. cpu: seconds of a core, ours and moto's."""

    seconds: float = 0.0
    ours: float = 0.0
    server: float = 0.0
    requests: dict[str, int] = field(default_factory=dict)
    megabytes: float = 0.0

    def __str__(self) -> str:
        n = sum(self.requests.values())
        return (
            f"{self.seconds:6.2f} s: {self.ours:5.2f} s of a core are ours, {self.server:6.2f} s moto's; {n} requests, "
            f"{1000 * self.server / max(n, 1):.0f} ms of moto each; {self.megabytes:.0f} MB more"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--checkpoints", type=int, default=10_000)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--indexed", action="store_true", help="moto finds a page as real servers do, by an index")
    arguments = parser.parse_args()
    os.environ.update(CREDENTIALS)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "objects.jsonl")
        keys = _write(file, arguments.checkpoints, arguments.runs)
        began = time.perf_counter()
        environment = {FILLED_WITH: str(file)} | ({INDEXED: "1"} if arguments.indexed else {})
        with s3_server(**environment) as server:
            print(f"moto holds {len(keys):,} objects after {time.perf_counter() - began:.0f} s", flush=True)
            assert server.pid is not None
            return _measure(S3(endpoint=server.endpoint), server.pid, keys, arguments.runs)


def _write(file: Path, checkpoints: int, runs: int) -> list[str]:
    """Two checkpoints more than are known are written. The keys below the prefix, in no order."""
    keys: list[str] = []
    with file.open("w", encoding="utf-8") as lines:
        for n in range(checkpoints + 2):
            for name, body in {**FILES, "model.safetensors": _weights(n)}.items():
                keys.append(f"{_place(n, runs)}/{name}")
                lines.write(json.dumps(["training", f"runs/{keys[-1]}", body]) + "\n")
    return keys


def _place(n: int, runs: int) -> str:
    return f"run-{n % runs:04}/step-{n // runs:06}"


def _weights(n: int) -> str:
    """Whole as far as its header can tell: one tensor with one number, which is `n`."""
    return (len(_HEAD).to_bytes(8, "little") + _HEAD.encode() + n.to_bytes(8, "little")).decode("latin-1")


def _measure(settings: S3, server: int, keys: list[str], runs: int) -> int:
    store = S3Store("s3://training/runs", settings)
    warm = next(store.list("", delimiter="/"))  # the client, made once
    assert warm.key.endswith("/")

    with _cost(server) as listing:
        listed = all(a == b for a, b in zip((e.key for e in store.list("")), sorted(keys), strict=True))
    print(f"all {len(keys):,} objects, right: {listed}: {listing}", flush=True)

    folders = sorted({key.rpartition("/")[0] for key in keys})
    new = {folders[1], folders[-1]}
    known = {f"b/{folder}": _fingerprint(store, folder, runs) for folder in folders if folder not in new}
    in_order = sorted(known)
    watch, root = Watch(), Root(name="b", path=store.uri, quiet_seconds=0)
    worst, most, right = Cost(), 0.0, listed
    wanted, seen = {f"b/{folder}" for folder in new}, set[str]()
    for tick in range(TICKS + runs):  # a round has come to its end by then
        at = tick * len(known) // TICKS % len(known)
        with _cost(server) as cost:
            found = {
                one.key
                for one in discover([root], known, watch, in_order[at : at + SWEEP], settings, PATIENCE)
                if isinstance(one, Found)
            }
        # What was found once is in a run where something is new, which every later look enters first.
        right &= seen <= found <= wanted
        seen |= found
        print(f"tick {tick + 1}, {len(known):,} known, {len(found)} found: {cost}", flush=True)
        worst, most = max(worst, cost, key=lambda one: one.seconds), max(most, cost.megabytes)
        if seen == wanted and tick + 1 >= TICKS:
            break
    right &= seen == wanted
    print(f"everything was found and nothing else: {right}; longest tick: {worst}; load {os.getloadavg()[0]:.1f}")
    if not right or worst.seconds > TICK_SECONDS or most > TICK_MB:
        print(f"not good enough: {TICK_SECONDS:.0f} s, {TICK_MB:.0f} MB", file=sys.stderr)
        return 1
    return 0


def _fingerprint(store: S3Store, folder: str, runs: int) -> str:
    """As a look at the bucket gives it, without the request: moto's ETags are MD5."""
    run, step = (int(part.rpartition("-")[2]) for part in folder.split("/"))
    n = step * runs + run
    bodies = {**FILES, "model.safetensors": _weights(n)}
    entries = [
        Entry(f"{folder}/{name}", len(body.encode("latin-1")), hashlib.md5(body.encode("latin-1")).hexdigest())
        for name, body in bodies.items()
    ]
    return bucket_listing(store, f"{folder}/", entries).fingerprint


@contextmanager
def _cost(server: int) -> Iterator[Cost]:
    cost = Cost()
    gc.collect()
    memory, cpu, others = peak_mb(), time.process_time(), cpu_of(server)
    began = time.perf_counter()
    with counted() as requests:
        yield cost
    cost.seconds = time.perf_counter() - began
    cost.ours, cost.server = time.process_time() - cpu, cpu_of(server) - others
    cost.requests, cost.megabytes = dict(requests), peak_mb() - memory


def cpu_of(pid: int) -> float:
    """Seconds of a core that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    sys.exit(main())
