"""How does it look: a bar while it goes on, a table at the end."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.soak.audit import Count
from benchmarks.soak.stub import PHASES

_BAR = 30
_SHOWN = 50


def progress(
    console: Console, dead: int, kills: int, published: int, arrived: int, began: float, *, every: int = 25
) -> None:
    """A bar on a terminal; elsewhere a line at `every` so many kills, and at each news after the last."""
    bar = ("=" * (_BAR * dead // max(1, kills))).ljust(_BAR)
    line = f"[{bar}] {dead}/{kills} kills, {published}/{arrived} published, {time.monotonic() - began:.0f} s"
    if console.is_terminal:
        console.print(line, end="\r", markup=False, highlight=False)
    elif dead % every == 0 or dead >= kills:
        console.print(line, markup=False, highlight=False)


def report(console: Console, title: str, count: Count, deaths: Sequence[Mapping[str, Any]]) -> None:
    """Where the workers died, what was counted, and what is wrong."""
    table = Table("what", "count", title=title, title_justify="left")
    where = Counter((death["phase"], death["how"]) for death in deaths)
    for phase in PHASES:
        told = [f"{where[phase, how]} {how}" for how in ("aimed", "random") if where[phase, how]]
        table.add_row(f"killed {phase}", ", ".join(told) or "0")
    table.add_section()
    for name, value in count.figures.items():
        table.add_row(name, str(value))
    console.print(table, highlight=False)
    for problem in count.wrong[:_SHOWN]:
        console.print(f"LOST OR DOUBLED: {problem}", style="red", markup=False, highlight=False)
    if len(count.wrong) > _SHOWN:
        console.print(f"and {len(count.wrong) - _SHOWN} more", highlight=False)
    console.print(f"{len(count.wrong)} problems" if count.wrong else "nothing lost, nothing doubled", highlight=False)
