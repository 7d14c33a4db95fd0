"""The program: see the package's text."""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.engine.models import MODELS
from benchmarks.engine.report import markdown
from benchmarks.engine.runners import Setup, measure_row
from benchmarks.engine.workloads import ROWS
from eval_platform.engine.settings import DTYPES
from eval_platform.errors import EvalPlatformError

# The larger model takes five times as long for a token.
_SMALLER = {"llama120m": 1 / 3}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=__doc__)
    parser.add_argument("--rows", help=f"names, separated by commas; default: all of {','.join(ROWS)}")
    parser.add_argument("--model", choices=MODELS, default="llama24m")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--path", choices=("auto", "tree", "plain"), default="auto", help="our engine's path")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scale", type=float, default=1.0, help="of each row's size, to try it out")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path(tempfile.gettempdir()) / "eval_platform_engine_benchmark",
        help="folder for models, answers and runs.jsonl; kept, so that models are made once",
    )
    arguments = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    names = arguments.rows.split(",") if arguments.rows else list(ROWS)
    unknown = [name for name in names if name not in ROWS]
    if unknown:
        parser.error(f"no rows {', '.join(unknown)}; there are {', '.join(ROWS)}")
    setup = Setup(
        arguments.model, arguments.dtype, arguments.threads, arguments.path, arguments.pairs, arguments.work.resolve()
    )
    try:
        return _run(setup, names, arguments.scale * _SMALLER.get(arguments.model, 1.0))
    except EvalPlatformError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _run(setup: Setup, names: Sequence[str], scale: float) -> int:
    begun = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - begun:6.0f} s, load {os.getloadavg()[0]:.1f}] {text}", flush=True)

    results = []
    for name in names:
        row = ROWS[name]
        results.append(measure_row(name, row, max(1, round(row.size * scale)), setup, say))
    print(f"\n{markdown(setup, results)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
