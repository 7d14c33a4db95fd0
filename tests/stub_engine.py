"""An engine in place of a model, for tests of how workers are started and ended: it needs no torch and answers at once.

It answers in batches, as an engine does: all of a batch is computed before the first of it is given. `computing` is
called while a batch is computed, with its number.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from eval_platform.engine import EngineInfo
from eval_platform.values import Request, Response, RunSettings

BATCH = 16


class StubEngine:
    def __init__(self, computing: Callable[[int], None] = lambda batch: None) -> None:
        self.computing = computing
        self.info = EngineInfo("cpu", "float32", 256, "plain", 1, 1, {}, "Stub", 512)

    def answer(self, requests: Sequence[Request]) -> Iterator[Response]:
        for start in range(0, len(requests), BATCH):
            self.computing(start // BATCH)
            for one in requests[start : start + BATCH]:
                value = -float(len(one.continuation or ""))
                yield Response(one.request_id, one.repeat, value, False, None, 1, "scored", 0)


def load_stub(computing: Callable[[int], None]) -> Callable[[Path, RunSettings], Any]:
    """What stands in place of `engine.load`: an engine so far as a worker asks one of a few choices."""
    return lambda path, settings: StubEngine(computing)
