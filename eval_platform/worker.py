"""The worker: a process of its own that stages one checkpoint, loads the model once and answers the planned tasks.

    python -m eval_platform.worker <folder with plan.json, or s3://bucket/prefix>

It appends messages to `messages.jsonl` in that folder, in Dagster Pipes' envelope (see docs/launchers.md), and
commits every task as it finishes. What was answered before a crash is read from the journal and not asked again; what
another worker holds is done last. The exit codes are EXIT_*.
"""

import argparse
import gc
import json
import logging
import os
import socket
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, TextIO

import pyarrow as pa

from eval_platform import __version__, checkpoints, outbox, scoring, stopping, tasks
from eval_platform.config import S3
from eval_platform.devices import SHARE_VARIABLE, device_share, peak_memory_bytes, visible_devices
from eval_platform.engine import (
    ChatTemplate,
    Engine,
    Messages,
    PromptLengths,
    ServedEngine,
    chat_template,
    load_served,
    prompt_lengths,
    resolve_settings,
)
from eval_platform.engine import load as load_engine
from eval_platform.errors import (
    CheckpointChanged,
    DeviceFailed,
    ErrorClass,
    EvalPlatformError,
    NoDevice,
    SamplesPruned,
    as_device_error,
    classify,
)
from eval_platform.identity import content_id, ordered_id
from eval_platform.plan import PLAN_VERSION, OtherRelease, Plan, PlannedTask, read_plan
from eval_platform.sandbox import describe as describe_sandbox
from eval_platform.stopping import Stopped
from eval_platform.store import Store, arrivals, commits, decisions, journal, leases, open_store, tries, utc_now
from eval_platform.store.process import process_record, this_process
from eval_platform.values import Checkpoint, Failure, Item, Request, Response, RunSettings, known_sum

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_FAULT = 70
EXIT_TRY_AGAIN = 75
EXIT_WAITING = 76
EXIT_REFUSED = 78
_WORST_FIRST = (EXIT_FAILED, EXIT_TRY_AGAIN, EXIT_WAITING, EXIT_DONE)

# After these no other task of the plan can be asked here either: the files or the GPU are not what they were.
_ENDS_ALL = (CheckpointChanged, DeviceFailed, NoDevice)

# In place of an id: a served model's tokenizer is its server's own, and no part of how prompts are written.
_UNSEEN = "unseen"

FLUSH_RESPONSES = 64
FLUSH_SECONDS = 1.0

Message = dict[str, Any]
Emit = Callable[[Message], None]
Load = Callable[[Path, RunSettings], Engine]

log = logging.getLogger("eval_platform.worker")


@dataclass
class _Model:
    """The staged checkpoint and, once something must be asked, its loaded engine. A served model has no path."""

    plan: Plan
    store: Store
    checkpoint: Checkpoint
    path: Path | None
    settings: RunSettings
    tokenizer_id: str
    load: Load
    emit: Emit
    engine: Engine | ServedEngine | None = None
    lengths: PromptLengths | None = None
    template: ChatTemplate | Messages | None = None
    refused: EvalPlatformError | None = None
    load_seconds: float = 0.0

    def loaded(self) -> Engine | ServedEngine:
        if self.refused is not None:  # what could not be loaded for one task cannot be for the next
            raise self.refused
        if self.engine is None:
            started = time.monotonic()
            try:
                with _arrival_try(self.store, self.plan), _told_of(self.path, self.plan.arrival.uri):
                    loaded = self._load()
            except EvalPlatformError as error:
                self.refused = error if error.class_ == "deterministic" else None
                raise
            self.engine = loaded
            self.load_seconds = time.monotonic() - started
            self.emit({"type": "loaded", "seconds": self.load_seconds, "engine": asdict(loaded.info)})
        return self.engine

    def _load(self) -> Engine | ServedEngine:
        entry = self.plan.served_model()
        if entry is not None:
            return load_served(entry, self.settings)
        assert self.path is not None
        with _on_device():
            return self.load(self.path, self.settings)

    def prompt_lengths(self) -> PromptLengths:
        if self.path is None:
            loaded = self.loaded()
            assert isinstance(loaded, ServedEngine)
            return loaded.prompt_lengths()
        if self.lengths is None:
            with _told_of(self.path, self.plan.arrival.uri):
                self.lengths = prompt_lengths(self.path, self.settings)
        return self.lengths

    def chat(self) -> tasks.Chat | None:
        """How tasks are asked as a conversation; None where they are not."""
        if not self.settings.chat:
            return None
        if self.path is None:
            self.template = Messages()
        elif self.template is None:
            with _told_of(self.path, self.plan.arrival.uri):
                self.template = chat_template(self.path, self.settings)
        self.template.leaves_out_system = False  # what it is to this task is found out anew
        return tasks.Chat(self.template, self.settings.system_prompt, self.settings.shots_as_turns)


def work(plan: Plan, store: Store, emit: Emit, load: Load = load_engine) -> int:
    """Do everything in `plan`; returns the exit code. Failures are recorded as tries and emitted, not raised."""
    try:
        model = _prepare(plan, store, emit, load)
    except Exception as error:  # noqa: BLE001 -- recorded as the arrival's failure, whatever it was
        return _failed(emit, None, error)

    try:
        code = _all_tasks(model)
    except EvalPlatformError as error:  # what no task can do without: the checkpoint as it was, a store to read
        code = _failed(emit, None, error)
    finally:
        checkpoints.release(model.checkpoint)
    return code


def _all_tasks(model: _Model) -> int:
    """Every planned task; the worst that happened is the exit code. Raises _ENDS_ALL: then none goes on."""
    plan = model.plan
    codes = [EXIT_DONE]
    leased_elsewhere: list[PlannedTask] = []
    todo = deque((task, 0) for task in plan.tasks)
    while todo:
        task, round_ = todo.popleft()
        if round_:
            # A round of retries starts when everything else is done; every round waits twice as long.
            time.sleep(plan.retry_wait_seconds * 2 ** (round_ - 1))
        code = _one_task(model, task)
        if code == EXIT_WAITING:
            leased_elsewhere.append(task)
        elif code == EXIT_TRY_AGAIN and round_ + 1 < tries.MAX_TRIES:
            todo.append((task, round_ + 1))
        else:
            codes.append(code)

    if leased_elsewhere:
        model.engine = None
        codes += [_after_others(model, task) for task in leased_elsewhere]
    return min(codes, key=_WORST_FIRST.index)


def _prepare(plan: Plan, store: Store, emit: Emit, load: Load) -> _Model:
    with _arrival_try(store, plan):
        checkpoint = checkpoints.stage(
            plan.arrival,
            Path(plan.cache),
            lambda done, total: emit({"type": "staging", "done": done, "total": total}),
            trust_remote_code=plan.settings.trust_remote_code,
            s3=S3(**plan.s3),
            holds=Path(plan.holds),
        )
        path = checkpoint.path
        settings = plan.settings
        if path is not None:
            with _told_of(path, plan.arrival.uri):
                settings = resolve_settings(settings, path)
        arrivals.record_identity(store, plan.arrival, checkpoint)
    emit(
        {"type": "staged", "checkpoint_id": checkpoint.checkpoint_id, "weights_id": checkpoint.weights_id},
    )
    tokenizer_id = _UNSEEN if path is None else checkpoints.tokenizer_id(path)
    return _Model(plan, store, checkpoint, path, settings, tokenizer_id, load, emit)


@contextmanager
def _told_of(staged: Path | None, uri: str) -> Iterator[None]:
    """Errors that name a staged file name the user's own instead: that is the one to mend."""
    try:
        yield
    except EvalPlatformError as error:
        if staged is None:
            raise
        raise type(error)(str(error).replace(str(staged), uri)) from error


@contextmanager
def _on_device() -> Iterator[None]:
    """A GPU's errors in our words: they say whose fault it is not."""
    try:
        yield
    except Exception as error:
        known = as_device_error(error)
        if known is None:
            raise
        raise known from error


@contextmanager
def _arrival_try(store: Store, plan: Plan) -> Iterator[None]:
    """What fails before any task can be asked is recorded under the arrival."""
    subject = tries.arrival_subject(plan.arrival)
    with _recorded(tries.start(store, subject, together=plan.together), done="done"):
        yield


@contextmanager
def _recorded(a_try: tries.Try, *, done: tries.Outcome | None) -> Iterator[None]:
    """End the try as `done`, or with the class and reason of what was raised."""
    try:
        yield
    except (Stopped, NoDevice):
        a_try.end("interrupted")
        raise
    except Exception as error:
        if stopping.was_asked():  # it is what some library made of the stop
            a_try.end("interrupted")
            raise Stopped from error
        a_try.end("failed", Failure(classify(error), str(error)), detail=traceback.format_exc())
        raise
    if done:
        a_try.end(done)


def _failed(emit: Emit, task: str | None, error: Exception) -> int:
    class_: ErrorClass = classify(error)
    if not isinstance(error, EvalPlatformError):
        log.error("%s", "".join(traceback.format_exception(error)))
    reason = str(error) if isinstance(error, EvalPlatformError) else f"{type(error).__name__}: {error}"
    emit({"type": "failed", "task": task, "class": class_, "reason": reason})
    return EXIT_TRY_AGAIN if class_ == "infrastructure" else EXIT_FAILED


@dataclass(frozen=True)
class _Evaluation:
    """The ids of one planned task on the staged checkpoint."""

    evaluation_id: str
    answers_id: str
    settings_id: str
    attempt: int


def _identify(model: _Model, task: PlannedTask) -> _Evaluation:
    settings_id = content_id(model.settings.identity())
    checkpoint_id = model.checkpoint.checkpoint_id
    evaluation_id = content_id({"checkpoints": [checkpoint_id], "task_id": task.task_id, "settings_id": settings_id})
    asked = _ask_id(model, task)
    answers_id = content_id({"checkpoint": checkpoint_id, "ask_id": asked, "settings_id": settings_id})
    return _Evaluation(evaluation_id, answers_id, settings_id, commits.slot(model.store, evaluation_id))


def _ask_id(model: _Model, task: PlannedTask) -> str:
    """What the model is asked: without a chat, whatever the task says of chats does not matter."""
    return task.ask_id if model.settings.chat or task.base_ask_id is None else task.base_ask_id


def _one_task(model: _Model, task: PlannedTask, watch: leases.LeaseWatch | None = None) -> int:
    """Answer one task unless someone has, or is at it. Returns EXIT_DONE, _FAILED, _TRY_AGAIN or _WAITING.

    `watch` has looked at the lease before and so can tell a silent holder. Raises _ENDS_ALL.
    """
    ids = _identify(model, task)
    try:
        return _leased(model, task, ids, watch or leases.LeaseWatch(model.store, ids.evaluation_id))
    except _ENDS_ALL:
        raise
    except Exception as error:  # noqa: BLE001 -- one task's failure never takes the others with it
        code = _failed(model.emit, task.name, error)
        subject = tries.evaluation_subject(ids.evaluation_id, ids.attempt)
        return EXIT_FAILED if tries.state(model.store, subject) is not None else code


def _leased(model: _Model, task: PlannedTask, ids: _Evaluation, watch: leases.LeaseWatch) -> int:
    """`_one_task` where nothing goes wrong; raises whatever does, recorded as the end of its try."""
    store = model.store
    if commits.read(store, ids.evaluation_id, ids.attempt) is not None:
        return _linked(model, task, ids)
    subject = tries.evaluation_subject(ids.evaluation_id, ids.attempt)
    failure = tries.state(store, subject)
    if failure is not None:
        return _failed_before(model, task, failure)
    lease = watch.acquire(model.plan.lease_seconds)
    if lease is None:
        model.emit({"type": "waiting", "task": task.name})
        return EXIT_WAITING
    with lease.keep():
        # Someone may have committed, or failed for good, between the look and the lease.
        if commits.read(store, ids.evaluation_id, ids.attempt) is not None:
            return _linked(model, task, ids)
        if (failure := tries.state(store, subject)) is not None:
            return _failed_before(model, task, failure)
        a_try = tries.start(store, subject, evaluation=_subject_fields(model, task, ids))
        with _recorded(a_try, done=None):
            won = _evaluate(model, task, ids, lease, a_try)
        a_try.end("committed" if won else "lost")
    return EXIT_DONE if won else _one_task_again(model, task)


def _failed_before(model: _Model, task: PlannedTask, failure: Failure) -> int:
    reason = f"{failure.reason}\n  it has failed for good; `eval-platform retry` tries it again"
    model.emit({"type": "failed", "task": task.name, "class": failure.class_, "reason": reason})
    return EXIT_FAILED


def _one_task_again(model: _Model, task: PlannedTask) -> int:
    """Another worker's commit stands: adopt it."""
    ids = _identify(model, task)
    if commits.read(model.store, ids.evaluation_id, ids.attempt) is None:
        # We lost the lease and nobody has committed yet.
        model.emit({"type": "waiting", "task": task.name})
        return EXIT_WAITING
    return _linked(model, task, ids)


def _linked(model: _Model, task: PlannedTask, ids: _Evaluation) -> int:
    model.emit({"type": "linked", "task": task.name, "evaluation_id": ids.evaluation_id, "attempt": ids.attempt})
    return EXIT_DONE


def _after_others(model: _Model, task: PlannedTask) -> int:
    """Watch another worker's lease for one ttl: take over when it stays silent, leave when it lives."""
    ids = _identify(model, task)
    watch = leases.LeaseWatch(model.store, ids.evaluation_id)
    deadline = time.monotonic() + 1.5 * model.plan.lease_seconds
    while time.monotonic() < deadline:
        if commits.read(model.store, ids.evaluation_id, ids.attempt) is not None or watch.may_take_over(
            model.plan.lease_seconds
        ):
            return _one_task(model, task, watch)
        if watch.beats_seen > 1:
            break
        time.sleep(min(0.5, model.plan.lease_seconds / 10))
    return EXIT_WAITING


def _subject_fields(model: _Model, task: PlannedTask, ids: _Evaluation) -> dict[str, Any]:
    """What a failed try says of itself, so that the catalog can show it without a commit."""
    return {
        "key": model.plan.arrival.key,
        "arrival": model.plan.arrival.n,
        "checkpoint_id": model.checkpoint.checkpoint_id,
        "kind": model.checkpoint.kind,
        "weights_id": model.checkpoint.weights_id,
        "task": task.name,
        "task_id": task.task_id,
        "ask_id": _ask_id(model, task),
        "settings_id": ids.settings_id,
        "answers_id": ids.answers_id,
        "settings": model.settings.identity(),
        "limit": model.settings.limit,
        "chat": model.settings.chat,
    }


def _evaluate(model: _Model, planned: PlannedTask, ids: _Evaluation, lease: leases.Lease, a_try: tries.Try) -> bool:
    """Ask what is not answered yet, score, write the samples and commit. False when another try won the slot."""
    started_at, started = utc_now(), time.monotonic()
    was_loaded = model.engine is not None
    store = model.store
    task = tasks.load_task(store, planned.task_id)
    chat = model.chat()
    with _told_of(model.path, model.plan.arrival.uri):
        items = list(tasks.render(task, limit=model.settings.limit, chat=chat))
    if task.definition.max_input_tokens is not None:
        items = _fitted(model, task, items, task.definition.max_input_tokens, chat)
    requests = _requests(items, task.repeats)
    # Found out before the model is asked: its answers would be of no use where no program can be run.
    ran_in = {} if task.definition.code is None else {"sandbox": describe_sandbox(model.plan.sandbox)}
    model.emit(
        {
            "type": "started",
            "task": planned.name,
            "evaluation_id": ids.evaluation_id,
            "attempt": ids.attempt,
            "total": len(requests),
        }
    )
    stored = _stored_answers(store, planned, ids, task, items)
    origin = "asked" if stored is None else "rescored"
    asked = _Asked(stored) if stored is not None else _ask(model, planned, ids, lease, a_try, requests)
    answers = asked.answers

    rows = scoring.score_items(task, items, answers, model.plan.sandbox)
    scores = scoring.aggregate(task, rows)
    prompts = tasks.write_prompts(store, items)
    samples = commits.write_samples(
        store, ids.evaluation_id, a_try.try_id, pa.Table.from_pylist(rows, schema=scoring.SAMPLE_SCHEMA)
    )
    primary = next(
        (s for s in scores if s.metric == task.primary_metric and s.subset == "" and s.subject is None), None
    )
    info = model.engine.info if model.engine is not None else None
    responses = [answers[request.request_id, request.repeat] for request in requests]
    seconds = time.monotonic() - started
    record = {
        **_subject_fields(model, planned, ids),
        "evaluation_id": ids.evaluation_id,
        "attempt": ids.attempt,
        "try": a_try.try_id,
        "tokenizer_id": model.tokenizer_id,
        "dataset_id": task.dataset_id,
        "prompts_id": prompts,
        **({} if model.template is None else {"chat_leaves_out_system": model.template.leaves_out_system}),
        "trust_remote_code": model.settings.trust_remote_code,
        "dtype": model.settings.dtype,
        "devices": [info.device] if info else [],
        "engine_path": info.engine_path if info else None,
        "n_parameters": info.n_parameters if info else None,
        "numerics_version": info.numerics_version if info else None,
        "versions": (dict(info.versions) if info else {}) | tasks.package_versions(task.definition) | ran_in,
        "started_at": started_at,
        "finished_at": utc_now(),
        "seconds": seconds,
        "answer_seconds": asked.seconds,
        "load_seconds": 0.0 if was_loaded or model.engine is None else model.load_seconds,
        "expected_seconds": model.plan.expected_seconds.get(planned.name),
        "tokens_per_second": asked.tokens / asked.seconds if asked.tokens and asked.seconds else None,
        "computed_tokens": asked.computed_tokens,
        "generated_tokens": asked.generated_tokens,
        **_device_cost(model, seconds),
        "n_requests": len(requests),
        "characters": tasks.characters(requests),
        "asked_requests": asked.n_requests,
        "n_tokens": known_sum(response.n_tokens for response in responses),
        "truncated": sum(response.truncated_left_tokens > 0 for response in responses),
        **_bill(model.plan, responses),
        "origin": origin,
        "planned": {
            "items": len(items),
            "samples": len(items) * task.repeats,
            "sample_ids": ordered_id(item.document.sample_id for item in items),
        },
        "answers_digest": _digest(responses),
        "samples": samples,
        "scores": [asdict(score) for score in scores],
        "primary": {
            "metric": task.primary_metric,
            "value": primary.value if primary else None,
            "higher_is_better": task.higher_is_better,
            "chance": task.chance,
        },
    }
    # An overwrite in place shows through hard links: what was answered may be half one model, half another.
    checkpoints.verify_unchanged(model.checkpoint)
    won = commits.commit(store, record, lease)
    if won:
        model.emit(
            {
                "type": "committed",
                "task": planned.name,
                "evaluation_id": ids.evaluation_id,
                "attempt": ids.attempt,
                "origin": origin,
            }
        )
    return won


def _fitted(
    model: _Model, task: tasks.Task, items: Sequence[Item], most_tokens: int, chat: tasks.Chat | None
) -> list[Item]:
    """The items, with as many of their shots as the task and the model's window have room for."""
    lengths = model.prompt_lengths()
    generation = (task.definition if chat is None else task.definition.in_chat).generation
    assert generation is not None  # the schema allows max_input_tokens for completions only
    room = lengths.room(generation.max_new_tokens)
    return tasks.fit_shots(task, items, lengths.count, min(most_tokens, room), chat)


def _requests(items: Sequence[Item], repeats: int) -> list[Request]:
    """Every distinct request, once per repeat, in the order of the items."""
    distinct = {request.request_id: request for item in items for request in item.requests}
    return [replace(request, repeat=repeat) for repeat in range(repeats) for request in distinct.values()]


def _stored_answers(
    store: Store, planned: PlannedTask, ids: _Evaluation, task: tasks.Task, items: Sequence[Item]
) -> dict[tuple[str, int], Response] | None:
    """The answers of a published evaluation that asked the same, if only the scoring differs; else None."""
    if ids.attempt > 1:  # a rerun truly asks again
        return None
    by_sample = {item.document.sample_id: item for item in items}
    for evaluation_id, attempt in commits.answered(store, ids.answers_id):
        if evaluation_id == ids.evaluation_id:
            continue
        standing = decisions.standing(store, evaluation_id, attempt)
        record = commits.read(store, evaluation_id, attempt)
        if record is None or standing is None or standing.status != "published":
            continue
        other = tasks.load_task(store, record["task_id"])
        if other.repeats < task.repeats:
            continue
        try:
            samples = commits.read_samples(store, record)
        except SamplesPruned:
            continue
        answers = {
            (response.request_id, response.repeat): response
            for row in samples.to_pylist()
            for response in scoring.responses_from_sample(other, by_sample[row["sample_id"]], row)
        }
        log.info("%s: scored from the stored answers of evaluation %s", planned.name, evaluation_id)
        return answers
    return None


@dataclass(frozen=True)
class _Asked:
    """All answers, and what those cost that the model was asked for in this try.

    seconds: inside the engine. tokens: `Response.n_tokens`, of which None counts for nothing; generated_tokens: of
    completions. computed_tokens: positions that went through the model, None where the engine does not count them.
    """

    answers: dict[tuple[str, int], Response]
    n_requests: int = 0
    seconds: float = 0.0
    tokens: int = 0
    generated_tokens: int | None = 0
    computed_tokens: int | None = 0


def _ask(
    model: _Model,
    planned: PlannedTask,
    ids: _Evaluation,
    lease: leases.Lease,
    a_try: tries.Try,
    requests: Sequence[Request],
) -> _Asked:
    """What an earlier try has answered costs nothing. Journals as it goes."""
    book = journal.Journal(model.store, ids.answers_id, ids.attempt, a_try.try_id)
    wanted = {(request.request_id, request.repeat) for request in requests}
    # A rerun truly asks again, also when another evaluation that asks the same has been rerun before it.
    subject = tries.evaluation_subject(ids.evaluation_id, ids.attempt)
    whose = tries.ids(model.store, subject) if ids.attempt > 1 else None
    answers = {key: response for key, response in book.finished(whose).items() if key in wanted}
    missing = [request for request in requests if (request.request_id, request.repeat) not in answers]
    if not missing:
        return _Asked(answers)
    running = model.loaded()
    computed_before = _computed_tokens(running)
    answer_seconds, pending, flushed = 0.0, [], time.monotonic()

    def flush() -> None:
        nonlocal flushed
        with stopping.held_back():  # what is in the journal is pending no more
            if pending:
                # The journal outlives this try, and a checkpoint may come back with the same content: no answer of a
                # model that was overwritten meanwhile may be found there.
                checkpoints.verify_unchanged(model.checkpoint)
                book.append(pending)
                pending.clear()
        flushed = time.monotonic()
        progress = {"task": planned.name, "done": len(answers), "total": len(requests)}
        lease.progress = progress
        model.emit({"type": "progress", **progress})

    flush()
    replies = running.answer(missing)
    try:
        with _on_device():
            while True:
                before = time.monotonic()
                response = next(replies, None)
                answer_seconds += time.monotonic() - before
                if response is None:
                    break
                answers[response.request_id, response.repeat] = response
                pending.append(response)
                if len(pending) >= FLUSH_RESPONSES or time.monotonic() - flushed > FLUSH_SECONDS:
                    flush()
    finally:
        flush()
    found = [(request.kind, answers[request.request_id, request.repeat].n_tokens) for request in missing]
    computed = _computed_tokens(running)
    return _Asked(
        answers,
        len(missing),
        answer_seconds,
        known_sum(n_tokens for _, n_tokens in found) or 0,
        known_sum(n_tokens for kind, n_tokens in found if kind == "generate"),
        computed - computed_before if computed is not None and computed_before is not None else None,
    )


def _computed_tokens(engine: Engine | ServedEngine) -> int | None:
    """So far; None where a part of it is not counted."""
    return getattr(engine, "counters", {}).get("forward_tokens") if engine.info.engine_path == "tree" else None


def _device_cost(model: _Model, seconds: float) -> dict[str, Any]:
    """What an evaluation of `seconds` cost here: nothing where no model was loaded, or a server has it."""
    if model.engine is None or model.path is None:
        return {"device_seconds": 0.0, "peak_memory_bytes": None}
    device = model.engine.info.device
    # The GPUs that it was given, used or not; without any the ones it uses, or the one CPU.
    count = max(len(visible_devices() or ()), device.count("cuda:"), 1) * device_share()
    return {"device_seconds": seconds * count, "peak_memory_bytes": peak_memory_bytes(device)}


def _bill(plan: Plan, responses: Sequence[Response]) -> dict[str, Any]:
    """What a server counted, and its cost by the configured prices; null where it did not say, or there are none.

    What it counted for tries of the harness's own that came to nothing is not told. Answers scored anew cost nothing,
    and carry no count.
    """
    entry = plan.served_model()
    if entry is None:
        return {}
    prompt = known_sum(response.prompt_tokens for response in responses)
    completion = known_sum(response.completion_tokens for response in responses)
    cost = None
    if None not in (prompt, completion, entry.price_input, entry.price_output):
        cost = (prompt * entry.price_input + completion * entry.price_output) / 1e6  # type: ignore[operator]
    return {"prompt_tokens": prompt, "completion_tokens": completion, "cost": cost}


def _digest(responses: Sequence[Response]) -> str | None:
    """The id of the log-likelihoods' exact bits, in order; None when nothing was scored by likelihood."""
    values = [response.log_likelihood for response in responses if response.log_likelihood is not None]
    return ordered_id(float(value).hex() for value in values) if values else None


def pipes_line(message: Mapping[str, Any]) -> str:
    """One message in Dagster Pipes' envelope, so that a Pipes reader on any side understands it."""
    envelope = {
        "__dagster_pipes_version": "0.1",
        "method": "report_custom_message",
        "params": {"payload": message},
    }
    return json.dumps(envelope) + "\n"


def _load_for_good(path: Path, settings: RunSettings) -> Engine:
    """The engine, taken out of the garbage collector's sight together with all that was imported.

    A process that loads one model keeps it to its end; each full collection would walk a million objects.
    """
    engine = load_engine(path, settings)
    gc.freeze()
    return engine


def main(folder: Path, driver: Mapping[str, Any], *, on_stdout: bool = False) -> int:
    """The program: plan.json in, messages.jsonl out, or standard output. `driver` is the record of the process that
    asked for it."""
    stopping.obey_sigterm(EXIT_TRY_AGAIN)
    try:
        code = _main(folder, driver, on_stdout)
        stopping.is_over()  # a signal that comes while the model is let go of is heard after that
        return code
    except Stopped:  # in its first steps, or its last
        return EXIT_TRY_AGAIN


def _main(folder: Path, driver: Mapping[str, Any], on_stdout: bool) -> int:
    with _standard_output() if on_stdout else _message_file(folder, driver) as messages:

        def emit(message: Message) -> None:
            messages.write(pipes_line({**message, "time": time.time()}))
            messages.flush()

        try:
            emit(_hello())
            plan = read_plan(folder / "plan.json")
            plan.refuse_other_release()
            code = work(plan, open_store(plan.store, S3(**plan.s3)), emit, load=_load_for_good)
        except Stopped:
            log.warning("stopped; what was answered is in the journal")
            code = EXIT_TRY_AGAIN
        except OtherRelease as error:  # nothing of it is recorded: the checkpoint can do nothing about it
            _failed(emit, None, error)
            code = EXIT_REFUSED
        except EvalPlatformError as error:  # a results root that does not answer
            code = _failed(emit, None, error)
        except Exception as error:  # noqa: BLE001 -- the last word of a process: say it, end with its code
            _failed(emit, None, error)
            code = EXIT_FAULT
        emit({"type": "end", "code": code})
    return code


def _message_file(folder: Path, driver: Mapping[str, Any]) -> TextIO:
    """Opened for more, beside the record of who writes it."""
    processes = {"worker": this_process(), "driver": driver}
    told = folder / "process.json.new"  # whoever looks (`launching.running`) sees it whole or not at all
    told.write_text(json.dumps(processes), encoding="utf-8")
    told.rename(folder / "process.json")
    file = folder / "messages.jsonl"
    is_torn = file.exists() and file.read_bytes()[-1:] not in (b"", b"\n")  # by an earlier life, whose machine failed
    messages = file.open("a", encoding="utf-8")
    messages.write("\n" if is_torn else "")
    return messages


def _standard_output() -> TextIO:
    """For messages alone: what libraries and children print to it goes to standard error from now on."""
    ours = os.dup(1)
    os.dup2(2, 1)
    return os.fdopen(ours, "w", encoding="utf-8")


def _hello() -> Message:
    """Who works here: what a driver on another machine cannot see. devices: null where nobody gave it any."""
    return {
        "type": "hello",
        "platform": __version__,
        "plan_version": PLAN_VERSION,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "devices": visible_devices(),
    }


def leave(code: int) -> NoReturn:
    """End this process at once: taking torch and all its objects apart takes most of a second, and nobody needs it."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


_HELP = f"""\
Answers one plan and ends: stages the checkpoint, loads the model once, asks what is not answered yet, commits every
task as it finishes. Started by the platform; by hand it does the same, for whoever wants to look.

files in FOLDER:
  plan.json        read: the arrival, the tasks, the settings, where the results go
  messages.jsonl   written: a line for everything that happens, in Dagster Pipes' envelope; the first is `hello`
  process.json     written: who this process is, and who asked for it
With --messages stdout for who shares no folder with it, the messages go to standard output and FOLDER is only read; all
else that is printed goes to standard error.
Where FOLDER is s3://bucket/prefix, plan.json is read from there, and what is said and printed is written there, an
object a second at most (1.json, 2.json, ...); the files are in a temporary folder then, downloads in $XDG_CACHE_HOME.
Results and the journal go straight to the results root. Credentials come from the environment, never from the plan.

CUDA_VISIBLE_DEVICES says which GPUs are its own, {SHARE_VARIABLE} which part of each (0.5) where others
use them too. A model that needs more than one of them lies on all.
SIGTERM: what is answered is journalled, the lease released, and it leaves, within 10 s; after SIGKILL the answers of at
most a second, or {FLUSH_RESPONSES} of them, are asked again.

exit codes:
  {EXIT_DONE}    everything asked is committed
  {EXIT_FAILED}    something failed for good
  {EXIT_FAULT}   a fault of the platform's own
  {EXIT_TRY_AGAIN}   something failed that may pass by itself, or it was told to stop
  {EXIT_WAITING}   another worker is answering what is left
  {EXIT_REFUSED}   the plan is of another release of eval-platform than this worker
"""


def _read_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m eval_platform.worker",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "folder", metavar="FOLDER", help="the worker's own, with plan.json in it, or s3://bucket/prefix"
    )
    parser.add_argument("--messages", choices=("file", "stdout"), default="file", help="where they go; default: file")
    parser.add_argument("--s3", type=_s3, default=S3(), metavar="JSON", help="of s3://...: the plan's `s3`")
    return parser.parse_args(arguments)


def _s3(text: str) -> S3:
    try:
        return S3(**json.loads(text))
    except (ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _in_bucket(address: str, s3: S3) -> NoReturn:
    """The program where no folder is shared."""

    def work_in(folder: Path) -> NoReturn:
        leave(main(folder, process_record(os.getppid())))

    try:
        outbox.carry(address, s3, work_in)
    except EvalPlatformError as error:
        log.error("%s", error)
        leave(EXIT_TRY_AGAIN)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    given = _read_arguments(sys.argv[1:])
    if given.folder.startswith("s3://"):
        _in_bucket(given.folder, given.s3)
    leave(main(Path(given.folder), process_record(os.getppid()), on_stdout=given.messages == "stdout"))
