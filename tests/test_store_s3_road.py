"""Checkpoints in a bucket, results in a bucket, SQL over them: what folders give, from any machine, through faults."""

import os
import signal
import uuid
from dataclasses import asdict

import pytest
from fault_tools import Place, forked
from wire import Answer, Wire

from eval_platform import checkpoints
from eval_platform.config import S3, Root
from eval_platform.store import arrivals, open_store, watcher_id
from eval_platform.store.s3 import S3Store
from eval_platform.worker import FLUSH_RESPONSES

pytestmark = pytest.mark.slow
pytest_plugins = ["store_roots"]

PAUSE = 70  # of 80 requests: one segment of 64 is journaled, 6 answers are in hand


class Bucket(Place):
    """A place whose checkpoints and results are in a bucket, reached over a wire."""

    def __init__(self, folder, endpoint):
        self.settings = S3(endpoint=endpoint)
        super().__init__(folder)

    def use(self, results):
        self.results = f"s3://results/road/{uuid.uuid4().hex}"
        self.store = open_store(self.results, self.settings)
        self.arriving = S3Store(f"s3://results/arriving/{uuid.uuid4().hex}", self.settings)

    def config(self, state="state"):
        roots = (Root(name="runs", path=self.arriving.uri, quiet_seconds=0),)
        return super().config(state).model_copy(update={"s3": self.settings, "checkpoints": roots})

    def checkpoint(self, name="a/step_1", *, seed=0):
        folder = super().checkpoint(name, seed=seed)
        for file in folder.iterdir():
            self.arriving.put(f"{name}/{file.name}", file.read_bytes())

    def arrive(self, name="a/step_1", *, state="state"):
        config = self.config(state)
        [found] = checkpoints.discover(config.checkpoints, {}, checkpoints.Watch(), s3=config.s3)
        named = f"{self.arriving.uri}/{name}"
        assert found == checkpoints.locate(named, config.checkpoints, config.cache_dir, lambda *_: None, config.s3)
        return arrivals.register(self.store, watcher=watcher_id(config.state_dir), **asdict(found))[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The same checkpoint and task with results in a folder: what the bucket must come to."""
    place = Place(tmp_path_factory.mktemp("folder"))
    place.write_task("sums")
    place.sync()
    place.checkpoint()
    with forked(place):
        assert [outcome.status for outcome in place.drive(place.arrive())] == ["published"]
    return place


@pytest.fixture
def wire(s3_session, s3_credentials):
    with Wire(s3_session.port) as wire:
        yield wire


@pytest.fixture
def bucket(tmp_path, wire):
    place = Bucket(tmp_path, wire.endpoint)
    place.write_task("sums")
    place.sync()
    place.checkpoint()
    with forked(place):
        yield place


SAMPLES = "select task, position, sample_id, prompt, chosen, log_likelihood from samples order by all"


def test_a_result_in_a_bucket_is_the_result_in_a_folder_and_sql_downloads_samples_once(bucket, folder, wire):
    wire.breaks(Answer(503, "SlowDown"), times=5, on="^PUT")
    assert [outcome.status for outcome in bucket.drive(bucket.arrive())] == ["published"]
    assert bucket.board() == folder.board() != []
    assert bucket.sql(SAMPLES) == folder.sql(SAMPLES) != []
    wire.requests.clear()
    assert len(bucket.sql(SAMPLES)) == 40
    assert not [request for request in wire.requests if "samples/" in request or "prompts/" in request]
    assert bucket.problems() == []

    # Another machine: a state of its own, an empty catalog and cache. It finds everything done.
    asked = bucket.asked()
    assert [outcome.status for outcome in bucket.drive(bucket.arrive(state="other"), state="other")] == ["published"]
    assert bucket.asked() == asked
    assert bucket.board(state="other") == folder.board()
    assert bucket.sql(SAMPLES, state="other") == folder.sql(SAMPLES)


def test_what_a_killed_worker_had_answered_is_not_asked_again_on_another_machine(bucket, folder):
    arrival = bucket.arrive()
    bucket.command("pause_answer", PAUSE)
    first = bucket.launch(arrival)
    os.kill(bucket.paused(), signal.SIGKILL)
    assert first.process.wait() == -signal.SIGKILL
    bucket.revoke("pause_answer")
    journaled = set(bucket.journaled())
    assert len(journaled) == FLUSH_RESPONSES
    asked_first = len(bucket.asked())
    assert [outcome.status for outcome in bucket.drive(arrival, state="other")] == ["published"]
    assert not journaled & set(bucket.asked()[asked_first:])
    assert len(bucket.commits()) == 1
    assert bucket.board(state="other") == folder.board()
