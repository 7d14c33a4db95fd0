"""What does the catalog know that an evaluation should be compared with? Three questions that the gate asks.

Each answers from the catalog as it is; call `refresh` first.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval_platform.warehouse.connection import open_catalog


@dataclass(frozen=True, slots=True)
class EarlierScore:
    """A published score of an earlier step of the same run."""

    key: str
    step: int
    value: float
    standard_error: float | None


def same_answers(catalog: Path, *, answers_digest: str, ask_id: str, weights_id: str) -> list[str]:
    """Keys of committed evaluations of other weights whose log-likelihoods on the same ask are bit for bit these.

    Held ones count too: answers that a broken engine repeats are held from the second on. Sorted, each key once.
    """
    return [
        key
        for (key,) in _rows(
            catalog,
            """
            select distinct key from evaluations
            where answers_digest = ? and ask_id = ? and weights_id <> ? and status <> 'failed' order by key
            """,
            [answers_digest, ask_id, weights_id],
        )
    ]


def prompts_ids(catalog: Path, *, ask_id: str, tokenizer_id: str, settings_id: str) -> list[str]:
    """The prompts_ids that committed evaluations of this ask, tokenizer and settings have rendered: one, or a leak."""
    return [
        prompts_id
        for (prompts_id,) in _rows(
            catalog,
            """
            select distinct prompts_id from evaluations
            where ask_id = ? and tokenizer_id = ? and settings_id = ? and prompts_id is not null order by prompts_id
            """,
            [ask_id, tokenizer_id, settings_id],
        )
    ]


def previous_scores(
    catalog: Path, *, run: str, task_id: str, settings_id: str, metric: str, before_step: int
) -> list[EarlierScore]:
    """The published whole-task scores of `metric` on the run's steps before `before_step`, newest step first."""
    rows = _rows(
        catalog,
        """
        select key, step, value, standard_error from learning_curves
        where run = ? and task_id = ? and settings_id = ? and metric = ? and subset = '' and subject is null
            and step < ? and value is not null
        group by all order by step desc, key
        """,
        [run, task_id, settings_id, metric, before_step],
    )
    return [EarlierScore(*row) for row in rows]


def _rows(catalog: Path, sql: str, parameters: list[Any]) -> list[tuple[Any, ...]]:
    con = open_catalog(catalog)
    try:
        return con.execute(sql, parameters).fetchall()
    finally:
        con.close()
