"""The results root and this machine's configuration, as a Dagster resource."""

import dagster as dg

from eval_platform.config import Config, load_config
from eval_platform.store import Store, open_store


class StoreResource(dg.ConfigurableResource):
    """Where results are kept. `config_file`: path of eval_platform.toml; empty: found as the CLI finds it."""

    config_file: str = ""

    def config(self) -> Config:
        return load_config(self.config_file or None)

    def open(self) -> Store:
        config = self.config()
        return open_store(config.results, config.s3)
