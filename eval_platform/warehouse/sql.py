"""What do people ask? Their SQL runs on a connection that can read the catalog and the samples, and nothing else."""

import difflib
import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import pyarrow as pa

from eval_platform.errors import QueryError
from eval_platform.store import Store
from eval_platform.warehouse.catalog import refresh
from eval_platform.warehouse.connection import literal, lock_down, open_catalog
from eval_platform.warehouse.samples import LOST, define_samples
from eval_platform.warehouse.schema import TABLES, VIEWS

if TYPE_CHECKING:
    import duckdb

REFERENCES = "reference_scores"
NO_REFERENCES: Mapping[str, str] = MappingProxyType({})
# Views that every connection defines for itself.
_OF_CONNECTION = ("samples", REFERENCES)

# A query that finds another refresh at work waits this long for it, then answers from the catalog as it is.
_PATIENCE_SECONDS = 2.0
# A mention is enough: defining the view for nothing costs time, missing one would cost an answer.
_SAMPLES = re.compile(r"samples", re.IGNORECASE)
_EXPLAIN = re.compile(r"\s*explain\s+(analyze\s+)?(?=\S)", re.IGNORECASE)


def connect(
    catalog: Path, store: Store, *, samples: bool = True, references: Mapping[str, str] = NO_REFERENCES
) -> "duckdb.DuckDBPyConnection":
    """A locked-down connection to the catalog as it is (`refresh` first), for our own statements.

    samples: also define the view `samples`, which costs time where there are many files. references: key -> name, of
    which the view `reference_scores` is made. Text from outside belongs in `query`. Raises QueryError when there is no
    catalog.
    """
    con = open_catalog(catalog)
    try:
        _define_references(con, references)
        lock_down(con, define_samples(con, store, catalog.parent / "store_copies" / catalog.stem) if samples else [])
    except BaseException:
        con.close()
        raise
    return con


def _define_references(con: "duckdb.DuckDBPyConnection", references: Mapping[str, str]) -> None:
    """The view REFERENCES on this connection: which models are pinned stands in the configuration, not in the store."""
    named = ", ".join(f"({literal(key)}, {literal(name)})" for key, name in references.items())
    pinned = f"values {named}" if named else "select '', '' where false"
    con.execute(f"""
        create view memory.main.{REFERENCES} as
        select r.reference, b.* from catalog.main.leaderboard b join ({pinned}) r(key, reference) on r.key = b.key
    """)


def query(
    catalog: Path,
    store: Store,
    sql: str,
    *,
    timeout_s: float = 60,
    references: Mapping[str, str] = NO_REFERENCES,
) -> pa.Table:
    """The answer to one SELECT (or DESCRIBE, SHOW TABLES, SUMMARIZE, EXPLAIN) over an up-to-date catalog.

    Anything that writes, reads elsewhere, loads, or changes a setting is refused, since the text is run as
    `from query(text)`, where DuckDB takes nothing but a SELECT. Ctrl-C stops it.
    Raises QueryError: refused, wrong (with the views or columns that were perhaps meant) or longer than `timeout_s`.
    """
    import duckdb

    if not sql.strip().strip(";").strip():
        raise QueryError("the query is empty", remedy='try `eval-platform sql "select * from leaderboard"`')
    refresh(store, catalog, wait_seconds=_PATIENCE_SECONDS)
    con = connect(catalog, store, samples=bool(_SAMPLES.search(sql)), references=references)
    try:
        return _within(timeout_s, con, lambda: _select(con, sql))
    except duckdb.Error as error:
        raise _explained(con, sql, error) from error
    finally:
        con.close()


def _within(timeout_s: float, con: "duckdb.DuckDBPyConnection", ask: Callable[[], pa.Table]) -> pa.Table:
    """What `ask` returns or raises; QueryError when it takes too long.

    DuckDB does not look for signals while it fills an Arrow table, so the query has a thread of its own and this one
    stays free for Ctrl-C.
    """
    answers: list[pa.Table] = []
    errors: list[Exception] = []
    done = threading.Event()

    def run() -> None:
        try:
            answers.append(ask())
        except Exception as error:  # noqa: BLE001 -- raised again below, in the caller's thread
            errors.append(error)
        finally:
            done.set()

    thread = threading.Thread(target=run, name="sql", daemon=True)
    thread.start()
    try:
        in_time = done.wait(timeout_s)
    finally:
        # Again and again, since an interrupt before the query has begun is forgotten.
        while not done.wait(0):
            con.interrupt()
            done.wait(0.05)
        thread.join()
    if answers:
        return answers[0]
    if not in_time:
        raise QueryError(
            f"the query took longer than {timeout_s:g} s and was stopped",
            remedy="ask for less (a condition on key, task or step), or allow more time",
        )
    raise errors[0]


def _select(con: "duckdb.DuckDBPyConnection", sql: str) -> pa.Table:
    explain = _EXPLAIN.match(sql)
    if explain is None:
        return con.sql("from query(?)", params=[sql]).to_arrow_table()
    analyze = "analyze" if explain.group(1) else ""
    rows = con.execute(f"explain {analyze} from query(?)", [sql[explain.end() :]]).fetchall()
    return pa.table({"plan": pa.array([line for _, plan in rows for line in plan.splitlines()], pa.string())})


def _explained(con: "duckdb.DuckDBPyConnection", sql: str, error: "duckdb.Error") -> QueryError:
    """DuckDB's words without the frame that the text was run in, and what to do."""
    import duckdb

    said = str(error).split("\n\nLINE 1: from query(?)")[0].replace("\nLINE 1: from query(?)", "").strip()
    views, tables = sorted([*VIEWS, *_OF_CONNECTION]), sorted(TABLES)
    there = f"views: {', '.join(views)}; tables: {', '.join(tables)}; `describe leaderboard` lists columns"
    match error:
        case duckdb.ParserException() if "single SELECT" in said:
            return QueryError(
                "only one SELECT is run: nothing can be written, loaded or set through this",
                remedy="ask with a single SELECT (WITH, DESCRIBE, SHOW TABLES, SUMMARIZE and EXPLAIN SELECT work too)",
            )
        case duckdb.PermissionException():
            return QueryError(f"only the catalog can be read through this ({said})", remedy=f"there are {there}")
        case duckdb.CatalogException() if missing := re.search(r"name \"?([^\s\"]+)\"? does not exist", said):
            close = difflib.get_close_matches(missing[1].lower(), [*views, *tables], n=3)
            perhaps = f"perhaps {' or '.join(close)} is meant. " if close else ""
            return QueryError(said.split("\nDid you mean")[0], remedy=f"{perhaps}There are {there}")
        case duckdb.InvalidInputException() if LOST in said:
            return QueryError(
                said[said.index(LOST) :],
                remedy="restore that file from a copy, or leave the evaluation's attempt out by its id, key, task or "
                "number (after `eval-platform rerun` its next attempt has samples again); `eval-platform verify` lists "
                "all that is lost",
            )
        case duckdb.BinderException():
            return QueryError(said, remedy=_columns(con, sql) or f"there are {there}")
        case _:
            return QueryError(said, remedy=f"there are {there}")


def _columns(con: "duckdb.DuckDBPyConnection", sql: str) -> str:
    """The columns of the views and tables that the text mentions."""
    mentioned = [name for name in (*VIEWS, *_OF_CONNECTION, *TABLES) if re.search(rf"\b{name}\b", sql, re.IGNORECASE)]
    rows = con.execute(
        """
        select table_name, string_agg(column_name, ', ' order by ordinal_position) from information_schema.columns
        where list_contains(?, table_name) group by table_name order by table_name
        """,
        [mentioned],
    ).fetchall()
    return "; ".join(f"{name} has the columns {columns}" for name, columns in rows)
