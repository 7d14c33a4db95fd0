"""Which rows go through the model together? Padded batches under a budget of tokens, halved when memory runs out."""

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
    """Run `rows` in order, batch by batch. `take(rest, share)` says how many of the rest fit `share` of the budget.

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
            if not is_out_of_memory(error):
                raise
            if size == 1:
                raise MemoryError(f"one request does not fit into memory: {error}") from error
            result = None
        if result is None:
            # Outside the except clause, so that the traceback's frames no longer hold the batch's tensors.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            waiting.extendleft(reversed(batch))
            # A share that still admits the same rows would only fail again.
            while take(waiting, share) >= size and size > 1:
                share /= 2
            _log.warning("out of memory with %d requests at once; going on with smaller batches", size)
            continue
        yield batch, result


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that memory ran out, on any device."""
    # On CPU torch raises a plain RuntimeError, whose text is all there is to know it by.
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in text
