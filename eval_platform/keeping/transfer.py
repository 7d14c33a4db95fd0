"""How do results come from one root into another? Copied in the order in which each file names the others.

So a kill leaves files that nothing names yet and never a name without its file; doing it again goes on where it
stopped. What the target has stands: every file is created once there too. For the same reason nothing damaged is
copied: it would stand there for ever. Tries, leases and journals stay where they are: work under way, and failures,
which elsewhere may succeed.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from eval_platform.errors import ConfigError, SchemaError
from eval_platform.keeping.bodies import judge
from eval_platform.keeping.together import Step, each, quietly
from eval_platform.store import Store, commits, decisions, find_record, layout, open_root, read_record
from eval_platform.store.announcements import announce
from eval_platform.store.records import decode
from eval_platform.store.roots import known_layout

Slot = tuple[str, int]

_BY_NAME = "tasks/by-name/"
# Listed in this order: what names others first, so that what it names is listed although a platform writes meanwhile.
_COPIED = (
    *("evaluations/", "decisions/", "answers/", "samples/", "prompts/"),
    *("arrivals/", "roots/", "tasks/", "datasets/"),
)


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


@dataclass(frozen=True, slots=True)
class _Roots:
    """The two roots, and what each had when it was listed at the beginning; `there` without what proved damaged."""

    source: Store
    target: Store
    there: set[str]
    kept: set[str]

    @property
    def slower(self) -> Store:
        return max(self.source, self.target, key=lambda store: store.requests_at_once)

    def copy(self, key: str) -> bool:
        """True when the target had it not. The log is told first where the file is one that it tells of.

        Raises SchemaError when it is damaged in the source.
        """
        if key in self.kept:
            return False
        body = self.source.read(key)
        if (problem := judge(self.source, key, body).problem) is not None:
            self.there.discard(key)
            raise SchemaError(f"{key} is damaged: {problem}")
        announce(self.target, key)
        return self.target.create(key, body)

    def ours(self, key: str) -> dict[str, Any] | None:
        return read_record(self.source, key) if key in self.there else None

    def theirs(self, key: str) -> dict[str, Any] | None:
        return read_record(self.target, key) if key in self.kept else None


def transfer(source: Store, target: Store, step: Step = quietly) -> Moved:
    """Copy tasks, datasets, prompts, checkpoints' records, samples, evaluations and decisions into `target`.

    Raises ConfigError, before anything is copied, when the two are one or a checkpoint root's name stands for
    different places in them; SchemaError when a newer eval-platform has laid either out; StoreError when either fails.
    """
    root = find_record(source, layout.ROOT)
    if root is not None:
        known_layout(source, root)
    there = {entry.key for top in _COPIED for entry in source.list(top)}
    if source.uri == target.uri:
        raise ConfigError(f"{source.uri} is both source and target", remedy="name another results root")
    if not any(key.startswith(("evaluations/", "arrivals/", "tasks/")) for key in there):
        raise ConfigError(f"there are no results in {source.uri}", remedy="name the folder that `results` is set to")
    open_root(target)
    roots = _Roots(source, target, there, {entry.key for top in _COPIED for entry in target.list(top)})
    moved = Moved()
    _checkpoint_roots(roots, moved)
    # What is named by its content: documents before their card, both before the task that asks them.
    by_content = [key for key in there - roots.kept if key.startswith(("datasets/", "prompts/"))]
    by_content.sort(key=lambda key: (not key.endswith("documents.parquet"), key))
    tasks = sorted(key for key in there - roots.kept if key.startswith("tasks/") and not key.startswith(_BY_NAME))
    for keys, copy, what in ((by_content, _copy, "copying documents and prompts"), (tasks, _task, "copying tasks")):
        for done, part in enumerate(each(roots.slower, partial(copy, roots), keys), 1):
            moved.add(part)
            step(what, done, len(keys))
    _names(roots, moved)

    usable: set[Slot] = set()
    arrivals: dict[str, list[int]] = defaultdict(list)
    for key in there:
        if (found := layout.parse_arrival(key)) is not None:
            arrivals[found[0]].append(found[1])
    carried = each(roots.slower, lambda key: _arrivals(roots, key, sorted(arrivals[key])), sorted(arrivals))
    for done, (numbers, part) in enumerate(carried, 1):
        usable |= numbers
        moved.add(part)
        step("copying checkpoints' records", done, len(arrivals))

    slots, decided = _slots(there)

    def evaluation(evaluation_id: str) -> Moved:
        part = Moved()
        other = None  # the attempt that is another result there
        for attempt in sorted(slots[evaluation_id]):
            slot = (evaluation_id, attempt)
            if other is None or layout.evaluation(*slot) in roots.kept:
                stands = _evaluation(roots, slot, sorted(decided[slot]), usable, part)
                other = other if stands else attempt
            else:  # the gate has compared the two here, and would show the one where the other is doubted
                reason = f"it is the rerun of attempt {other}, which is another result there"
                part.said.append(Said("refused", layout.evaluation(*slot), reason))
        return part

    for done, part in enumerate(each(roots.slower, evaluation, sorted(slots)), 1):
        moved.add(part)
        step("copying evaluations", done, len(slots))
    return moved


def _slots(keys: Iterable[str]) -> tuple[dict[str, list[int]], dict[Slot, list[int]]]:
    """(evaluation_id -> attempts that are committed, slot -> numbers of its decisions)."""
    slots: dict[str, list[int]] = defaultdict(list)
    decided: dict[Slot, list[int]] = defaultdict(list)
    for key in keys:
        numbered = layout.numbered(key)
        if key.startswith("evaluations/") and numbered is not None and numbered[1] == ".json":
            slots[key.split("/")[1]].append(numbered[0])
        elif (parsed := layout.parse_decision(key)) is not None:
            decided[key.split("/")[1], parsed[0]].append(parsed[1])
    return slots, decided


def _checkpoint_roots(roots: _Roots, moved: Moved) -> None:
    names = sorted(key for key in roots.there if key.startswith("roots/"))
    for key in names:
        ours, theirs = (record and record["uri"] for record in (roots.ours(key), roots.theirs(key)))
        if theirs is not None and theirs != ours:
            name = key.removeprefix("roots/").removesuffix(".json")
            raise ConfigError(
                f"checkpoint root {name!r} is {ours} in {roots.source.uri}, but {theirs} in {roots.target.uri}: one "
                "key would be two checkpoints",
                remedy="nothing was copied; give one of the two places another name in [[checkpoints]] and let its "
                "checkpoints be evaluated under it (equal content is not asked again)",
            )
    moved.files += sum(map(roots.copy, names))


def _damaged(key: str, error: SchemaError) -> Said:
    return Said("refused", key, f"{str(error).partition(chr(10))[0]}; see `eval-platform verify`")


def _copy(roots: _Roots, key: str) -> Moved:
    try:
        return Moved(files=roots.copy(key))
    except SchemaError as error:
        return Moved(said=[_damaged(key, error)])


def _task(roots: _Roots, key: str) -> Moved:
    """Copy a task whose documents are in the target."""
    try:
        record = read_record(roots.source, key)
    except SchemaError as error:
        roots.there.discard(key)
        return Moved(said=[_damaged(key, error)])
    asked = [record[name] for name in ("dataset_id", "fewshot_dataset_id") if record.get(name) is not None]
    for documents in map(layout.dataset_documents, asked):
        if documents not in roots.there and documents not in roots.kept:
            roots.there.discard(key)
            return Moved(said=[Said("refused", key, f"{documents}, which it asks, is missing or damaged")])
    return _copy(roots, key)


def _names(roots: _Roots, moved: Moved) -> None:
    """What task each name stands for. A name that the target has goes on standing there for what it does: what is
    asked there is for its own `tasks sync` to say, and no import's."""
    names: dict[str, list[int]] = defaultdict(list)
    newest: dict[str, int] = {}
    for keys, told in ((roots.there, True), (roots.kept, False)):
        for key in keys:
            numbered = layout.numbered(key)
            if key.startswith(_BY_NAME) and numbered is not None:
                name = key.removeprefix(_BY_NAME).rpartition("/")[0]
                if told:
                    names[name].append(numbered[0])
                else:
                    newest[name] = max(numbered[0], newest.get(name, 0))
    for name, numbers in sorted(names.items()):
        try:
            _name(roots, name, sorted(numbers), newest.get(name, 0), moved)
        except SchemaError as error:
            moved.said.append(_damaged(layout.task_names(name), error))


def _name(roots: _Roots, name: str, numbers: list[int], newest: int, moved: Moved) -> None:
    """newest: what the target has of the name."""
    keys = [layout.task_name(name, n) for n in numbers]
    ours = {key: read_record(roots.source, key) for key in keys}
    if all(ours[key] == roots.theirs(key) for key in keys if key in roots.kept):
        # The newest first: from then on the name stands for it, and what a kill leaves out is filled in another time.
        for key in (layout.task_name(name, n) for n in reversed(numbers) if not newest or n < newest):
            task = layout.task(ours[key]["task_id"])
            if task not in roots.there and task not in roots.kept:
                moved.said.append(Said("refused", key, f"{task}, which it names, is missing or damaged"))
                return
            moved.files += roots.copy(key)
    if not newest:
        return
    theirs = roots.theirs(layout.task_name(name, newest))
    if theirs is None or ours[keys[-1]]["task_id"] != theirs["task_id"]:
        reason = "the name stands for another task there: results of this one are kept, and count as stale"
        moved.said.append(Said("kept", layout.task_names(name), reason))


def _arrivals(roots: _Roots, key: str, numbers: list[int]) -> tuple[set[Slot], Moved]:
    """(the arrivals of `key` that are the same in both now, what was done)."""
    same: set[Slot] = set()
    moved = Moved()
    for n in numbers:
        place, identity = layout.arrival(key, n), layout.arrival_identity(key, n)
        if place not in roots.kept and n > 1 and (key, n - 1) not in same:
            moved.said.append(Said("refused", place, "arrivals before it are others there, or missing here"))
            break
        try:
            if roots.copy(place):
                moved.files += 1
            elif not _same_arrival(roots, key, n):
                reason = "this arrival is another checkpoint there: results of it would stand on the wrong curve"
                moved.said.append(Said("refused", place, reason))
                break
            if identity in roots.there:
                moved.files += roots.copy(identity)
        except SchemaError as error:
            moved.said.append(_damaged(place, error))
            break
        same.add((key, n))
    return same, moved


def _same_arrival(roots: _Roots, key: str, n: int) -> bool:
    """By content where both are known by it (two machines may see one folder's times differently), else as seen."""
    identity = layout.arrival_identity(key, n)
    ours, theirs = find_record(roots.source, identity), find_record(roots.target, identity)
    if ours is not None and theirs is not None:
        return ours["checkpoint_id"] == theirs["checkpoint_id"]
    place = layout.arrival(key, n)
    return read_record(roots.source, place)["fingerprint"] == read_record(roots.target, place)["fingerprint"]


def _evaluation(roots: _Roots, slot: Slot, numbers: list[int], usable: set[Slot], moved: Moved) -> bool:
    """One attempt: first what its commit names, then the commit, then what was asked for and decided on it.

    False when it is another result in the target.
    """
    key = layout.evaluation(*slot)
    try:
        body = roots.source.read(key)
        record = decode(body, key)
        before = roots.theirs(key)
        if before is not None:
            moved.present += 1
        else:
            reason = _bring(roots, slot, record, usable, moved)
            if reason is not None:
                moved.said.append(Said("refused", key, reason))
                return True
            announce(roots.target, key)
            if roots.target.create(key, body):
                moved.files += 1
                moved.evaluations += 1
                before = record
            else:  # another writer has won the slot meanwhile
                before = read_record(roots.target, key)
        if before == record:
            # Who asked for a rerun comes after its result: until that is there, a platform would ask the model again.
            if (asked := layout.evaluation_asked(*slot)) in roots.there:
                moved.files += roots.copy(asked)
            _decisions(roots, slot, numbers, moved)
            return True
    except SchemaError as error:
        moved.said.append(_damaged(key, error))
        return True
    moved.said.append(_other_result(key, record, before))
    return moved.said[-1].kind == "kept"


def _bring(roots: _Roots, slot: Slot, record: dict[str, Any], usable: set[Slot], moved: Moved) -> str | None:
    """Copy what the commit names; a reason when it may not be taken over."""
    if (record["key"], record["arrival"]) not in usable:
        return f"its checkpoint {record['key']}, arrival {record['arrival']}, is not the same there, or missing here"
    for needed in (layout.task(record["task_id"]), layout.prompts(record["prompts_id"])):
        if needed not in roots.there:
            return f"{needed}, which it names, is missing or damaged; see `eval-platform verify`"
    named, tombstone = record["samples"], layout.evaluation_pruned(*slot)
    pruned = tombstone in roots.there
    if not pruned and named["key"] not in roots.kept:
        try:
            samples = roots.source.read(named["key"])
        except KeyError:
            pruned = commits.tombstone(roots.source, *slot) is not None  # since it was listed
            if not pruned:
                return f"its samples {named['key']} are missing; see `eval-platform verify`"
        else:
            if hashlib.sha256(samples).hexdigest() != named["sha256"]:
                return f"its samples {named['key']} are damaged; see `eval-platform verify`"
            moved.files += roots.target.create(named["key"], samples)
    if pruned:
        moved.files += roots.copy(tombstone)
    if (pointer := layout.answers(record["answers_id"], *slot)) in roots.there:
        moved.files += roots.copy(pointer)
    return None


def _other_result(key: str, ours: dict[str, Any], theirs: dict[str, Any]) -> Said:
    """One slot has one result, and the target's stands (contract section 2); whether that loses anything."""
    if ours["scores"] == theirs["scores"]:
        return Said("kept", key, "it was evaluated there too, with the same scores; the target's own stands")
    primary = [(one.get("primary") or {}).get("value") for one in (ours, theirs)]
    reason = f"it was evaluated there too, with other scores ({primary[0]} here, {primary[1]} there), and that stands"
    return Said("refused", key, reason)


def _decisions(roots: _Roots, slot: Slot, numbers: list[int], moved: Moved) -> None:
    """What was decided goes on from the same beginning, or the target's own stands."""
    for expected, n in enumerate(numbers, 1):
        key = layout.decision(*slot, n)
        if n != expected:
            moved.said.append(Said("refused", key, "a decision before it is lost; see `eval-platform verify`"))
            return
        try:
            if roots.copy(key):
                moved.files += 1
                continue
            if read_record(roots.target, key) == read_record(roots.source, key):
                continue
            last = read_record(roots.source, layout.decision(*slot, numbers[-1]))["status"]
        except SchemaError as error:
            moved.said.append(_damaged(key, error))
            return
        standing = decisions.standing(roots.target, *slot)
        there = standing.status if standing is not None else None
        reason = f"it was decided there too: {there} there, {last} here; the target's own decisions stand"
        moved.said.append(Said("kept" if last == there else "refused", key, reason))
        return
