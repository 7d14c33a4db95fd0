"""The soak with few kills: its program works, nothing is lost, and its count sees what is lost or doubled."""

import json
import random

import pytest

from benchmarks.soak.__main__ import soak
from benchmarks.soak.audit import audit
from benchmarks.soak.stub import append, lines
from benchmarks.soak.world import world

pytestmark = pytest.mark.slow
pytest_plugins = ["store_roots"]

KILLS = 3


def test_a_small_soak_loses_nothing_and_its_count_would_see_it(tmp_path, s3_session, s3_credentials):
    with world(tmp_path / "soak", s3_session) as one:
        # On one machine: a second imports and validates all once more. `make soak` has two.
        count = soak(one, kills=KILLS, seed=random.randrange(1000), machines=["north"], ahead=1)
        deaths = lines(one.control / "deaths.jsonl")
        assert count.wrong == []
        assert len({line["worker"] for line in deaths}) == KILLS
        assert one.dropped

        config = one.config("north")
        store = one.store(config)
        altered = next(entry.key for entry in store.list("evaluations/"))
        record = json.loads(store.read(altered))
        record["primary"]["value"] += 0.1
        store.put(altered, json.dumps(record).encode())
        gone = next(entry.key for entry in store.list("answers/"))
        store.delete(gone)
        one.dropped["runs/a/lost"] = "0123456789abcdef"
        for entry in list(store.list("log/")):
            if "kind=decision" in entry.key and record["evaluation_id"] in entry.key:
                store.delete(entry.key)
        # By a worker that was never killed, and may lose nothing.
        append(one.control / "asked.jsonl", {**lines(one.control / "asked.jsonl")[0], "worker": "another"})

        wrong = "\n".join(audit(one, [config], deaths).wrong)

    for seen in (
        "was never committed",
        f"1 objects were written more than once: ['{altered}']",
        f"objects were deleted: ['{gone}'",
        "its score",
        f"the log has no entry of the decision of {record['evaluation_id']}",
        "worker another asked 1 requests that it did not journal",
        "`eval-platform verify` ended with 1",
        "the leaderboard is not what it must be",
    ):
        assert seen in wrong, seen
