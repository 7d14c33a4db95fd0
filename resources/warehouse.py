"""The DuckDB catalog, as a Dagster resource."""

import dagster as dg
import pyarrow as pa

from eval_platform import warehouse
from resources.store import StoreResource


class WarehouseResource(dg.ConfigurableResource):
    """SQL over everything that is in the store."""

    store: dg.ResourceDependency[StoreResource]

    def query(self, sql: str) -> pa.Table:
        """Bring the catalog up to date, then ask it."""
        config, store = self.store.config(), self.store.open()
        warehouse.refresh(store, config.catalog_path)
        return warehouse.query(config.catalog_path, store, sql)
