"""Runs `eval-platform` as a user does, in this process; and a folder in which everything that may happen has happened.

The folder is made once for all tests that ask for it: each of its workers costs seconds.
"""

import contextlib
import io
import json
import shlex
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
from shared_nursery import lend
from tiny_models import make_checkpoint

from eval_platform import cli
from eval_platform.config import load_config

CONFIG = """
[[checkpoints]]
name = "run"
path = "arriving"
pattern = "{run}/step_{step}"
quiet_seconds = 0

[tasks]
folders = ["my_tasks"]

[suites]
first = ["colours"]

[engine]
device = "cpu"
dtype = "float32"
max_length = 256

[worker]
retry_wait_seconds = 0.1
"""

COLOURS = """
task: colours
documents: {file: colours.jsonl}
output_type: multiple_choice
doc_to_text: "Question: what colour is {{thing}}?\\nAnswer:"
doc_to_choice: [red, green, blue]
doc_to_target: colour
metric_list: [{metric: acc}, {metric: acc_norm}]
"""

WORDS = """
task: words
documents: {generator: {name: copying, n: 4}}
output_type: generate_until
doc_to_text: question
doc_to_target: answer
generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
"""

STORIES = """
task: stories
documents: {generator: {name: text, n: 3}}
output_type: loglikelihood_rolling
doc_to_target: text
primary_metric: bits_per_byte
"""

THINGS = {"blood": "red", "grass": "green", "the sky": "blue", "a leaf": "green", "the sea": "blue", "a ruby": "red"}


@dataclass(frozen=True)
class Answer:
    """What a command said and how it ended."""

    code: int
    raw: bytes
    err: str

    @property
    def out(self) -> str:
        return self.raw.decode()

    @property
    def json(self) -> Any:
        return json.loads(self.raw)


def run_cli(*args: str, stdin: str = "") -> Answer:
    """`eval-platform <args>`. What is no error of a user's passes through."""
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["eval-platform", *args])
        patch.setattr(sys, "stdin", io.StringIO(stdin))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("HF_HUB_OFFLINE", "1")
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
            cli.main()
    return Answer(int(end.value.code or 0), out.buffer.getvalue(), err.getvalue())  # type: ignore[attr-defined]


def parse(line: str) -> None:
    """Raises typer's usage errors when `line`, a command as one types it, names an unknown command or option."""
    program, *args = shlex.split(line)
    assert program == "eval-platform", line
    command: Any = typer.main.get_command(cli.app)
    context = command.make_context(program, args)
    while hasattr(command, "resolve_command"):
        rest = [*context._protected_args, *context.args]
        name, command, args = command.resolve_command(context, rest)
        context = command.make_context(name, args, parent=context)


@dataclass(frozen=True)
class Place:
    """A folder with a configuration."""

    folder: Path

    def __call__(self, *args: str, stdin: str = "") -> Answer:
        return run_cli("--config", str(self.folder / "eval_platform.toml"), *args, stdin=stdin)

    @property
    def lock(self) -> Path:
        return self.folder / "eval_platform.lock.json"

    def arriving(self, step: int) -> Path:
        return self.folder / "arriving" / "a" / f"step_{step}"


def make_place(folder: Path) -> Place:
    """A configuration and three small tasks, not synced yet."""
    (folder / "arriving").mkdir(parents=True)
    tasks = folder / "my_tasks"
    tasks.mkdir()
    (folder / "eval_platform.toml").write_text(CONFIG)
    for name, text in (("colours", COLOURS), ("words", WORDS), ("stories", STORIES)):
        (tasks / f"{name}.yaml").write_text(text)
    rows = [json.dumps({"thing": thing, "colour": colour}) for thing, colour in THINGS.items()]
    (tasks / "colours.jsonl").write_text("\n".join(rows))
    return Place(folder)


@dataclass(frozen=True)
class Lived:
    """A place, and what its commands answered when it was made."""

    place: Place
    answers: dict[str, Answer]


@cache
def lived_in(folder: Path) -> Lived:
    """Steps 100 (only colours), 200 (whole), 300 (NaN weights) and 500 (a class nobody knows) were run, in this order.

    "elsewhere" ran a checkpoint of another folder, with infinite weights, two items of one task, into `elsewhere/`.
    """
    place = make_place(folder)
    for step in (100, 200, 300, 500):
        make_checkpoint(place.arriving(step), seed=step, nan=step == 300)
    infinite = make_checkpoint(folder / "outside" / "infinite", seed=400)
    spoil_weights(infinite, float("inf"))
    config = place.arriving(500) / "config.json"
    config.write_text(
        json.dumps({**json.loads(config.read_text()), "architectures": ["Nobody"], "model_type": "nobody"})
    )
    answers = {"empty": place("status"), "sync": place("tasks", "sync")}
    lend(load_config(folder / "eval_platform.toml").state_dir)
    answers["100"] = place("run", "--checkpoint", str(place.arriving(100)), "--suite", "first")
    for step in (200, 300, 500):
        answers[str(step)] = place("run", "--checkpoint", str(place.arriving(step)), "--json")
    answers["status"] = place("status")
    lock = place.lock.read_bytes()
    answers["elsewhere"] = place(
        *("run", "--checkpoint", str(infinite), "--tasks", "colours", "--limit", "2"),
        *("--results", str(folder / "elsewhere"), "--json"),
    )
    assert place.lock.read_bytes() == lock, "another results root has a lock of its own"
    return Lived(place, answers)


def spoil_weights(checkpoint: Path, value: float) -> None:
    """One weight matrix of the first layer becomes `value` everywhere."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(checkpoint / "model.safetensors")
    name = next(name for name in sorted(tensors) if "layers.0" in name and tensors[name].ndim == 2)
    tensors[name][:] = value
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
