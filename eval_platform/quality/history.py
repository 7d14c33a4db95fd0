"""What the gate must know of other evaluations, as plain data, and how it is read from the catalog."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval_platform.store import Store, arrivals
from eval_platform.warehouse import history
from eval_platform.warehouse.connection import open_catalog
from eval_platform.warehouse.history import EarlierScore

if TYPE_CHECKING:
    import duckdb


@dataclass(frozen=True, slots=True)
class History:
    """What an evaluation is compared with.

    same_answers: keys of checkpoints with other weights whose log-likelihood vector is bit-identical.
    other_prompts: prompts_ids that the same ask, tokenizer and settings gave elsewhere, this evaluation's left out.
    previous: the primary score of the run's nearest earlier published step on the same task and settings; None for
    the first one and for arrivals without a step.
    """

    same_answers: tuple[str, ...] = ()
    other_prompts: tuple[str, ...] = ()
    previous: EarlierScore | None = None


def read_history(store: Store, catalog: Path, evaluation: Mapping[str, Any]) -> History:
    """The history of a committed evaluation, as fresh as the catalog is."""
    same: list[str] = []
    with open_catalog(catalog) as con:
        if evaluation["answers_digest"] is not None:
            same = history.same_answers(
                con,
                answers_digest=evaluation["answers_digest"],
                ask_id=evaluation["ask_id"],
                weights_id=evaluation["weights_id"],
            )
        prompts = history.prompts_ids(
            con,
            ask_id=evaluation["ask_id"],
            tokenizer_id=evaluation["tokenizer_id"],
            settings_id=evaluation["settings_id"],
        )
        previous = _previous(store, con, evaluation)
    return History(
        same_answers=tuple(same),
        other_prompts=tuple(one for one in prompts if one != evaluation["prompts_id"]),
        previous=previous,
    )


def _previous(store: Store, con: "duckdb.DuckDBPyConnection", evaluation: Mapping[str, Any]) -> EarlierScore | None:
    arrival = arrivals.get(store, evaluation["key"], evaluation["arrival"])
    if arrival is None or arrival.step is None:
        return None
    earlier = history.previous_scores(
        con,
        run=arrival.run,
        task_id=evaluation["task_id"],
        settings_id=evaluation["settings_id"],
        metric=evaluation["primary"]["metric"],
        before_step=arrival.step,
    )
    return earlier[0] if earlier else None
