"""Where the model runs: a worker process per device slot, as a Dagster resource."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import dagster as dg

from eval_platform.drive import Outcome, drive
from eval_platform.plan import Wanted, plan
from eval_platform.tasks import read_lock
from eval_platform.values import Arrival
from resources.store import StoreResource


class EvaluatorResource(dg.ConfigurableResource):
    """Evaluates one arrival and puts every answer through the gate."""

    store: dg.ResourceDependency[StoreResource]

    def evaluate(
        self,
        arrival: Arrival,
        tasks: Sequence[str],
        *,
        actor: str,
        on_message: Callable[[dict[str, Any]], None],
        others: int,
    ) -> Iterator[Outcome]:
        """One Outcome per task, each as soon as the gate has decided. others: so many want a worker besides."""
        config = self.store.config()
        store = self.store.open()
        todo = plan(arrival, Wanted(read_lock(config.lock_path), tasks), config, store)
        yield from drive(todo, config, store, actor=actor, on_message=on_message, others=others)
