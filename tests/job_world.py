"""A results root whose workers are jobs of a real cluster, and that knows every answer that must come of them.

The workers are the platform's own program; an engine that answers from the weights' bytes (the soak's) stands in place
of the model, slowly enough to be interrupted, and writes down each request that it is asked.
"""

import json
import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from checkpoint_factory import make_checkpoint
from fault_tools import Place

from benchmarks.soak import truth
from benchmarks.soak.stub import CONTROL, lines
from eval_platform.config import Config, Worker
from eval_platform.drive import Outcome, drive
from eval_platform.launching import Handle, folders, launch
from eval_platform.plan import Plan, Wanted, plan
from eval_platform.tasks import read_lock
from eval_platform.values import Arrival
from eval_platform.worker import FLUSH_RESPONSES

N_REQUESTS = 2 * truth.N_SUMS + truth.N_WORDS
SECONDS_A_REQUEST = "EVAL_PLATFORM_TEST_SECONDS_A_REQUEST"
SLOW_IMPORT = "slow_import"  # a worker does not get beyond its imports while `control` has a file of this name


class JobWorld(Place):
    """Two tasks of which `truth` knows every answer. asks: the cluster's section of the configuration."""

    def __init__(self, folder: Path, **asks: Any) -> None:
        super().__init__(folder)
        self.asks = asks
        self.shards = 1
        for name, rows, body in truth.task_files():
            (self.tasks / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            definition = {**body, "task": name, "documents": {"file": f"{name}.jsonl"}}
            (self.tasks / f"{name}.yaml").write_text(json.dumps(definition))  # JSON is YAML
        self.sync()
        (folder / "site").mkdir()
        (folder / "site" / "sitecustomize.py").write_text(
            "import os, sys\n"
            'if "eval_platform.worker" in sys.orig_argv:\n'
            "    import time\n"
            "    from pathlib import Path\n"
            f"    Path(os.environ[{CONTROL!r}], 'importing').touch()\n"
            f"    while Path(os.environ[{CONTROL!r}], {SLOW_IMPORT!r}).exists():\n"
            "        time.sleep(0.05)\n"
            "    from benchmarks.soak import stub\n"
            f"    stub._SECONDS_A_REQUEST = float(os.environ[{SECONDS_A_REQUEST!r}])\n"
            f"    stub.obey(Path(os.environ[{CONTROL!r}]))\n"
        )

    @property
    def environment(self) -> dict[str, str]:
        """By which workers everywhere obey it."""
        path = os.pathsep.join([str(self.folder / "site"), str(Path(__file__).resolve().parent.parent)])
        return {"PYTHONPATH": path, CONTROL: str(self.control), SECONDS_A_REQUEST: "0.002"}

    def config(self, state: str = "state") -> Config:
        (launcher,) = self.asks or ("subprocess",)
        worker = Worker(launcher=launcher, shards=self.shards, lease_seconds=4.0, retry_wait_seconds=0.1)
        return super().config(state).model_copy(update={"worker": worker, **self.asks})

    def checkpoint(self, name: str = "a/step_1", *, seed: int = 0) -> Path:
        return make_checkpoint(self.checkpoints / name, seed=seed, values=2_000)

    def arrived(self, seed: int) -> Arrival:
        self.checkpoint(f"a/step_{seed}", seed=seed)
        return self.arrive(f"a/step_{seed}")

    def plan(self, arrival: Arrival) -> Plan:
        config = self.config()
        return plan(arrival, Wanted(read_lock(config.lock_path)), config, self.store)

    def started(self, arrival: Arrival) -> Handle:
        """A worker alone, nobody listening."""
        ((_, handle),) = launch(self.plan(arrival), self.config())
        return handle

    def driven(self, arrival: Arrival, on_message: Callable[[dict[str, Any]], None] = lambda _: None) -> list[Outcome]:
        return list(drive(self.plan(arrival), self.config(), self.store, actor="test", on_message=on_message))

    def in_background(self, arrival: Arrival, said: list[dict[str, Any]]) -> "Future[list[Outcome]]":
        pool = ThreadPoolExecutor(1)
        try:
            return pool.submit(self.driven, arrival, said.append)
        finally:
            pool.shutdown(wait=False)

    def told(self, kind: str) -> list[dict[str, Any]]:
        """What all workers said of this kind, by worker and in order."""
        found = sorted(folders.workers(self.config()).glob("*"))
        return [one for folder in found for one in folders.messages_from(folder, 0)[0] if one["type"] == kind]

    def n_asked(self) -> int:
        return len(lines(self.control / "asked.jsonl"))

    def all_is_there(self, n: int, *, kills: int = 0, stops: int = 0) -> None:
        """`n` checkpoints are on the leaderboard with the scores that their weights give, each committed once, and no
        request was asked twice but what a kill may cost, and the one that was in hand when a worker was stopped."""
        rows = self.sql("select key, task, value, attempt from leaderboard")
        assert len(rows) == 2 * n
        for row in rows:
            weights = truth.weights_digest(self.checkpoints / row["key"].removeprefix("runs/"))
            assert row["value"] == truth.expected_score(row["task"], weights)
        assert len(self.commits()) == 2 * n
        asked = Counter((line["weights"], *line["asked"]) for line in lines(self.control / "asked.jsonl"))
        assert len(asked) == n * N_REQUESTS
        assert asked.total() - len(asked) <= kills * FLUSH_RESPONSES + stops


def all_published(outcomes: list[Outcome]) -> bool:
    assert [one.status for one in outcomes] == ["published"] * 2, outcomes
    return True
