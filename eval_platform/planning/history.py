"""What does the catalog know of what tasks took? Two questions, each of a connection of the caller's (`connect`)."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from eval_platform.planning.cost import Past

if TYPE_CHECKING:
    import duckdb

# Of each task on each run: enough for a median that forgets what was slow once, and the device of a month ago.
NEWEST = 5


def past(con: "duckdb.DuckDBPyConnection", *, run: str, task_ids: Iterable[str], limit: int | None) -> list[Past]:
    """What these tasks took anywhere, and any task on this run; the newest of each, as if so many items were asked.

    Only evaluations that one worker asked in whole: of one that was interrupted and gone on with nobody has the sum.
    """
    rows = con.execute(
        f"""
        with asked as (
            select a.run, e.task_id, e.n_parameters, e.seconds, e.answer_seconds, e.load_seconds, e.computed_tokens,
                e.generated_tokens, e.finished_at,
                case when e.item_limit is not distinct from $limit then 1.0
                    when e.item_limit is null then least($limit / e.planned_items, 1.0) end as part
            from evaluations e join arrivals a on a.key = e.key and a.n = e.arrival
            where e.origin = 'asked' and e.answer_seconds > 0 and (a.run = $run or e.task_id in (select unnest($tasks)))
                and (e.n_tokens is null or abs(e.tokens_per_second * e.answer_seconds - e.n_tokens) < 0.5)
        )
        select run, task_id, n_parameters, part * (seconds - coalesce(load_seconds, 0)), part * answer_seconds,
            load_seconds, part * computed_tokens, part * generated_tokens
        from asked where part is not null
        qualify row_number() over (partition by run, task_id order by finished_at desc) <= {NEWEST}
        """,
        {"run": run, "limit": limit, "tasks": list(task_ids)},
    ).fetchall()
    return [Past(*row) for row in rows]


def answered(con: "duckdb.DuckDBPyConnection", *, key: str, n: int, limit: int | None) -> frozenset[str]:
    """Tasks that have a result for this arrival's content; none where nobody has staged it yet."""
    rows = con.execute(
        """
        select distinct e.task_id from evaluations e join arrivals a on a.checkpoint_id = e.checkpoint_id
        where a.key = ? and a.n = ? and e.status <> 'failed' and e.item_limit is not distinct from ?
        """,
        [key, n, limit],
    ).fetchall()
    return frozenset(task_id for (task_id,) in rows)
