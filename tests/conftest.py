"""What every test needs: nothing is fetched, nothing is reported home, and threads do not fight over two cores."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DAGSTER_DISABLE_TELEMETRY", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
for variable in [name for name in os.environ if name.startswith("EVAL_PLATFORM_") and name != "EVAL_PLATFORM_DATA"]:
    del os.environ[variable]  # the user's own configuration is none of the tests' business
