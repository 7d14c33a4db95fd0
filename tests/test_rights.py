"""The policies of docs/s3.md let each do its work, on a server that enforces them, and grant nothing else."""

import json
import re
import urllib.request
from dataclasses import asdict
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import botocore.client
import botocore.session
import pytest
from checkpoint_factory import make_checkpoint
from fault_tools import Place
from keeping_world import TOML, load
from s3_server import CREDENTIALS, S3Server, s3_server

from eval_platform import checkpoints, keeping, outbox, warehouse, worker
from eval_platform.checkpoints.announce import upload
from eval_platform.config import S3, Config, load_config
from eval_platform.errors import StoreError
from eval_platform.launching import inbox
from eval_platform.plan import Wanted, plan
from eval_platform.store import arrivals, bundles, commits, decisions, open_store, register_root
from eval_platform.tasks import read_lock, sync_tasks

ROLES = ("watcher", "worker", "reader", "its driver", "a worker elsewhere")
# An operation of the S3 API and the right that it needs (docs.aws.amazon.com, "Required permissions for Amazon S3 API
# operations").
NEEDS = {
    "ListObjectsV2": "s3:ListBucket",
    "GetObject": "s3:GetObject",
    "HeadObject": "s3:GetObject",
    "PutObject": "s3:PutObject",
    "DeleteObject": "s3:DeleteObject",
}


@pytest.fixture(scope="module")
def server():
    with s3_server() as one:
        yield one


@pytest.fixture
def policies() -> dict[str, Any]:
    text = (Path(__file__).parent.parent / "docs" / "s3.md").read_text(encoding="utf-8")
    return dict(zip(ROLES, map(json.loads, re.findall(r"```json\n(.*?)```", text, re.DOTALL)), strict=True))


def users(server: S3Server, policies: dict[str, Any]) -> dict[str, dict[str, str]]:
    """A user with each policy; their credentials. From the return on the server obeys the policies."""
    iam = botocore.session.get_session().create_client("iam", region_name="us-east-1", endpoint_url=server.endpoint)
    found = {}
    for name, policy in policies.items():
        iam.create_user(UserName=name)
        iam.put_user_policy(UserName=name, PolicyName=name, PolicyDocument=json.dumps(policy))
        key = iam.create_access_key(UserName=name)["AccessKey"]
        found[name] = {"AWS_ACCESS_KEY_ID": key["AccessKeyId"], "AWS_SECRET_ACCESS_KEY": key["SecretAccessKey"]}
    where, as_text = f"{server.endpoint}/moto-api/reset-auth", {"Content-Type": "text/plain"}
    request = urllib.request.Request(where, data=b"0", headers=as_text, method="POST")
    urllib.request.urlopen(request, timeout=30).close()
    return found


def configured(place: Place, server: S3Server) -> Config:
    file = place.folder / "eval_platform.toml"
    where = {"results": "s3://evals/team", "state": "state", "checkpoints": "s3://training/runs"}
    file.write_text(TOML.format(**where, s3=f'endpoint = "{server.endpoint}"'))
    return load_config(file)


def test_each_does_its_work_with_its_policy_and_nothing_else(server, policies, tmp_path, monkeypatch):
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    for bucket in ("evals", "training"):
        server.make_bucket(bucket)
    upload(make_checkpoint(tmp_path / "made"), "s3://training/runs/a/step_1", S3(endpoint=server.endpoint))
    place = Place(tmp_path)
    place.write_task("choices", 6)
    config = configured(place, server)
    credentials = users(server, policies)
    role, calls = "", []

    def recorded(client, operation, keys, real=botocore.client.BaseClient._make_api_call):
        calls.append((role, operation, keys["Bucket"] + (f"/{keys['Key']}" if "Key" in keys else "")))
        return real(client, operation, keys)

    monkeypatch.setattr(botocore.client.BaseClient, "_make_api_call", recorded)

    def become(who):
        nonlocal role
        role = who
        for name, value in credentials[who].items():
            monkeypatch.setenv(name, value)
        return open_store(config.results, config.s3)

    # What each does, in the order in which it comes about.
    store = become("watcher")
    sync_tasks(config.tasks, store, config.lock_path)
    register_root(store, "runs", config.checkpoints[0].path)
    (found,) = list(checkpoints.discover(config.checkpoints, {}, checkpoints.Watch(), s3=config.s3))
    assert isinstance(found, checkpoints.Found)
    arrival, _ = arrivals.register(store, watcher="w", **asdict(found))
    todo = plan(arrival, Wanted(read_lock(config.lock_path)), config, store)

    store = become("worker")
    said: list[dict[str, Any]] = []
    assert worker.work(todo, store, said.append, load=load) == 0, said
    (done,) = [message for message in said if message["type"] == "committed"]
    own = keeping.Candidate(done["evaluation_id"], 1, arrival.key, None, None, "choices", "held", "", 0)
    with pytest.raises(StoreError, match="AccessDenied"):
        keeping.prune(store, [own], actor="test", rule="none")
    calls.pop()
    assert commits.tombstone(store, done["evaluation_id"], 1) is None
    told = {"status": "published", "checks": [], "reasons": [], "gate_version": "1", "actor": "test"}
    with pytest.raises(StoreError, match="AccessDenied"):
        decisions.append(store, done["evaluation_id"], 1, **told)
    calls.pop()

    store = become("watcher")
    decisions.append(store, done["evaluation_id"], 1, **told)
    monkeypatch.setattr(bundles, "AT_LEAST", 1)
    assert bundles.bundle(store) > 0
    with pytest.raises(StoreError, match="AccessDenied"):
        store.delete(f"evaluations/{done['evaluation_id']}/1.json")
    calls.pop()

    store = become("reader")
    rows = warehouse.query(config.catalog_path, store, "select key, prompt from leaderboard join samples using (key)")
    assert rows.num_rows == 6
    with pytest.raises(StoreError, match="AccessDenied"):
        store.create("log/2030-01-01/x.json", b"{}")
    calls.pop()

    # A worker's words through the exchange, both ends of it.
    exchange, folder = "s3://evals/exchange", tmp_path / "state" / "workers" / "a-worker"
    become("its driver")
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text("{}")
    inbox.send_plan(folder, exchange, config.s3)
    become("a worker elsewhere")
    words = outbox.Outbox(open_store(f"{exchange}/a-worker", config.s3), tmp_path)
    words.store.read("plan.json")
    (tmp_path / "worker.log").write_text("printed\n")
    words.send()
    become("its driver")
    reader = inbox.inbox_of(folder, config.s3)
    assert reader is not None
    assert reader.fetch(is_all=True)
    assert (folder / "worker.log").read_text() == "printed\n"
    inbox.forget(["a-worker"], exchange, config.s3)
    assert list(open_store(exchange, config.s3).list("")) == []

    # By our own reading of the policies as well: everything asked is granted, everything granted was asked.
    for who in ROLES:
        granted = {
            (action, resource.removeprefix("arn:aws:s3:::"))
            for statement in policies[who]["Statement"]
            for action in statement["Action"]
            for resource in statement["Resource"]
        }
        used = set()
        for name, operation, where in calls:
            if name == who:
                by = {one for one in granted if one[0] == NEEDS[operation] and fnmatchcase(where, one[1])}
                assert by, f"{who}: {operation} {where}"
                used |= by
        assert used == granted, who
