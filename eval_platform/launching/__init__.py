"""Where does a worker run? One program, started in several ways behind one face (`face.Handle`)."""

from collections.abc import Callable, Sequence

from eval_platform.config import Config
from eval_platform.launching import folders, inbox, kubernetes, local, ray, slurm
from eval_platform.launching.face import Handle, Shard, stop_all
from eval_platform.launching.inbox import Silent
from eval_platform.launching.local import WORKER_ENV, Running, running, stop_orphans
from eval_platform.plan import Plan

__all__ = ["WORKER_ENV", "Handle", "Running", "Shard", "Silent", "launch", "running", "stop_all", "stop_orphans"]


def launch(
    plan: Plan,
    config: Config,
    waiting: Callable[[str], None] = lambda reason: None,
    split: Callable[[int], Sequence[Plan]] | None = None,
    *,
    others: int = 0,
) -> list[Shard]:
    """Start a worker on `plan` as soon as there is room for it, or several that share it out. Then forget what is
    kept of workers that ended long ago.

    `waiting` is told now and then why there is none yet. split: the plans of as many workers as there is room for, or
    of fewer; None: `plan` as it is. others: so many other checkpoints want a worker, which goes before a second one
    here.
    """
    shards = _launch(plan, config, waiting, split or (lambda _: [plan]), others)
    forgotten = folders.forget_old(folders.workers(config))
    if forgotten and config.worker.exchange is not None:
        inbox.forget(forgotten, config.worker.exchange, config.s3)
    return shards


def _launch(
    plan: Plan, config: Config, waiting: Callable[[str], None], split: Callable[[int], Sequence[Plan]], others: int
) -> list[Shard]:
    if config.worker.launcher == "slurm":
        return slurm.launch(plan, split(config.worker.shards), config)
    if config.worker.launcher == "ray":
        return ray.launch(plan, split(config.worker.shards), config)
    if config.worker.launcher == "kubernetes":
        return kubernetes.launch(plan, split(config.worker.shards), config)
    return local.launch(plan, split, config, waiting, others=others)
