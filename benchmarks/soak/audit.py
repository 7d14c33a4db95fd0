"""Is anything lost, anything doubled? Everything counted at the end, from the store, from SQL, and from what was asked.

The bound on what is asked twice: a worker hands its answers to the journal in segments of at most
`worker.FLUSH_RESPONSES`, and the engine is asked for the next answer only when a full segment is uploaded. So what a
kill can lose is at most one segment's worth of requests, the one in hand among them; what was journalled is never
asked again, unless a lease passed on from a worker that lived (a beat that came too late), which is counted apart.
"""

import io
import sys
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from benchmarks.soak import truth
from benchmarks.soak.stub import lines
from benchmarks.soak.world import World
from eval_platform import warehouse
from eval_platform.config import Config
from eval_platform.store import Store, arrivals, commits, decisions, journal, layout, log, read_record
from eval_platform.worker import FLUSH_RESPONSES

TASKS = tuple(name for name, _, _ in truth.task_files())
LOST_AT_MOST = FLUSH_RESPONSES


@dataclass
class Count:
    """`wrong`: what is lost, doubled or altered, in words. `figures`: what was counted, for the table."""

    wrong: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def must(self, ok: bool, problem: str) -> None:
        if not ok:
            self.wrong.append(problem)


def audit(world: World, configs: Sequence[Config], deaths: Sequence[Mapping[str, Any]]) -> Count:
    """Call it when nothing runs any more."""
    count = Count()
    store = world.store(configs[0])
    records = _commits(world, store, count)
    _log(store, records, deaths, count)
    _sql(world, store, configs, records, count)
    _verify(configs[0], count)
    dead = {line["worker"] for line in deaths}
    tried = _tries(world, store)
    from_the_living = _takeovers(world, store, dead, count)
    _asked(world, store, records, tried, dead, from_the_living, count)
    for name in ("errors", "told"):
        for line in lines(world.control / f"{name}.jsonl"):
            reason = line.get("error") or line["reason"]
            count.must(name == "told" and _is_of_a_kill(reason), f"{line['key']}: {reason}")
    count.figures["forgiven (killed three times)"] = len(lines(world.control / "forgiven.jsonl"))
    return count


def _is_of_a_kill(reason: str) -> bool:
    return any(
        said in reason
        for said in ("ended with code -9", "ended without a word", "another worker is answering it", "(killed,")
    )


def _commits(world: World, store: Store, count: Count) -> dict[tuple[str, str], dict[str, Any]]:
    """(digest of weights, task) -> commit; one each, its samples and score as they must be."""
    weights = {}
    for key, digest in world.dropped.items():
        history = arrivals.history(store, key)
        count.must([one.n for one in history] == [1], f"{key} has {len(history)} arrivals")
        identity = arrivals.identity(store, key, 1)
        count.must(identity is not None, f"{key} was never identified")
        if identity is not None:
            weights[identity.checkpoint_id] = digest
    count.must(
        len(weights) == len(set(world.dropped.values())), "checkpoints of one content are not one, or others are"
    )
    keys = [entry.key for entry in store.list("evaluations/")]
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for key in keys:
        record = read_record(store, key)
        slot = (weights.get(record["checkpoint_id"], "?"), record["task"])
        count.must(slot not in found and record["attempt"] == 1, f"{slot} is committed twice: {key}")
        found[slot] = record
        _right(store, slot, record, count)
    expected = {(digest, task) for digest in world.dropped.values() for task in TASKS}
    for slot in sorted(expected - found.keys()):
        count.must(False, f"{slot} was never committed")
    for slot in sorted(found.keys() - expected):
        count.must(False, f"{slot} is committed, and nobody asked for it")
    for slot, record in found.items():
        made = decisions.history(store, record["evaluation_id"], 1)
        count.must([one.n for one in made] == [1], f"{slot} has {len(made)} decisions")
        count.must(bool(made) and made[-1].status == "published", f"{slot} is not published")
    count.figures |= {"checkpoints": len(world.dropped), "of different content": len(weights)}
    count.figures["evaluations committed / must be"] = f"{len(keys)} / {len(expected)}"
    return found


def _right(store: Store, slot: tuple[str, str], record: Mapping[str, Any], count: Count) -> None:
    digest, task = slot
    rows = sorted(commits.read_samples(store, record).to_pylist(), key=lambda row: row["position"])
    said = [
        row["response"] if task == "words" else [choice["log_likelihood"] for choice in row["choices"]] for row in rows
    ]
    count.must(said == truth.expected_samples(task, digest), f"{slot}: its samples are not what the model answers")
    score = record["primary"]["value"]
    count.must(score == truth.expected_score(task, digest), f"{slot}: its score {score} is wrong")
    count.figures["samples, each as it must be"] = count.figures.get("samples, each as it must be", 0) + len(rows)


def _log(store: Store, records: Mapping[Any, Mapping[str, Any]], deaths: Sequence[Any], count: Count) -> None:
    """Every commit and decision is announced; twice only after a writer was killed between the two."""
    entries = Counter((entry["kind"], entry.get("evaluation_id")) for entry in log.read(store, log.dates(store)))
    again = 0
    for record in records.values():
        for kind in ("evaluation", "decision"):
            told = entries[kind, record["evaluation_id"]]
            count.must(told >= 1, f"the log has no entry of the {kind} of {record['evaluation_id']}")
            again += max(0, told - 1) if kind == "evaluation" else 0
    for kind, evaluation_id in entries:
        known = {record["evaluation_id"] for record in records.values()}
        count.must(
            kind not in ("evaluation", "decision") or evaluation_id in known, f"the log tells of {evaluation_id}"
        )
    killed = sum(death["phase"] in ("between log entry and commit", "between samples and commit") for death in deaths)
    count.must(again <= killed, f"{again} evaluations announced again, and only {killed} killed there")
    count.figures["log entries of commits, beyond one each"] = again


def _sql(
    world: World, store: Store, configs: Sequence[Config], records: Mapping[tuple[str, str], Any], count: Count
) -> None:
    """Each machine's catalog says the same as the files."""
    boards = []
    for config in configs:
        warehouse.refresh(store, config.catalog_path)

        def ask(text: str, config: Config = config) -> list[dict[str, Any]]:
            return warehouse.query(config.catalog_path, store, text).to_pylist()

        said = {(row["evaluation_id"], row["attempt"]): row["status"] for row in ask("select * from evaluations")}
        meant = {(record["evaluation_id"], 1): "published" for record in records.values()}
        count.must(said == meant, f"{config.folder.name}: its catalog says of evaluations what the files do not")
        samples = ask("select count(*) as n from samples")[0]["n"]
        count.must(samples == count.figures.get("samples, each as it must be"), f"{samples} samples in SQL")
        problems = ask("select * from problems")
        count.must(not problems, f"{config.folder.name}: problems {problems[:3]}")
        boards.append(
            {(row["key"], row["task"]): row["value"] for row in ask("select key, task, value from leaderboard")}
        )
        count.figures[f"rows on the leaderboard of {config.folder.name}"] = len(boards[-1])
    meant_board = {
        (key, task): truth.expected_score(task, digest) for key, digest in world.dropped.items() for task in TASKS
    }
    for config, board in zip(configs, boards, strict=True):
        count.must(board == meant_board, f"{config.folder.name}: the leaderboard is not what it must be")


def _verify(config: Config, count: Count) -> None:
    """The command itself, as a person runs it."""
    from eval_platform import cli

    said, argv = io.StringIO(), sys.argv
    sys.argv = ["eval-platform", "--config", str(config.file), "verify"]
    code: Any = None
    try:
        with redirect_stdout(said):
            cli.main()
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = argv
    count.must(code == 0, f"`eval-platform verify` ended with {code}: {said.getvalue()}")
    words = said.getvalue().strip().splitlines()
    count.figures["verify"] = words[-1] if words else "said nothing"


def _process(record: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(record.get(name) for name in ("machine", "pid", "started"))


def _tries(world: World, store: Store) -> dict[str, str]:
    """try id -> the worker whose it was."""
    workers = {_process(line["process"]): line["worker"] for line in lines(world.control / "births.jsonl")}
    return {
        record["try"]: workers.get(_process(record["process"]), "?")
        for entry in store.list("tries/evaluations/")
        if entry.key.endswith(".start.json") and (record := read_record(store, entry.key))
    }


def _asked(
    world: World,
    store: Store,
    records: Mapping[tuple[str, str], Mapping[str, Any]],
    tried: Mapping[str, str],
    dead: Iterable[str],
    from_the_living: Collection[str],
    count: Count,
) -> None:
    """Every request asked stands in the journal exactly once, but for those a killed worker had in hand.

    from_the_living: evaluations whose lease passed on from a worker that lived; two may have answered those.
    """
    asked: dict[str, Counter[tuple[str, str]]] = defaultdict(Counter)  # worker -> (weights, request)
    for line in lines(world.control / "asked.jsonl"):
        asked[line["worker"]][line["weights"], line["asked"][0]] += 1
    kept: dict[str, Counter[tuple[str, str]]] = defaultdict(Counter)
    by_two: set[tuple[str, str]] = set()
    for (weights, _), record in records.items():
        for entry in store.list(layout.journal_folder(record["answers_id"], 1)):
            book = journal.Journal(store, record["answers_id"], 1, "reader")
            worker = tried[layout.journal_try(entry.key)]
            answered = [(weights, response.request_id) for response in book._read(entry.key)]
            kept[worker].update(answered)
            by_two.update(answered if record["evaluation_id"] in from_the_living else ())
    total, journalled = sum(asked.values(), Counter()), sum(kept.values(), Counter())
    distinct = len(total)
    expected = sum(record["n_requests"] for record in records.values())
    count.must(distinct == expected, f"{distinct} different requests were asked, {expected} are answered")
    twice = {one: n for one, n in journalled.items() if n > 1}
    count.must(
        twice.keys() <= by_two, f"{len(twice.keys() - by_two)} requests were asked again although they were journalled"
    )
    count.must(
        journalled.keys() == total.keys(), f"{len(total.keys() - journalled.keys())} requests are not journalled"
    )
    dead = set(dead)
    lost = {worker: asked[worker].total() - kept[worker].total() for worker in asked}
    for worker, n in lost.items():
        most = LOST_AT_MOST if worker in dead else 0
        count.must(0 <= n <= most, f"worker {worker} asked {n} requests that it did not journal, at most {most} may be")
    of_kills = [lost.get(worker, 0) for worker in dead]
    count.must(
        total.total() == distinct + sum(of_kills) + sum(n - 1 for n in twice.values()),
        "asked is not what it adds up to",
    )
    count.figures |= {
        "requests asked": total.total(),
        "different requests": distinct,
        "lost by kills, asked again": sum(of_kills),
        "by one kill: median, worst, bound": f"{median(of_kills or [0]):g}, {max(of_kills, default=0)}, {LOST_AT_MOST}",
    }


def _takeovers(world: World, store: Store, dead: Iterable[str], count: Count) -> set[str]:
    """Leases that passed on without having been released, and from whom; the evaluations of those from the living."""
    workers = {_process(line["process"]): line["worker"] for line in lines(world.control / "births.jsonl")}
    keys = {entry.key for entry in store.list("leases/")}
    dead, here, there, living = set(dead), 0, 0, set[str]()
    for key in keys:
        numbered = layout.numbered(key)
        if numbered is None or numbered[1] != ".json" or numbered[0] == 1:
            continue
        name, before = key.split("/")[1], numbered[0] - 1
        if layout.lease_released(name, before) in keys:
            continue
        old = read_record(store, layout.lease(name, before))["process"]
        if workers.get(_process(old)) not in dead:
            living.add(name)
        elif old["machine"] == read_record(store, key)["process"]["machine"]:
            here += 1
        else:
            there += 1
    count.figures["takeovers on the same machine / by the other / from the living"] = (
        f"{here} / {there} / {len(living)}"
    )
    return living
