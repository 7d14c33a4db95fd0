"""Who comes next? What a checkpoint is asked (tiers), in which order what waits is begun, and what is passed over.

Pure functions of what has arrived and what waits: the sensors look, ask here, and tell Dagster's queue. Nothing here
knows of Dagster, reads a clock or keeps anything. `docs/queueing.md` says the policy in words.
"""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from eval_platform import config
from eval_platform.errors import ConfigError
from eval_platform.tasks import TaskLock, find_suite
from eval_platform.tasks.sections import did_you_mean

# Before every tier: somebody asked for it by name. After every tier: what fills gaps while nothing else waits.
BY_HAND, GAPS = -1, 1_000
# Numbers of the first in line; those behind have less, whatever their time of arrival.
_FRONT_NUMBER = 10**13
_BETWEEN_PLACES = 10**10  # more than any time in seconds since 1970
FRONT = 50

LAST_TAG = "last"

# In the store's record of a run that a person cancelled, in place of a tier's name, which holds no dot.
CANCELLED = "cancelled."


@dataclass(frozen=True, slots=True)
class Tier:
    """Some of the lock's tasks, and of which checkpoints of a run they are asked.

    place: 0 goes first. every: None where only the last of a run is asked. tasks: those that no earlier tier asks of
    every checkpoint.
    """

    name: str
    place: int
    tasks: frozenset[str]
    every: int | None = 1
    last: bool = False

    @property
    def takes_all(self) -> bool:
        """Whether every checkpoint is asked, so that nothing must be known of the others of its run."""
        return self.every == 1

    @property
    def told(self) -> str:
        """Of which checkpoints it is asked, in words."""
        if self.takes_all:
            return "every checkpoint"
        of = [] if self.every is None else [f"every {self.every}th checkpoint of a run"]
        return " and ".join([*of, *(["the last of a run"] if self.last else [])])


@dataclass(frozen=True, slots=True)
class Point:
    """A checkpoint on its run's curve: the newest arrival of a key.

    arrived_at: ISO 8601, UTC. is_last: its trainer has said that no other follows (tag `last` in checkpoint.json).
    """

    key: str
    n: int
    step: int | None = None
    arrived_at: str = ""
    is_last: bool = False

    @property
    def order(self) -> tuple[int, str, str]:
        return (-1 if self.step is None else self.step, self.arrived_at, self.key)


@dataclass(frozen=True, slots=True)
class Waiting:
    """Something that waits to be begun. place: its tier's, BY_HAND or GAPS. tier: None: it is never passed over."""

    id: str
    run: str
    place: int = 0
    tier: str | None = None
    step: int | None = None
    arrived_at: str = ""

    @property
    def order(self) -> tuple[int, str, str]:
        return (-1 if self.step is None else self.step, self.arrived_at, self.id)


def tiers(queue: config.Queue | None, suites: Mapping[str, Sequence[str]], lock: TaskLock) -> tuple[Tier, ...]:
    """The tiers of `[queue]` over the tasks of the lock, the first to be begun first; without any, one of all tasks.

    Tasks that no tier names make a last tier, `other`, of every checkpoint, or a task that somebody
    added would never be heard of. A tier of which every task is skipped for want
    of data is left out. suites: `[suites]`. Raises ConfigError naming the field for a suite that is not there, a task
    that the lock has not, and a tier that asks nothing.
    """
    configured = queue.tiers if queue is not None else ()
    found: list[Tier] = []
    taken: set[str] = set()  # asked of every checkpoint by an earlier tier
    named: set[str] = set()
    for place, tier in enumerate(configured):
        where = f"field queue.tiers.{place}"
        names = _names(tier, where, suites, lock)
        own = frozenset((names & lock.tasks.keys()) - taken)
        if not own and names & lock.tasks.keys():
            raise ConfigError(
                f"{where} (tier {tier.name}) asks nothing: earlier tiers ask all of its tasks of every checkpoint",
                remedy="give it other tasks, or remove it",
            )
        named |= names
        if not own:
            continue
        every = tier.every or (None if tier.last else 1)
        found.append(Tier(tier.name, place, own, every, tier.last and every != 1))
        if every == 1:
            taken |= own
    rest = frozenset(lock.tasks.keys() - named)
    if rest:
        found.append(Tier(config.OTHER_TIER, len(configured), rest))
    return tuple(found)


def _names(tier: config.Tier, where: str, suites: Mapping[str, Sequence[str]], lock: TaskLock) -> set[str]:
    """The tasks that a configured tier means, skipped ones too."""
    known = lock.tasks.keys() | lock.skipped.keys()
    if not tier.tasks and not tier.suites:
        return set(known)
    names = set(tier.tasks)
    for i, suite in enumerate(tier.suites):
        try:
            names |= set(find_suite(suite, suites, lock.groups).tasks)
        except ConfigError as error:
            said = str(error).partition("\n  remedy: ")[0]
            raise ConfigError(f"{where}.suites.{i} (tier {tier.name}): {said}", remedy=error.remedy) from error
    unknown = sorted(names - known)
    if unknown:
        raise ConfigError(
            f"{where} (tier {tier.name}): no task named {', '.join(unknown)} in the lock"
            f"{did_you_mean(unknown[0], known)}",
            remedy="add it to [tasks] and run `eval-platform tasks sync`",
        )
    return names


def points_of(run: Iterable[Point], tier: Tier, asked: Collection[str], *, ended: bool) -> list[Point]:
    """Checkpoints of one run that `tier` is still to be asked of, by step.

    asked: keys that it was asked of already, or was passed over at. ended: no other checkpoint will come.

    Of every k-th: in a run that comes in order the k-th, the 2k-th and so on. What arrives out of order never brings
    two nearer together than k checkpoints, and leaves no more than 2k - 1 from one to the next.
    """
    ordered = sorted(run, key=lambda point: point.order)
    if not ordered:
        return []
    chosen: dict[str, Point] = {}
    if tier.every is not None:
        # Positions from 1; 0 is where a run begins, and is nobody's.
        fixed = [0, *(i for i, point in enumerate(ordered, 1) if point.key in asked)]
        for here, following in zip(fixed, [*fixed[1:], None], strict=True):
            until = len(ordered) if following is None else following - tier.every
            for position in range(here + tier.every, until + 1, tier.every):
                chosen[ordered[position - 1].key] = ordered[position - 1]
    if tier.last:
        final = ordered[-1]
        if ended or final.is_last:
            chosen[final.key] = final
    return [point for point in ordered if point.key in chosen and point.key not in asked]


def was_asked(tier: Tier, tiers: Iterable[Tier], answered: Collection[str]) -> bool:
    """Whether a checkpoint with results of these tasks was asked by `tier`, which is not of every checkpoint.

    What other such tiers ask too says nothing of this one, unless nothing is left to ask.
    """
    others = (other.tasks for other in tiers if not other.takes_all and other.name != tier.name)
    own = tier.tasks.difference(*others)
    return not own.isdisjoint(answered) or tier.tasks.issubset(answered)


def has_ended(run: Iterable[Point], idle_minutes: float, now: datetime) -> bool:
    """Whether a run has had no new checkpoint for `idle_minutes`. A time that is yet to come is another clock's."""
    times = [_time(point.arrived_at) for point in run if point.arrived_at]
    return bool(times) and (now - max(times)).total_seconds() >= 60 * idle_minutes


def in_turn(waiting: Iterable[Waiting], served: Mapping[tuple[int, str], float]) -> list[Waiting]:
    """What waits, in the order in which it is to be begun.

    By place; within a place the runs take turns, the one that was begun longest ago first (never: before all); within a
    run the newest step first. served: (place, run) -> when one of that run was begun there last, in seconds.

    Taking the first away, and noting it in `served` as the latest, leaves the others in their order: so nothing has to
    be sorted again while nothing arrives.
    """
    by_place: dict[int, dict[str, list[Waiting]]] = defaultdict(lambda: defaultdict(list))
    for one in waiting:
        by_place[one.place][one.run].append(one)
    ordered: list[Waiting] = []
    for place, runs in sorted(by_place.items()):
        for own in runs.values():
            own.sort(key=lambda one: one.order, reverse=True)

        turns = sorted(runs, key=lambda run: (served.get((place, run), float("-inf")), run))
        dealt = [(rank, turn, one) for turn, run in enumerate(turns) for rank, one in enumerate(runs[run])]
        ordered += [one for _, _, one in sorted(dealt, key=lambda card: card[:2])]
    return ordered


def numbers(order: Sequence[Waiting]) -> dict[str, int]:
    """id -> a priority for Dagster, whose queue begins the highest first.

    The first FRONT are numbered one by one. Behind them the time of arrival decides: so a new checkpoint changes few
    numbers, however many wait, and a queue that nobody sorts for a while still begins the newest first.
    """
    found = {one.id: _FRONT_NUMBER - i for i, one in enumerate(order[:FRONT])}
    for one in order[FRONT:]:
        seconds = int(_time(one.arrived_at).timestamp()) if one.arrived_at else 0
        found[one.id] = seconds - one.place * _BETWEEN_PLACES
    return found


def superseded(
    order: Sequence[Waiting], beyond: int, begun: Mapping[tuple[str, str], tuple[int, str]]
) -> list[tuple[Waiting, int]]:
    """What is passed over: (who, the step of the newest in its place) of those behind the first `beyond` in line whose
    run has a newer checkpoint in the same tier that waits or was begun. A run's newest is never passed over.

    begun: (tier, run) -> (step or -1, arrived_at) of the newest that was begun lately.
    """
    newest = dict(begun)
    for one in order:
        if one.tier is not None:
            at = (one.tier, one.run)
            newest[at] = max(newest.get(at, (-1, "")), one.order[:2])
    return [
        (one, newest[one.tier, one.run][0])
        for one in order[beyond:]
        if one.tier is not None and one.order[:2] < newest[one.tier, one.run]
    ]


def why_skipped(run: str, newest_step: int, beyond: int) -> str:
    """For people: what stands in the store's record."""
    newer = f"step {newest_step}" if newest_step >= 0 else "a newer checkpoint"
    return f"superseded: more than {beyond} were waiting, and {run} has {newer} by now; asked when nothing waits"


def why_cancelled(run_id: str) -> str:
    """For people: what stands in the store's record."""
    return f"its run {run_id[:8]} was cancelled in Dagster"


def _time(text: str) -> datetime:
    time = datetime.fromisoformat(text)
    return time if time.tzinfo else time.replace(tzinfo=UTC)
