"""What the worker's program promises to whoever starts it (docs/launchers.md): its messages, its end, its codes."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_factory import make_checkpoint
from fault_tools import Driver, Place
from stub_engine import BATCH, load_stub

from eval_platform import __version__, worker
from eval_platform.devices import SHARE_VARIABLE
from eval_platform.errors import as_device_error
from eval_platform.launching import folders
from eval_platform.plan import PLAN_VERSION, Plan, Wanted, plan
from eval_platform.store import journal, tries
from eval_platform.store.process import process_record
from eval_platform.tasks import read_lock
from eval_platform.values import Arrival

ROOT = Path(__file__).parent.parent
# What the worker's image (docker/worker.Dockerfile) does not have: test_docker.py holds that none is missing here.
NOT_THE_WORKERS = [
    *("dagster", "dagster_graphql", "dagster_pipes", "dagster_webserver", "duckdb", "great_expectations", "matplotlib"),
    *("pandas", "rich", "typer"),
]
REQUESTS = 80


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """A checkpoint has arrived, and is to be asked 80 requests of one task."""
    one = Place(tmp_path)
    one.write_task("sums")
    one.sync()
    make_checkpoint(one.checkpoints / "a" / "step_1")
    return one


def planned(place: Place) -> tuple[Plan, Arrival]:
    config, arrival = place.config(), place.arrive()
    return plan(arrival, Wanted(read_lock(config.lock_path)), config, place.store), arrival


def ends_with(folder: Path, load: Callable[..., Any]) -> int:
    """The exit code of the worker's program on this folder, in a fork, with this in place of the engine."""

    def run() -> None:
        worker.load_engine = load  # type: ignore[assignment]
        os._exit(worker.main(folder, process_record(os.getppid())))

    return Driver(run).wait()


def said(folder: Path) -> list[dict[str, Any]]:
    return folders.read_messages(folder)


def kill_myself() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_it_says_hello_and_needs_neither_dagster_nor_what_the_platform_alone_needs(place: Place) -> None:
    """In an interpreter of its own where importing any of them fails."""
    todo, _ = planned(place)
    folder = folders.make_folder(todo, place.config())
    program = """
        import json, os, sys
        from pathlib import Path

        class NotInstalled:
            names = json.loads(sys.argv[2])
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] in self.names:
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        sys.meta_path.insert(0, NotInstalled())
        from eval_platform import worker
        from eval_platform.store.process import process_record
        from stub_engine import load_stub
        worker.load_engine = load_stub(lambda batch: None)
        sys.exit(worker.main(Path(sys.argv[1]), process_record(os.getppid())))
        """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent)]),
        "CUDA_VISIBLE_DEVICES": "2, GPU-5f0c",
        SHARE_VARIABLE: "0.25",
    }
    command = [sys.executable, "-c", textwrap.dedent(program), str(folder), json.dumps(NOT_THE_WORKERS)]
    process = subprocess.Popen(command, env=environment)
    assert process.wait(60) == worker.EXIT_DONE
    hello, *others = said(folder)
    assert hello.pop("time") <= time.time()
    assert hello.pop("host")
    assert hello == {
        "type": "hello",
        "platform": __version__,
        "plan_version": PLAN_VERSION,
        "pid": process.pid,
        "devices": ["2", "GPU-5f0c"],
    }
    kinds = [one["type"] for one in others if one["type"] not in ("staging", "progress")]
    assert kinds == ["staged", "started", "loaded", "committed", "end"]
    (cost,) = place.sql(
        "select seconds, answer_seconds, n_tokens, device_seconds, tokens_per_second, peak_memory_bytes "
        "from evaluations"
    )
    assert cost["device_seconds"] == 2 * 0.25 * cost["seconds"] > 0  # it was given a part of two devices
    assert cost["tokens_per_second"] == pytest.approx(cost["n_tokens"] / cost["answer_seconds"])
    assert 2**24 < cost["peak_memory_bytes"] < 2**33


@pytest.mark.parametrize("key", ["platform", "plan_version", "a_new_field"])
def test_a_plan_of_another_release_is_refused_and_nothing_is_recorded(place: Place, key: str) -> None:
    todo, arrival = planned(place)
    folder = folders.make_folder(todo, place.config())
    file = folder / "plan.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: "9.9.9"}))
    assert ends_with(folder, load_stub(lambda batch: None)) == worker.EXIT_REFUSED
    _, failed, end = said(folder)
    assert (failed["type"], failed["task"], end["code"]) == ("failed", None, worker.EXIT_REFUSED)
    assert __version__ in failed["reason"]
    assert "9.9.9" in failed["reason"] or "a_new_field" in failed["reason"]
    assert "remedy: install the same eval-platform" in failed["reason"]
    assert tries.history(place.store, tries.arrival_subject(arrival)) == []


@pytest.fixture
def started(place: Place) -> tuple[Place, Plan, Path]:
    todo, _ = planned(place)
    return place, todo, folders.make_folder(todo, place.config())


def test_told_to_stop_while_it_computes_a_batch_it_loses_no_more_than_that(
    started: tuple[Place, Plan, Path],
) -> None:
    place, todo, folder = started
    assert ends_with(folder, load_stub(lambda batch: kill_myself() if batch == 3 else None)) == worker.EXIT_TRY_AGAIN
    assert said(folder)[-1]["code"] == worker.EXIT_TRY_AGAIN
    journaled = place.journaled()
    assert len(journaled) == len(set(journaled)) == 3 * BATCH

    again = folders.make_folder(todo, place.config())
    batches = place.control / "batches"

    def note(batch: int) -> None:
        with batches.open("a") as file:
            file.write("x")

    assert ends_with(again, load_stub(note)) == worker.EXIT_DONE
    assert len(batches.read_text()) == (REQUESTS - 3 * BATCH) / BATCH
    assert len(place.commits()) == 1


def test_the_next_life_of_a_job_begins_on_a_line_of_its_own(started: tuple[Place, Plan, Path]) -> None:
    """Its machine failed while it wrote a message, and Slurm began the job anew in the same folder."""
    _, _, folder = started
    (folder / "messages.jsonl").write_text('{"__dagster_pipes_ver')
    assert ends_with(folder, load_stub(lambda batch: None)) == worker.EXIT_DONE
    assert (said(folder)[0]["type"], said(folder)[-1]["type"]) == ("hello", "end")


def test_on_standard_output_it_says_messages_alone_and_its_folder_is_only_read(
    started: tuple[Place, Plan, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    place, _, folder = started
    reading, writing = os.pipe()

    def run() -> None:
        os.dup2(writing, 1)
        worker.load_engine = load_stub(lambda batch: os.write(1, b"from a library\n") and None)  # type: ignore[assignment]
        os._exit(worker.main(folder, process_record(os.getppid()), on_stdout=True))

    driver = Driver(run)
    os.close(writing)
    with open(reading, encoding="utf-8") as output:
        messages = [json.loads(line)["params"]["payload"] for line in output]
    assert driver.wait() == worker.EXIT_DONE
    assert (messages[0]["type"], messages[-1]["type"]) == ("hello", "end")
    assert len(place.commits()) == 1
    assert capfd.readouterr().err.count("from a library\n") == REQUESTS / BATCH
    assert [file.name for file in folder.iterdir()] == ["plan.json"]


def test_told_to_stop_while_it_writes_the_journal_it_writes_it_once(
    started: tuple[Place, Plan, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    place, _, folder = started
    append = journal.Journal.append

    def stopped_after(self: journal.Journal, responses: Any) -> None:
        append(self, responses)
        kill_myself()
        kill_myself()  # asked twice is asked once

    monkeypatch.setattr(journal.Journal, "append", stopped_after)
    assert ends_with(folder, load_stub(lambda batch: None)) == worker.EXIT_TRY_AGAIN
    journaled = place.journaled()
    assert len(journaled) == len(set(journaled)) == worker.FLUSH_RESPONSES


def test_what_a_library_makes_of_the_stop_is_no_failure(started: tuple[Place, Plan, Path]) -> None:
    """An extension module that is being imported makes an ImportError of every exception."""
    place, todo, folder = started

    def load(path: Path, settings: Any) -> None:
        try:
            kill_myself()
        except BaseException as error:
            raise ImportError("initialization failed") from error

    assert ends_with(folder, load) == worker.EXIT_TRY_AGAIN
    assert [one["type"] for one in said(folder)][-1:] == ["end"]
    assert "failed" not in {one["type"] for one in said(folder)}
    outcomes = [told.outcome for told in tries.history(place.store, tries.arrival_subject(todo.arrival))]
    assert outcomes == ["done", "interrupted"]


def test_told_to_stop_when_all_is_done_it_ends_as_it_would_have() -> None:
    program = """
        import os, signal
        from pathlib import Path
        from eval_platform import worker
        worker._main = lambda *_: worker.EXIT_DONE
        code = worker.main(Path(), {})
        os.kill(os.getpid(), signal.SIGTERM)
        worker.leave(code)
        """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    assert subprocess.run(command, cwd=ROOT, timeout=60).returncode == 0


def test_a_call_that_never_comes_back_is_cut_off_and_the_log_says_where() -> None:
    """hashlib's loop is in C: no handler of Python's runs before it ends, in hours."""
    program = """
        import hashlib, os, signal, threading
        from eval_platform import stopping
        stopping.LEAVE_SECONDS = 0.2
        stopping.obey_sigterm(75)
        def hash_for_hours():
            hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        hash_for_hours()
        """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    process = subprocess.run(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=60)
    assert process.returncode == 75
    assert "still here 0.2 s after SIGTERM" in process.stderr
    assert "hash_for_hours" in process.stderr


class AcceleratorError(RuntimeError):
    """Named as torch's own, which a build without CUDA never raises."""


@pytest.mark.parametrize(
    ("words", "outcome"),
    [
        ("CUDA error: uncorrectable ECC error encountered", "failed"),
        ("CUDA error: no CUDA-capable device is detected", "interrupted"),
    ],
)
def test_a_gpu_that_fails_ends_the_worker_and_is_not_the_checkpoints_fault(
    started: tuple[Place, Plan, Path], words: str, outcome: str
) -> None:
    place, _, folder = started

    def fail(batch: int) -> None:
        if batch == 1:
            raise AcceleratorError(words)

    assert ends_with(folder, load_stub(fail)) == worker.EXIT_TRY_AGAIN
    (failed,) = [one for one in said(folder) if one["type"] == "failed"]
    assert (failed["task"], failed["class"]) == (None, "infrastructure")
    assert words in failed["reason"]
    assert "remedy: see " in failed["reason"]
    (begun,) = [one for one in said(folder) if one["type"] == "started"]
    subject = tries.evaluation_subject(begun["evaluation_id"], 1)
    assert [told.outcome for told in tries.history(place.store, subject)] == [outcome]
    assert len(place.journaled()) == BATCH


def test_full_memory_is_no_broken_device() -> None:
    class OutOfMemoryError(RuntimeError):
        pass

    assert as_device_error(OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")) is None
    assert as_device_error(ValueError("invalid device ordinal")) is None


def test_help_and_page_name_every_exit_code_and_every_message(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        worker._read_arguments(["--help"])
    told = capsys.readouterr().out
    page = (ROOT / "docs" / "launchers.md").read_text()
    codes = {value for name, value in vars(worker).items() if name.startswith("EXIT_")}
    assert codes == {int(code) for code in re.findall(r"^  (\d+)  ", told, re.MULTILINE)}
    assert codes == {int(code) for code in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)}
    source = (ROOT / "eval_platform" / "worker.py").read_text()
    types = set(re.findall(r'"type": "(\w+)"', source))
    assert types
    assert types <= set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
