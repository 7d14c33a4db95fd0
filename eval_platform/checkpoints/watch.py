"""Since when has a folder been unchanged? A watcher's memory, small enough for a sensor's cursor."""

import json
import math
import time
from collections.abc import Callable, Collection
from typing import Self

from eval_platform.checkpoints.turns import Turns, up_from

# Only whole but not yet registered folders take a seat; the others of a large backlog wait their turn.
CAPACITY = 200
_TURNS = ""  # in place of a key, of which none is empty


class Watch:
    """Per key: what the folder looked like (`Listing.activity`) and when it was first seen like that; and `turns`:
    which folders of a bucket come first the next time.

    By the wall clock (seconds since the epoch), because the memory must outlive the process. A clock stepping back
    makes a folder wait again from then on; it never shortens the wait.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.clock = clock
        self.turns = Turns()
        self.left: frozenset[str] = frozenset()  # keys of the folders that the last look had no time for
        self._seen: dict[str, tuple[str, float]] = {}

    def __contains__(self, key: object) -> bool:
        return key in self._seen

    @property
    def full(self) -> bool:
        return len(self._seen) >= CAPACITY

    def unchanged(self, key: str, activity: str) -> bool:
        """`key` was seen before and looked the same."""
        seen = self._seen.get(key)
        return seen is not None and seen[0] == activity

    def note(self, key: str, activity: str) -> float:
        """Remember what `key` looks like now; seconds for which it has been seen to look so."""
        now = self.clock()
        seen = self._seen.get(key)
        if seen is None or seen[0] != activity or now < seen[1]:
            seen = self._seen[key] = (activity, now)
        return now - seen[1]

    def forget(self, key: str) -> None:
        self._seen.pop(key, None)

    def keep(self, keys: Collection[str], left: Collection[str] = ()) -> None:
        """Forget all but `keys` and what lies below one of the folders `left`, which nobody has looked at."""
        self.left = frozenset(left)
        self._seen = {
            key: seen
            for key, seen in self._seen.items()
            if key in keys or any(above in self.left for above in up_from(key))
        }

    def to_json(self) -> str:
        turns = self.turns.to_json()
        return json.dumps({**self._seen, **({_TURNS: turns} if turns else {})}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str | None, clock: Callable[[], float] = time.time) -> Self:
        """The memory that `to_json` wrote; an empty one for None or for what no version of it wrote.

        Forgetting is safe: it costs one more quiet period.
        """
        watch = cls(clock)
        try:
            seen = json.loads(text or "{}")
        except ValueError:
            seen = {}
        if not isinstance(seen, dict):
            return watch
        watch.turns = Turns.from_json(seen.pop(_TURNS, None))
        for key, entry in seen.items():
            match entry:
                case [str(activity), int() | float() as since] if math.isfinite(since) and not watch.full:
                    watch._seen[key] = (activity, float(since))
        return watch
