"""A process that has imported what Dagster's runs need and forks them from itself: each begins seconds earlier, and
most of its memory is shared.

    python -m resources.run_nursery <DAGSTER_HOME>

`eval-platform up` keeps one running; `run_launcher.py` asks it first. `eval_platform/nursery.py` says how it forks and
when it refuses. What may change while it runs, the definitions with the lock and the configuration, a fork loads anew.
"""

import importlib
import logging
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

from dagster._grpc.types import ExecuteRunArgs
from dagster._serdes import serialize_value

from eval_platform import nursery
from eval_platform.importing import collector_paused

# What executes a run, and what the definitions gather, but for themselves.
_MODULES = (
    "dagster._cli.api",
    *("assets.boards", "assets.checks", "assets.maintenance", "assets.results"),
    *("resources.evaluator", "resources.store", "resources.warehouse"),
    *("sensors.alerts", "sensors.arrivals", "sensors.reconciliation"),
)


def fork_run(home: Path, args: ExecuteRunArgs) -> dict[str, Any] | None:
    """The record of the process that works on the run from now on; None when there is no nursery in `home`, or it would
    not do the same as a process that is started from nothing."""
    child = nursery.ask(home, {"run": serialize_value(args)}, os.environ)
    if child is None:
        return None
    child.connection.close()  # how it ends is in Dagster's event log
    return child.record


def main(home: Path) -> None:
    """Import, listen, fork; every child ends in here too."""
    request = nursery.serve(home, _import)
    if request is None:
        return
    nursery.begin(request)
    from dagster._cli.api import api_cli

    # By SIGINT a run is cancelled; who starts the platform in a shell's background has it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = 1
    try:
        api_cli(["execute_run", request["run"]], standalone_mode=False)
        code = 0
    except BaseException:  # noqa: BLE001 -- the last word of a process: say it, end with its code
        traceback.print_exc()
    finally:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # what the nursery has registered for its own end is not to be done by each of its children


def _import() -> None:
    # Not above: the launcher, which asks, is in Dagster's daemon and web server, and they need none of it.
    from eval_platform import quality

    with collector_paused():
        for module in _MODULES:
            importlib.import_module(module)
    quality.warm().join()


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    main(Path(sys.argv[1]))
