"""Datasets on the Hugging Face hub, through the package `datasets`: is the hub within reach, and what are the rows?"""

import functools
import importlib.util
import os
from typing import Any

from eval_platform.errors import TaskError

_REACH_SECONDS = 5.0


class Unreachable(Exception):
    """The hub cannot be asked from here; the message says why, in one line."""


def told(name: str, config: str | None, split: str) -> str:
    """How messages call a split of a dataset."""
    return f"dataset {name}" + (f" ({config})" if config else "") + f", split {split}"


def read(name: str, config: str | None, split: str, revision: str | None) -> list[dict[str, Any]]:
    """The rows of one split. Offline (HF_HUB_OFFLINE=1) only what was downloaded before can be read.

    Raises Unreachable when the hub cannot be asked, TaskError when it was asked and has no such rows.
    """
    refusal = _refusal()
    if refusal is not None:
        raise Unreachable(refusal)
    import datasets

    where = told(name, config, split)
    try:
        rows = datasets.load_dataset(name, config, split=split, revision=revision)
    except Exception as error:  # datasets and huggingface_hub raise dozens of types
        if (why := why_unreachable(error, where)) is not None:
            raise Unreachable(why) from error
        raise TaskError(
            f"{where} cannot be loaded from the Hugging Face hub: {type(error).__name__}: {error}",
            remedy="check name, config, split and revision, or keep the documents in a local file",
        ) from error
    if len(rows) == 0:
        raise TaskError(f"{where} holds no documents", remedy="name another split")
    return [dict(row) for row in rows]


def out_of_reach() -> str | None:
    """Why the hub, or what was downloaded from it, cannot be asked from here; None when it can."""
    return _refusal()


def remedy(name: str) -> str:
    """What would bring the dataset `name` to this machine."""
    there = f"{name} on the Hugging Face hub"
    if importlib.util.find_spec("datasets") is None:
        return f"install the package that reads {there}: pip install datasets"
    if _offline():
        return f"unset HF_HUB_OFFLINE once, where {there} can be reached"
    return f"make {there} reachable"


def why_unreachable(error: Exception, where: str) -> str | None:
    """Why `error` says no more than that `where` cannot be had from here; None when it says something else."""
    if _offline():
        return f"HF_HUB_OFFLINE is set, and {where} was not downloaded before"
    if isinstance(error, ConnectionError | TimeoutError):
        return f"the hub did not answer for {where}: {error}"
    return None


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


@functools.cache
def _refusal() -> str | None:
    """Why the hub is not asked at all in this process, None when it may be.

    Looked at once: `datasets` tries a hub that is out of reach again and again, for every task that names one.
    """
    if importlib.util.find_spec("datasets") is None:
        return "the package `datasets` is not installed (pip install datasets)"
    if _offline():
        return None  # it answers from its cache, without a network
    import urllib.error
    import urllib.request

    from huggingface_hub import constants

    try:
        with urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=_REACH_SECONDS):
            return None
    except urllib.error.HTTPError:
        return None  # it answered
    except OSError as error:
        return f"the hub at {constants.ENDPOINT} cannot be reached: {error}"
