"""How is the catalog opened? Read-only, through a DuckDB instance of its own: every reader sees the newest file.

`duckdb.connect(path)` would not do: within a process it hands out the instance that already has the path open, which
goes on showing the file that a refresh has since replaced. Attaching to a fresh in-memory instance opens what is there.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from eval_platform.errors import QueryError

if TYPE_CHECKING:
    import duckdb

# Nothing is ever fetched or loaded, and a Python variable is not a table.
_CONFIG = {
    "autoinstall_known_extensions": False,
    "autoload_known_extensions": False,
    "allow_community_extensions": False,
    "python_enable_replacements": False,
}


def open_catalog(catalog: Path) -> "duckdb.DuckDBPyConnection":
    """A connection whose default database is the catalog, read-only. Close it when done.

    Raises QueryError when there is no catalog, duckdb.Error when the file is not one.
    """
    import duckdb

    if not catalog.is_file():
        raise QueryError(f"there is no catalog at {catalog}", remedy="refresh it: `eval-platform sql` does")
    con = duckdb.connect(":memory:", config=dict(_CONFIG))
    try:
        con.execute(f"attach {literal(str(catalog))} as catalog (read_only)")
        con.execute("set TimeZone = 'UTC'")
        # What a connection defines for itself (the view `samples`) stands in `memory`.
        con.execute("set search_path = 'catalog.main,memory.main'")
    except BaseException:
        con.close()
        raise
    return con


def lock_down(con: "duckdb.DuckDBPyConnection", paths: Sequence[str]) -> None:
    """From here on the connection reads the catalog and `paths`, nothing else, and no setting can be changed.

    The order matters: each statement would be refused after the later ones. `allowed_paths` also grants writing to
    these paths (DuckDB has no finer right), so strangers' text goes through `sql.query`, which runs nothing but SELECT.
    """
    con.execute("set temp_directory = ''")
    con.execute("set memory_limit = '2GB'")
    con.execute(f"set threads = {min(4, os.cpu_count() or 1)}")
    con.execute(f"set allowed_paths = [{', '.join(literal(path) for path in paths)}]")
    con.execute("set enable_external_access = false")
    con.execute("set lock_configuration = true")


def literal(text: str) -> str:
    """`text` as an SQL string."""
    return "'" + text.replace("'", "''") + "'"
