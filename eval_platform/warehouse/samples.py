"""Where are the samples? In the files that the evaluations name, never in what a glob finds."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval_platform.store import Store, commits, layout
from eval_platform.store.nearby import local_files
from eval_platform.warehouse.connection import literal

if TYPE_CHECKING:
    import duckdb
    import pyarrow as pa


def define_samples(con: "duckdb.DuckDBPyConnection", store: Store, cache: Path) -> list[str]:
    """Define the view `samples` on this connection; returns the paths that it reads.

    One row per sample of every committed attempt, whatever its status: with `scoring.SAMPLE_SCHEMA` come who was
    asked what (key, run, step and task of the arrival that it was first asked for; a linked copy has the same
    checkpoint_id), `status`, and the prompt. What `prune` has removed is left out. Samples that are not there and that
    nobody has pruned are lost: a query that would count them fails, and says whose they are. Of a store that is not on
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
    lost = [
        (*known, _why(store, known[0], key), None)
        for *known, key, _ in rows
        # Somebody may have pruned them since the catalog was brought up to date.
        if key not in near and commits.tombstone(store, known[0], known[1]) is None
    ]
    asked = {file[-1] for file in files}
    prompt_files = {
        prompts_id: str(near[key]) for prompts_id, key in prompt_keys.items() if prompts_id in asked and key in near
    }
    con.execute("create schema memory.bookkeeping")
    con.register("_described", _described(files, prompt_files))
    con.execute("create table memory.bookkeeping.sample_files as from _described")
    con.unregister("_described")
    view = _view(con, files, list(prompt_files.values()))
    con.execute(f"create view memory.main.samples as {_failing(con, lost)}{view}")
    return [*(file[-2] for file in files), *prompt_files.values()]


LOST = "the samples are lost: "  # how the error of a query that needs them begins


def _why(store: Store, evaluation_id: str, key: str) -> str:
    return f"{LOST}{key}, of evaluation {evaluation_id}, is not in {store.uri}, and nobody has pruned it"


def _failing(con: "duckdb.DuckDBPyConnection", lost: list[tuple[Any, ...]]) -> str:
    """A branch of the view with a row for each evaluation whose samples are lost; to read one is an error.

    A condition on key, task or evaluation that rules them out is applied before, so that all other queries work. The
    columns that would come of the samples are errors too: as NULL, a condition on them would drop the row in silence.
    """
    if not lost:
        return ""
    from eval_platform.scoring import SAMPLE_SCHEMA

    con.register("_described", _described(lost, {}))
    con.execute("create table memory.bookkeeping.lost_samples as from _described")
    con.unregister("_described")
    columns = ", ".join(f'error(l._file) as "{name}"' for name in (*SAMPLE_SCHEMA.names, "prompt"))
    return f"""
        select l.* exclude (_file, _prompts), {columns} from memory.bookkeeping.lost_samples l
        where error(l._file)::boolean union all by name
    """


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
