"""What does the catalog know of what tasks took? Two questions, each of a connection of the caller's (`connect`)."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

from eval_platform.planning.cost import Past
from eval_platform.values import RunSettings

if TYPE_CHECKING:
    import duckdb

# Of each task on each run: enough for a median that forgets what was slow once.
NEWEST = 5


@dataclass(frozen=True, slots=True)
class History:
    """What evaluations took. rows: with the kind of device that each was on; devices: run -> the kind that is used for
    it, where that is known.
    """

    rows: Sequence[tuple[Past, str]]
    devices: Mapping[str, str]

    def seen_on(self, device: str | None) -> list[Past]:
        """As a run sees it for which this kind of device is used."""
        return [one if kind == device else replace(one, is_here=False) for one, kind in self.rows]


def read_history(
    con: "duckdb.DuckDBPyConnection",
    *,
    runs: Iterable[str],
    task_ids: Iterable[str],
    limit: int | None,
    chat: bool | None,
) -> History:
    """What these tasks took anywhere, and any task on these runs; the newest of each, as if so many items were asked.

    Only evaluations that one worker asked in whole: of one that was interrupted and gone on with nobody has the sum.
    For a run the kind of device of its last evaluation is used; for a new one what whoever found it used last. chat:
    asked as conversations or not; None: whichever.
    """
    asked = """
        with asked as (
            select a.run, a.watcher, e.task_id, e.n_parameters, e.seconds, e.answer_seconds, e.load_seconds,
                e.computed_tokens, e.generated_tokens, e.n_requests, e.characters, e.finished_at,
                coalesce(split_part(e.devices[1], ':', 1), '') as device,
                case when e.item_limit is not distinct from $limit then 1.0
                    when e.item_limit is null then least($limit / e.planned_items, 1.0) end as part
            from evaluations e join arrivals a on a.key = e.key and a.n = e.arrival
            where e.origin = 'asked' and e.answer_seconds > 0 and e.asked_requests = e.n_requests
                and ($chat is null or e.chat = $chat)
        )
    """
    said = {"limit": limit, "chat": chat, "runs": list(runs)}
    devices = con.execute(
        f"""
        {asked},
        wanted as (select run, arg_max(watcher, arrived_at) as watcher from arrivals
            where run in (select unnest($runs)) group by run),
        by_run as (select run, arg_max(device, finished_at) as device from asked group by run),
        by_watcher as (select watcher, arg_max(device, finished_at) as device from asked group by watcher)
        select w.run, coalesce(r.device, f.device) from wanted w
        left join by_run r on r.run = w.run left join by_watcher f on f.watcher = w.watcher
        where coalesce(r.device, f.device) is not null
        """,
        said,
    ).fetchall()
    rows = con.execute(
        f"""
        {asked}
        select device, run, task_id, n_parameters, part * (seconds - load_seconds), part * answer_seconds,
            load_seconds, part * computed_tokens, part * generated_tokens, true, part * n_requests, part * characters
        from asked
        where part is not null and (run in (select unnest($runs)) or task_id in (select unnest($tasks)))
        qualify row_number() over (
            partition by run, task_id, device, n_parameters order by finished_at desc
        ) <= {NEWEST}
        """,
        {**said, "tasks": list(task_ids)},
    ).fetchall()
    return History([(Past(*row), device) for device, *row in rows], dict(devices))


class Answered(NamedTuple):
    """An evaluation that has a result. attempt: the last."""

    evaluation_id: str
    attempt: int
    task_id: str
    ask_id: str
    is_published: bool


def answered(con: "duckdb.DuckDBPyConnection", *, key: str, n: int, settings: RunSettings) -> list[Answered]:
    """What has a result for this arrival's content, asked as `settings` say; nothing where nobody has staged it yet."""
    rows = con.execute(
        """
        select e.evaluation_id, max(e.attempt), e.task_id, e.ask_id, bool_or(e.status = 'published'),
            any_value(e.settings)
        from evaluations e join arrivals a on a.checkpoint_id = e.checkpoint_id
        where a.key = ? and a.n = ? and e.status <> 'failed'
        group by e.evaluation_id, e.task_id, e.ask_id
        """,
        [key, n],
    ).fetchall()
    said = _said(settings)
    return [Answered(*row) for *row, text in rows if _agrees(said, json.loads(text or "{}"))]


def _said(settings: RunSettings) -> dict[str, object]:
    """What of the settings is part of their identity and does not depend on the checkpoint."""
    said = asdict(settings)
    for recorded in ("device", "batch_tokens", "engine_path", "deterministic", "quantization"):
        del said[recorded]
    if settings.chat == "auto":
        for name in ("chat", "system_prompt", "shots_as_turns"):
            del said[name]
    return {name: value for name, value in said.items() if value != "auto" and (name, value) != ("max_length", None)}


def _agrees(said: dict[str, object], recorded: dict[str, object]) -> bool:
    return all(recorded.get(name) == value for name, value in said.items())
