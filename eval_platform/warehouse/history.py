"""What does the catalog know that an evaluation should be compared with? Three questions that the gate asks.

Each answers from the catalog as it is; call `refresh` first. They share a connection of the caller's, from
`open_catalog`: to open one takes longer than to ask.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import duckdb


@dataclass(frozen=True, slots=True)
class EarlierScore:
    """A published score of an earlier step of the same run."""

    key: str
    step: int
    value: float
    standard_error: float | None


def same_answers(con: "duckdb.DuckDBPyConnection", *, answers_digest: str, ask_id: str, weights_id: str) -> list[str]:
    """Keys of committed evaluations of other weights whose log-likelihoods on the same ask are bit for bit these.

    Held ones count too: answers that a broken engine repeats are held from the second on. Sorted, each key once.
    """
    return [
        key
        for (key,) in con.execute(
            """
            select distinct key from evaluations
            where answers_digest = ? and ask_id = ? and weights_id <> ? and status <> 'failed' order by key
            """,
            [answers_digest, ask_id, weights_id],
        ).fetchall()
    ]


def prompts_ids(con: "duckdb.DuckDBPyConnection", *, ask_id: str, tokenizer_id: str, settings_id: str) -> list[str]:
    """The prompts_ids that committed evaluations of this ask, tokenizer and settings have rendered: one, or a leak."""
    return [
        prompts_id
        for (prompts_id,) in con.execute(
            """
            select distinct prompts_id from evaluations
            where ask_id = ? and tokenizer_id = ? and settings_id = ? and prompts_id is not null order by prompts_id
            """,
            [ask_id, tokenizer_id, settings_id],
        ).fetchall()
    ]


def previous_scores(
    con: "duckdb.DuckDBPyConnection", *, run: str, task_id: str, settings_id: str, metric: str, before_step: int
) -> list[EarlierScore]:
    """The published whole-task scores of `metric` on the run's steps before `before_step`, newest step first."""
    rows = con.execute(
        """
        select key, step, value, standard_error from learning_curves
        where run = ? and task_id = ? and settings_id = ? and metric = ? and subset = '' and subject is null
            and step < ? and value is not null
        group by all order by step desc, key
        """,
        [run, task_id, settings_id, metric, before_step],
    ).fetchall()
    return [EarlierScore(*row) for row in rows]
