"""Where public items are for tests that compare with them: $EVAL_PLATFORM_DATA, else `../shared/data`.

They lie beside the project where it is developed, and not in a clone of it: a test that needs them skips and says so.
"""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
FOLDER = Path(os.environ.get("EVAL_PLATFORM_DATA") or REPOSITORY.parent / "shared" / "data")


def originals(path: str) -> Path:
    """The file or folder `path` of the public items; skips the test that asks when it is not there."""
    if not (FOLDER / path).exists():
        pytest.skip(f"public items are needed: no {path} below {FOLDER} (set EVAL_PLATFORM_DATA)")
    return FOLDER / path


def use_originals(monkeypatch: pytest.MonkeyPatch, *paths: str) -> None:
    """Let tasks find the public items, as with EVAL_PLATFORM_DATA set; skips unless all `paths` are there."""
    for path in paths:
        originals(path)
    monkeypatch.setenv("EVAL_PLATFORM_DATA", str(FOLDER))
