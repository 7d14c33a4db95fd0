"""How long do the demo's tasks take the model, with the tree engine and without?

Run from the repository's root, after `make demo ONCE=1`: `python -m benchmarks.demo_inference [--pairs 3]`. Every task
of the demo is asked of its last checkpoint, on the plain path and on the tree in turn, in one process with the workers'
environment. Prints medians for each task; exits 1 when the two paths' answers differ by more than rounding.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

PATHS = ("plain", "tree")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, default=Path("demo/eval_platform.toml"))
    parser.add_argument("--checkpoint", type=Path, default=Path("demo/checkpoints/tiny/step_01000"))
    parser.add_argument("--pairs", type=int, default=3)
    given = parser.parse_args()

    from eval_platform.launching import WORKER_ENV

    if any(os.environ.get(key) is None for key in WORKER_ENV):
        # The allocator and OpenMP read theirs when a process starts.
        return subprocess.run(
            [sys.executable, "-m", "benchmarks.demo_inference", *sys.argv[1:]],
            env={**WORKER_ENV, **os.environ},
            check=False,
        ).returncode

    from eval_platform.bench.report import task_requests
    from eval_platform.config import load_config
    from eval_platform.engine.loading import load
    from eval_platform.store import open_store
    from eval_platform.tasks import read_lock
    from eval_platform.values import Response, RunSettings

    config = load_config(given.config)
    store, lock = open_store(config.results), read_lock(config.lock_path)
    engines = {path: load(given.checkpoint, RunSettings(engine_path=path)) for path in PATHS}
    worst, totals = 0.0, dict.fromkeys(PATHS, 0.0)
    print("| task | requests | plain, s | tree, s | ratio |\n|---|---|---|---|---|")
    for task in sorted(lock.tasks):
        requests = task_requests(store, lock, [task], None)
        seconds: dict[str, list[float]] = {path: [] for path in PATHS}
        answers: dict[str, dict[tuple[str, int], Response]] = {}
        for _ in range(given.pairs):
            for path in PATHS:
                start = time.perf_counter()
                answers[path] = {(r.request_id, r.repeat): r for r in engines[path].answer(requests)}
                seconds[path].append(time.perf_counter() - start)
        plain, tree = (statistics.median(seconds[path]) for path in PATHS)
        for key, one in answers["plain"].items():
            other = answers["tree"][key]
            if one.log_likelihood is not None and other.log_likelihood is not None:
                allowed = max(1e-4, 1e-5 * (one.n_tokens or 0))
                worst = max(worst, abs(one.log_likelihood - other.log_likelihood) / allowed)
            elif one.text != other.text:
                print(f"{task}: the texts of {key[0]} differ", file=sys.stderr)
        for path, value in zip(PATHS, (plain, tree), strict=True):
            totals[path] += value
        print(f"| {task} | {len(requests):,} | {plain:.2f} | {tree:.2f} | {plain / tree:.1f} |", flush=True)
    ratio = totals["plain"] / totals["tree"]
    print(f"| all | | {totals['plain']:.2f} | {totals['tree']:.2f} | {ratio:.1f} |")
    print(f"largest difference of two log-likelihoods: {worst:.2f} of the tolerance")
    return int(worst > 1)


if __name__ == "__main__":
    sys.exit(main())
