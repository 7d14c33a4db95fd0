"""The driver's road for one arrival: launch workers, put what they commit through the gate, say how each task ended.

The Dagster op and `eval-platform run` both call `drive`; neither adds anything to the numbers.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from eval_platform import adopt, checkpoints, launching, planning, quality, warehouse
from eval_platform.config import Config
from eval_platform.errors import EvalPlatformError
from eval_platform.launching import Handle, Silent, stop_all
from eval_platform.plan import Plan
from eval_platform.store import Store, commits
from eval_platform.values import Decision


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one planned task ended. `record` is the commit, `decision` what the gate said of it.

    skipped: it was asked for and never planned: its data cannot be had, or this model cannot be asked it.
    """

    task: str
    status: Literal["published", "held", "failed", "waiting", "skipped"]
    reasons: tuple[str, ...] = ()
    record: Mapping[str, Any] = field(default_factory=dict)
    decision: Decision | None = None
    linked: bool = False


@dataclass
class _Followed:
    """A worker, its share of the tasks, and what was heard of it so far. whole: a failure of the arrival itself."""

    plan: Plan
    handle: Handle
    left: set[str]
    whole: dict[str, Any] | None = None
    failures: dict[str, dict[str, Any]] = field(default_factory=dict)
    waiting: set[str] = field(default_factory=set)
    begun: float | None = None
    ended: float | None = None

    def note(self, message: dict[str, Any]) -> None:
        """What a message says of anything but a result."""
        match message["type"]:
            case "hello":
                self.begun = self.begun or message["time"]
            case "end":
                self.ended = message["time"]
            case "failed" if message["task"] is None:
                self.whole = message
            case "failed":
                self.failures[message["task"]] = message
            case "waiting":
                self.waiting.add(message["task"])

    def unanswered(self) -> Iterator[Outcome]:
        """How the tasks ended that no result was heard of."""
        for name in (task.name for task in self.plan.tasks if task.name in self.left):
            own = self.failures.get(name)
            if own is not None and (self.whole is None or own["class"] != "infrastructure"):
                yield Outcome(name, "failed", (own["reason"],))
            elif self.whole is not None:  # also of what would have been tried once more
                yield Outcome(name, "failed", (self.whole["reason"],))
            elif name in self.waiting:
                yield Outcome(name, "waiting", ("another worker is answering it",))
            else:
                ended = f"the worker ended with code {self.handle.poll()} before it got there; its last words:"
                yield Outcome(name, "failed", (f"{ended}\n{self.handle.last_words()}",))


def drive(
    plan: Plan,
    config: Config,
    store: Store,
    *,
    actor: str,
    on_message: Callable[[dict[str, Any]], None] = lambda message: None,
    others: int = 0,
) -> Iterator[Outcome]:
    """One Outcome per planned task, each as soon as it is known; tasks that no message spoke of come last, failed.

    The workers are stopped when the iterator is closed or an error passes through it; `Silent` alone lets them go on.
    Tasks that cannot be asked of the model come after the others, skipped. others: so many other checkpoints want a
    worker too. `on_message` is told what the workers say (docs/launchers.md), and besides `slot` (waiting: there is no
    room yet), `launched` (folder: a worker's), `log` (text: what it printed), and how the work is shared out: `planned`
    at the beginning, `took` at the end (shards: of each its tasks, expected_seconds and, at the end, seconds; begun:
    none waits in a cluster's queue).
    """
    if plan.tasks:
        yield from _asked(plan, config, store, actor, on_message, others)
    yield from (Outcome(name, "skipped", (why,)) for name, why in plan.skipped.items())


def _asked(
    plan: Plan,
    config: Config,
    store: Store,
    actor: str,
    on_message: Callable[[dict[str, Any]], None],
    others: int,
) -> Iterator[Outcome]:
    expected = planning.expect(plan, config, store)
    quality.warm()  # Great Expectations takes seconds to import: meanwhile the workers start
    shards = launching.launch(
        expected,
        config,
        lambda reason: on_message({"type": "slot", "waiting": True, "reason": reason}),
        lambda places: planning.share_out(expected, places),
        others=others,
    )
    workers = [_Followed(*shard, {task.name for task in shard.plan.tasks}) for shard in shards]
    try:
        for worker in workers:
            on_message({"type": "launched", "folder": str(worker.handle.folder)})
        is_begun = config.worker.launcher == "subprocess"  # a job's queue is its cluster's own
        on_message({"type": "planned", "shards": [_told(worker) for worker in workers], "begun": is_begun})
        for worker, messages in _heard(workers):
            is_fresh = False  # one refresh shows the gate all that these messages tell of
            for message in messages:
                on_message(message)
                worker.note(message)
                if message["type"] in ("committed", "linked") and message["task"] in worker.left:
                    worker.left.discard(message["task"])
                    outcome = _adopted(store, config, message, actor, is_fresh=is_fresh)
                    is_fresh = is_fresh or outcome.decision is not None
                    yield outcome
        codes = {worker.handle.poll() for worker in workers}
    except Silent:  # they go on, and whoever drives next finds them again
        raise
    except BaseException:
        stop_all([worker.handle for worker in workers])
        raise
    for worker in workers:
        yield from worker.unanswered()
    given = {task.name for worker in workers for task in worker.plan.tasks}
    lost = [task.name for task in plan.tasks if task.name not in given]
    for name in lost:
        yield Outcome(name, "failed", ("the folder of the worker that it was given to is gone; the next run asks it",))
    on_message({"type": "took", "shards": [_told(worker) for worker in workers]})
    is_done = codes == {0} and not lost and not any(worker.left for worker in workers)
    # Not the workers' affair: none of several knows that it was the last, and not every one may write there. Other
    # tiers of [queue] may ask more of the arrival, whose folder may be gone by then.
    if is_done and (config.queue is None or not config.queue.tiers):
        checkpoints.release_hold(plan.arrival, config.cache_dir)
    warehouse.refresh(store, config.catalog_path)  # so that whoever reads the catalog next finds every decision there


def _heard(workers: Sequence[_Followed]) -> Iterator[tuple[_Followed, list[dict[str, Any]]]]:
    """What each worker said since the last look, in turn, until all have ended."""
    followed = [(worker, worker.handle.messages()) for worker in workers]
    while followed:
        for one in list(followed):
            worker, looks = one
            messages = next(looks, None)
            if messages is None:
                followed.remove(one)
            elif messages:
                yield worker, messages


def _told(worker: _Followed) -> dict[str, Any]:
    took = worker.ended - worker.begun if worker.begun is not None and worker.ended is not None else None
    return {
        "tasks": [task.name for task in worker.plan.tasks],
        "expected_seconds": planning.expected_seconds(worker.plan),
        **({} if took is None else {"seconds": took}),
    }


def _adopted(store: Store, config: Config, message: Mapping[str, Any], actor: str, *, is_fresh: bool) -> Outcome:
    evaluation_id, attempt = message["evaluation_id"], message["attempt"]
    try:
        if not is_fresh:
            warehouse.refresh(store, config.catalog_path)
        decision = adopt.adopt(store, config.catalog_path, evaluation_id, attempt, actor)
    except EvalPlatformError as error:  # one task's failure never takes the others with it; undecided counts as held
        return Outcome(message["task"], "failed", (f"it is committed but could not be put through the gate: {error}",))
    record = commits.read(store, evaluation_id, attempt)
    if record is None:
        raise RuntimeError(f"evaluation {evaluation_id} attempt {attempt} was committed and is gone from the store")
    return Outcome(
        message["task"], decision.status, decision.reasons, record, decision, linked=message["type"] == "linked"
    )
