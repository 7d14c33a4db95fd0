"""How are packages imported that make millions of objects? Without the collector looking through them each time."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """No cyclic garbage collection inside: what an import makes, stays.

    Worth an eighth of the time that torch with transformers, or Great Expectations, takes (docs/log.md). For imports
    only: what is loaded or computed inside would not be freed where it is part of a cycle.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
