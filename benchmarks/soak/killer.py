"""Who dies, and when? Workers at random moments, and aimed at the moments that are short.

At a random moment: one of the workers that live is killed from outside, after a wait that is uniform over about a life
(so that not the young alone die, where there are more killers' turns than births). Aimed: the first worker
that comes to a given phase of its life (`stub.PHASES`) dies within some milliseconds of it.
"""

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.soak.stub import PHASES, append, lines
from eval_platform.store.process import known_dead

# Each draw of a phase and of how long after its beginning, in seconds: within an upload, or right after it.
_AIM_DELAY = 0.015
_AIM_PATIENCE = 8.0
_LIFE_SECONDS = 5.0
# Where workers are born slowly (a busy machine) as many as are born would die young, and nothing be finished.
MOST_KILLED = 0.8


@dataclass
class Killer:
    """Looks when it is told to (`step`); `mean_wait` in seconds between two kills of each kind."""

    control: Path
    chance: random.Random
    mean_wait: float
    workers: dict[str, dict[str, Any]] = field(default_factory=dict)  # name -> birth
    _gone: set[str] = field(default_factory=set)
    _read: int = 0
    _doomed: dict[str, float] = field(default_factory=dict)  # name -> when
    _next_random: float = 0.0
    _next_aim: float = 0.0
    _withdraw: float = 0.0

    def step(self, left: int) -> None:
        """Kill whose time has come, unless so many kills are not left any more (one may be on its way)."""
        now = time.monotonic()
        self._look()
        left = min(left, 1 + int(MOST_KILLED * len(self.workers)) - len(self.deaths())) - len(self._claimed())
        for name, when in list(self._doomed.items()):
            if now > when:
                del self._doomed[name]
                self._kill(name)
        left -= len(self._doomed)
        if (self.control / "aim").exists():
            left -= 1
            if now > self._withdraw:
                (self.control / "aim").unlink(missing_ok=True)
        elif now > self._next_aim and left > 0:
            self._aim(now)
            left -= 1
        if now > self._next_random and left > 0:
            self._next_random = now + self.chance.uniform(0, 2 * self.mean_wait)
            living = sorted(set(self._living()) - set(self._claimed()) - self._doomed.keys())
            if living:
                self._doomed[self.chance.choice(living)] = now + self.chance.uniform(0, _LIFE_SECONDS)

    def withdraw(self) -> None:
        """Aim at nobody any more, and wait for those that were hit."""
        (self.control / "aim").unlink(missing_ok=True)
        self._doomed.clear()
        while self._claimed():
            time.sleep(0.05)
            self._look()

    def end_all(self) -> None:
        """Leave no worker behind, whatever has ended the soak."""
        self._look()
        for name in list(self._living()):
            with suppress(ProcessLookupError):
                os.kill(self.workers[name]["process"]["pid"], signal.SIGKILL)

    def deaths(self) -> list[dict[str, Any]]:
        """Every worker killed, once: the kill that was its end, and its phase then."""
        return list({line["worker"]: line for line in lines(self.control / "deaths.jsonl")}.values())

    def _look(self) -> None:
        file = self.control / "births.jsonl"
        if not file.exists():
            return
        with file.open("rb") as opened:
            opened.seek(self._read)
            *whole, rest = opened.read().split(b"\n")
            self._read = opened.tell() - len(rest)
        for line in whole:
            birth = json.loads(line)
            self.workers[birth["worker"]] = birth

    def _living(self) -> Iterator[str]:
        for name, birth in self.workers.items():
            if name not in self._gone:
                if known_dead({**birth["process"], "machine": _here()}):
                    self._gone.add(name)
                else:
                    yield name

    def _claimed(self) -> list[str]:
        """Those that took the aim and still live."""
        living = set(self._living())
        return [name for file in self.control.glob("aimed-*") if (name := file.name.removeprefix("aimed-")) in living]

    def _aim(self, now: float) -> None:
        aside = self.control / "aim.new"
        aim = {
            "phase": self.chance.choice(PHASES),
            "chance": self.chance.choice((1.0, 0.4)),  # not always the first that comes by, or its first segment
            "delay": self.chance.choice((0.0, self.chance.uniform(0, _AIM_DELAY))),
        }
        aside.write_text(json.dumps(aim))
        aside.rename(self.control / "aim")
        self._withdraw = now + _AIM_PATIENCE
        self._next_aim = now + self.chance.uniform(0, 2 * self.mean_wait)

    def _kill(self, name: str) -> None:
        """Unless it has ended, or been killed, by now."""
        birth = self.workers[name]
        with suppress(ProcessLookupError):
            descriptor = os.pidfd_open(birth["process"]["pid"])
            try:
                # Held by its descriptor, so that no other process can have its number; and it is still this one.
                if known_dead({**birth["process"], "machine": _here()}):
                    return
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
                while not known_dead({**birth["process"], "machine": _here()}):
                    time.sleep(0.001)
            finally:
                os.close(descriptor)
            messages = Path(birth["folder"], "messages.jsonl")
            if messages.exists() and '"type": "end"' in messages.read_text():
                return  # it had said its last word: this killed nobody
            phase = (self.control / "phase" / name).read_text().strip()
            append(self.control / "deaths.jsonl", {"worker": name, "phase": phase, "how": "random"})


def _here() -> str | None:
    """This machine, as those of the soak know it that pretend to be others."""
    from eval_platform.store import process

    return process._machine()
