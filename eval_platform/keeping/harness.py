"""How do results of lm-evaluation-harness come into a results root? As evaluations whose origin is `imported`.

Nothing of them can be taken for ours. Their checkpoint_id is made of what the file says was asked (`imported`), as a
served model's is, and their task_id of what it says was asked of it; the task's name has an @, which no task file's may
have. What the file has no word for stays null.
"""

import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from eval_platform import quality
from eval_platform.checkpoints.description import describe_path
from eval_platform.config import Root
from eval_platform.errors import ConfigError, SchemaError
from eval_platform.identity import content_id, escape_key, ordered_id
from eval_platform.keeping.harness_results import (
    SOURCE,
    HarnessRun,
    HarnessTask,
    read_results,
    results_files,
    settings_of,
)
from eval_platform.keeping.harness_samples import HarnessSamples, read_samples
from eval_platform.keeping.together import Step, quietly
from eval_platform.scoring import SAMPLE_SCHEMA
from eval_platform.store import Store, arrivals, commits, create_record, decisions, layout, leases, log, open_root
from eval_platform.store.records import read_record
from eval_platform.tasks import write_prompts
from eval_platform.values import IMPORTED, Arrival, Checkpoint

_LEASE_SECONDS = 60.0
_WATCHER = "import-lm-eval"
# Keys of a task's configuration that say what it asks, and how that is scored; all of them are in every 0.4.x.
_ASKS = (
    *("output_type", "dataset_path", "dataset_name", "doc_to_text", "doc_to_target", "doc_to_choice", "description"),
    *("target_delimiter", "fewshot_delimiter", "generation_kwargs", "repeats"),
)
_SCORES = ("metric_list", "filter_list")
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # of a function that was written as its repr
# The end of a path that says a step. A number alone says none: a path may be a name on the hub, as Llama-3.
_STEP = re.compile(r"(?:^|(?<![A-Za-z])(?:step|checkpoint|ckpt|iter|iteration)[-_=]?)([0-9]+)$", re.IGNORECASE)
_NO_INTERVAL = f"none: {SOURCE} reports a standard error only"


@dataclass(frozen=True, slots=True)
class Told:
    """What became of one thing. taken and present: an evaluation of `key`; left_out: no task's result; fault: lost."""

    kind: str  # taken | present | left_out | fault
    file: str
    text: str
    task: str | None = None
    key: str | None = None
    evaluation_id: str | None = None
    attempt: int | None = None
    status: str | None = None  # what the gate decided


@dataclass(slots=True)
class TakenOver:
    """Everything that was found, in the order in which it was looked at."""

    told: list[Told] = field(default_factory=list)

    def count(self, kind: str) -> int:
        return sum(one.kind == kind for one in self.told)

    @property
    def ok(self) -> bool:
        return self.count("fault") == 0


@dataclass(frozen=True, slots=True)
class Place:
    """Where a model stands: its key, its run's name and its step, and what its id is made of."""

    key: str
    run: str
    step: int | None
    identity: Mapping[str, Any]


def take_over(
    store: Store,
    catalog: Path,
    source: Path,
    *,
    roots: Sequence[Root] = (),
    run: str | None = None,
    step: int | None = None,
    actor: str,
    progress: Step = quietly,
) -> TakenOver:
    """Commit and decide every task's results of the file `source`, or of all results files below the folder.

    roots: of the configuration; their patterns say run and step of a model that lies in one. run, step: what a person
    says of all these files. Files are taken in the order of their time. What was taken over before is left as it is.
    Raises ConfigError where there is no results file, StoreError when the store fails.
    """
    files = results_files(source)
    if not files:
        raise ConfigError(
            f"{source}: there is no results file of {SOURCE} (results_<time>.json) in it",
            remedy="name the folder that --output_path named, or one file",
        )
    done = TakenOver()
    runs = []
    for file in files:
        try:
            runs.append(read_results(file))
        except SchemaError as error:
            done.told.append(Told("fault", str(file), str(error)))
    runs.sort(key=lambda one: (one.started or 0.0, str(one.file)))
    open_root(store)
    for n, one in enumerate(runs, 1):
        done.told += _run(store, catalog, one, place_of(one, roots, run, step), actor)
        progress("taking over results", n, len(runs))
    return done


def place_of(one: HarnessRun, roots: Sequence[Root], run: str | None, step: int | None) -> Place:
    """Where the model of a results file stands, by what is configured of its folder, else by its path or name.

    A step that a person gives and the path does not say is part of the identity: it tells apart what stood one after
    the other in one folder.
    """
    which = one.model.which
    name = "/".join([one.model.name, *(which[key] for key in ("revision", "subfolder") if key in which)])
    parts = [part for part in name.split("/") if part not in ("", ".", "..")]
    relative = "/".join(parts)
    folder = Path(one.model.name)
    root = next((root for root in roots if "://" not in str(root.path) and folder.is_relative_to(root.path)), None)
    if root is not None:
        below = str(folder.relative_to(root.path))
        found = describe_path(root.name, below, root.pattern)
        own_run, own_step = found.run, found.step
    else:
        above, _, last = relative.rpartition("/")
        number = _STEP.search(last)
        own_run = above if number and above else relative
        own_step = int(number[1]) if number else None
    identity: dict[str, Any] = {"source": SOURCE, **which}
    key = f"{IMPORTED}/{escape_key(relative)}"
    if step is not None and step != own_step:
        identity["step"] = step
        key += f"/step-{step}"
    return Place(key, run or own_run, own_step if step is None else step, identity)


def _run(store: Store, catalog: Path, one: HarnessRun, place: Place, actor: str) -> Iterator[Told]:
    """Each task of one results file, and what of it is not taken over."""
    file = str(one.file)
    yield from (Told("fault", file, fault) for fault in one.faults)
    yield from (Told("left_out", file, text) for text in one.left_out)
    if not one.tasks:
        return
    arrival = _arrive(store, one, place)
    if (arrival.run, arrival.step) != (place.run, place.step):
        stands = f"{arrival.run!r}, step {arrival.step}"
        yield Told("left_out", file, f"{place.key} stands as run {stands} since it was first taken over", key=place.key)
    for task in one.tasks:
        try:
            yield _task(store, catalog, one, task, arrival, place, actor)
        except SchemaError as error:
            yield Told("fault", file, str(error), task=task.name, key=place.key)


def _arrive(store: Store, one: HarnessRun, place: Place) -> Arrival:
    """The model's arrival: the one it had before, however many others its key has had since."""
    checkpoint = Checkpoint(content_id({IMPORTED: dict(place.identity)}), None, None, IMPORTED)
    before = arrivals.history(store, place.key)
    arrival = next((known for known in before if known.fingerprint == checkpoint.checkpoint_id), None)
    if arrival is None:
        tags = {"source": SOURCE, "model": one.model.name, **place.identity}
        arrival, _ = arrivals.register(
            store,
            key=place.key,
            uri=f"{SOURCE}://{place.key.removeprefix(f'{IMPORTED}/')}",
            fingerprint=checkpoint.checkpoint_id,
            run=place.run,
            step=place.step,
            tags={name: str(value) for name, value in tags.items()},
            watcher=_WATCHER,
        )
    arrivals.record_identity(store, arrival, checkpoint)
    return arrival


def _task(
    store: Store, catalog: Path, one: HarnessRun, task: HarnessTask, arrival: Arrival, place: Place, actor: str
) -> Told:
    samples = HarnessSamples((), (), 0, None) if task.samples is None else read_samples(task.samples, task)
    definition = _define(store, task)
    settings = settings_of(one, task)
    settings_id = content_id(settings)
    checkpoint_id, task_id = arrival.fingerprint, definition["task_id"]
    evaluation_id = content_id({"checkpoints": [checkpoint_id], "task_id": task_id, "settings_id": settings_id})
    source = _source(one, task, samples)
    if (known := _taken_before(store, evaluation_id, source)) is not None:
        return _decided(store, catalog, one, known, "present", actor)
    lease = leases.acquire(store, evaluation_id, _LEASE_SECONDS)
    if lease is None:
        raise SchemaError(
            f"{one.file}: {task.name} is being taken over by another process", remedy="do it again when that has ended"
        )
    with lease.keep():
        attempt = max(commits.attempts(store, evaluation_id), default=0) + 1
        try_id = uuid.uuid4().hex
        table = pa.Table.from_pylist(list(samples.rows), schema=SAMPLE_SCHEMA)
        record = {
            **_ids(definition, arrival, place, evaluation_id, settings_id),
            **_facts(one, task, definition["name"], samples),
            "attempt": attempt,
            "try": try_id,
            "settings": settings,
            "limit": settings["limit"],
            "chat": settings["chat"],
            "prompts_id": write_prompts(store, samples.items),
            "samples": commits.write_samples(store, evaluation_id, try_id, table),
            IMPORTED: source,
        }
        # Looked for once more: another process may have been quicker between the first look and the lease.
        known = _taken_before(store, evaluation_id, source)
        if known is None and not commits.commit(store, record, lease):
            raise SchemaError(f"{one.file}: {task.name} was taken over by another process", remedy="do it again")
    return _decided(store, catalog, one, known or record, "present" if known else "taken", actor)


def _decided(store: Store, catalog: Path, one: HarnessRun, record: Mapping[str, Any], kind: str, actor: str) -> Told:
    """The gate's word on a commit, which is said now where a killed import had not come to it."""
    evaluation_id, attempt = record["evaluation_id"], record["attempt"]
    decision = decisions.standing(store, evaluation_id, attempt)
    if decision is None:
        decision = quality.decide(store, record, quality.judge(store, catalog, record), f"{actor}, {_WATCHER}")
    told = f"{record['task']}: {decision.status}" + "".join(f"; {reason}" for reason in decision.reasons)
    return Told(kind, str(one.file), told, record["task"], record["key"], evaluation_id, attempt, decision.status)


def _taken_before(store: Store, evaluation_id: str, source: Mapping[str, Any]) -> dict[str, Any] | None:
    """The commit of the same file; one without samples does not stand for one that has them now."""
    for attempt in commits.attempts(store, evaluation_id):
        record = commits.read(store, evaluation_id, attempt)
        theirs = None if record is None else record.get(IMPORTED)
        if theirs is None or theirs["sha256"] != source["sha256"]:
            continue
        if source["samples_sha256"] in (None, theirs["samples_sha256"]):
            return record
    return None


def _define(store: Store, task: HarnessTask) -> dict[str, Any]:
    """The record of the task, kept under its name; the newest definition that came is what boards show."""
    asked = {
        "source": SOURCE,
        "task": task.name,
        "version": task.version,
        "num_fewshot": task.num_fewshot,
        **_said(task, _ASKS),
    }
    scored = _said(task, _SCORES)
    ask_id = content_id({IMPORTED: asked})
    task_id = content_id({"ask_id": ask_id, IMPORTED: scored})
    shots = f"-{task.num_fewshot}shot" if task.num_fewshot else ""
    name = f"{escape_key(task.name).replace('/', '=2F')}@lm-eval{shots}"
    primary = task.scores[0].metric
    record = {
        "task_id": task_id,
        "ask_id": ask_id,
        "name": name,
        "origin": IMPORTED,
        "dataset_id": None,
        "fewshot_dataset_id": None,
        "definition": {"output_type": task.config.get("output_type"), **asked, **scored, "task": name},
    }
    create_record(store, layout.task(task_id), record)
    named = {
        "task_id": task_id,
        "ask_id": ask_id,
        "primary_metric": primary,
        "higher_is_better": task.better.get(primary.partition(",")[0]),
        "chance": None,
        "title": task.name,
        "about": f"taken over from {SOURCE}",
    }
    while True:
        numbers = sorted(layout.numbers(store, layout.task_names(name)))
        if any(read_record(store, key)["task_id"] == task_id for _, key in numbers):
            return record
        n = numbers[-1][0] + 1 if numbers else 1
        log.write(store, "task", name=name, n=n, task_id=task_id)
        if create_record(store, layout.task_name(name, n), named):
            return record


def _said(task: HarnessTask, keys: Sequence[str]) -> dict[str, Any]:
    """What the task's configuration says under `keys`, without what another process would write otherwise."""
    return {key: _plain(task.config[key]) for key in keys if task.config.get(key) not in (None, "", [], {})}


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return _ADDRESS.sub("", value)
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list) else value


def _ids(
    definition: Mapping[str, Any], arrival: Arrival, place: Place, evaluation_id: str, settings_id: str
) -> dict[str, Any]:
    checkpoint_id, ask_id = arrival.fingerprint, definition["ask_id"]
    return {
        "evaluation_id": evaluation_id,
        "checkpoint_id": checkpoint_id,
        "weights_id": None,
        "tokenizer_id": None,
        "kind": IMPORTED,
        "key": place.key,
        "arrival": arrival.n,
        "task": definition["name"],
        "task_id": definition["task_id"],
        "ask_id": ask_id,
        "answers_id": content_id({"checkpoint": checkpoint_id, "ask_id": ask_id, "settings_id": settings_id}),
        "dataset_id": None,
        "settings_id": settings_id,
        "origin": IMPORTED,
    }


def _facts(one: HarnessRun, task: HarnessTask, name: str, samples: HarnessSamples) -> dict[str, Any]:
    """What the file says of the run and of its scores. Its seconds are those of all its tasks, and in `imported`."""
    primary = task.scores[0]
    dtype = one.config.get("model_dtype")
    parameters = one.config.get("model_num_parameters")
    about = {"lm_eval": one.about.get("lm_eval_version"), "transformers": one.about.get("transformers_version")}
    return {
        "dtype": None if not dtype else str(dtype).removeprefix("torch."),
        "devices": [str(one.config["device"])] if one.config.get("device") else [],
        "engine_path": None,
        "n_parameters": parameters if isinstance(parameters, int) and parameters >= 0 else None,
        "numerics_version": None,
        "versions": {name: value for name, value in about.items() if value},
        "trust_remote_code": None,
        "started_at": None if one.started is None else datetime.fromtimestamp(one.started, UTC).isoformat(),
        "finished_at": None,
        "seconds": None,
        "answer_seconds": None,
        "n_requests": samples.n_requests if samples.rows else None,
        "n_tokens": None,
        "truncated": None,
        "planned": {
            "items": len(samples.items),
            "samples": len(samples.rows),
            "sample_ids": ordered_id(item.document.sample_id for item in samples.items),
        },
        "answers_digest": None,
        "scores": [
            {
                "task": name,
                "subset": "",
                "metric": score.metric,
                "subject": None,
                "value": score.value,
                "standard_error": score.standard_error,
                "ci_low": None,
                "ci_high": None,
                "interval_method": _NO_INTERVAL,
                "n": task.n,
                "n_clusters": None,
            }
            for score in task.scores
        ],
        "primary": {
            "metric": primary.metric,
            "value": primary.value,
            "higher_is_better": task.better.get(primary.metric.partition(",")[0]),
            "chance": None,
        },
    }


def _source(one: HarnessRun, task: HarnessTask, samples: HarnessSamples) -> dict[str, Any]:
    """Where it comes from: enough to find the file again, and to know it when it comes again."""
    return {
        "source": SOURCE,
        "version": one.about.get("lm_eval_version"),
        "git_hash": one.about.get("git_hash"),
        "file": one.file.name,
        "sha256": one.sha256,
        "samples_file": None if task.samples is None else task.samples.name,
        "samples_sha256": samples.sha256,
        "task": task.name,
        "task_version": task.version,
        "task_hash": task.task_hash,
        "num_fewshot": task.num_fewshot,
        "n_of": task.of,
        "run_seconds": one.about.get("total_evaluation_time_seconds"),
    }
