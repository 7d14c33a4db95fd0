"""Workers that share no folder with their driver: the plan in and the messages out through a bucket.

The workers are the platform's own program as processes of this machine, with `scripted_slurm` as their cluster and moto
as the bucket, behind a wire that breaks on command. `test_slurm.py` and `test_ray.py` have real clusters.
"""

import json
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any, NoReturn

import botocore.session
import dagster_pipes
import pytest
from fault_tools import Driver, until
from job_world import SECONDS_A_REQUEST, JobWorld, all_published
from ray_job_server import job_server
from s3_server import CREDENTIALS, S3Server, s3_server
from scripted_slurm import ScriptedSlurm
from wire import Answer, Cut, Hang, Wire

from eval_platform import launching, outbox
from eval_platform.config import S3, Config, Ray, Slurm, Worker
from eval_platform.errors import StoreError
from eval_platform.launching import folders, inbox, jobs
from eval_platform.launching.inbox import Inbox
from eval_platform.outbox import Outbox
from eval_platform.plan import PlannedTask, plan_of
from eval_platform.store import LocalStore
from eval_platform.store.s3 import S3Store
from eval_platform.values import Arrival
from eval_platform.worker import EXIT_TRY_AGAIN, pipes_line

EXCHANGE = "s3://evals/ex change"


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as one:
        one.make_bucket("evals")
        yield one


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Credentials, and a folder for what is left of a worker that was killed."""
    for name, value in {**CREDENTIALS, "TMPDIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tempfile, "tempdir", None)


class World(JobWorld):
    """Of two machines, `state` and `other`, each with a driver's files. Results and checkpoints are shared."""

    def __init__(self, folder: Path, wire: Wire, cluster: ScriptedSlurm) -> None:
        self.machine = "state"
        self.exchange = f"{EXCHANGE}/{folder.parent.name}"
        self.cluster = cluster
        self.wire = wire
        super().__init__(folder, slurm=Slurm(variables=("TMPDIR",)))

    def config(self, state: str | None = None) -> Config:
        config = super().config(state or self.machine)
        worker = config.worker.model_copy(update={"exchange": self.exchange})
        return config.model_copy(update={"worker": worker, "s3": S3(endpoint=self.wire.endpoint)})

    @property
    def bucket(self) -> S3Store:
        return S3Store(self.exchange, S3(endpoint=self.wire.endpoint))

    def objects(self) -> list[str]:
        return [entry.key for entry in self.bucket.list("")]


@pytest.fixture
def world(tmp_path: Path, server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    cluster = ScriptedSlurm(tmp_path / "cluster")
    with Wire(server.port) as wire:
        one = World(tmp_path / "world", wire, cluster)
        for name, value in one.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("PATH", f"{cluster.folder / 'bin'}:{os.environ['PATH']}")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "node"))
        monkeypatch.setattr(jobs, "ASK_SECONDS", (0.1, 0.1))
        monkeypatch.setattr(inbox, "LOOK_SECONDS", 0.1)
        monkeypatch.setattr(inbox, "AWAY_SECONDS", 0.1)
        yield one
        cluster.end()


def types(said: list[dict[str, Any]]) -> list[str]:
    return [one["type"] for one in said]


@pytest.mark.slow
def test_plan_in_and_messages_out_and_a_driver_on_another_machine_goes_on_where_one_was_killed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SECONDS_A_REQUEST, "0.01")
    arrival = world.arrived(1)
    driver = Driver(lambda: world.driven(arrival))
    until(lambda: world.n_asked() > 10, "answers", 60)
    driver.kill()
    script = (world.cluster.folder / "script").read_text()
    assert "s3://" in script
    assert str(world.config().state_dir) not in script
    assert CREDENTIALS["AWS_SECRET_ACCESS_KEY"] not in script + json.dumps(world.objects())
    world.machine = "other"
    said: list[dict[str, Any]] = []
    all_published(world.driven(arrival, said.append))
    world.all_is_there(1)
    assert world.cluster.submissions == 1
    assert types(said).count("hello") == types(said).count("end") == 1
    assert said[-2]["type"] == "end"
    assert launching.running(world.config()) == []


@pytest.mark.slow
def test_a_node_that_is_lost_and_a_bucket_that_is_away_at_the_end_cost_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job's second life goes on behind the first one's words, and waits with its own until they can be said."""
    monkeypatch.setenv(SECONDS_A_REQUEST, "0.02")
    arrival, said = world.arrived(2), list[dict[str, Any]]()
    running = world.in_background(arrival, said)
    until(lambda: "progress" in types(said), "answers", 60)
    world.cluster.lose_node()
    monkeypatch.setenv(SECONDS_A_REQUEST, "0.002")
    world.cluster.begin_anew()
    until(lambda: types(said).count("hello") == 2, "the second life", 60)
    world.wire.breaks(Answer(503, "ServiceUnavailable"), times=100_000)
    until(lambda: len(world.commits()) == 2, "the results", 60)
    assert not running.done()
    time.sleep(1.5)
    assert "end" not in types(said)
    assert not (world.cluster.folder / "code").exists()  # nothing was thrown away
    world.wire.heals()
    all_published(running.result(60))
    world.all_is_there(1, kills=1)
    assert types(said).count("end") == 1


@pytest.mark.slow
def test_a_worker_that_is_stopped_is_heard_to_its_last_word(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECONDS_A_REQUEST, "0.05")
    handle = world.started(world.arrived(4))
    until(lambda: world.n_asked() > 2, "answers", 60)
    began = time.monotonic()
    handle.stop()
    assert time.monotonic() - began < 9
    assert handle.poll() == EXIT_TRY_AGAIN
    assert world.n_asked() - len(world.journaled()) <= 1  # the one in hand
    said = [one for messages in handle.messages() for one in messages]
    assert [one["code"] for one in said if one["type"] == "end"] == [EXIT_TRY_AGAIN]
    assert "failed" not in types(said)
    assert any(one["type"] == "log" and "what was answered is in the journal" in one["text"] for one in said)


@pytest.mark.slow
def test_a_bucket_that_stays_away_keeps_no_job_from_being_stopped(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(SECONDS_A_REQUEST, "0.05")
    handle = world.started(world.arrived(4))
    until(lambda: world.n_asked() > 2, "answers", 60)
    monkeypatch.setattr(inbox, "SILENT_SECONDS", -1.0)
    world.wire.breaks(Answer(503, "SlowDown"))
    with pytest.raises(StoreError, match="SlowDown"):
        until(lambda: handle.poll() is not None, "the end", 10)
    handle.stop()
    assert handle.poll() is not None
    assert (world.cluster.folder / "code").exists()  # the job has ended


@pytest.mark.slow
def test_a_driver_that_gives_a_bucket_up_leaves_the_job_at_work(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SECONDS_A_REQUEST, "0.02")
    arrival, said = world.arrived(5), list[dict[str, Any]]()
    running = world.in_background(arrival, said)
    until(lambda: "progress" in types(said), "answers", 60)
    with monkeypatch.context() as patched:
        patched.setattr(inbox, "SILENT_SECONDS", -1.0)
        world.wire.breaks(Answer(503, "SlowDown"), times=100_000)
        with pytest.raises(StoreError, match="SlowDown"):
            running.result(60)
        world.wire.heals()
    all_published(world.driven(arrival, said.append))
    world.all_is_there(1)
    assert world.cluster.submissions == 1


@pytest.mark.slow
def test_a_worker_that_cannot_reach_the_bucket_is_told_with_where_to_look(world: World) -> None:
    world.wire.breaks(Answer(403, "AccessDenied"))
    with pytest.raises(StoreError, match="AccessDenied"):  # the driver cannot either
        world.driven(world.arrived(3))
    world.cluster.put("start", "echo no credentials >> $(cat output); echo 75 > code")
    outcomes = world.driven(world.arrive("a/step_3"))
    assert {one.status for one in outcomes} == {"failed"}
    for one in outcomes:
        assert "has never written to s3://evals/" in one.reasons[0]
        assert "/tmp/eval-platform-71.log on the node node1" in one.reasons[0]


def test_with_the_folder_of_a_worker_that_is_forgotten_goes_what_it_said(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "KEPT_WORKERS", 2)
    world.cluster.put("start", "echo 0 > code")
    for seed in range(3):
        handle = world.started(world.arrived(seed))
        world.bucket.put(f"{handle.folder.name}/1.json", pipes_line({"type": "hello", "pid": 7}).encode())
        until(lambda handle=handle: handle.poll() is not None, "its end", 10)
    kept = sorted(folder.name for folder in folders.workers(world.config()).iterdir())
    assert len(kept) == 2
    assert world.objects() == [f"{name}/{file}" for name in kept for file in ("1.json", "plan.json")]


def test_a_driver_that_ends_while_it_takes_shards_up_leaves_none_out(
    bucket: S3Store, wire: Wire, tmp_path: Path
) -> None:
    exchange, names = S3Store(f"{bucket.uri}/x", bucket.settings), ["1-made-0", "1-made-1"]
    for name in names:
        exchange.put(f"{name}/plan.json", b"{}")
    for own in names:
        workers = tmp_path / own
        wire.breaks(Answer(403, "AccessDenied"), on=f"GET .*{names[1 - names.index(own)]}/plan.json")
        with pytest.raises(StoreError, match="AccessDenied"):
            inbox.take_up(f"{exchange.uri}/{own}", workers / own, bucket.settings)
        inbox.take_up(f"{exchange.uri}/{own}", workers / own, bucket.settings)
        assert [(workers / name / "plan.json").exists() for name in names] == [True, True]


def test_drivers_on_two_machines_share_the_jobs_of_a_checkpoint_that_ray_has(
    tmp_path: Path, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers share its tasks out; of the second's folders nothing is there before it comes."""
    monkeypatch.setattr(jobs, "ASK_SECONDS", (0.0, 0.0))
    exchange, s3 = f"{EXCHANGE}/{tmp_path.name}", S3(endpoint=server.endpoint)
    with job_server() as ray:
        found = []
        for machine in ("one", "two", "two"):
            config = Config(
                folder=tmp_path,
                results=str(tmp_path / "results"),
                state=str(tmp_path / machine),
                worker=Worker(launcher="ray", exchange=exchange),
                ray=Ray(address=ray.address),
                s3=s3,
            )
            arrival = Arrival("runs/a", 1, "fingerprint", "s3://a", "a", 1, None, {})
            tasks = tuple(PlannedTask(name, f"task-{name}", f"ask-{name}") for name in ("sums", "words"))
            store = LocalStore(tmp_path / "results")
            whole = plan_of(arrival, tasks, {}, config.run_settings(), config, store)
            parts = [replace(whole, tasks=(task,)) for task in tasks]
            split = {"one": parts, "two": [whole]}[machine]  # who comes again would not share it out
            found.append(launching.launch(whole, config, split=lambda most, split=split: split))
        first, second, third = found
        for one in (second, third):
            assert [shard.handle.job for shard in one] == [shard.handle.job for shard in first] == list(ray.jobs)  # type: ignore[attr-defined]
            assert [shard.plan.tasks for shard in one] == [(task,) for task in tasks]
            assert [shard.handle.folder for shard in one] == [
                tmp_path / "two" / "workers" / shard.handle.folder.name for shard in first
            ]
        entrypoints = [told["entrypoint"] for told in ray.jobs.values()]
        assert not any(str(tmp_path) in text for text in entrypoints)
        # What the worker of the second shard says is heard by both, and its end is its own alone.
        own = S3Store(f"{exchange}/{first[1].handle.folder.name}", s3)
        own.create(
            "1.json",
            "".join(pipes_line(one) for one in ({"type": "hello", "pid": 7}, {"type": "end", "code": 0})).encode(),
        )
        for shards in (first, second):
            assert [shard.handle.poll() for shard in shards] == [None, None]  # as far as is known they wait
            assert [shard.handle.poll() for shard in shards] == [None, 0]


# ------------------------------------------------------------------------------------------------------- either end


@pytest.fixture
def wire(server: S3Server) -> Iterator[Wire]:
    with Wire(server.port) as one:
        yield one


@pytest.fixture
def bucket(wire: Wire, tmp_path: Path) -> S3Store:
    """A worker's prefix, of one try each."""
    store = S3Store(f"{EXCHANGE}/{tmp_path.name}", S3(endpoint=wire.endpoint), deadline_s=0.0)
    store.put("plan.json", b"{}")
    return store


def say(folder: Path, kind: str, **fields: Any) -> None:
    with (folder / "messages.jsonl").open("a") as file:
        file.write(pipes_line({"type": kind, **fields}))


def carried(bucket: S3Store, work: Callable[[Path], NoReturn]) -> Driver:
    return Driver(lambda: outbox.carry(bucket.uri, bucket.settings, work))


def heard(bucket: S3Store, folder: Path) -> list[dict[str, Any]]:
    folder.mkdir(exist_ok=True)
    assert Inbox(bucket, folder).fetch(is_all=True)
    return folders.messages_from(folder, 0)[0]


def n_objects(bucket: S3Store) -> int:
    return len(list(bucket.list(""))) - 1  # the plan


def test_a_flood_is_an_object_a_second_and_of_what_is_printed_the_newest(bucket: S3Store, tmp_path: Path) -> None:
    def work(folder: Path) -> NoReturn:
        began, n = time.monotonic(), 0
        while time.monotonic() - began < 2.2:
            say(folder, "progress", n=(n := n + 1))
            os.write(1, b"x" * 1023 + b"\n")
            time.sleep(0.001)
        os.write(2, b"the last words")
        os._exit(7)

    assert carried(bucket, work).wait() == 7
    assert 2 <= n_objects(bucket) <= 4
    said = heard(bucket, tmp_path / "folder")
    assert [one["n"] for one in said] == list(range(1, len(said) + 1))
    assert len(said) > 500
    printed = (tmp_path / "folder" / "worker.log").read_text()
    assert printed.endswith("\nthe last words")
    assert "bytes are left out here]" in printed
    assert len(printed) < n_objects(bucket) * (outbox.MOST_PRINTED_BYTES + 100)


def test_sigterm_goes_on_to_the_worker_and_its_last_word_arrives(bucket: S3Store, tmp_path: Path) -> None:
    def work(folder: Path) -> NoReturn:
        signal.signal(signal.SIGTERM, lambda *_: (say(folder, "end", code=EXIT_TRY_AGAIN), os._exit(EXIT_TRY_AGAIN)))
        say(folder, "hello")
        while True:
            signal.pause()

    job = carried(bucket, work)
    until(lambda: n_objects(bucket) == 1, "hello", 10)
    began = time.monotonic()
    os.kill(job.pid, signal.SIGTERM)
    assert job.wait() == EXIT_TRY_AGAIN
    assert time.monotonic() - began < 3
    assert types(heard(bucket, tmp_path / "folder")) == ["hello", "end"]


def test_told_to_leave_it_does_not_wait_for_a_bucket_that_is_away(
    bucket: S3Store, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "_LEAVE_SECONDS", 1.0)

    def work(folder: Path) -> NoReturn:
        say(folder, "hello")
        signal.pause()
        os._exit(1)

    job = carried(bucket, work)
    until(lambda: n_objects(bucket) == 1, "hello", 10)
    wire.breaks(Hang(30), times=10)
    began = time.monotonic()
    os.kill(job.pid, signal.SIGTERM)
    assert job.wait() == -signal.SIGTERM
    assert time.monotonic() - began < 3


def test_a_worker_that_is_killed_is_heard_to_its_end_and_its_carrier_ends_by_the_same_signal(
    bucket: S3Store, tmp_path: Path
) -> None:
    def work(folder: Path) -> NoReturn:
        say(folder, "hello")
        os.write(2, b"out of memory")
        os.kill(os.getpid(), signal.SIGKILL)
        os._exit(0)

    assert carried(bucket, work).wait() == -signal.SIGKILL
    assert types(heard(bucket, tmp_path / "folder")) == ["hello"]
    assert (tmp_path / "folder" / "worker.log").read_text() == "out of memory"


def test_a_worker_does_not_outlive_its_carrier(bucket: S3Store, tmp_path: Path) -> None:
    def work(folder: Path) -> NoReturn:
        (tmp_path / "pid").write_text(str(os.getpid()))
        while True:
            signal.pause()

    job = carried(bucket, work)
    pid = int(until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text(), "the worker", 10))
    job.kill()
    until(
        lambda: not Path(f"/proc/{pid}/stat").exists() or " Z " in Path(f"/proc/{pid}/stat").read_text(), "its end", 5
    )


def lives(bucket: S3Store, tmp_path: Path, *names: str) -> list[Outbox]:
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "worker.log").touch()
    return [Outbox(bucket, tmp_path / name) for name in names]


def test_of_two_lives_of_a_job_the_later_is_listened_to(bucket: S3Store, tmp_path: Path) -> None:
    """The first, on a node that was given up, lives on; the second has looked where it must go on before it."""
    first, second = lives(bucket, tmp_path, "first", "second")
    for one in (first, second, first, second, second):
        say(one.folder, "progress", of=one.folder.name)
        one.send()
    assert (first.is_superseded, second.is_superseded) == (True, False)
    assert [one["of"] for one in heard(bucket, tmp_path / "folder")] == ["first", "second", "second", "second"]


def test_an_object_whose_answer_was_lost_is_there_once(bucket: S3Store, wire: Wire, tmp_path: Path) -> None:
    (one,) = lives(bucket, tmp_path, "one")
    for n in range(3):
        say(one.folder, "progress", n=n)
        wire.breaks(Cut(down=0), on="PUT")
        with pytest.raises(StoreError):
            one.send()
        say(one.folder, "more", n=n)
        one.send()
    kinds = [(said["type"], said["n"]) for said in heard(bucket, tmp_path / "folder")]
    assert kinds == [(kind, n) for n in range(3) for kind in ("progress", "more")]
    assert not one.is_superseded


def test_objects_that_are_gone_or_cut_off_stop_nobody(bucket: S3Store, tmp_path: Path) -> None:
    """A gap while the job works, a torn object, and a gap before the end."""
    (one,) = lives(bucket, tmp_path, "one")
    for n in range(8):
        say(one.folder, "progress", n=n)
        (one.folder / "worker.log").open("a").write(f"line {n}\n")
        one.send()
    bucket.put("4.json", bucket.read("4.json")[:-20])
    for gone in (2, 3, 6):
        bucket.delete(f"{gone}.json")
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    assert [said["n"] for said in heard(bucket, ours)] == [0, 4, 6, 7]
    assert "[2 of the objects in which the worker spoke are gone" in (ours / "worker.log").read_text()
    # Two drivers in one folder, one of which has only begun.
    theirs.mkdir()
    slow, fast = Inbox(bucket, theirs), Inbox(bucket, theirs)
    assert fast.fetch(is_all=True)
    assert slow.fetch(is_all=True)
    for name in ("messages.jsonl", "worker.log", "inbox.json"):
        assert (theirs / name).read_bytes() == (ours / name).read_bytes()
    again = inbox.inbox_of(theirs, bucket.settings)
    assert again is not None
    assert (again.number, again.store.uri) == (9, bucket.uri)


def test_a_gap_is_looked_for_while_the_job_works(
    bucket: S3Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inbox, "GAP_SECONDS", 0.0)
    (one,) = lives(bucket, tmp_path, "one")
    for n in range(3):
        say(one.folder, "progress", n=n)
        one.send()
    bucket.delete("2.json")
    (tmp_path / "folder").mkdir()
    reader = Inbox(bucket, tmp_path / "folder")
    monkeypatch.setattr(inbox, "LOOK_SECONDS", 0.0)
    reader.fetch()
    reader.fetch()
    assert [said["n"] for said in folders.messages_from(reader.folder, 0)[0]] == [0, 2]


def test_a_bucket_that_stays_away_is_given_up(bucket: S3Store, wire: Wire, tmp_path: Path, monkeypatch: Any) -> None:
    reader = Inbox(bucket, tmp_path)
    wire.breaks(Answer(503, "ServiceUnavailable"), times=2)
    assert reader.fetch(is_all=True) is False
    monkeypatch.setattr(inbox, "SILENT_SECONDS", 0.0)
    with pytest.raises(StoreError, match="ServiceUnavailable"):
        reader.fetch(is_all=True)


def test_what_dagster_pipes_own_writer_writes_is_read(bucket: S3Store, wire: Wire, tmp_path: Path) -> None:
    client = botocore.session.get_session().create_client("s3", endpoint_url=wire.endpoint)
    channel = dagster_pipes.PipesS3MessageWriterChannel(client, bucket.bucket, bucket.prefix.rstrip("/"))
    custom = dagster_pipes._make_message("report_custom_message", {"payload": {"type": "hello"}})
    printed = dagster_pipes.PipesDefaultLogWriterChannel(channel, "stdout", "stdout", 1)
    channel.write_message(dagster_pipes._make_message("opened", {"extras": {}}))
    channel.write_message(custom)
    printed.write_chunk("printed\n")
    payload = "\n".join(json.dumps(message) for message in channel.flush_messages())
    channel.upload_messages_chunk(StringIO(payload), 1)
    assert heard(bucket, tmp_path / "folder") == [{"type": "hello"}]
    assert (tmp_path / "folder" / "worker.log").read_text() == "printed\n"
