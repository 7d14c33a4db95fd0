"""What every test needs: nothing is fetched, nothing is reported home, and threads do not fight over two cores."""

import os

import pytest
from xdist.scheduler import LoadFileScheduling

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DAGSTER_DISABLE_TELEMETRY", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
for variable in [name for name in os.environ if name.startswith("EVAL_PLATFORM_") and name != "EVAL_PLATFORM_DATA"]:
    del os.environ[variable]  # the user's own configuration is none of the tests' business

# Files that share `cli_tools.lived_in`, a folder that takes most of a minute to make: one process makes it, for all.
SHARE_A_PLACE = frozenset({"tests/test_bad_input.py", "tests/test_cli_commands.py", "tests/test_docs.py"})


class TogetherByPlace(LoadFileScheduling):
    """A file's tests on one process, and all files that share a place on the same one."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return "lived_in" if file in SHARE_A_PLACE else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> TogetherByPlace | None:
    """Only where files are what is handed out, as `make test` has it."""
    return TogetherByPlace(config, log) if config.getvalue("dist") == "loadfile" else None
