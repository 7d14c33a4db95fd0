"""The driver's road for one arrival: launch a worker, put what it commits through the gate, say how each task ended.

The Dagster op and `eval-platform run` both call `drive`; neither adds anything to the numbers.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from eval_platform import adopt, launching, quality, warehouse
from eval_platform.config import Config
from eval_platform.errors import EvalPlatformError
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


def drive(
    plan: Plan,
    config: Config,
    store: Store,
    *,
    actor: str,
    on_message: Callable[[dict[str, Any]], None] = lambda message: None,
) -> Iterator[Outcome]:
    """One Outcome per planned task, each as soon as it is known; tasks that no message spoke of come last, failed.

    The worker is stopped when the iterator is closed or an error passes through it. Tasks that cannot be asked of the
    model come after the others, skipped. `on_message` is told what the worker says (docs/launchers.md), and besides
    `slot` (waiting: there is no room yet), `launched` (folder: the worker's) and `log` (text: what it printed).
    """
    if plan.tasks:
        yield from _asked(plan, config, store, actor, on_message)
    yield from (Outcome(name, "skipped", (why,)) for name, why in plan.skipped.items())


def _asked(
    plan: Plan, config: Config, store: Store, actor: str, on_message: Callable[[dict[str, Any]], None]
) -> Iterator[Outcome]:
    quality.warm()  # Great Expectations takes seconds to import: meanwhile the worker starts
    left = {task.name for task in plan.tasks}
    handle = launching.launch(plan, config, lambda: on_message({"type": "slot", "waiting": True}))
    on_message({"type": "launched", "folder": str(handle.folder)})
    whole: dict[str, Any] | None = None  # a failure of the arrival itself
    last_failure: dict[str, dict[str, Any]] = {}
    waiting: set[str] = set()
    try:
        for messages in handle.messages():
            is_fresh = False  # one refresh shows the gate all that these messages tell of
            for message in messages:
                on_message(message)
                task = message.get("task")
                match message["type"]:
                    case "committed" | "linked" if task in left:
                        left.discard(task)
                        outcome = _adopted(store, config, message, actor, is_fresh=is_fresh)
                        is_fresh = is_fresh or outcome.decision is not None
                        yield outcome
                    case "failed" if task is None:
                        whole = message
                    case "failed":
                        last_failure[message["task"]] = message
                    case "waiting":
                        waiting.add(message["task"])
        code = handle.poll()
    finally:
        handle.stop()
    for task in plan.tasks:
        if task.name not in left:
            continue
        own = last_failure.get(task.name)
        if own is not None and (whole is None or own["class"] != "infrastructure"):
            yield Outcome(task.name, "failed", (own["reason"],))
        elif whole is not None:  # also of what would have been tried once more
            yield Outcome(task.name, "failed", (whole["reason"],))
        elif task.name in waiting:
            yield Outcome(task.name, "waiting", ("another worker is answering it",))
        else:
            reason = f"the worker ended with code {code} before it got there; its last words:\n{handle.last_words()}"
            yield Outcome(task.name, "failed", (reason,))
    warehouse.refresh(store, config.catalog_path)  # so that whoever reads the catalog next finds every decision there


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
