"""A results root as it comes about: a real worker on small checkpoints, with an engine that answers by dice.

Two tasks, three steps of one run; step 2 is held on `choices`. Made once, and copied by whoever changes it.
"""

import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from checkpoint_factory import make_checkpoint
from cli_tools import Answer, run_cli
from fault_tools import WORDS, Place

from eval_platform import checkpoints, worker
from eval_platform.config import Config, load_config
from eval_platform.engine import EngineInfo
from eval_platform.plan import Wanted, plan
from eval_platform.store import Store, arrivals, decisions, register_root, watcher_id
from eval_platform.tasks import read_lock
from eval_platform.values import Arrival, Check, Request, Response, RunSettings

STEPS = (1, 2, 3)
TOML = """
results = "{results}"
state = "{state}"

[[checkpoints]]
name = "runs"
path = "{checkpoints}"
pattern = "{{run}}/step_{{step}}"
quiet_seconds = 0

[tasks]
folders = ["tasks"]

[engine]
device = "cpu"
dtype = "float32"
max_length = 256

[s3]
{s3}
"""


class Dice:
    """Answers that depend on the checkpoint's weights and the request alone."""

    info = EngineInfo("cpu", "float32", 256, "plain", 1, 1, {}, "Dice", 512)

    def __init__(self, path: Path) -> None:
        self.seed = (path / "model.safetensors").read_bytes()[-64:]

    def answer(self, requests: Sequence[Request]) -> Iterator[Response]:
        for one in requests:
            dice = random.Random(self.seed + one.request_id.encode())
            if one.kind == "generate":
                yield Response(one.request_id, one.repeat, None, None, dice.choice(["Yes", "No"]), 1, "stop", 0)
            else:
                yield Response(one.request_id, one.repeat, -10 * dice.random(), False, None, 1, "", 0)


def load(path: Path, settings: RunSettings) -> Any:
    return Dice(path)


def never(path: Path, settings: RunSettings) -> Any:
    raise AssertionError("a model is loaded")


def make_world(folder: Path) -> Place:
    place = Place(folder)
    place.write_task("choices", 6)
    place.write_task("words", 4, **WORDS)
    place.sync()
    for step in STEPS:
        make_checkpoint(place.checkpoints / f"a/step_{step}", seed=step)
        arrival = arrive(place, step)
        for message in work(place, place.store, arrival, load):
            held = step == 2 and message["task"] == "choices"
            decide(place.store, message["evaluation_id"], "held" if held else "published")
    return place


def arrive(place: Place, step: int) -> Arrival:
    config = configured(place, place.store)
    register_root(place.store, "runs", config.checkpoints[0].path)
    folder = place.checkpoints / f"a/step_{step}"
    found = checkpoints.locate(folder, config.checkpoints, config.cache_dir, lambda done, total: None)
    return arrivals.register(place.store, watcher=watcher_id(config.state_dir), **asdict(found))[0]


def work(place: Place, store: Store, arrival: Arrival, load: Any) -> list[dict[str, Any]]:
    """What the worker said of every task that it finished."""
    config = configured(place, store)
    todo = plan(arrival, Wanted(read_lock(config.lock_path)), config, store)
    said: list[dict[str, Any]] = []
    assert worker.work(todo, store, said.append, load=load) == 0, said
    return [message for message in said if message["type"] in ("committed", "linked")]


def decide(store: Store, evaluation_id: str, status: Any) -> None:
    check = Check("finite", passed=status == "published", severity="error", reason="planted")
    decisions.append(
        store, evaluation_id, 1, status=status, checks=[check], reasons=["planted"], gate_version="1", actor="test"
    )


def configured(place: Place, store: Store, state: str = "state") -> Config:
    return load_config(write_config(place, store, state))


def write_config(place: Place, store: Store, state: str) -> Path:
    """The configuration of someone who works on `store`, with a state folder of that name."""
    settings = getattr(store, "settings", None)
    s3 = "" if settings is None else f'endpoint = "{settings.endpoint}"'
    file = place.folder / "eval_platform.toml"
    file.write_text(TOML.format(results=store.uri, state=state, checkpoints=place.checkpoints, s3=s3))
    return file


def copied(place: Place, folder: Path) -> Place:
    """A place of its own with the same results and tasks; the checkpoints stay where they are."""
    copy = Place(folder)
    shutil.copytree(place.results, copy.results)
    shutil.copytree(place.tasks, copy.tasks, dirs_exist_ok=True)
    copy.checkpoints = place.checkpoints
    shutil.copy(place.config().lock_path, copy.config().lock_path)
    return copy


def command(place: Place, *args: str, store: Store | None = None, state: str = "state") -> Answer:
    """`eval-platform` on these results, or those of `store`."""
    return run_cli("--config", str(write_config(place, store or place.store, state)), *args)
