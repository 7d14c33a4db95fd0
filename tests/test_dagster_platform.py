"""The whole platform as `eval-platform up` starts it: a folder fills, and everybody who should know does."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster_world import DagsterWorld, Webhook, write_task
from tiny_models import make_checkpoint
from typer.testing import CliRunner

from eval_platform import up
from eval_platform.cli import app

pytestmark = [pytest.mark.dagster, pytest.mark.slow, pytest.mark.timeout(900)]

PATIENCE_SECONDS = 300.0
ERROR, WARN = dg.AssetCheckSeverity.ERROR, dg.AssetCheckSeverity.WARN


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("OMP_NUM_THREADS", "1"), ("HF_HUB_OFFLINE", "1"), ("PYTHONWARNINGS", "ignore")):
        monkeypatch.setenv(name, value)
    # As installed: the packages are found from any folder.
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))


@pytest.fixture
def webhook() -> Iterator[Webhook]:
    one = Webhook()
    yield one
    one.close()


def until(found: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (value := found()):
        assert time.monotonic() < deadline, f"waited {PATIENCE_SECONDS:.0f} s for {what}"
        time.sleep(2)  # a look costs more than the wait
    return value


def command(world: DagsterWorld, *words: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["--config", str(world.file), *words], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


def drop(world: DagsterWorld, name: str, **what: Any) -> str:
    folder = make_checkpoint(world.checkpoints / name, **what)
    (folder / "_SUCCESS").touch()
    return f"runs/{name}"


def shown_board(world: DagsterWorld) -> str:
    return str(world.events("leaderboard")[0].metadata["leaderboard"].value)


@pytest.mark.usefixtures("environment")
def test_from_a_dropped_folder_to_everybody_who_should_know(tmp_path: Path, webhook: Webhook) -> None:
    with dg.DagsterInstance.ephemeral() as aside:  # before the platform has one, the world needs some instance
        world = DagsterWorld(tmp_path, aside, f'[alerts]\nwebhook = "{webhook.url}"\n[tasks]\nfolders = ["tasks"]\n')
    (tmp_path / "tasks").mkdir()
    write_task(tmp_path / "tasks", "larger")
    command(world, "tasks", "sync")

    with up.platform(world.config), dg.DagsterInstance.from_config(str(world.config.dagster_home)) as instance:
        world.instance = instance
        with pytest.raises(up.EvalPlatformError, match="already runs"), up.platform(world.config):
            pass

        # Published: in SQL, as a partition with its score and its check, and on the leaderboard asset.
        good = drop(world, "a/step_1", seed=1)
        board = until(lambda: world.sql("select * from leaderboard"), "the first checkpoint on the leaderboard")
        assert [(row["key"], row["task"]) for row in board] == [(good, "larger")]
        until(lambda: world.events("summary", good), "the run's summary")
        shown = world.events(["results", "larger"], good)[0]
        assert shown.metadata["score"].value == board[0]["value"]
        assert world.check("larger", good)[1] == WARN
        assert world.partitions() == {good}
        until(lambda: world.events("leaderboard"), "the leaderboard asset")
        assert good in shown_board(world)
        assert webhook.told == []

        # Held: the alert comes, the check is red, the board is as it was.
        bad = drop(world, "a/step_2", seed=2, nan=True)
        # Meanwhile somebody evaluates a folder of their own by hand, and another takes the first checkpoint back.
        elsewhere = make_checkpoint(tmp_path / "elsewhere", seed=3)
        command(world, "run", "--checkpoint", str(elsewhere))
        ran = time.monotonic()
        evaluation = board[0]["evaluation_id"]
        command(world, "retract", evaluation, "--reason", "to see it move")
        waits: dict[str, float] = {}

        # What the command did appears.
        adhoc = until(lambda: world.partitions() - {good, bad}, "the hand-run checkpoint's partition").pop()
        assert adhoc.startswith("adhoc/elsewhere-")
        until(lambda: world.events("summary", adhoc), "what the command line evaluated")
        waits["run"] = time.monotonic() - ran

        # What was taken back is red, and off the board; given back, it is as it was. In the end the board shows both.
        until(lambda: world.check("larger", good)[1] == ERROR, "retract in Dagster")
        waits["retract"] = time.monotonic() - ran
        assert [row["key"] for row in world.sql("select key from leaderboard")] == [adhoc]
        command(world, "release", evaluation, "--reason", "to see it move")
        released = time.monotonic()
        until(lambda: world.check("larger", good)[1] == WARN, "release in Dagster")
        waits["release"] = time.monotonic() - released

        (told,) = until(lambda: webhook.told, "the alert")
        assert told["checkpoint"] == bad
        assert "larger held" in told["reasons"][0]
        until(lambda: world.events("summary", bad), "the summary of what is held")
        assert world.check("larger", bad) == (False, ERROR)
        keys = [row["key"] for row in world.sql("select key from leaderboard order by key")]
        assert keys == [adhoc, good]
        until(lambda: all(key in shown_board(world) for key in (good, adhoc)), "both on the leaderboard asset")
        assert len(webhook.told) == 1
        print({what: round(seconds, 1) for what, seconds in waits.items()}, "load", os.getloadavg()[0])
        # A minute on a machine that does nothing else; this one is shared.
        assert max(waits.values()) < 60 * max(1.0, os.getloadavg()[0])
    assert up.running(world.config) is None
