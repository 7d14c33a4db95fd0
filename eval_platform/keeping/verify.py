"""Is the results root whole? Every file is read, held against what names it, and nothing is changed."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from eval_platform import warehouse
from eval_platform.identity import content_id
from eval_platform.keeping.bodies import Body, read_body
from eval_platform.keeping.together import Step, each, quietly
from eval_platform.store import Entry, Store, layout
from eval_platform.store.announcements import unannounced, unmet
from eval_platform.store.bundles import WITHOUT_IT

RESTORE = "restore it from a copy"
_RERUN = f"{RESTORE}, or `eval-platform rerun` the evaluation"
_REBUILD = "`eval-platform rebuild` makes it again from the files"

Slot = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Finding:
    """damage: something is lost, altered or not to be found. leftover: of a crash or of work under way, harmless."""

    kind: Literal["damage", "leftover"]
    key: str
    problem: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Verified:
    """What was read, and what is wrong with it, damage first."""

    files: int
    n_bytes: int
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        return all(finding.kind != "damage" for finding in self.findings)


@dataclass(slots=True)
class _Root:
    """What was found: every file's size and, as far as others refer to it, what it says."""

    sizes: dict[str, int]
    bodies: dict[str, Body] = field(default_factory=dict)

    def record(self, key: str) -> dict[str, Any] | None:
        """None when it is absent or cannot be read; the latter is a finding of its own."""
        body = self.bodies.get(key)
        return None if body is None else body.record

    def under(self, top: str, suffix: str) -> Iterator[tuple[str, int, str]]:
        """(folder below `top`, n, key) of every `<top>/<folder>/<n><suffix>`."""
        for key in self.sizes:
            numbered = layout.numbered(key)
            if key.startswith(top) and numbered is not None and numbered[1] == suffix:
                yield key.removeprefix(top).rpartition("/")[0], numbered[0], key


def verify(store: Store, catalog: Path, step: Step = quietly) -> Verified:
    """Read every file of the store; compare ids, hashes and counts; then the log and the catalog with the files.

    A root in use is no hindrance: what is missing is looked for once more before it is called lost. Raises StoreError
    when the storage fails; a damaged file is a finding, never an error.
    """
    listed: list[Entry] = list(store.list(""))
    root = _Root({entry.key: entry.size for entry in listed})
    findings: list[Finding] = []
    for done, (entry, body) in enumerate(
        zip(listed, each(store, partial(read_body, store), (entry.key for entry in listed)), strict=True), 1
    ):
        step("reading every file", done, len(listed))
        if body is None:  # deleted since it was listed
            del root.sizes[entry.key]
        elif body.problem is not None:
            kind = "leftover" if body.foreign else "damage"
            findings.append(Finding(kind, entry.key, body.problem, body.remedy or RESTORE))
        if body is not None:
            root.bodies[entry.key] = body
    for entry in store.list("evaluations/"):  # of a prune that went on meanwhile
        if entry.key.endswith(".pruned.json") and entry.key not in root.sizes:
            root.sizes[entry.key] = entry.size
    for check in (_root_record, _evaluations, _unnamed, _decisions, _tries, _arrivals, _tasks, _bundles):
        findings += check(root)
    # What was written since its folder was listed is not lost.
    findings = [one for one in findings if one.key in root.sizes or one.kind == "leftover" or not _is_there(store, one)]
    findings += _log(store, root)
    catalog_said = warehouse.differences(store, catalog, partial(step, "building a catalog to compare"))
    for table, (lacking, extra) in catalog_said.items():
        said = f"the table {table} lacks {lacking} rows that the files have, and has {extra} that they have not"
        findings.append(Finding("damage", str(catalog), said, _REBUILD))
    findings.sort(key=lambda finding: (finding.kind, finding.key))
    return Verified(len(root.sizes), sum(root.sizes.values()), tuple(findings))


# ------------------------------------------------------------------------------------------------ what is referred to


def _root_record(root: _Root) -> Iterator[Finding]:
    if root.sizes and layout.ROOT not in root.sizes:
        yield Finding(
            "damage",
            layout.ROOT,
            "the root's own record is lost: which layout this is, and its id, stand nowhere",
            f"{RESTORE}, or `eval-platform tasks sync`: it writes one, and every machine builds its catalog anew",
        )


def _evaluations(root: _Root) -> Iterator[Finding]:
    decided = {(key.split("/")[1], parsed[0]) for key in root.sizes if (parsed := layout.parse_decision(key))}
    for evaluation_id, attempt, key in root.under("evaluations/", ".json"):
        record = root.record(key)
        if record is None:
            continue
        try:
            yield from _identity(key, evaluation_id, attempt, record)
            yield from _samples(root, key, record)
            yield from _references(root, key, record)
        except (KeyError, TypeError, ValueError) as error:
            yield Finding("damage", key, f"it is no record of an evaluation: {error!r}", RESTORE)
        if (evaluation_id, attempt) not in decided:
            yield Finding(
                "leftover",
                key,
                "it is committed and not decided: it counts as held",
                f'`eval-platform recheck {evaluation_id} --reason "never decided"`, or a platform that runs decides it',
            )


def _identity(key: str, evaluation_id: str, attempt: int, record: dict[str, Any]) -> Iterator[Finding]:
    """The ids are of what the record says (contract section 1)."""
    settings_id = content_id(record["settings"])
    checkpoint_id, task_id = record["checkpoint_id"], record["task_id"]
    own = content_id({"checkpoints": [checkpoint_id], "task_id": task_id, "settings_id": settings_id})
    answers = content_id({"checkpoint": checkpoint_id, "ask_id": record["ask_id"], "settings_id": settings_id})
    told = (record["evaluation_id"], record["attempt"], record["settings_id"], record["answers_id"])
    if told != (evaluation_id, attempt, settings_id, answers) or own != evaluation_id:
        yield Finding("damage", key, "its ids are not those of what it says was asked of which model", RESTORE)


def _samples(root: _Root, key: str, record: dict[str, Any]) -> Iterator[Finding]:
    named, evaluation_id, attempt = record["samples"], record["evaluation_id"], record["attempt"]
    tombstone = layout.evaluation_pruned(evaluation_id, attempt)
    found = root.bodies.get(named["key"])
    if found is None:
        if tombstone not in root.sizes:
            yield Finding("damage", named["key"], f"the samples that {key} names are lost", _RERUN)
        return
    if found.problem is None and (found.sha256, found.rows) != (named["sha256"], named["rows"]):
        yield Finding("damage", named["key"], f"it is not what {key} committed: its SHA-256 differs", _RERUN)
    if tombstone in root.sizes:
        yield Finding(
            "leftover", named["key"], "a prune was stopped before it removed this", "prune again: any rule removes it"
        )


def _references(root: _Root, key: str, record: dict[str, Any]) -> Iterator[Finding]:
    prompts = root.bodies.get(layout.prompts(record["prompts_id"]))
    planned = record["planned"]
    if prompts is None:
        yield Finding("damage", layout.prompts(record["prompts_id"]), f"the prompts that {key} names are lost", RESTORE)
    elif prompts.problem is None and (prompts.rows, prompts.sample_ids) != (planned["items"], planned["sample_ids"]):
        yield Finding("damage", layout.prompts(record["prompts_id"]), f"its items are not those of {key}", RESTORE)
    arrival, n = record["key"], record["arrival"]
    identity = root.record(layout.arrival_identity(arrival, n))
    if layout.arrival_identity(arrival, n) not in root.sizes:
        lost = layout.arrival_identity(arrival, n)
        yield Finding("damage", lost, f"which checkpoint {key} is of stands nowhere any more", RESTORE)
    elif layout.arrival(arrival, n) not in root.sizes:
        yield Finding(
            "damage", layout.arrival(arrival, n), f"the checkpoint's record that {key} names is lost", RESTORE
        )
    elif identity is not None and identity.get("checkpoint_id") != record["checkpoint_id"]:
        yield Finding("damage", layout.arrival_identity(arrival, n), f"{key} says it is another checkpoint", RESTORE)
    if layout.task(record["task_id"]) not in root.sizes:
        yield Finding("damage", layout.task(record["task_id"]), f"the task that {key} names is lost", RESTORE)
    pointer = layout.answers(record["answers_id"], record["evaluation_id"], record["attempt"])
    if pointer not in root.sizes:
        yield Finding("damage", pointer, f"{key} is not found by its answers: they would be asked again", RESTORE)


def _unnamed(root: _Root) -> Iterator[Finding]:
    """What no commit names, and what speaks of a commit that is not there."""
    commits = {key: root.record(key) for _, _, key in root.under("evaluations/", ".json")}
    # A commit that cannot be read may name anything.
    unreadable = any(not _names_both(record) for record in commits.values())
    named = {record["samples"]["key"] for record in commits.values() if record and _names_both(record)}
    known = {record["prompts_id"] for record in commits.values() if record and _names_both(record)}
    for key in root.sizes:
        top, _, rest = key.partition("/")
        if top == "samples" and key not in named and not unreadable:
            yield Finding(
                "leftover", key, "no commit names it: a try lost, or is at work", "delete it when no worker is at it"
            )
        elif top == "prompts" and rest.removesuffix(".parquet") not in known and not unreadable:
            yield Finding("leftover", key, "no commit names it", "delete it when no worker is at work")
        elif top == "answers":
            evaluation_id, _, attempt = rest.partition("/")[2].removesuffix(".json").rpartition("-")
            if not attempt.isdigit() or layout.evaluation(evaluation_id, int(attempt)) not in root.sizes:
                yield Finding("leftover", key, "it points at no commit: a worker was killed before it", "none needed")
    for evaluation_id, attempt, key in root.under("evaluations/", ".pruned.json"):
        if layout.evaluation(evaluation_id, attempt) not in root.sizes:
            yield Finding("leftover", key, "its commit is not here: an import was stopped before it", "import again")


def _names_both(record: dict[str, Any] | None) -> bool:
    samples = None if record is None else record.get("samples")
    return record is not None and isinstance(samples, dict) and "key" in samples and "prompts_id" in record


def _decisions(root: _Root) -> Iterator[Finding]:
    numbers: dict[Slot, set[int]] = defaultdict(set)
    for key in root.sizes:
        parsed = layout.parse_decision(key)
        if parsed is not None:
            numbers[key.split("/")[1], parsed[0]].add(parsed[1])
            record, says = root.record(key), ("evaluation_id", "attempt", "n")
            if record is not None and tuple(record.get(name) for name in says) != (key.split("/")[1], *parsed):
                yield Finding("damage", key, "it is the decision on something else", RESTORE)
    for (evaluation_id, attempt), found in numbers.items():
        if layout.evaluation(evaluation_id, attempt) not in root.sizes:
            yield Finding(
                "damage", layout.evaluation(evaluation_id, attempt), "it was decided on, and the commit is lost", _RERUN
            )
        for n in sorted(set(range(1, max(found))) - found):
            yield Finding("damage", layout.decision(evaluation_id, attempt, n), "a decision is lost", RESTORE)


def _tries(root: _Root) -> Iterator[Finding]:
    """A try that says it committed has a commit."""
    for folder, _, key in root.under("tries/evaluations/", ".end.json"):
        record = root.record(key)
        evaluation_id, _, attempt = folder.rpartition("/")
        if not attempt.isdecimal():  # no try's place
            continue
        commit = layout.evaluation(evaluation_id, int(attempt))
        if record is not None and record.get("outcome") == "committed" and commit not in root.sizes:
            yield Finding("damage", commit, f"{key} says it was committed, and it is lost", _RERUN)


def _arrivals(root: _Root) -> Iterator[Finding]:
    numbers: dict[str, set[int]] = defaultdict(set)
    for folder, n, key in root.under(layout.ARRIVALS, ".json"):
        numbers[folder].add(n)
        record = root.record(key)
        if record is not None and (record.get("key"), record.get("n")) != (folder, n):
            yield Finding("damage", key, f"it says it is arrival {record.get('n')} of {record.get('key')}", RESTORE)
    for folder, n, key in root.under(layout.ARRIVALS, ".identity.json"):
        if n not in numbers[folder]:
            yield Finding("damage", layout.arrival(folder, n), f"{key} stands, its arrival is lost", RESTORE)
            numbers[folder].add(n)
    yield from _gaps(numbers, layout.arrival, "an arrival is lost")


def _tasks(root: _Root) -> Iterator[Finding]:
    numbers: dict[str, set[int]] = defaultdict(set)
    for name, n, key in root.under("tasks/by-name/", ".json"):
        numbers[name].add(n)
        record = root.record(key)
        if record is not None and layout.task(str(record.get("task_id"))) not in root.sizes:
            yield Finding(
                "damage", layout.task(str(record.get("task_id"))), f"the task that {key} names is lost", RESTORE
            )
    yield from _gaps(numbers, layout.task_name, "an earlier definition's name is lost")
    for key, body in root.bodies.items():
        if not key.startswith("tasks/") or key.startswith("tasks/by-name/") or body.record is None:
            continue
        for dataset_id in (body.record.get("dataset_id"), body.record.get("fewshot_dataset_id")):
            if dataset_id is None:
                continue
            for part in (layout.dataset_documents(dataset_id), layout.dataset_card(dataset_id)):
                if part not in root.sizes:
                    yield Finding("damage", part, f"the documents that {key} asks are lost", RESTORE)


def _gaps(numbers: dict[str, set[int]], place: Any, problem: str) -> Iterator[Finding]:
    for name, found in numbers.items():
        for n in sorted(set(range(1, max(found, default=1))) - found):
            yield Finding("damage", place(name, n), problem, RESTORE)


def _bundles(root: _Root) -> Iterator[Finding]:
    """A record in a bundle is the record: catalogs are built from either."""
    for key, body in root.bodies.items():
        for copied, sha256 in body.copies.items():
            record = root.bodies.get(copied)
            if record is not None and record.sha256 is not None and record.sha256 != sha256:
                yield Finding("damage", key, f"its copy of {copied} is not what that says", WITHOUT_IT)
                break


def _log(store: Store, root: _Root) -> Iterator[Finding]:
    keys = list(root.sizes)
    entries = {key: body.record for key, body in root.bodies.items() if key.startswith(layout.LOG) and body.record}
    missing = unannounced(keys, entries.values())
    ahead = unmet(entries, keys)
    if missing or ahead:  # announced, or written, since its folder was listed
        keys = [entry.key for entry in store.list("")]
        since = [key for key in keys if key.startswith(layout.LOG) and key not in root.sizes]
        entries |= {key: body.record for key in since if (body := read_body(store, key)) is not None and body.record}
        missing = unannounced(missing, entries.values())
        ahead = unmet({key: entries[key] for key in ahead}, keys)
    for key in missing:
        yield Finding("damage", key, "no log entry points at it: other machines may never see it", _REBUILD)
    for key in ahead:
        said = "what it announces is not there: its writer was killed before it wrote it, or it is lost"
        yield Finding("leftover", key, said, f"none needed after a kill; else {RESTORE}")


def _is_there(store: Store, finding: Finding) -> bool:
    try:
        store.read(finding.key, 0, 1)
    except KeyError:
        return False
    return True
