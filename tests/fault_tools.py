"""Faults made for real: workers and drivers are processes that are killed, stopped, starved of disk or told to leave.

A worker here is the program `eval_platform.worker` itself. `Forked` starts it by a fork of the test's process instead
of a fresh interpreter, which saves the seconds that importing torch takes and changes nothing else; `sitecustomize`
prepares a fresh interpreter for the tests that want one. Either way the worker obeys files in `Place.control`:

    asked.jsonl      what it was asked: one line per call of `Engine.answer`, one per model load
    pause_answer     stop after so many answers of one call, say so in paused-<pid>, go on when this file is gone
    pause_commit     the same between the samples and the commit
    plant_nan        every log-likelihood is NaN (a fault planted in the engine)
    die_at_write     kill -9 itself at the n-th file it would create in the results root
"""

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

from tiny_models import make_checkpoint

from eval_platform import checkpoints, warehouse, worker
from eval_platform.config import Config, Root, Tasks
from eval_platform.config import Engine as EngineConfig
from eval_platform.config import Worker as WorkerConfig
from eval_platform.drive import Outcome, drive
from eval_platform.launching import local
from eval_platform.plan import Wanted, plan
from eval_platform.store import LocalStore, arrivals, journal, layout, watcher_id
from eval_platform.store.process import process_record
from eval_platform.tasks import read_lock, sync_tasks
from eval_platform.values import Arrival

PATIENCE_S = 120.0
CONTROL = "EVAL_PLATFORM_TEST_CONTROL"
Asked = tuple[str, int]  # request_id, repeat

CHOICES: dict[str, Any] = {
    "output_type": "multiple_choice",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_choice": ["Yes", "No"],
    "doc_to_target": "label",
    "metric_list": [{"metric": "acc"}],
    "primary_metric": "acc",
    "higher_is_better": True,
    "chance": 0.5,
}
WORDS: dict[str, Any] = {
    "output_type": "generate_until",
    "doc_to_text": "{{question}} =",
    "doc_to_target": "Yes",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
    "metric_list": [{"metric": "exact_match"}],
    "primary_metric": "exact_match",
    "higher_is_better": True,
    "chance": 0.0,
}


def until(found: Callable[[], Any], what: str, patience_s: float = PATIENCE_S, *, every_s: float = 0.05) -> Any:
    """The first true value of `found()`; fails, saying what was awaited, when it never comes."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
        if value := found():
            return value
        time.sleep(every_s)
    raise AssertionError(f"waited {patience_s:.0f} s for {what}")


class Place:
    """One results root, its checkpoints and tasks; any number of machines (state folders) that work on it."""

    def __init__(self, folder: Path, *, lease_seconds: float = 30.0) -> None:
        self.folder = folder
        self.control = folder / "control"
        self.checkpoints = folder / "checkpoints"
        self.tasks = folder / "tasks"
        self.lease_seconds = lease_seconds
        for made in (self.control, self.checkpoints, self.tasks):
            made.mkdir(parents=True, exist_ok=True)
        self.use(folder / "results")

    def use(self, results: Path) -> None:
        """Work on this results root."""
        self.results = results
        self.store = LocalStore(results)

    def config(self, state: str = "state") -> Config:
        return Config(
            folder=self.folder,
            results=str(self.results),
            state=str(self.folder / state),
            checkpoints=(Root(name="runs", path=str(self.checkpoints), quiet_seconds=0),),
            tasks=Tasks(folders=(str(self.tasks),)),
            engine=EngineConfig(device="cpu", dtype="float32", max_length=256),
            worker=WorkerConfig(lease_seconds=self.lease_seconds, retry_wait_seconds=0.1),
        )

    # ------------------------------------------------------------------------------------------ tasks and checkpoints

    def write_task(self, name: str, n: int = 40, **keys: Any) -> None:
        """A task file over `n` questions of its own (two requests each, unless `keys` say otherwise)."""
        rows = [{"question": f"{name} {i} larger {i * 7 % 10}?", "label": i % 2} for i in range(n)]
        (self.tasks / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        body = {**CHOICES, **keys, "task": name, "documents": {"file": f"{name}.jsonl"}}
        (self.tasks / f"{name}.yaml").write_text(json.dumps(body))  # JSON is YAML

    def sync(self) -> None:
        report = sync_tasks(self.config().tasks, self.store, self.config().lock_path)
        assert not report.errors

    def checkpoint(self, name: str = "a/step_1", *, seed: int = 0) -> Path:
        return make_checkpoint(self.checkpoints / name, seed=seed)

    def arrive(self, name: str = "a/step_1", *, state: str = "state") -> Arrival:
        """Register what lies in the folder now, as the sensor does."""
        config = self.config(state)
        found = checkpoints.locate(
            self.checkpoints / name, config.checkpoints, config.cache_dir, lambda done, total: None
        )
        return arrivals.register(self.store, watcher=watcher_id(config.state_dir), **asdict(found))[0]

    # ---------------------------------------------------------------------------------------------------------- doing

    def drive(self, arrival: Arrival, *, state: str = "state", tasks: Sequence[str] | None = None) -> list[Outcome]:
        """The whole job: a worker, the gate, the catalog."""
        config = self.config(state)
        todo = plan(arrival, Wanted(read_lock(config.lock_path), tasks), config, self.store)
        return list(drive(todo, config, self.store, actor="test"))

    def launch(self, arrival: Arrival, *, state: str = "state") -> local.LocalHandle:
        """A worker alone, nobody listening."""
        config = self.config(state)
        todo = plan(arrival, Wanted(read_lock(config.lock_path)), config, self.store)
        ((_, handle),) = local.launch(todo, lambda _: [todo], config)
        assert isinstance(handle, local.LocalHandle)
        return handle

    def command(self, name: str, value: object = "") -> None:
        """Give the workers an order; see the module's text."""
        aside = self.control / f".{name}"
        aside.write_text(str(value))
        aside.rename(self.control / name)

    def revoke(self, name: str) -> None:
        (self.control / name).unlink()

    def paused(self, patience_s: float = PATIENCE_S) -> int:
        """Wait for a worker to pause; its process number."""
        found: list[Path] = until(lambda: list(self.control.glob("paused-*")), "a worker to pause", patience_s)
        (mark,) = found
        mark.unlink()
        return int(mark.name.removeprefix("paused-"))

    # -------------------------------------------------------------------------------------------------------- looking

    def asked(self, pid: int | None = None) -> list[Asked]:
        """Every request that the engine was asked, in order; those of one process when `pid` is given."""
        lines = self._events()
        return [(one, n) for line in lines if pid in (None, line["pid"]) for one, n in line.get("asked", ())]

    def loads(self) -> int:
        """How often a model was loaded."""
        return sum("loaded" in line for line in self._events())

    def journaled(self, attempt: int = 1) -> list[Asked]:
        """Every request in the journal, as often as it stands there."""
        found: list[Asked] = []
        for answers_id in {entry.key.split("/")[1] for entry in self.store.list("journal/")}:
            for entry in self.store.list(layout.journal_folder(answers_id, attempt)):
                _, *lines = self.store.read(entry.key).decode().splitlines()
                found += [(row[0], row[1]) for row in map(json.loads, lines)]
            # The reader that the worker uses must find the same.
            assert set(journal.Journal(self.store, answers_id, attempt, "reader").finished()) <= set(found)
        return found

    def sql(self, text: str, *, state: str = "state") -> list[dict[str, Any]]:
        config = self.config(state)
        warehouse.refresh(self.store, config.catalog_path)
        return warehouse.query(config.catalog_path, self.store, text).to_pylist()

    def commits(self) -> list[str]:
        """Store keys of every commit."""
        return [entry.key for entry in self.store.list("evaluations/") if not entry.key.endswith(".asked.json")]

    def board(self, *, state: str = "state") -> list[tuple[Any, ...]]:
        """(key, task, value, n, evaluation_id, attempt), sorted: equal on every machine."""
        rows = self.sql("select key, task, value, n, evaluation_id, attempt from leaderboard order by all", state=state)
        return [tuple(row.values()) for row in rows]

    def problems(self, *, state: str = "state") -> list[dict[str, Any]]:
        return self.sql("select * from problems", state=state)

    def _events(self) -> list[dict[str, Any]]:
        file = self.control / "asked.jsonl"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


# ---------------------------------------------------------------------------------------------------- inside the worker


def obey(control: Path) -> None:
    """Make this process, a worker, obey the files in `control`. The last line of defence: nobody waits for ever."""
    from eval_platform.engine.plain import PlainEngine
    from eval_platform.store import commits

    def say(**event: Any) -> None:
        line = json.dumps({"pid": os.getpid(), **event}) + "\n"
        with (control / "asked.jsonl").open("ab") as file:
            file.write(line.encode())

    def pause(name: str) -> None:
        (control / f"paused-{os.getpid()}").touch()
        until(lambda: not (control / name).exists(), f"{name} to be revoked")

    real_init, real_answer, real_write_samples = PlainEngine.__init__, PlainEngine.answer, commits.write_samples

    def init(self: PlainEngine, *args: Any, **keys: Any) -> None:
        say(loaded=True)
        real_init(self, *args, **keys)

    def answer(self: PlainEngine, requests: Sequence[Any]) -> Iterator[Any]:
        say(asked=[[request.request_id, request.repeat] for request in requests])
        for count, response in enumerate(real_answer(self, requests), 1):
            planted = (control / "plant_nan").exists()
            yield replace(response, log_likelihood=float("nan"), is_greedy=False) if planted else response
            with suppress(FileNotFoundError):
                if int((control / "pause_answer").read_text()) == count:
                    pause("pause_answer")

    def write_samples(*args: Any) -> Any:
        found = real_write_samples(*args)
        if (control / "pause_commit").exists():
            pause("pause_commit")
        return found

    PlainEngine.__init__, PlainEngine.answer = init, answer  # type: ignore[method-assign]
    commits.write_samples = write_samples
    with suppress(FileNotFoundError):
        die_at_write(int((control / "die_at_write").read_text()))


def die_at_write(n: int) -> None:
    """kill -9 of this process when it would create or replace its n-th file in a results root."""
    real_create, real_put = LocalStore.create, LocalStore.put
    writes = 0

    def count() -> None:
        nonlocal writes
        writes += 1
        if writes == n:
            os.kill(os.getpid(), signal.SIGKILL)

    def create(self: LocalStore, key: str, body: Any) -> bool:
        count()
        return real_create(self, key, body)

    def put(self: LocalStore, key: str, body: Any) -> None:
        count()
        real_put(self, key, body)

    LocalStore.create, LocalStore.put = create, put  # type: ignore[method-assign]


class Forked:
    """Stands in for subprocess.Popen in `launch`: the same worker program, in a fork of this process."""

    started: ClassVar[list["Forked"]] = []

    def __init__(self, command: Sequence[str], *, stdout: Any, **_: Any) -> None:
        folder = Path(command[-1])
        assert command[1:3] == ["-m", "eval_platform.worker"]
        self.returncode: int | None = None
        self.started.append(self)
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                os.setsid()
                os.dup2(stdout.fileno(), 1)
                os.dup2(stdout.fileno(), 2)
                sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115 -- for as long as the process lives
                logging.basicConfig(level=logging.INFO, force=True)
                import torch

                torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
                obey(Path(os.environ[CONTROL]))
                code = worker.main(folder, process_record(os.getppid()))
            finally:
                os._exit(code)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        deadline = time.monotonic() + (PATIENCE_S if timeout is None else timeout)
        while self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("worker", timeout or PATIENCE_S)
            time.sleep(0.02)
        assert self.returncode is not None
        return self.returncode

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


@contextmanager
def forked(place: "Place") -> Iterator[None]:
    """Within, `launch` forks its workers, and they obey `place`. None of them outlives it."""
    _import_all_that_a_worker_needs()
    popen, control = local.subprocess, os.environ.get(CONTROL)
    local.subprocess = SimpleNamespace(**{**vars(subprocess), "Popen": Forked})  # type: ignore[assignment]
    os.environ[CONTROL] = str(place.control)
    try:
        yield
    finally:
        for left in (one for one in Forked.started if one.poll() is None):
            left.kill()
            left.wait()
        Forked.started.clear()
        local.subprocess = popen
        if control is None:
            del os.environ[CONTROL]
        else:
            os.environ[CONTROL] = control


@cache
def _import_all_that_a_worker_needs() -> None:
    """Before any fork: a fork during another thread's import would inherit its lock for ever."""
    from eval_platform.engine import load, resolve_settings
    from eval_platform.quality import suites
    from eval_platform.values import RunSettings

    suites._batch_definition()
    with tempfile.TemporaryDirectory() as folder:
        path = make_checkpoint(Path(folder))
        load(path, resolve_settings(RunSettings(device="cpu", dtype="float32"), path))


def sitecustomize(folder: Path) -> Path:
    """A folder for PYTHONPATH that makes a fresh worker obey the control folder named in the environment."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        textwrap.dedent(
            f"""
            import os, sys
            from pathlib import Path

            if {{"eval_platform.worker", "eval_platform.nursery"}} & set(sys.orig_argv):
                sys.path.append({str(Path(__file__).parent)!r})
                from fault_tools import obey

                obey(Path(os.environ[{CONTROL!r}]))
            """
        )
    )
    return folder


class Driver:
    """A process, forked from the test's, that runs `run()`; its exit code is 0 when that returns."""

    def __init__(self, run: Callable[[], Any]) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                Forked.started.clear()  # the parent's, not ours
                run()
                code = 0
            except Exception:  # noqa: BLE001 -- the last word of a process: say it, end with its code
                traceback.print_exc()
            finally:
                os._exit(code)

    def kill(self) -> None:
        """kill -9, and wait until it is gone."""
        os.kill(self.pid, signal.SIGKILL)
        assert self.wait() == -signal.SIGKILL

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
