"""Where does a worker run? One program, started in several ways behind one face (`face.Handle`)."""

from collections.abc import Callable

from eval_platform.config import Config
from eval_platform.launching import local, slurm
from eval_platform.launching.face import Handle
from eval_platform.launching.local import WORKER_ENV, Running, running, stop_orphans
from eval_platform.plan import Plan

__all__ = ["WORKER_ENV", "Handle", "Running", "launch", "running", "stop_orphans"]


def launch(plan: Plan, config: Config, waiting: Callable[[], None] = lambda: None) -> Handle:
    """Start a worker on `plan` as soon as there is room for it; `waiting` is called now and then until there is."""
    if config.worker.launcher == "slurm":
        return slurm.launch(plan, config)
    return local.launch(plan, config, waiting)
