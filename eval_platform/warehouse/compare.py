"""Does a catalog say what the files say? It is held against one that is built from the files at this moment."""

from collections.abc import Callable
from pathlib import Path

from eval_platform.store import Store
from eval_platform.warehouse.catalog import rebuild, refresh, turn
from eval_platform.warehouse.connection import literal, open_catalog
from eval_platform.warehouse.schema import TABLES


def differences(
    store: Store, catalog: Path, step: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, tuple[int, int]]:
    """table -> (rows that the catalog lacks, rows that it has and the files have not), of tables that differ.

    The catalog is refreshed first. Raises StoreError when the store cannot be read or a catalog not be written.
    """
    anew = catalog.with_name(f"anew-{catalog.name}")  # one name, in turns: what a kill leaves the next one replaces
    with turn(catalog.with_name(f"compared-{catalog.name}"), None):
        try:
            refresh(store, catalog)
            rebuild(store, anew, step)
            if not (found := _compared(catalog, anew)):
                return found
            # Something may have been written between the two.
            refresh(store, anew)
            refresh(store, catalog)
            return _compared(catalog, anew)
        finally:
            anew.unlink(missing_ok=True)


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
