"""Where are the samples? In the files that the evaluations name, never in what a glob finds."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval_platform.store import Store, layout
from eval_platform.store.nearby import local_files
from eval_platform.warehouse.connection import literal

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa


def define_samples(con: "duckdb.DuckDBPyConnection", store: Store, cache: Path) -> list[str]:
    """Define the view `samples` on this connection; returns the paths that it reads.

    One row per sample of every committed attempt, whatever its status: with `scoring.SAMPLE_SCHEMA` come who was
    asked what (key, run, step and task of the arrival that it was first asked for; a linked copy has the same
    checkpoint_id), `status`, and the prompt. What `prune` has removed is left out. Of a store that is not on
    this machine copies are read, which are kept in `cache`. Raises StoreError when they cannot be had.
    """
    rows = con.execute(
        """
        select e.evaluation_id, e.attempt, e.status, e.key, a.run, a.step, e.task, e.task_id, e.checkpoint_id,
            e.settings_id, e.item_limit, e.samples_key, e.prompts_id
        from evaluations e left join arrivals a on a.key = e.key and a.n = e.arrival
        where e.samples_key is not null and e.samples_pruned_at is null
        """
    ).fetchall()
    prompt_keys = {row[-1]: layout.prompts(row[-1]) for row in rows}
    near = local_files(store, dict.fromkeys([*(row[-2] for row in rows), *prompt_keys.values()]), cache)
    files = [(*known, str(near[key]), prompts_id) for *known, key, prompts_id in rows if key in near]
    asked = {file[-1] for file in files}
    prompt_files = {
        prompts_id: str(near[key]) for prompts_id, key in prompt_keys.items() if prompts_id in asked and key in near
    }
    con.execute("create schema memory.bookkeeping")
    con.register("_described", _described(files, prompt_files))
    con.execute("create table memory.bookkeeping.sample_files as from _described")
    con.unregister("_described")
    con.execute(f"create view memory.main.samples as {_view(con, files, list(prompt_files.values()))}")
    return [*(file[-2] for file in files), *prompt_files.values()]


def _described(files: list[tuple[Any, ...]], prompt_files: dict[str, str]) -> "pa.Table":
    import pyarrow as pa

    text = pa.string()
    columns = {
        "evaluation_id": text,
        "attempt": pa.int32(),
        "status": text,
        "key": text,
        "run": text,
        "step": pa.int64(),
        "task": text,
        "task_id": text,
        "checkpoint_id": text,
        "settings_id": text,
        "item_limit": pa.int64(),
        "_file": text,
        "_prompts": text,
    }
    rows = [dict(zip(columns, (*file[:-1], prompt_files.get(file[-1])), strict=True)) for file in files]
    return pa.Table.from_pylist(rows, schema=pa.schema(columns))


def _view(con: "duckdb.DuckDBPyConnection", files: list[tuple[Any, ...]], prompt_files: list[str]) -> str:
    """The join on the file's name lets DuckDB skip the files that a condition on key, task or step rules out."""
    if files:
        # Not union_by_name, which opens every file first: one layout version has one schema.
        source = f"read_parquet([{', '.join(literal(file[-2]) for file in files)}], filename = '_file')"
    else:
        from eval_platform.scoring import SAMPLE_SCHEMA

        con.register("_no_rows", SAMPLE_SCHEMA.empty_table())
        con.execute("create table memory.bookkeeping.no_samples as select *, null::varchar as _file from _no_rows")
        con.unregister("_no_rows")
        source = "memory.bookkeeping.no_samples"
    if prompt_files:
        listed = ", ".join(literal(path) for path in prompt_files)
        prompt = "p.prompt"
        join = f"left join read_parquet([{listed}], filename = '_file') p on p._file = f._prompts"
        join += " and p.sample_id = s.sample_id"
    else:
        prompt, join = "null::varchar", ""
    return f"""
        select f.* exclude (_file, _prompts), s.* exclude (_file), {prompt} as prompt
        from {source} s join memory.bookkeeping.sample_files f on f._file = s._file {join}
    """
