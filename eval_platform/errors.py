"""What can go wrong, in words a person can act on.

Every error names the thing (file, field, key) and the remedy. The class says who should act: `class_` is what a
try records (contract: deterministic | infrastructure | gone) and so decides whether it is tried again.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

ErrorClass = Literal["deterministic", "infrastructure", "gone"]


class EvalPlatformError(Exception):
    """An error whose message is meant for the user: what is wrong, where, and what to do."""

    class_: ClassVar[ErrorClass] = "deterministic"

    def __init__(self, message: str, *, remedy: str | None = None) -> None:
        super().__init__(f"{message}\n  remedy: {remedy}" if remedy else message)
        self.remedy = remedy


class ConfigError(EvalPlatformError):
    """The configuration file or an environment variable is wrong."""


class TaskError(EvalPlatformError):
    """A task file, its documents or its templates are wrong."""


class NoData(TaskError):
    """A task whose documents cannot be had on this machine: it is skipped, and listed as skipped.

    name: of the dataset. tried: each place that was looked at and what was found there, in a few words.
    """

    def __init__(self, name: str, tried: Sequence[str], *, remedy: str | None = None) -> None:
        self.name = name
        self.tried = tuple(tried)
        super().__init__(f"no data for {name}: {'; '.join(self.tried)}", remedy=remedy)


class CheckpointError(EvalPlatformError):
    """A complete checkpoint that cannot be evaluated (pickle only, unknown model class, no tokenizer)."""


class CheckpointGone(EvalPlatformError):
    """The checkpoint was deleted before it could be staged."""

    class_ = "gone"


class CheckpointChanged(EvalPlatformError):
    """The checkpoint's files changed while it was staged or evaluated; this try is dropped."""

    class_ = "infrastructure"


class StoreError(EvalPlatformError):
    """The results root cannot be read or written (permissions, disk full, network)."""

    class_ = "infrastructure"


class SchemaError(EvalPlatformError):
    """A stored file was written by a newer version than this one, or is not what its name says."""


class SamplesPruned(EvalPlatformError):
    """The samples of an evaluation were removed by `eval-platform prune`; its scores stand."""


class SandboxError(EvalPlatformError):
    """No program can be run in the sandbox here. Of the machine, not of the task: elsewhere it can."""

    class_ = "infrastructure"


class ServerError(EvalPlatformError):
    """A served model's server does not answer now, or has too much to do."""

    class_ = "infrastructure"


class NoDevice(EvalPlatformError):
    """The GPUs that this process was to use are not there, or too small. No checkpoint's fault: such a try does not
    count."""

    class_ = "infrastructure"


class DeviceFailed(EvalPlatformError):
    """A GPU failed in the middle of its work, and nothing in this process can use it any more."""

    class_ = "infrastructure"


class QueryError(EvalPlatformError):
    """A user's SQL was refused or failed."""


# What torch, CUDA and HIP say of a GPU that cannot be used, in place of one that failed at its work.
_NOT_THERE = (
    "No CUDA GPUs are available",
    "no CUDA-capable device",
    "no ROCm-capable device",
    "invalid device ordinal",
    "busy or unavailable",
    "driver on your system is too old",
)


def as_device_error(error: BaseException) -> NoDevice | DeviceFailed | None:
    """torch's error of a GPU in our words; None for any other, memory that is full among them. Imports no torch."""
    text = " ".join(str(error).split())
    ours = type(error).__name__ == "AcceleratorError" or text.startswith(("CUDA error", "CUDA driver", "HIP error"))
    if any(words in text for words in _NOT_THERE) and isinstance(error, RuntimeError):
        return NoDevice(f"the GPU cannot be used: {text[:300]}", remedy="see what `nvidia-smi` says on that machine")
    if not ours:
        return None
    return DeviceFailed(
        f"the GPU failed: {text[:300]}",
        remedy="see `nvidia-smi` and the kernel's log (Xid) on that machine; what was answered is kept",
    )


def classify(error: BaseException) -> ErrorClass:
    """The class under which a try records `error`: what may pass by itself is infrastructure."""
    if isinstance(error, EvalPlatformError):
        return error.class_
    if isinstance(error, OSError | MemoryError | ConnectionError | TimeoutError):
        return "infrastructure"
    # torch's own type, without importing torch here.
    if type(error).__name__ == "OutOfMemoryError":
        return "infrastructure"
    return "deterministic"
