"""What starting a worker leaves on the machine."""

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest

from eval_platform import drive, launching, status
from eval_platform.config import S3, Config, Engine, Slurm, Worker
from eval_platform.launching import Running, environment, folders, jobs
from eval_platform.plan import OtherRelease, Plan, PlannedTask, plan_of, read_plan
from eval_platform.store import LocalStore
from eval_platform.store.process import process_record
from eval_platform.values import Arrival


def test_only_folders_of_workers_that_have_ended_are_forgotten(tmp_path: Path) -> None:
    names = [f"{number:020d}-worker" for number in range(folders.KEPT_WORKERS + 3)]
    for name in names:
        (tmp_path / name).mkdir()
    living, dead = process_record(os.getpid()), {**process_record(os.getpid()), "started": "never"}
    for name, worker in zip(names, (living, dead), strict=False):
        (tmp_path / name / "process.json").write_text(json.dumps({"worker": worker}))
    folders.forget_old(tmp_path)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == [names[0], *names[3:]]


def test_buckets_of_one_name_on_two_servers_have_a_catalog_each(tmp_path: Path) -> None:
    def catalog(results: str, endpoint: str | None) -> Path:
        return Config(folder=tmp_path, results=results, state=str(tmp_path), s3=S3(endpoint=endpoint)).catalog_path

    endpoints = (None, "http://127.0.0.1:9000", "http://127.0.0.1:9001")
    assert len({catalog("s3://bucket/results", endpoint) for endpoint in endpoints}) == 3
    assert len({catalog("results", endpoint) for endpoint in endpoints}) == 1


@pytest.fixture
def todo(tmp_path: Path) -> Plan:
    config = Config(folder=tmp_path, results=str(tmp_path / "results"), state=str(tmp_path / "state"))
    arrival = Arrival("runs/a", 1, "fingerprint", "file:///a", "a", 1, None, {})
    tasks = (PlannedTask("sums", "task", "ask"),)
    return plan_of(arrival, tasks, {}, config.run_settings(), config, LocalStore(tmp_path / "results"))


def test_a_job_that_waits_in_its_clusters_queue_is_seen(todo: Plan, tmp_path: Path) -> None:
    config = Config(folder=tmp_path, state=str(tmp_path / "state"))
    folder = folders.make_folder(todo, config)
    assert launching.running(config) == []
    jobs.remember(folder, "slurm", "71")
    (one,) = launching.running(config)
    assert (one.plan, one.waits, one.where) == (todo, True, "slurm 71")
    assert launching.stop_orphans(config) == 0
    hello = {"type": "hello", "host": "node4", "devices": None}
    (folder / "messages.jsonl").write_text(json.dumps({"params": {"payload": hello}}) + "\n")
    processes = {name: process_record(os.getpid()) for name in ("worker", "driver")}
    (folder / "process.json").write_text(json.dumps(processes))
    (one,) = launching.running(config)
    assert (one.waits, one.where) == (False, "node4, slurm 71")
    (folder / "process.json").unlink()
    jobs.let_go(folder, "71", "it ended")
    assert launching.running(config) == []


def test_no_secret_of_the_platforms_own_goes_to_a_node(todo: Plan) -> None:
    """A worker has no use for the database and the webhook, and it runs what models and their authors wrote."""
    mine = {
        **dict.fromkeys(["EVAL_PLATFORM_POSTGRES", "EVAL_PLATFORM_WEBHOOK", "OPENAI_API_KEY", "MY_OWN"], "secret"),
        "EVAL_PLATFORM_DATA": "/data",
        "AWS_SECRET_ACCESS_KEY": "of the results",
    }
    sent = environment.hidden_environment(todo, mine, ("EVAL_PLATFORM_POSTGRES",))
    assert "secret" not in sent.values()
    assert sent["EVAL_PLATFORM_DATA"] == "/data"
    assert sent["AWS_SECRET_ACCESS_KEY"] == "of the results"


def test_no_secret_of_the_platforms_own_is_in_a_workers_environment(
    todo: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVAL_PLATFORM_POSTGRES", "postgresql+psycopg2://a:hunter2@b/c")
    monkeypatch.setenv("EVAL_PLATFORM_DATA", "/data")
    ((_, handle),) = launching.launch(todo, Config(folder=tmp_path, results=todo.store, state=str(tmp_path / "state")))
    try:
        given = Path(f"/proc/{handle.process.pid}/environ").read_bytes()  # type: ignore[attr-defined]
    finally:
        handle.stop()
    assert b"EVAL_PLATFORM_DATA=/data" in given
    assert b"hunter2" not in given


def test_what_ends_a_worker_does_not_hide_why_a_task_failed_for_good(
    todo: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm's time limit ends a job one of whose tasks can never be answered; another only had bad luck before."""

    def failed(task: str | None, class_: str, reason: str) -> dict[str, Any]:
        return {"type": "failed", "task": task, "class": class_, "reason": reason}

    messages = [
        failed("sums", "deterministic", "its file is wrong"),
        failed("words", "infrastructure", "the store did not answer"),
        failed(None, "infrastructure", "the time limit"),
    ]
    ended: Any = SimpleNamespace(folder=tmp_path, poll=lambda: 1, messages=lambda: iter([messages]), stop=lambda: None)
    monkeypatch.setattr(drive.launching, "launch", lambda *_, **__: [launching.Shard(plan, ended)])
    monkeypatch.setattr(drive.quality, "warm", lambda: None)
    monkeypatch.setattr(drive.planning, "expect", lambda plan, *_: plan)
    monkeypatch.setattr(drive.warehouse, "refresh", lambda *_: None)
    plan = replace(todo, tasks=tuple(PlannedTask(name, name, name) for name in ("sums", "words", "others")))
    config = Config(folder=tmp_path, results=str(tmp_path / "results"), state=str(tmp_path / "state"))
    outcomes = drive.drive(plan, config, LocalStore(tmp_path / "results"), actor="test")
    assert {one.task: one.reasons for one in outcomes} == {
        "sums": ("its file is wrong",),
        "words": ("the time limit",),
        "others": ("the time limit",),
    }


def test_a_line_that_a_failing_machine_cut_off_stops_nobody(tmp_path: Path) -> None:
    said = tmp_path / "messages.jsonl"
    whole = json.dumps({"params": {"payload": {"type": "hello"}}}).encode() + b"\n"
    said.write_bytes(whole + whole[:20] + b"\0\0\n" + whole + whole[:7])
    assert folders.messages_from(tmp_path, 0) == ([{"type": "hello"}] * 2, len(said.read_bytes()) - 7)
    assert folders.read_messages(tmp_path) == [{"type": "hello"}] * 2


@pytest.mark.parametrize("part", ["settings", "arrival"])
def test_a_plan_with_parts_of_another_release_is_refused_by_name(todo: Plan, tmp_path: Path, part: str) -> None:
    body: dict[str, Any] = json.loads(todo.to_json())
    body[part]["invented_later"] = 1
    body["platform"] = "9.9.9"
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(body))
    with pytest.raises(OtherRelease, match=r"9\.9\.9(.|\n)*remedy: install the same"):
        read_plan(file).refuse_other_release()


def test_who_asks_slurm_for_gpus_never_computes_on_a_cpu_in_silence(tmp_path: Path) -> None:
    def device(asked: Slurm, engine: str = "auto", launcher: Literal["subprocess", "slurm"] = "slurm") -> str:
        config = Config(folder=tmp_path, worker=Worker(launcher=launcher), slurm=asked, engine=Engine(device=engine))
        return config.run_settings().device

    assert device(Slurm(gres="gpu:1")) == device(Slurm(arguments=("--gpus-per-node=1",))) == "cuda"
    assert device(Slurm()) == device(Slurm(arguments=("--mem=32G",))) == "auto"
    assert device(Slurm(gres="gpu:1"), "cpu") == "cpu"
    assert device(Slurm(gres="gpu:1"), launcher="subprocess") == "auto"  # workers are processes of this machine


def test_of_two_workers_at_one_checkpoint_each_shows_its_own_task(todo: Plan) -> None:
    """Two tiers of one checkpoint; and of two that have the same task the one that is at it."""

    def working(names: tuple[str, ...], *started: str) -> Running:
        planned = replace(todo, tasks=tuple(PlannedTask(name, name, name) for name in names))
        return Running(planned, tuple({"type": "started", "task": name} for name in started), 1, is_orphan=False)

    quick, orphan, later = working(("quick",), "quick"), working(("full",), "full"), working(("full",))
    assert status._whose([quick, orphan, later], "quick") is quick
    assert status._whose([quick, orphan, later], "full") is orphan
    assert status._whose([quick], "full") is None
