"""The DuckDB catalog, as a Dagster resource."""

import dagster as dg
import pyarrow as pa

from eval_platform import warehouse
from resources.store import StoreResource


class WarehouseResource(dg.ConfigurableResource):
    """SQL over everything that is in the store."""

    store: dg.ResourceDependency[StoreResource]

    def refresh(self) -> None:
        """Bring the catalog up to date."""
        warehouse.refresh(self.store.open(), self.store.config().catalog_path)

    def query(self, sql: str) -> pa.Table:
        """Ask the catalog as it is; `refresh` first. For statements of our own: strangers' go through the library's."""
        return self.queries(sql)[0]

    def queries(self, *statements: str) -> list[pa.Table]:
        """`query` of each, of one and the same catalog: to open it costs more than most statements."""
        config = self.store.config()
        with warehouse.connect(
            config.catalog_path, self.store.open(), samples=False, references=config.reference_keys
        ) as con:
            return [con.execute(sql).to_arrow_table() for sql in statements]
