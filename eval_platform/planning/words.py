"""What a run's page and a terminal say of a plan, and of what became of it."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any


def planned(message: Mapping[str, Any], now: datetime) -> str:
    """Of a message `planned` (`drive`): who does what, and when all is expected to be done.

    No time of day is told of what may wait in a cluster's queue: nobody knows when it begins.
    """
    shards: Sequence[Mapping[str, Any]] = message["shards"]
    each = [one["expected_seconds"] for one in shards]
    known = [seconds for seconds in each if seconds is not None]
    end = "when it ends is not known yet"
    if len(known) == len(each) and not message["begun"]:
        end = f"expected to take {duration(max(known))} once {'it has' if len(shards) == 1 else 'all have'} begun"
    elif len(known) == len(each):
        at = (now + timedelta(seconds=max(known))).astimezone(UTC)
        end = f"expected to end at {at:%H:%M:%S} UTC, {duration(max(known))} after the start"
    if len(shards) == 1:
        return f"one worker for {_counted(shards[0])}; {end}"
    parts = "; ".join(f"{', '.join(one['tasks'])} ({_expected(one)})" for one in shards)
    return f"{len(shards)} workers share the tasks out; {end}: {parts}"


def took(shards: Sequence[Mapping[str, Any]]) -> str:
    """Of a message `took`: what each worker was expected to take, and what it took from its first word to its last."""
    return "; ".join(
        f"{_counted(one)}: {_expected(one)}, took "
        + (duration(one["seconds"]) if "seconds" in one else "nobody knows how long")
        for one in shards
    )


def duration(seconds: float) -> str:
    """For people: 12 s, 3 min, 2 h 5 min."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _expected(shard: Mapping[str, Any]) -> str:
    seconds = shard["expected_seconds"]
    return "not known" if seconds is None else f"{duration(seconds)} expected"


def _counted(shard: Mapping[str, Any]) -> str:
    n = len(shard["tasks"])
    return f"{n} task{'s' if n != 1 else ''}"
