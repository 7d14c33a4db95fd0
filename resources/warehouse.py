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
        with warehouse.connect(self.store.config().catalog_path, self.store.open(), samples=False) as con:
            return con.execute(sql).to_arrow_table()
