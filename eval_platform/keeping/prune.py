"""Which samples may go? Those that no rule keeps. Commits, scores and decisions stay, so nothing is asked again."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval_platform import warehouse
from eval_platform.errors import ConfigError, StoreError
from eval_platform.keeping.together import Step, each, quietly
from eval_platform.store import Store, commits, layout
from eval_platform.tasks.metrics import METRICS
from eval_platform.warehouse.connection import literal

if TYPE_CHECKING:
    import duckdb

_DECIDED = """
    select e.evaluation_id, e.attempt, e.checkpoint_id, e.key, a.run, a.step, e.task, e.status, e.samples_key,
        e.samples_pruned_at is not null as pruned
    from evaluations e left join arrivals a on a.key = e.key and a.n = e.arrival
    where e.samples_key is not null
        and exists (from decisions d where d.evaluation_id = e.evaluation_id and d.attempt = e.attempt)
    order by a.run, a.step nulls first, e.key, e.task, e.evaluation_id, e.attempt
"""

# Steps are counted, not folders: a run's last save often lies there twice, once as the final model. What has no step
# counts singly, behind all that have one.
_NEWEST = """
    select checkpoint_id, step, dense_rank() over (
            partition by run order by step desc nulls last, case when step is null then arrived_at end desc
        ) as place
    from newest_arrivals
"""


@dataclass(frozen=True, slots=True)
class Keep:
    """Whose samples are kept: those of checkpoints that any of the first three names; all where none is given.

    last: so many newest steps of each run. every: steps that it divides, and checkpoints without a step. best: TASK or
    TASK:METRIC, in each run the checkpoint with the best published value. published_only: of these, what stands
    published.
    """

    last: int | None = None
    every: int | None = None
    best: tuple[str, ...] = ()
    published_only: bool = False

    def __str__(self) -> str:
        """As options of the command."""
        told = [f"--keep-last {self.last}"] if self.last is not None else []
        told += [f"--keep-every {self.every}"] if self.every is not None else []
        told += [f"--keep-best {one}" for one in self.best]
        return " ".join([*told, *(["--published-only"] if self.published_only else [])])


@dataclass(frozen=True, slots=True)
class Candidate:
    """One attempt whose samples would go."""

    evaluation_id: str
    attempt: int
    key: str
    run: str | None
    step: int | None
    task: str
    status: str
    samples_key: str
    n_bytes: int


@dataclass(frozen=True, slots=True)
class Chosen:
    """What the rules say: these go, so many attempts keep theirs."""

    prune: tuple[Candidate, ...]
    kept: int

    @property
    def n_bytes(self) -> int:
        return sum(one.n_bytes for one in self.prune)


def choose(store: Store, catalog: Path, keep: Keep) -> Chosen:
    """The attempts that have samples and that `keep` does not keep; what is not decided yet is always kept.

    What a prune that was killed has left is among them, whatever `keep` says: its tombstone stands already.
    Raises ConfigError when `keep` says nothing, or names a task that nothing is published of.
    """
    if keep == Keep():
        raise ConfigError("which samples are to be kept?", remedy="give a rule, as --keep-last 3 or --published-only")
    warehouse.refresh(store, catalog)
    sizes = {entry.key: entry.size for entry in store.list("samples/")}
    with warehouse.connect(catalog, store, samples=False) as con:
        checkpoints = _kept_checkpoints(con, keep)
        decided = _ask(con, _DECIDED)
    going: list[Candidate] = []
    kept = 0
    for row in decided:
        if row["samples_key"] not in sizes:
            continue
        if row.pop("pruned") or not _is_kept(row, checkpoints, keep):
            del row["checkpoint_id"]
            going.append(Candidate(**row, n_bytes=sizes[row["samples_key"]]))
        else:
            kept += 1
    return Chosen(tuple(going), kept)


def prune(store: Store, candidates: Sequence[Candidate], *, actor: str, rule: str, step: Step = quietly) -> None:
    """Remove the samples of these attempts, each behind a tombstone that says who and by which rule.

    Safe to repeat after a kill. Raises StoreError when the store fails.
    """

    def remove(one: Candidate) -> None:
        record = commits.read(store, one.evaluation_id, one.attempt)
        if record is None:
            raise StoreError(
                f"attempt {one.attempt} of evaluation {one.evaluation_id} is in the catalog, and not in {store.uri}",
                remedy="nothing of it was removed; see `eval-platform verify`",
            )
        commits.prune_samples(store, record, actor=actor, rule=rule)

    # Who may not delete (a bucket's policy can be the guard) is told before a tombstone says that samples are gone.
    store.delete(layout.samples("nothing", uuid.uuid4().hex))
    for done, _ in enumerate(each(store, remove, candidates), 1):
        step("pruning", done, len(candidates))


def _is_kept(row: dict[str, Any], checkpoints: set[str] | None, keep: Keep) -> bool:
    if keep.published_only and row["status"] != "published":
        return False
    return checkpoints is None or row["checkpoint_id"] in checkpoints


def _kept_checkpoints(con: "duckdb.DuckDBPyConnection", keep: Keep) -> set[str] | None:
    """checkpoint_ids that a rule keeps; None where no rule speaks of checkpoints, so that all are."""
    if keep.last is None and keep.every is None and not keep.best:
        return None
    kept: set[str] = set()
    for row in _ask(con, _NEWEST):
        by_last = keep.last is not None and row["place"] <= keep.last
        by_every = keep.every is not None and (row["step"] is None or row["step"] % keep.every == 0)
        if by_last or by_every:
            kept.add(row["checkpoint_id"])
    for named in keep.best:
        kept |= _best(con, named)
    return kept


def _best(con: "duckdb.DuckDBPyConnection", named: str) -> set[str]:
    """In each run the checkpoint with the best value of TASK's primary metric, or of TASK:METRIC."""
    task, _, metric = named.partition(":")
    which = f"metric = {literal(metric)}" if metric else "is_primary"
    text = f"""
        select run, checkpoint_id, value, higher_is_better from learning_curves
        where task = {literal(task)} and {which} and subset = '' and subject is null and not stale and value is not null
        order by step desc nulls last
    """
    rows = _ask(con, text)
    if not rows:
        raise ConfigError(
            f"--keep-best {named}: nothing is published of it",
            remedy="see `eval-platform leaderboard`; TASK:METRIC names another metric than the task's primary one",
        )
    if metric:
        known = METRICS.get(metric.split(",")[0])
        if known is None:
            raise ConfigError(
                f"--keep-best {named}: whether more is better is not known of {metric}", remedy=f"write {task}"
            )
        higher = known.higher_is_better
    else:
        higher = rows[0]["higher_is_better"]
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        held = best.get(row["run"])
        if held is None or (row["value"] > held["value"] if higher else row["value"] < held["value"]):
            best[row["run"]] = row
    return {row["checkpoint_id"] for row in best.values()}


def _ask(con: "duckdb.DuckDBPyConnection", text: str) -> list[dict[str, Any]]:
    return con.sql(text).to_arrow_table().to_pylist()
