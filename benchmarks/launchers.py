"""Are the scores the same to the last digit whatever starts the workers? The same fixed checkpoints on each launcher.

    python -m benchmarks.launchers [--launchers subprocess slurm ray] [CHECKPOINT ...]

Without checkpoints three tiny ones are made, of different architectures and fixed seeds. Every launcher evaluates them
into a results root of its own, with `[engine] deterministic = true`; then every score, every answer's log-likelihood
and text, and every row of the samples must be equal, not nearly equal. A Slurm of one node or a Ray of two is started
here where it is asked for. Prints a line for each comparison; exits 1 when anything differs.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eval_platform import checkpoints
from eval_platform.config import Config, load_config
from eval_platform.drive import drive
from eval_platform.plan import Wanted, plan
from eval_platform.store import Store, arrivals, commits, open_store, watcher_id
from eval_platform.tasks import read_lock, sync_tasks

LAUNCHERS = ("subprocess", "slurm", "ray")
ARCHITECTURES = ("llama", "gpt2", "qwen3")
ITEMS = 40  # of each task
_TOML = """
results = "results"
state = "state"

[[checkpoints]]
name = "fixed"
path = "{checkpoints}"
quiet_seconds = 0

[tasks]
include = ["copying", "comparison", "parity", "stories_perplexity"]

[engine]
device = "cpu"
dtype = "float32"
deterministic = true

[worker]
launcher = "{launcher}"

[ray]
address = "{ray}"
num_cpus = 2
"""

Results = dict[tuple[str, str], tuple[dict[str, Any], list[dict[str, Any]]]]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.launchers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoints", nargs="*", type=Path, help="folders of checkpoints (default: three tiny ones)")
    parser.add_argument("--launchers", nargs="+", choices=LAUNCHERS, default=LAUNCHERS, metavar="LAUNCHER")
    arguments = parser.parse_args()
    if len(set(arguments.launchers)) < 2:
        parser.error("name two launchers to compare")
    with ExitStack() as at_the_end:
        folder = Path(at_the_end.enter_context(tempfile.TemporaryDirectory(prefix="launchers-")))
        arriving = folder / "checkpoints"
        _bring(arguments.checkpoints, arriving)
        results: dict[str, Results] = {}
        for launcher in arguments.launchers:
            began = time.monotonic()
            with _ready(launcher):
                results[launcher] = _evaluate(launcher, arriving, folder / launcher)
            print(f"{launcher}: {len(results[launcher])} evaluations in {time.monotonic() - began:.0f} s", flush=True)
    first, *others = results
    different = [line for other in others for line in _differences(first, results[first], other, results[other])]
    for line in different:
        print(line)
    if not different:
        values = [len(rows) for _, rows in results[first].values()]
        n_scores = sum(len(record["scores"]) for record, _ in results[first].values())
        print(f"equal to the last digit on {', '.join(results)}: {n_scores} scores, {sum(values)} samples")
    return 1 if different else 0


def _bring(given: Sequence[Path], arriving: Path) -> None:
    arriving.mkdir()
    for path in given:
        (arriving / path.name).symlink_to(path.resolve(), target_is_directory=True)
    if not given:
        from tests.tiny_models import make_checkpoint

        for seed, architecture in enumerate(ARCHITECTURES):
            make_checkpoint(arriving / architecture, architecture=architecture, seed=seed, max_length=1024)


@contextmanager
def _ready(launcher: str) -> Iterator[None]:
    if launcher == "slurm":
        from tests.slurm_cluster import slurm_cluster

        with slurm_cluster() as cluster:
            os.environ["SLURM_CONF"] = cluster.environment["SLURM_CONF"]
            yield
    elif launcher == "ray":
        from tests.ray_cluster import ray_cluster

        with ray_cluster() as cluster:
            os.environ.update(cluster.environment)
            yield
    else:
        yield


def _evaluate(launcher: str, arriving: Path, home: Path) -> Results:
    """(key, task) -> its commit and its samples, of every checkpoint in `arriving`."""
    home.mkdir()
    ray = os.environ.get("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:8265")
    text = _TOML.format(checkpoints=arriving, launcher=launcher, ray=ray)
    (home / "eval_platform.toml").write_text(text, encoding="utf-8")
    config = load_config(home / "eval_platform.toml")
    store = open_store(config.results, config.s3)
    synced = sync_tasks(config.tasks, store, config.lock_path)
    if synced.errors:
        raise RuntimeError(f"the tasks cannot be had: {synced.errors}")
    found: Results = {}
    for folder in sorted(arriving.iterdir()):
        found |= _drive(config, store, folder)
    return found


def _drive(config: Config, store: Store, folder: Path) -> Results:
    located = checkpoints.locate(folder, config.checkpoints, config.cache_dir, lambda done, total: None)
    arrival, _ = arrivals.register(store, watcher=watcher_id(config.state_dir), **asdict(located))
    todo = plan(arrival, Wanted(read_lock(config.lock_path), limit=ITEMS), config, store)
    found: Results = {}
    for outcome in drive(todo, config, store, actor="benchmark"):
        if not outcome.record:
            raise RuntimeError(f"{arrival.key}, {outcome.task}: {outcome.status}: {' '.join(outcome.reasons)}")
        record = dict(outcome.record)
        found[arrival.key, outcome.task] = record, commits.read_samples(store, record).to_pylist()
    return found


def _differences(one: str, ours: Results, other: str, theirs: Results) -> Iterator[str]:
    """What is not the same to the last bit; NaN is equal to NaN."""
    if ours.keys() != theirs.keys():
        yield f"{one} and {other} did not evaluate the same: {sorted(ours.keys() ^ theirs.keys())}"
    for name in sorted(ours.keys() & theirs.keys()):
        (our_record, our_rows), (their_record, their_rows) = ours[name], theirs[name]
        for field in ("evaluation_id", "scores", "answers_digest", "engine_path"):
            if repr(our_record[field]) != repr(their_record[field]):
                yield f"{name}: {field} is {our_record[field]} on {one} and {their_record[field]} on {other}"
        if len(our_rows) != len(their_rows):
            yield f"{name}: {len(our_rows)} samples on {one}, {len(their_rows)} on {other}"
            continue
        n = sum(repr(a) != repr(b) for a, b in zip(our_rows, their_rows, strict=True))
        if n:
            yield f"{name}: {n} of {len(our_rows)} samples differ between {one} and {other}"


if __name__ == "__main__":
    sys.exit(main())
