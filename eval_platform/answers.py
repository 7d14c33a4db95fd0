"""What exactly did it answer? Samples for people to read, and the items on which two checkpoints differ."""

from pathlib import Path
from typing import Any

from eval_platform import warehouse
from eval_platform.errors import QueryError
from eval_platform.store import Store
from eval_platform.warehouse.connection import literal

# Binary scores tell right from wrong; the first that a sample has decides.
_RIGHT = "coalesce(metrics['acc'], metrics['exact_match'], list_extract(map_values(metrics), 1))"

_SHOWN = f"""
    key, task, position, subset, prompt, target, choices, chosen, response, extracted, metrics, finish_reason,
    evaluation_id, attempt, {_RIGHT} as first_score
"""


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
    """The first `n` samples, ready to print. Raises QueryError when nothing is evaluated under these names."""
    where = []
    if checkpoint is not None:
        where.append(f"checkpoint_id = {_checkpoint_id(catalog, store, checkpoint)}")
    if task is not None:
        where.append(f"task = {literal(task)}")
    if evaluation_id is not None:
        where.append(f"starts_with(evaluation_id, {literal(evaluation_id)})")
    if attempt is not None:
        where.append(f"attempt = {attempt}")
    if not where:
        raise QueryError("which samples?", remedy="give --checkpoint and --task, or --evaluation, or --diff A B")
    if wrong:
        where.append("first_score < 1")
    text = f"""
        with shown as (select checkpoint_id, {_SHOWN} from samples)
        select * from shown where {" and ".join(where)} order by task, attempt desc, position limit {n}
    """
    return [_readable(row) for row in warehouse.query(catalog, store, text).to_pylist()]


def flipped(catalog: Path, store: Store, a: str, b: str, *, task: str | None, n: int) -> list[dict[str, Any]]:
    """Items on which checkpoints `a` and `b` score differently, those that got worse first."""
    chosen = f"and x.task = {literal(task)}" if task else ""
    text = f"""
        with shown as (
            select checkpoint_id, task_id, settings_id, sample_id, repeat, {_SHOWN} from samples
            where status = 'published' and item_limit is null
        )
        select x.task, x.position, x.prompt, x.target, x.choices as a_choices, y.choices as b_choices,
            x.chosen as a_chosen, y.chosen as b_chosen, x.response as a_response, y.response as b_response,
            x.first_score as a_score, y.first_score as b_score
        from shown x join shown y using (task_id, settings_id, sample_id, repeat)
        where x.checkpoint_id = {_checkpoint_id(catalog, store, a)}
          and y.checkpoint_id = {_checkpoint_id(catalog, store, b)}
          and x.first_score is distinct from y.first_score {chosen}
        order by b_score - a_score, x.task, x.position limit {n}
    """
    return [
        {
            "title": f"{row['task']} #{row['position']}",
            "prompt": row["prompt"],
            "target": row["target"],
            f"{a} ({row['a_score']})": _said(row["a_choices"], row["a_chosen"], row["a_response"]),
            f"{b} ({row['b_score']})": _said(row["b_choices"], row["b_chosen"], row["b_response"]),
        }
        for row in warehouse.query(catalog, store, text).to_pylist()
    ]


def _checkpoint_id(catalog: Path, store: Store, key: str) -> str:
    """The newest known content under `key`, as an SQL string."""
    text = f"select checkpoint_id from newest_arrivals where key = {literal(key)}"
    found = warehouse.query(catalog, store, text)["checkpoint_id"].to_pylist()
    if not found:
        raise QueryError(f"no checkpoint named {key} has been identified", remedy="see `eval-platform status`")
    return literal(found[0])


def _readable(row: dict[str, Any]) -> dict[str, Any]:
    shown = {
        "title": f"{row['key']}  {row['task']} #{row['position']}" + (f" {row['subset']}" if row["subset"] else ""),
        "prompt": row["prompt"],
        "answered": _said(row["choices"], row["chosen"], row["response"]),
        "target": row["target"],
        "scores": ", ".join(f"{name} {_number(value)}" for name, value in (row["metrics"] or ())),
        "finished": row["finish_reason"],
    }
    if row["extracted"]:
        shown["extracted"] = ", ".join(f"{name}: {value}" for name, value in row["extracted"])
    return shown


def _said(choices: list[dict[str, Any]] | None, chosen: int | None, response: str | None) -> str:
    """The completion, or every choice with its log-likelihood, the chosen one marked."""
    if not choices:
        return response if response is not None else "(scored as text)"
    return "\n" + "\n".join(
        f"  {'->' if i == chosen else '  '} {choice['text']!r}  {_number(choice['log_likelihood'])}"
        for i, choice in enumerate(choices)
    )


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"
