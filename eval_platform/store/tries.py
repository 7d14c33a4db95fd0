"""Who tried, and how did it end? Every try records its start and its end under what it tries to do.

Tries of one subject are numbered k = 1, 2, 3 in the order of their starts, so that counting needs no clock.
"""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from eval_platform.errors import EvalPlatformError
from eval_platform.store import layout, leases, log
from eval_platform.store.base import Store
from eval_platform.store.process import known_dead, same_process, this_process
from eval_platform.store.records import create_record, find_record, read_record, utc_now
from eval_platform.values import Arrival, Failure

MAX_TRIES = 3
_REASON_CHARACTERS = 4_000
_DETAIL_CHARACTERS = 16_000

# ("evaluations", evaluation_id, attempt) or ("arrivals", key, n)
Subject = tuple[str, str, int]
# done: an arrival's step succeeded. lost: another try won the slot. interrupted: told to stop (SIGTERM, Ctrl-C).
Outcome = Literal["committed", "done", "lost", "failed", "interrupted"]


def evaluation_subject(evaluation_id: str, attempt: int) -> Subject:
    """One commit slot."""
    return ("evaluations", evaluation_id, attempt)


def arrival_subject(arrival: Arrival) -> Subject:
    """What must succeed before an evaluation has an id: staging, identifying, loading."""
    return ("arrivals", arrival.key, arrival.n)


@dataclass(frozen=True, slots=True)
class Try:
    """A try that this process started."""

    store: Store
    subject: Subject
    k: int
    try_id: str

    def end(self, outcome: Outcome, failure: Failure | None = None, *, detail: str = "") -> None:
        """Record how it ended, once. `failure` belongs to outcome "failed"; `detail` is a traceback, its end kept.

        Raises ValueError when outcome and failure do not fit or the try has ended already.
        """
        if (outcome == "failed") != (failure is not None):
            raise ValueError(f"a try that ended {outcome!r} with failure {failure}")
        record: dict[str, Any] = {"try": self.try_id, "outcome": outcome, "time": utc_now()}
        if failure:
            record |= {
                "class": failure.class_,
                "reason": failure.reason[:_REASON_CHARACTERS],
                "detail": detail[-_DETAIL_CHARACTERS:],
            }
            log.write(self.store, "try", **_announced(self.subject))
        if not create_record(self.store, layout.try_end(self.subject, self.k), record):
            raise ValueError(f"try {self.try_id} of {self.subject} has ended already")


@dataclass(frozen=True, slots=True)
class Told:
    """One try as the store tells it; outcome None while it has not ended (at work, or killed)."""

    k: int
    try_id: str
    process: Mapping[str, Any]
    started_at: str
    outcome: Outcome | None = None
    failure: Failure | None = None
    detail: str = ""
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    together: str = ""
    forgiven: bool = False


def start(store: Store, subject: Subject, *, evaluation: Mapping[str, Any] | None = None, together: str = "") -> Try:
    """Record that this process begins. `evaluation`: what a catalog shows of it if no commit ever does (JSON values).
    together: of processes that were begun for one purpose at one time the same id; what hinders all counts once.

    Raises StoreError when it cannot be written.
    """
    try_id = uuid.uuid4().hex
    record: dict[str, Any] = {
        "try": try_id,
        "process": this_process(),
        "time": utc_now(),
        "evaluation": dict(evaluation or {}),
    }
    if together:
        record["together"] = together
    log.write(store, "try", **_announced(subject))
    k = max((k for k, _ in _starts(store, subject)), default=0) + 1
    while not create_record(store, layout.try_start(subject, k), record):
        k += 1  # another process took that number
    return Try(store, subject, k, try_id)


def history(store: Store, subject: Subject) -> list[Told]:
    """Every try of the subject in the order of their starts."""
    forgiven = _forgiven(store, subject)
    told = []
    for k, key in sorted(_starts(store, subject)):
        begun = read_record(store, key)
        ended = find_record(store, layout.try_end(subject, k)) or {}
        failure = Failure(ended["class"], ended["reason"]) if ended.get("outcome") == "failed" else None
        told.append(
            Told(
                k=k,
                try_id=begun["try"],
                process=begun["process"],
                started_at=begun["time"],
                outcome=ended.get("outcome"),
                failure=failure,
                detail=ended.get("detail", ""),
                evaluation=begun["evaluation"],
                together=begun.get("together", ""),
                forgiven=begun["try"] in forgiven,
            )
        )
    return told


def ids(store: Store, subject: Subject) -> set[str]:
    """The ids of every try of the subject."""
    return {read_record(store, key)["try"] for _, key in _starts(store, subject)}


def asked(store: Store, subject: Subject) -> Mapping[str, Any]:
    """What the tries of the subject say they were to answer (`start`); empty when none says anything."""
    return next((told.evaluation for told in history(store, subject) if told.evaluation), {})


def state(store: Store, subject: Subject) -> Failure | None:
    """None while the subject may be tried; else why it may not until `retry`. class_ "gone": its checkpoint is gone.

    A deterministic failure is final at once, and so is a deleted checkpoint. Of infrastructure failures and abandoned
    tries the third is, where those of one launch (`start`) count as one. Abandoned is what started, never ended, and is
    not at work any more: its process is known dead on this machine, or it is an evaluation's and its process no longer
    holds the lease. (An arrival's try on another machine counts as at work until it ends, since nothing says
    otherwise.) Lost and interrupted tries do not count, nor does what came before a success.
    """
    counted = _counted(store, subject)
    final = [told.failure for told in counted if told.failure and told.failure.class_ != "infrastructure"]
    if final:
        return final[-1]
    times = {told.together or told.try_id for told in counted}
    if len(times) < MAX_TRIES:
        return None
    last = counted[-1]
    reason = last.failure.reason if last.failure else _killed(last)
    return Failure("infrastructure", f"{len(times)} tries ended without a result; the last: {reason}")


def retry(store: Store, subject: Subject, actor: str, reason: str) -> list[str]:
    """Forgive the tries that count so far, so that the subject may be tried again; returns their ids.

    Raises EvalPlatformError when nothing has failed.
    """
    forgiven = [told.try_id for told in _counted(store, subject)]
    if not forgiven:
        raise EvalPlatformError(
            f"{_name(subject)} has no failed try to forgive",
            remedy="nothing is needed: it is tried by itself, unless `eval-platform status` says otherwise",
        )
    record = {"tries": forgiven, "actor": actor, "reason": reason, "time": utc_now()}
    log.write(store, "asked", action="retry", **_announced(subject))
    k = len(_retries(store, subject)) + 1
    while not create_record(store, layout.retry(subject, k), record):
        k += 1
    return forgiven


def _counted(store: Store, subject: Subject) -> list[Told]:
    """The tries that failed or were abandoned since the last success and are not forgiven, in order."""
    told = history(store, subject)
    success = max((one.k for one in told if one.outcome in ("committed", "done")), default=0)
    suspects = [one for one in told if one.k > success and not one.forgiven and one.outcome in ("failed", None)]
    if not any(one.outcome is None for one in suspects):
        return suspects
    kind, name, _ = subject
    holder = leases.holder(store, name) if kind == "evaluations" else None

    def at_work(one: Told) -> bool:
        if known_dead(one.process):
            return False
        return kind != "evaluations" or (holder is not None and same_process(holder.process, one.process))

    return [one for one in suspects if one.outcome == "failed" or not at_work(one)]


def _killed(told: Told) -> str:
    return (
        f"process {told.process['pid']} on {told.process['host']}, started {told.started_at}, ended without a word "
        "(killed, out of memory, or power lost)"
    )


def _starts(store: Store, subject: Subject) -> list[tuple[int, str]]:
    return list(layout.numbers(store, layout.try_folder(subject), suffix=".start.json"))


def _retries(store: Store, subject: Subject) -> list[str]:
    folder = layout.try_folder(subject)
    return [e.key for e in store.list(f"{folder}retry-", delimiter="/") if e.key.endswith(".json")]


def _forgiven(store: Store, subject: Subject) -> set[str]:
    return {try_id for key in _retries(store, subject) for try_id in read_record(store, key)["tries"]}


def _announced(subject: Subject) -> dict[str, Any]:
    """The subject as a log entry's fields."""
    kind, name, number = subject
    return {"evaluation_id": name, "attempt": number} if kind == "evaluations" else {"key": name, "n": number}


def _name(subject: Subject) -> str:
    kind, name, number = subject
    return f"attempt {number} of evaluation {name}" if kind == "evaluations" else f"arrival {number} of {name}"
