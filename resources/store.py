"""The results root and this machine's configuration, as a Dagster resource."""

from functools import cache

import dagster as dg

from eval_platform.config import S3, Config, load_config
from eval_platform.store import Store, open_store


class StoreResource(dg.ConfigurableResource):
    """Where results are kept. `config_file`: path of eval_platform.toml; empty: found as the CLI finds it."""

    config_file: str = ""

    def config(self) -> Config:
        return load_config(self.config_file or None)

    def open(self) -> Store:
        config = self.config()
        return _opened(config.results, config.s3.model_dump_json())


@cache
def _opened(results: str, s3: str) -> Store:
    """One for the whole process: a bucket's keeps its connections open, and knows what it has found out.

    s3: the settings as JSON.
    """
    return open_store(results, S3.model_validate_json(s3))
