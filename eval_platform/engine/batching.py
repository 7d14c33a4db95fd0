"""What goes through the model together, and what then when memory runs out? Less at a time; nothing is lost."""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

_log = logging.getLogger(__name__)
Row = TypeVar("Row")
Result = TypeVar("Result")


def run_batches(
    rows: Sequence[Row],
    run: Callable[[list[Row]], Result],
    take: Callable[[Sequence[Row], float], int],
) -> Iterator[tuple[list[Row], Result]]:
    """Run `rows` in order, in padded batches. `take(rest, share)` says how many of the rest fit `share` of the budget.

    When memory runs out the share is halved, for good, and the same rows are tried again in smaller batches.
    Raises MemoryError when a single row does not fit.
    """
    waiting = deque(rows)
    share = 1.0
    while waiting:
        size = max(1, take(waiting, share))
        batch = [waiting.popleft() for _ in range(size)]
        try:
            result = run(batch)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            if size == 1:
                raise _too_large(error) from error
            result = None
        if result is None:
            _give_back()
            waiting.extendleft(reversed(batch))
            # A share that still admits the same rows would only fail again.
            while take(waiting, share) >= size and size > 1:
                share /= 2
            _log.warning("out of memory with %d requests at once; going on with smaller batches", size)
            continue
        yield batch, result


def again_with_less(attempt: Callable[[], Iterator[Result]], shrink: Callable[[], bool]) -> Iterator[Result]:
    """What `attempt()` yields. When memory runs out in it, `shrink()` makes the next attempt a smaller one, which must
    leave out what was yielded; it returns False when it cannot be smaller, and MemoryError is raised.
    """
    while True:
        try:
            yield from attempt()
            return
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            if not shrink():
                raise _too_large(error) from error
        _give_back()


def _is_out_of_memory(error: BaseException) -> bool:
    # On CPU torch raises a plain RuntimeError, whose text is all there is to know it by.
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in text


def _too_large(error: BaseException) -> MemoryError:
    return MemoryError(f"one request does not fit into memory: {error}")


def _give_back() -> None:
    """To be called outside the except clause, so that the traceback's frames no longer hold the tensors."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
