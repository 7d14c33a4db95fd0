"""A small world of store records for the catalog's tests: what a platform writes, by the store's own functions."""

from pathlib import Path
from typing import Any

import pyarrow as pa

from eval_platform.errors import ErrorClass
from eval_platform.identity import content_id
from eval_platform.store import LocalStore, arrivals, commits, create_record, decisions, layout, leases, log, tries
from eval_platform.values import Arrival, Check, Checkpoint, Failure
from eval_platform.warehouse.connection import open_catalog
from eval_platform.warehouse.schema import TABLES

METRIC = "acc"


def evaluation_id(checkpoint_id: str, task_id: str, settings_id: str = "s") -> str:
    return content_id({"checkpoints": [checkpoint_id], "task_id": task_id, "settings_id": settings_id})


def scores(task: str, value: float | None, n: int = 100) -> list[dict[str, Any]]:
    """The primary metric on the whole task, one on a subset, and another metric."""
    base = {"task": task, "standard_error": 0.05, "ci_low": 0.1, "ci_high": 0.9, "interval_method": "wilson", "n": n}
    return [
        {**base, "metric": METRIC, "value": value, "subset": ""},
        {**base, "metric": METRIC, "value": value, "subset": "hard"},
        {**base, "metric": "f1", "value": value, "subset": ""},
    ]


def commit_record(
    checkpoint_id: str, task: str, task_id: str, value: float | None = 0.5, attempt: int = 1, **fields: Any
) -> dict[str, Any]:
    """A commit record with every field that docs/architecture.md lists."""
    limit, settings_id = fields.pop("limit", None), fields.pop("settings_id", "s")
    identity = evaluation_id(checkpoint_id, task_id, settings_id)
    return {
        "evaluation_id": identity,
        "attempt": attempt,
        "try": "t",
        "checkpoint_id": checkpoint_id,
        "weights_id": f"w-{checkpoint_id}",
        "tokenizer_id": "tok",
        "task": task,
        "task_id": task_id,
        "ask_id": f"ask-{task}",
        "answers_id": f"answers-{checkpoint_id}-{task}",
        "dataset_id": f"data-{task}",
        "prompts_id": f"prompts-{task}",
        "settings": {"dtype": "float32", "limit": limit, "max_length": 128},
        "settings_id": settings_id,
        "key": "r/run/1",
        "arrival": 1,
        "dtype": "float32",
        "devices": ["cpu"],
        "engine_path": "plain",
        "numerics_version": 1,
        "versions": {"torch": "2.13"},
        "trust_remote_code": False,
        "started_at": "2026-01-02T03:04:05.000006Z",
        "finished_at": "2026-01-02T03:04:09.000006Z",
        "seconds": 4.0,
        "answer_seconds": 3.0,
        "n_requests": 10,
        "n_tokens": 50,
        "truncated": 0,
        "origin": "asked",
        "planned": {"items": 10, "samples": 10, "sample_ids": "ids"},
        "answers_digest": f"digest-{checkpoint_id}-{task}",
        "samples": {"key": f"samples/{identity}/t{attempt}.parquet", "sha256": "0", "rows": 10},
        "scores": scores(task, value),
        "primary": {"metric": METRIC, "value": value, "higher_is_better": True, "chance": 0.25},
        **fields,
    }


class World:
    """A store and its catalog."""

    def __init__(self, folder: Path) -> None:
        self.store = LocalStore(folder / "results")
        self.catalog = folder / "state" / "catalog.duckdb"

    def task(self, name: str, task_id: str) -> None:
        newest = layout.newest_numbered(self.store, layout.task_names(name))
        n = newest[0] + 1 if newest else 1
        log.write(self.store, "task", name=name, n=n, task_id=task_id)
        create_record(self.store, layout.task_name(name, n), task_record(task_id))

    def arrive(self, key: str, checkpoint_id: str | None, step: int = 1, run: str = "run") -> Arrival:
        """A new arrival of `key`; identified unless `checkpoint_id` is None."""
        newest = arrivals.newest(self.store, key)
        arrival, new = arrivals.register(
            self.store,
            key=key,
            uri=f"file://{key}",
            fingerprint=f"f{newest.n + 1 if newest else 1}",
            run=run,
            step=step,
            tags={"lr": "0.1"},
            watcher="w",
        )
        assert new
        if checkpoint_id is not None:
            self.identify(arrival, checkpoint_id)
        return arrival

    def identify(self, arrival: Arrival, checkpoint_id: str) -> None:
        checkpoint = Checkpoint(checkpoint_id, f"w-{checkpoint_id}", None, "transformers")
        arrivals.record_identity(self.store, arrival, checkpoint)

    def commit(
        self, checkpoint_id: str, task: str, task_id: str, value: float | None = 0.5, attempt: int = 1, **fields: Any
    ) -> str:
        """Returns the evaluation_id."""
        record = commit_record(checkpoint_id, task, task_id, value, attempt, **fields)
        lease = leases.acquire(self.store, record["evaluation_id"], 30)
        assert lease is not None
        assert commits.commit(self.store, record, lease)
        lease.release()
        return record["evaluation_id"]

    def decide(self, evaluation: str, status: Any = "published", attempt: int = 1, action: Any = "gate") -> None:
        checks = (
            Check("finite", passed=status == "published", severity="error", reason="a NaN", observed={"n": 1}),
            Check("chance", passed=False, severity="warning", reason="at chance"),
        )
        decisions.append(
            self.store,
            evaluation,
            attempt,
            status=status,
            checks=checks,
            reasons=("a NaN",) if status == "held" else (),
            gate_version="1",
            actor="test",
            action=action,
        )

    def publish(self, checkpoint_id: str, task: str, task_id: str, value: float = 0.5, **fields: Any) -> str:
        evaluation = self.commit(checkpoint_id, task, task_id, value, **fields)
        self.decide(evaluation, attempt=fields.get("attempt", 1))
        return evaluation

    def fail(self, subject: tries.Subject, class_: ErrorClass = "deterministic", **evaluation: Any) -> None:
        tries.start(self.store, subject, evaluation=evaluation).end("failed", Failure(class_, f"it was {class_}"))


def task_record(task_id: str) -> dict[str, Any]:
    return {"task_id": task_id, "primary_metric": METRIC, "higher_is_better": True, "chance": 0.25}


def dump(catalog: Path) -> dict[str, list[str]]:
    """Every table's rows, sorted: equal when the catalogs say the same."""
    con = open_catalog(catalog)
    try:
        return {name: sorted(map(repr, con.execute(f"from {name}").fetchall())) for name in TABLES}
    finally:
        con.close()


def rows(table: pa.Table) -> list[tuple[Any, ...]]:
    return [tuple(row.values()) for row in table.to_pylist()]
