"""How do results come from one root into another? Copied in the order in which each file names the others.

So a kill leaves files that nothing names yet and never a name without its file; doing it again goes on where it
stopped. What the target has stands: every file is created once there too. Tries, leases and journals stay where they
are: work under way, and failures, which elsewhere may succeed.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from eval_platform.errors import ConfigError, SchemaError
from eval_platform.keeping.together import Step, each, quietly
from eval_platform.store import Store, find_record, layout, read_record
from eval_platform.store.announcements import announce
from eval_platform.store.records import decode

Slot = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Said:
    """What was not taken over. kept: the target's own stands and says the same. refused: it is lost to the target."""

    kind: Literal["kept", "refused"]
    key: str
    reason: str


@dataclass(slots=True)
class Moved:
    """What came over: numbers of files written, of evaluations among them, of evaluations that were there already."""

    files: int = 0
    evaluations: int = 0
    present: int = 0
    said: list[Said] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return all(one.kind != "refused" for one in self.said)

    def add(self, other: "Moved") -> None:
        self.files += other.files
        self.evaluations += other.evaluations
        self.present += other.present
        self.said += other.said


def transfer(source: Store, target: Store, step: Step = quietly) -> Moved:
    """Copy tasks, datasets, prompts, checkpoints' records, samples, evaluations and decisions into `target`.

    Raises ConfigError, before anything is written, when the two are one or a checkpoint root's name stands for
    different places in them; StoreError when either fails.
    """
    there = {entry.key for entry in source.list("")}
    if source.uri == target.uri:
        raise ConfigError(f"{source.uri} is both source and target", remedy="name another results root")
    if not any(key.startswith(("evaluations/", "arrivals/", "tasks/")) for key in there):
        raise ConfigError(f"there are no results in {source.uri}", remedy="name the folder that `results` is set to")
    moved = Moved()
    _roots(source, target, there, moved)
    # What is named by its content, documents before their card and both before the task that asks them.
    kept = {entry.key for top in ("datasets/", "tasks/", "prompts/") for entry in target.list(top)}
    by_content = [key for key in there - kept if key.startswith(("datasets/", "prompts/"))]
    by_content.sort(key=lambda key: (not key.endswith("documents.parquet"), key))
    definitions = sorted(k for k in there - kept if k.startswith("tasks/") and not k.startswith("tasks/by-name/"))
    slower = source if source.requests_at_once > target.requests_at_once else target
    for keys, what in ((by_content, "copying documents and prompts"), (definitions, "copying tasks")):
        for done, _ in enumerate(each(slower, partial(_copy, source, target), keys), 1):
            step(what, done, len(keys))
        moved.files += len(keys)
    _names(source, target, there, kept, moved)

    usable: set[Slot] = set()
    arrivals: dict[str, list[int]] = defaultdict(list)
    for key in there:
        if (found := layout.parse_arrival(key)) is not None:
            arrivals[found[0]].append(found[1])
    of_arrivals = each(slower, lambda key: _arrivals(source, target, key, sorted(arrivals[key])), sorted(arrivals))
    for done, (numbers, part) in enumerate(of_arrivals, 1):
        usable |= numbers
        moved.add(part)
        step("copying checkpoints' records", done, len(arrivals))

    slots: dict[str, list[int]] = defaultdict(list)
    decisions: dict[Slot, list[int]] = defaultdict(list)
    for key in there:
        folder, _, _ = key.partition("/")
        numbered = layout.numbered(key)
        if folder == "evaluations" and numbered is not None and numbered[1] == ".json":
            slots[key.split("/")[1]].append(numbered[0])
        elif (parsed := layout.parse_decision(key)) is not None:
            decisions[key.split("/")[1], parsed[0]].append(parsed[1])

    def evaluation(evaluation_id: str) -> Moved:
        part = Moved()
        for attempt in sorted(slots[evaluation_id]):
            _evaluation(
                source, target, (evaluation_id, attempt), sorted(decisions[evaluation_id, attempt]), usable, part
            )
        return part

    for done, part in enumerate(each(slower, evaluation, sorted(slots)), 1):
        moved.add(part)
        step("copying evaluations", done, len(slots))
    return moved


def _copy(source: Store, target: Store, key: str) -> bool:
    """True when the target had it not. The log is told first where the file is one that it tells of."""
    if _has(target, key):
        return False
    body = source.read(key)
    announce(target, key)
    return target.create(key, body)


def _roots(source: Store, target: Store, there: Iterable[str], moved: Moved) -> None:
    names = sorted(key for key in there if key.startswith("roots/"))
    for key in names:
        ours, theirs = read_record(source, key)["uri"], (find_record(target, key) or {}).get("uri")
        if theirs is not None and theirs != ours:
            name = key.removeprefix("roots/").removesuffix(".json")
            raise ConfigError(
                f"checkpoint root {name!r} is {ours} in {source.uri}, but {theirs} in {target.uri}: one key would be "
                "two checkpoints",
                remedy="nothing was copied; give one of the two places another name in [[checkpoints]] and let its "
                "checkpoints be evaluated under it (equal content is not asked again)",
            )
    moved.files += sum(_copy(source, target, key) for key in names)


def _names(source: Store, target: Store, there: Iterable[str], kept: set[str], moved: Moved) -> None:
    """What task each name stands for: the target's own names stand, those it has not come with their history."""
    names: dict[str, list[int]] = defaultdict(list)
    for key in there:
        numbered = layout.numbered(key)
        if key.startswith("tasks/by-name/") and numbered is not None:
            names[key.removeprefix("tasks/by-name/").rpartition("/")[0]].append(numbered[0])
    for name, numbers in sorted(names.items()):
        own = [n for n in numbers if layout.task_name(name, n) in kept]
        newest = layout.newest_numbered(target, layout.task_names(name))
        ours = {n: read_record(source, layout.task_name(name, n)) for n in sorted(numbers)}
        # A name that was carried over in part is of a transfer that was killed: it is the same as far as it goes.
        if newest is None or all(find_record(target, layout.task_name(name, n)) == ours.get(n) for n in own):
            moved.files += sum(_copy(source, target, layout.task_name(name, n)) for n in ours if n not in own)
        elif read_record(target, newest[1])["task_id"] != ours[max(ours)]["task_id"]:
            reason = "the name stands for another task there: results of this one are kept, and count as stale"
            moved.said.append(Said("kept", layout.task_names(name), reason))


def _arrivals(source: Store, target: Store, key: str, numbers: list[int]) -> tuple[set[Slot], Moved]:
    """(the arrivals of `key` that are the same in both now, what was done)."""
    same: set[Slot] = set()
    moved = Moved()
    for n in numbers:
        ours, theirs = _seen(source, key, n), _seen(target, key, n)
        place = layout.arrival(key, n)
        if theirs is None and n > 1 and (key, n - 1) not in same:
            moved.said.append(Said("refused", place, "arrivals before it are others there, or missing here"))
            return same, moved
        if theirs is None:
            moved.files += _copy(source, target, place)
            theirs = _seen(target, key, n)
        if not _same_arrival(ours, theirs):
            reason = "this arrival is another checkpoint there: results of it would stand on the wrong curve"
            moved.said.append(Said("refused", place, reason))
            return same, moved
        identity = layout.arrival_identity(key, n)
        if ours is not None and ours[1] is not None and theirs is not None and theirs[1] is None:
            moved.files += _copy(source, target, identity)
        same.add((key, n))
    return same, moved


def _seen(store: Store, key: str, n: int) -> tuple[str, str | None] | None:
    """(fingerprint, checkpoint_id or None) of an arrival; None when it is not there."""
    record = find_record(store, layout.arrival(key, n))
    if record is None:
        return None
    identity = find_record(store, layout.arrival_identity(key, n)) or {}
    return record["fingerprint"], identity.get("checkpoint_id")


def _same_arrival(ours: tuple[str, str | None] | None, theirs: tuple[str, str | None] | None) -> bool:
    """By content where both are known by it (two machines may see one folder's times differently), else as seen."""
    if ours is None or theirs is None:
        return False
    if ours[1] is not None and theirs[1] is not None:
        return ours[1] == theirs[1]
    return ours[0] == theirs[0]


def _evaluation(source: Store, target: Store, slot: Slot, numbers: list[int], usable: set[Slot], moved: Moved) -> None:
    """One attempt: first what its commit names, then the commit, then what was decided on it."""
    key = layout.evaluation(*slot)
    body = source.read(key)
    try:
        record = decode(body, key)
        before = find_record(target, key)
        if before is None:
            reason = _bring(source, target, slot, record, usable, moved)
            if reason is not None:
                moved.said.append(Said("refused", key, reason))
                return
            announce(target, key)
            if target.create(key, body):
                moved.files += 1
                moved.evaluations += 1
                before = record
            else:  # another writer has won the slot meanwhile
                before = read_record(target, key)
        else:
            moved.present += 1
    except SchemaError as error:
        moved.said.append(Said("refused", key, f"{str(error).partition(chr(10))[0]}; see `eval-platform verify`"))
        return
    if before == record:
        _decisions(source, target, slot, numbers, moved)
    else:
        moved.said.append(_other_result(key, record, before))


def _bring(
    source: Store, target: Store, slot: Slot, record: dict[str, Any], usable: set[Slot], moved: Moved
) -> str | None:
    """Copy what the commit names; a reason when it may not be taken over."""
    if (record["key"], record["arrival"]) not in usable:
        return f"its checkpoint {record['key']}, arrival {record['arrival']}, is not the same there, or missing here"
    for needed in (layout.task(record["task_id"]), layout.prompts(record["prompts_id"])):
        if not _has(target, needed):
            return f"{needed}, which it names, is missing; see `eval-platform verify`"
    tombstone = find_record(source, layout.evaluation_pruned(*slot))
    named = record["samples"]
    if tombstone is None:
        try:
            samples = source.read(named["key"])
        except KeyError:
            return f"its samples {named['key']} are missing; see `eval-platform verify`"
        if hashlib.sha256(samples).hexdigest() != named["sha256"]:
            return f"its samples {named['key']} are damaged; see `eval-platform verify`"
        moved.files += target.create(named["key"], samples)
    else:
        moved.files += _copy(source, target, layout.evaluation_pruned(*slot))
    for key in (layout.evaluation_asked(*slot), layout.answers(record["answers_id"], *slot)):
        if _has(source, key):
            moved.files += _copy(source, target, key)
    return None


def _other_result(key: str, ours: dict[str, Any], theirs: dict[str, Any]) -> Said:
    """One slot has one result, and the target's stands (contract section 2); whether that loses anything."""
    if ours["scores"] == theirs["scores"]:
        return Said("kept", key, "it was evaluated there too, with the same scores; the target's own stands")
    primary = [(one.get("primary") or {}).get("value") for one in (ours, theirs)]
    reason = f"it was evaluated there too, with other scores ({primary[0]} here, {primary[1]} there), and that stands"
    return Said("refused", key, reason)


def _decisions(source: Store, target: Store, slot: Slot, numbers: list[int], moved: Moved) -> None:
    """What was decided goes on from the same beginning, or the target's own stands."""
    for n in numbers:
        key = layout.decision(*slot, n)
        ours = read_record(source, key)
        if find_record(target, key) is None and _copy(source, target, key):
            moved.files += 1
        elif read_record(target, key) != ours:
            last = read_record(source, layout.decision(*slot, numbers[-1]))["status"]
            newest = max(parsed for parsed in _decided(target, slot[0]) if parsed[0] == slot[1])
            standing = read_record(target, layout.decision(*slot, newest[1]))["status"]
            kind: Literal["kept", "refused"] = "kept" if last == standing else "refused"
            reason = f"it was decided there too: {standing} there, {last} here; the target's own decisions stand"
            moved.said.append(Said(kind, key, reason))
            return


def _decided(store: Store, evaluation_id: str) -> list[tuple[int, int]]:
    """(attempt, n) of every decision on the evaluation."""
    listed = store.list(layout.decision_folder(evaluation_id), delimiter="/")
    return [parsed for entry in listed if (parsed := layout.parse_decision(entry.key)) is not None]


def _has(store: Store, key: str) -> bool:
    try:
        store.read(key, 0, 1)
    except KeyError:
        return False
    return True
