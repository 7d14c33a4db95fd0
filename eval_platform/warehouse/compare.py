"""Does a catalog say what the files say? It is held against one that is built from the files at this moment."""

import tempfile
from collections.abc import Callable
from pathlib import Path

from eval_platform.store import Store
from eval_platform.warehouse.catalog import rebuild, refresh
from eval_platform.warehouse.connection import literal, open_catalog
from eval_platform.warehouse.schema import TABLES


def differences(
    store: Store, catalog: Path, step: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, tuple[int, int]]:
    """table -> (rows that the catalog lacks, rows that it has and the files have not), of tables that differ.

    The catalog is refreshed first. Raises StoreError when the store cannot be read or a catalog not be written.
    """
    with tempfile.TemporaryDirectory(prefix=f"{catalog.name}.anew-", dir=_made(catalog.parent)) as folder:
        anew = Path(folder) / "catalog.duckdb"
        refresh(store, catalog)
        rebuild(store, anew, step)
        if not (found := _compared(catalog, anew)):
            return found
        # Something may have been written between the two.
        refresh(store, anew)
        refresh(store, catalog)
        return _compared(catalog, anew)


def _compared(catalog: Path, anew: Path) -> dict[str, tuple[int, int]]:
    found = {}
    con = open_catalog(catalog)
    try:
        con.execute(f"attach {literal(str(anew))} as anew (read_only)")
        for name in TABLES:
            pairs = ((f"anew.main.{name}", name), (name, f"anew.main.{name}"))
            lacking, extra = (
                con.execute(f"select count(*) from (from {a} except all from {b})").fetchall()[0][0] for a, b in pairs
            )
            if lacking or extra:
                found[name] = (lacking, extra)
    finally:
        con.close()
    return found


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
