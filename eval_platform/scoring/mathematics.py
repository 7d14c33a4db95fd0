"""Is it the same number, set or expression? By math-verify (extra `metrics`)."""

import logging
import threading
from collections.abc import Sequence

# Seconds for reading an answer, and for comparing it: some expressions take sympy for ever.
_SECONDS = 5


def math_equal(answer: str | None, references: Sequence[str]) -> float:
    """1.0 when math-verify takes the last expression in the answer for equal to that of any reference.

    Its order matters: the reference is the gold. What cannot be read, or not within five seconds, is not equal.
    Raises RuntimeError outside the main thread, where Python cannot stop it.
    """
    from math_verify import parse, verify

    # It prints every answer that takes too long, whole; here that is an answer like another, and not equal.
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("math_verify is stopped by a signal, which only the main thread gets: score there")
    if answer is None:
        return 0.0
    said = parse(answer, parsing_timeout=_SECONDS)
    return float(
        any(
            verify(parse(reference, parsing_timeout=_SECONDS), said, timeout_seconds=_SECONDS)
            for reference in references
        )
    )
