"""Is anything lost, anything doubled? Everything counted at the end: what lies in the bucket, read without the
platform's own code (`bucket`), against what was uploaded and asked (`truth`); then what SQL and `verify` say.

The bound on what is asked twice: a worker hands its answers to the journal in segments of at most
`worker.FLUSH_RESPONSES`, and the engine is asked for the next answer only when a full segment is uploaded. So what a
kill can lose is at most one segment's worth of requests, the one in hand among them; what was journalled is never
asked again, unless a lease passed on from a worker that lived (a beat that came too late), which is counted apart.
"""

import hashlib
import io
import json
import sys
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import pyarrow.parquet as pq

from benchmarks.soak import bucket, truth
from benchmarks.soak.bucket import Bucket
from benchmarks.soak.stub import lines
from benchmarks.soak.world import World
from eval_platform import warehouse
from eval_platform.config import Config
from eval_platform.store import Store
from eval_platform.worker import FLUSH_RESPONSES

TASKS = tuple(name for name, _, _ in truth.task_files())
LOST_AT_MOST = FLUSH_RESPONSES
# How many leases may pass on from a worker that lived, for want of a beat in time on a busy machine: a few, or a share.
FROM_THE_LIVING, SHARE_FROM_THE_LIVING = 5, 0.05


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
    held = bucket.read(world.endpoint, world.results)
    _created_once(held, count)
    records = _commits(world, held, count)
    _log(held, records, deaths, count)
    _sql(world, world.store(configs[0]), configs, records, count)
    _verify(configs[0], count)
    dead = {line["worker"] for line in deaths}
    tried = _tries(world, held)
    from_the_living = _takeovers(world, held, dead, len(records), count)
    _asked(world, held, records, tried, dead, from_the_living, count)
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


def _created_once(held: Bucket, count: Count) -> None:
    """All but a lease's beats: nothing is written over, nothing is deleted."""
    again = sorted(key for key, n in held.written.items() if n > 1 and not key.endswith(".beat"))
    count.must(not again, f"{len(again)} objects were written more than once: {again[:3]}")
    count.must(not held.deleted, f"{len(held.deleted)} objects were deleted: {sorted(held.deleted)[:3]}")
    count.figures["objects in the results' bucket, each written once"] = len(held.bodies)


def _commits(world: World, held: Bucket, count: Count) -> dict[tuple[str, str], dict[str, Any]]:
    """(digest of weights, task) -> commit; one each, its samples and score as they must be."""
    weights = {}
    for key, digest in world.dropped.items():
        named = [name.removeprefix(f"arrivals/{key}/") for name in held.under(f"arrivals/{key}/", ".json")]
        numbered = [name for name in named if name.removesuffix(".json").isdecimal()]
        count.must(numbered == ["1.json"], f"{key} has the arrivals {numbered}")
        count.must("1.identity.json" in named, f"{key} was never identified")
        if "1.identity.json" in named:
            weights[json.loads(held.bodies[f"arrivals/{key}/1.identity.json"])["checkpoint_id"]] = digest
    count.must(
        len(weights) == len(set(world.dropped.values())), "checkpoints of one content are not one, or others are"
    )
    keys = held.under("evaluations/")
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for key in keys:
        record = json.loads(held.bodies[key])
        slot = (weights.get(record["checkpoint_id"], "?"), record["task"])
        count.must(slot not in found and key.endswith("/1.json"), f"{slot} is committed twice: {key}")
        found[slot] = record
        _right(held, slot, record, count)
    expected = {(digest, task) for digest in world.dropped.values() for task in TASKS}
    for slot in sorted(expected - found.keys()):
        count.must(False, f"{slot} was never committed")
    for slot in sorted(found.keys() - expected):
        count.must(False, f"{slot} is committed, and nobody asked for it")
    for slot, record in found.items():
        made = held.under(f"decisions/{record['evaluation_id']}/")
        count.must([key.rpartition("/")[2] for key in made] == ["1-1.json"], f"{slot} has {len(made)} decisions")
        said = [json.loads(held.bodies[key])["status"] for key in made]
        count.must(said[-1:] == ["published"], f"{slot} is not published")
    count.figures |= {"checkpoints": len(world.dropped), "of different content": len(weights)}
    count.figures["evaluations committed / must be"] = f"{len(keys)} / {len(expected)}"
    return found


def _right(held: Bucket, slot: tuple[str, str], record: Mapping[str, Any], count: Count) -> None:
    digest, task = slot
    body = held.bodies.get(record["samples"]["key"], b"")
    is_whole = hashlib.sha256(body).hexdigest() == record["samples"]["sha256"]
    count.must(is_whole, f"{slot}: its samples are not those that it committed")
    if not is_whole or task not in TASKS:
        return
    rows = sorted(pq.read_table(io.BytesIO(body)).to_pylist(), key=lambda row: row["position"])
    said = [
        row["response"] if task == "words" else [choice["log_likelihood"] for choice in row["choices"]] for row in rows
    ]
    count.must(said == truth.expected_samples(task, digest), f"{slot}: its samples are not what the model answers")
    score = record["primary"]["value"]
    count.must(score == truth.expected_score(task, digest), f"{slot}: its score {score} is wrong")
    count.figures["samples, each as it must be"] = count.figures.get("samples, each as it must be", 0) + len(rows)


def _log(held: Bucket, records: Mapping[Any, Mapping[str, Any]], deaths: Sequence[Any], count: Count) -> None:
    """Every commit and decision is announced; twice only after a writer was killed between the two."""
    told = [json.loads(held.bodies[key]) for key in held.under("log/")]
    entries = Counter((entry["kind"], entry.get("evaluation_id")) for entry in told)
    again = 0
    for record in records.values():
        for kind in ("evaluation", "decision"):
            n = entries[kind, record["evaluation_id"]]
            count.must(n >= 1, f"the log has no entry of the {kind} of {record['evaluation_id']}")
            again += max(0, n - 1) if kind == "evaluation" else 0
    known = {record["evaluation_id"] for record in records.values()}
    for kind, evaluation_id in entries:
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


def _tries(world: World, held: Bucket) -> dict[str, str]:
    """try id -> the worker whose it was."""
    workers = {_process(line["process"]): line["worker"] for line in lines(world.control / "births.jsonl")}
    begun = [json.loads(held.bodies[key]) for key in held.under("tries/evaluations/", ".start.json")]
    return {record["try"]: workers.get(_process(record["process"]), "?") for record in begun}


def _asked(
    world: World,
    held: Bucket,
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
        for key in held.under(f"journal/{record['answers_id']}/"):
            _, _, _, a_try, _ = key.split("/")
            # A line of what the segment is, then one for each response: a list that begins with the request's id.
            answered = [(weights, json.loads(line)[0]) for line in held.bodies[key].splitlines()[1:]]
            kept[tried[a_try]].update(answered)
            by_two.update(answered if record["evaluation_id"] in from_the_living else ())
    total, journalled = sum(asked.values(), Counter()), sum(kept.values(), Counter())
    distinct = len(total)
    expected = len(set(world.dropped.values())) * (len(truth.CHOICES) * truth.N_SUMS + truth.N_WORDS)
    count.must(distinct == expected, f"{distinct} different requests were asked, {expected} there are")
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
        "journalled by two workers, of which one lived": sum(n - 1 for n in twice.values()),
        "by one kill: median, worst, bound": f"{median(of_kills or [0]):g}, {max(of_kills, default=0)}, {LOST_AT_MOST}",
    }


def _takeovers(world: World, held: Bucket, dead: Iterable[str], evaluations: int, count: Count) -> set[str]:
    """Leases that passed on without having been released, and from whom; the evaluations of those from the living."""
    workers = {_process(line["process"]): line["worker"] for line in lines(world.control / "births.jsonl")}
    dead, here, there, living = set(dead), 0, 0, set[str]()
    for key in held.under("leases/", ".json"):
        _, name, number = key.removesuffix(".json").split("/")
        before = f"leases/{name}/{int(number) - 1}"
        if number == "1" or f"{before}.released" in held.bodies:
            continue
        old = json.loads(held.bodies[f"{before}.json"])["process"]
        if workers.get(_process(old)) not in dead:
            living.add(name)
        elif old["machine"] == json.loads(held.bodies[key])["process"]["machine"]:
            here += 1
        else:
            there += 1
    most = max(FROM_THE_LIVING, SHARE_FROM_THE_LIVING * evaluations)
    count.must(len(living) <= most, f"{len(living)} leases passed on from the living, at most {most:.0f} may")
    count.figures["takeovers on the same machine / by the other / from the living"] = (
        f"{here} / {there} / {len(living)}"
    )
    return living
