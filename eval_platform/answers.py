"""What exactly did it answer? Samples for people to read, and the items on which two checkpoints differ."""

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval_platform import warehouse
from eval_platform.errors import QueryError
from eval_platform.scoring import is_term
from eval_platform.store import Store
from eval_platform.tasks.metrics import METRICS
from eval_platform.warehouse.connection import literal

# Metrics of which a sample's value tells right (1) from wrong (0).
_TELLS_RIGHT = [m.name for m in METRICS.values() if (m.low, m.high) == (0, 1) and m.higher_is_better]

# `score` is the sample's value of its task's primary metric where that tells right from wrong; null for a perplexity
# and the like, of which nothing is right or wrong.
_SHOWN = f"""
    select s.checkpoint_id, s.task_id, s.settings_id, s.item_limit, e.stale, e.shown, s.sample_id, s.repeat, s.key,
        s.task, s.position, s.subset, s.prompt, s.target, s.choices, s.chosen, s.response, s.extracted, s.metrics,
        s.finish_reason, s.evaluation_id, s.attempt,
        if(split_part(e.primary_metric, ',', 1) in ({", ".join(map(literal, _TELLS_RIGHT))}),
            s.metrics[e.primary_metric], null) as score,
        s.attempt = last.attempt as newest
    from samples s join evaluations e using (evaluation_id, attempt) join (
        select evaluation_id, max(attempt) as attempt from evaluations
        where samples_key is not null and samples_pruned_at is null group by evaluation_id
    ) last on last.evaluation_id = s.evaluation_id
"""


@dataclass(frozen=True, slots=True)
class Flips:
    """Where two checkpoints differ. `items` of both were compared; `shown` holds the first of those that flipped."""

    items: int
    better: int
    worse: int
    shown: list[dict[str, Any]]


def look(
    catalog: Path,
    store: Store,
    *,
    checkpoint: str | None,
    task: str | None,
    evaluation_id: str | None,
    attempt: int | None,
    wrong: bool,
    n: int,
) -> list[dict[str, Any]]:
    """The first `n` samples by task and position; without `attempt` those of each evaluation's newest.

    Of each: where it is from, prompt, what was answered, what is right and the scores (`_readable` has the fields).
    Raises QueryError when nothing is answered under these names.
    """
    newest = "newest" if attempt is None else f"attempt = {attempt}"
    where = []
    if evaluation_id is not None:
        where.append(f"starts_with(evaluation_id, {literal(evaluation_id)})")
    elif checkpoint is None and task is None:
        raise QueryError("which samples?", remedy="give --checkpoint and --task, or --evaluation, or --diff A B")
    else:
        where.append("not stale")
    if checkpoint is not None:
        where.append(f"checkpoint_id = {literal(_checkpoint_id(catalog, store, checkpoint))}")
    if task is not None:
        where.append(f"task = {literal(task)}")
    shown = f"with shown as ({_SHOWN}) select * from shown where {' and '.join([newest, *where])}"
    order = f"order by task, item_limit nulls first, position, repeat limit {n}"
    text = f"{shown} and (score is null or score < 1) {order}" if wrong else f"{shown} {order}"
    rows = warehouse.query(catalog, store, text).to_pylist()
    if not rows and (not wrong or not warehouse.query(catalog, store, f"{shown} limit 1").num_rows):
        named = {"checkpoint": checkpoint, "task": task, "evaluation": evaluation_id, "attempt": attempt}
        said = ", ".join(f"{name} {value}" for name, value in named.items() if value is not None)
        _refuse_pruned(catalog, store, [*where, "true" if attempt is None else newest], said)
        raise QueryError(f"nothing is answered for {said}", remedy="`eval-platform status --tasks` shows what is")
    return [_readable(row) for row in rows]


def _refuse_pruned(catalog: Path, store: Store, where: list[str], said: str) -> None:
    """Raises QueryError when what is asked for was answered, and its samples were pruned."""
    text = f"""
        select samples_pruned_at as time, samples_pruned_by as by, count(*) over () as n from evaluations
        where samples_pruned_at is not null and {" and ".join(where)} order by time desc limit 1
    """
    for row in warehouse.query(catalog, store, text).to_pylist():
        raise QueryError(
            f"the samples of {said} were pruned at {row['time']:%Y-%m-%d %H:%M} UTC by {row['by']}"
            + (f" ({row['n']} evaluations)" if row["n"] > 1 else ""),
            remedy="their scores stand (`eval-platform leaderboard`); only `eval-platform rerun` asks the model again",
        )


def flipped(catalog: Path, store: Store, a: str, b: str, *, task: str | None, n: int) -> Flips:
    """Items of published evaluations on which checkpoints `a` and `b` score differently, those that got worse first.

    Raises QueryError when the two have no evaluation in common that could be compared item by item.
    """
    chosen = f"and x.task = {literal(task)}" if task else ""
    pairs = f"""
        with shown as ({_SHOWN}),
        pairs as (
            select x.task, x.task_id, x.position, x.sample_id, x.repeat, x.subset, x.prompt, x.target,
                x.choices as a_choices, x.chosen as a_chosen, x.response as a_response, x.score as a_score,
                y.choices as b_choices, y.chosen as b_chosen, y.response as b_response, y.score as b_score
            from shown x join shown y using (task_id, settings_id, sample_id, repeat)
            where x.checkpoint_id = {literal(_checkpoint_id(catalog, store, a))}
              and y.checkpoint_id = {literal(_checkpoint_id(catalog, store, b))}
              and x.shown and y.shown and not x.stale and x.score is not null and y.score is not null {chosen}
        )
    """
    counts = f"""
        {pairs} select count(*) as items, count(*) filter (b_score > a_score) as better,
            count(*) filter (b_score < a_score) as worse
        from pairs
    """
    found = warehouse.query(catalog, store, counts).to_pylist()[0]
    if not found["items"]:
        what = f"task {task}" if task else "any task with right and wrong answers"
        raise QueryError(
            f"{a} and {b} are not both published on {what}",
            remedy="`eval-platform status --tasks` shows what each was asked",
        )
    text = f"{pairs} select * from pairs where a_score <> b_score order by b_score - a_score, task, position limit {n}"
    shown = []
    for row in warehouse.query(catalog, store, text).to_pylist():
        right = _right(row["target"])
        shown.append(
            {
                **{name: row[name] for name in ("task", "position", "subset", "sample_id", "repeat", "prompt")},
                "target": row["target"],
                "a": {"key": a, "score": row["a_score"], **_answer(row, "a_", right)},
                "b": {"key": b, "score": row["b_score"], **_answer(row, "b_", right)},
            }
        )
    return Flips(found["items"], found["better"], found["worse"], shown)


def _checkpoint_id(catalog: Path, store: Store, key: str) -> str:
    """The newest known content under `key`."""
    rows = warehouse.query(catalog, store, "select key, checkpoint_id from newest_arrivals").to_pylist()
    known = {row["key"]: row["checkpoint_id"] for row in rows}
    if key not in known:
        near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
        remedy = f"perhaps {' or '.join(near)}; " if near else ""
        raise QueryError(f"no checkpoint {key} has been evaluated", remedy=f"{remedy}see `eval-platform status`")
    return known[key]


def _readable(row: dict[str, Any]) -> dict[str, Any]:
    names = ("key", "task", "position", "subset", "repeat", "sample_id", "evaluation_id", "attempt", "prompt")
    return {
        **{name: row[name] for name in names},
        **_answer(row, "", _right(row["target"])),
        "target": row["target"],
        "scores": {name: value for name, value in dict(row["metrics"] or ()).items() if not is_term(name)},
        "extracted": dict(row["extracted"] or ()),
        "finish_reason": row["finish_reason"],
    }


def _answer(row: dict[str, Any], prefix: str, right: set[int]) -> dict[str, Any]:
    """`choices` of a multiple choice, else `response` (null where a given text was scored)."""
    choices = row[f"{prefix}choices"]
    if not choices:
        return {"response": row[f"{prefix}response"]}
    return {
        "choices": [
            {
                "text": choice["text"],
                "log_likelihood": choice["log_likelihood"],
                "chosen": index == row[f"{prefix}chosen"],
                "right": index in right,
            }
            for index, choice in enumerate(choices)
        ]
    }


def _right(target: str) -> set[int]:
    """The numbers of the right choices; empty where the target is a text."""
    try:
        value = json.loads(target)
    except ValueError:
        return set()
    values = value if isinstance(value, list) else [value]
    return {number for number in values if isinstance(number, int)}
