"""What whoever starts a worker promises to whoever wants it: how it goes, what it says, its end."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from eval_platform.plan import Plan


class Handle(Protocol):
    """A worker that was started, wherever it runs. `folder` is its own (`folders.py`)."""

    @property
    def folder(self) -> Path: ...

    def poll(self) -> int | None:
        """The exit code (negative: the signal that ended it), or None while it runs."""
        ...

    def messages(self) -> Iterator[list[dict[str, Any]]]:
        """What was said since the last look, often nothing; ends when the worker has ended and all is read.

        Several are followed in turn, so a look takes less than a second where all is well; one at a cluster that does
        not answer keeps the others' messages waiting for as long as its questions are waited for. Beside the worker's
        messages (docs/launchers.md) `{"type": "log", "text": ...}`: what it printed meanwhile.
        """
        ...

    def stop(self) -> None:
        """Ask the worker to flush and leave; end it when it does not within 10 s. Harmless when it has ended."""
        ...

    def last_words(self, n: int = 20) -> str:
        """The last `n` lines of the worker's log, for an error message."""
        ...


class Shard(NamedTuple):
    """A worker that was started, and what of a checkpoint's tasks is its own."""

    plan: Plan
    handle: Handle


def stop_all(handles: Sequence[Handle]) -> None:
    """All at once, for each may take its 10 s. Raises what stopping one of them raises, when all were asked."""
    with ThreadPoolExecutor(max(1, len(handles))) as pool:
        stopping = [pool.submit(handle.stop) for handle in handles]
    for one in stopping:
        one.result()
