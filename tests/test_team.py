"""A team's platform: runs in PostgreSQL, a web server that only shows, and a proxy that asks who is there.

    make test-postgres

Real servers of all three. Passwords are looked for in everything that was written.
"""

import base64
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster_world import DagsterWorld, write_task
from postgres_server import SERVER, postgres_database
from test_old_runs import check_old_runs
from tiny_models import make_checkpoint
from typer.testing import CliRunner
from websockets.sync.client import connect
from websockets.typing import Subprotocol

from eval_platform import up
from eval_platform.cli import app
from eval_platform.instance import POSTGRES_VARIABLE, instance_text

pytestmark = [
    pytest.mark.dagster,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(SERVER not in os.environ, reason="needs a PostgreSQL server: `make test-postgres` starts one"),
]

ROOT = Path(__file__).parent.parent
PATIENCE_SECONDS = 300.0
READER, OPERATOR = ("ada", "only looks"), ("grace", "may act")


@dataclass
class Team:
    """A platform on PostgreSQL that has published one checkpoint."""

    world: DagsterWorld
    url: str  # of the web server that can act
    key: str
    run_id: str
    database: str


def until(found: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not (value := found()):
        assert time.monotonic() < deadline, f"waited {PATIENCE_SECONDS:.0f} s for {what}"
        time.sleep(1)
    return value


@pytest.fixture(scope="module")
def team(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Team]:
    folder = tmp_path_factory.mktemp("team")
    settings = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT)}
    with pytest.MonkeyPatch.context() as patch, postgres_database(os.environ[SERVER], "team") as database:
        for name, value in {**settings, POSTGRES_VARIABLE: database}.items():
            patch.setenv(name, value)
        with dg.DagsterInstance.ephemeral() as aside:  # before the platform has one, the world needs some instance
            world = DagsterWorld(folder, aside, '[tasks]\nfolders = ["tasks"]\n')
        (folder / "tasks").mkdir()
        write_task(folder / "tasks", "larger")
        synced = CliRunner().invoke(app, ["--config", str(world.file), "tasks", "sync"], catch_exceptions=False)
        assert synced.exit_code == 0, synced.output
        with (
            up.platform(world.config) as running,
            # As a process that reads DAGSTER_HOME by itself sees it, the variable in its environment.
            dg.DagsterInstance.from_config(str(world.config.dagster_home)) as instance,
        ):
            world.instance = instance
            (make_checkpoint(world.checkpoints / "a" / "step_1", seed=1) / "_SUCCESS").touch()
            until(lambda: world.sql("select * from leaderboard"), "the checkpoint on the leaderboard")
            until(lambda: world.events("summary", "runs/a/step_1"), "the run's summary")
            ended = [dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE]
            where = dg.RunsFilter(job_name="evaluate", statuses=ended)
            run = until(lambda: instance.get_runs(where), "its end")[-1]
            yield Team(world, running.url, "runs/a/step_1", run.run_id, database)


def test_from_a_dropped_folder_to_sql_with_its_runs_in_postgres(team: Team) -> None:
    (row,) = team.world.sql("select key, task, value from leaderboard")
    assert (row["key"], row["task"]) == (team.key, "larger")
    shown = team.world.events(["results", "larger"], team.key)[0]
    assert shown.metadata["score"].value == row["value"]
    assert team.world.check("larger", team.key)[1] == dg.AssetCheckSeverity.WARN
    run = team.world.instance.get_run_by_id(team.run_id)
    assert run is not None
    assert run.status == dg.DagsterRunStatus.SUCCESS
    assert run.tags["dagster/partition"] == team.key
    assert type(team.world.instance.run_storage).__name__ == "PostgresRunStorage"
    assert team.world.instance.run_monitoring_enabled
    home = team.world.config.dagster_home
    assert not list(home.rglob("*.db")), "nothing of an instance in files"


def test_the_password_is_written_nowhere(team: Team) -> None:
    password = team.database.partition("://")[2].partition(":")[2].partition("@")[0]
    assert len(password) > 8
    told = json.dumps(graphql(team.url, "{ instance { id info daemonHealth { id } } }"))
    assert password not in told
    for file in team.world.folder.rglob("*"):
        if file.is_file():
            assert password.encode() not in file.read_bytes(), file


def test_old_runs_on_postgres(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with postgres_database(os.environ[SERVER], "old_runs") as database:
        monkeypatch.setenv(POSTGRES_VARIABLE, database)
        (tmp_path / "dagster.yaml").write_text(instance_text(1, postgres=True))
        with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
            check_old_runs(instance, monkeypatch)


# ------------------------------------------------------------------------------------------ who may look, who may act


@pytest.fixture(scope="module")
def proxy(team: Team, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """docker/nginx.conf as it is, but for addresses and folders: (address to look, address to act)."""
    nginx = shutil.which("nginx", path=f"{os.environ['PATH']}{os.pathsep}/usr/sbin")
    if nginx is None:
        pytest.skip("no nginx here: apt-get install nginx-light")
    folder = tmp_path_factory.mktemp("proxy")
    shows, look, act = free_port(), free_port(), free_port()
    text = (ROOT / "docker" / "nginx.conf").read_text()
    for here, there in (
        ("listen 8080", f"listen 127.0.0.1:{look}"),
        ("listen 8081", f"listen 127.0.0.1:{act}"),
        ("http://webserver-readonly:3000", f"http://127.0.0.1:{shows}"),
        ("http://webserver:3000", team.url),
        ("/etc/nginx/", f"{folder}/"),
        ("/tmp/nginx", f"{folder}/nginx"),
    ):
        assert here in text
        text = text.replace(here, there)
    (folder / "nginx.conf").write_text(text)
    for name, (who, word) in (("readers", READER), ("operators", OPERATOR)):
        salted = hashlib.sha1(word.encode() + b"salt").digest() + b"salt"
        (folder / name).write_text(f"{who}:{{SSHA}}{base64.b64encode(salted).decode()}\n")
    workspace = team.world.config.dagster_home / "workspace.yaml"
    server = [sys.executable, "-m", "dagster_webserver", "--read-only", "-w", str(workspace)]
    user = "user root;" if os.geteuid() == 0 else ""  # the folder is ours alone
    environment = {**os.environ, "DAGSTER_HOME": str(team.world.config.dagster_home), "DAGSTER_DISABLE_TELEMETRY": "1"}
    with (
        process([*server, "-h", "127.0.0.1", "-p", str(shows)], folder / "webserver.log", environment),
        process(
            [nginx, "-e", "stderr", "-c", str(folder / "nginx.conf"), "-g", f"daemon off; {user}"],
            folder / "nginx.log",
            dict(os.environ),
        ),
    ):
        until(lambda: listens(shows) and listens(look) and listens(act), "web server and proxy")
        yield f"http://127.0.0.1:{look}", f"http://127.0.0.1:{act}"


@contextmanager
def process(command: list[str], log: Path, environment: dict[str, str]) -> Iterator[None]:
    with log.open("wb") as output:
        one = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment)
    try:
        yield
    finally:
        one.terminate()
        try:
            one.wait(20)
        except subprocess.TimeoutExpired:
            one.kill()
            one.wait(20)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def basic(who: tuple[str, str]) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(":".join(who).encode()).decode()}


def status(url: str, who: tuple[str, str] | None = None) -> int:
    request = urllib.request.Request(f"{url}/server_info", headers=basic(who) if who else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def graphql(url: str, query: str, who: tuple[str, str] | None = None) -> dict[str, Any]:
    headers = {"Content-Type": "application/json", **(basic(who) if who else {})}
    request = urllib.request.Request(f"{url}/graphql", json.dumps({"query": query}).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)["data"]


def test_only_who_has_a_password_gets_in(proxy: tuple[str, str]) -> None:
    look, act = proxy
    assert [status(look), status(act)] == [401, 401]
    assert status(look, ("ada", "a guess")) == 401
    assert status(act, READER) == 401  # who may look may not act
    assert [status(look, READER), status(act, OPERATOR)] == [200, 200]


def test_who_looks_changes_nothing(team: Team, proxy: tuple[str, str]) -> None:
    look, act = proxy
    (runs,) = graphql(look, "{ runsOrError { ... on Runs { results { runId status } } } }", READER).values()
    assert team.run_id in [run["runId"] for run in runs["results"]]
    reload = 'mutation { reloadRepositoryLocation(repositoryLocationName: "eval_platform") { __typename } }'
    delete = f'mutation {{ deletePipelineRun(runId: "{team.run_id}") {{ __typename }} }}'
    for mutation in (reload, delete):
        (found,) = graphql(look, mutation, READER).values()
        assert found["__typename"] == "UnauthorizedError", mutation
    assert team.world.instance.get_run_by_id(team.run_id) is not None
    (found,) = graphql(act, reload, OPERATOR).values()
    assert found["__typename"] == "WorkspaceLocationEntry"


def test_a_run_is_followed_through_the_proxy(team: Team, proxy: tuple[str, str]) -> None:
    """GraphQL subscriptions are a websocket: without Upgrade it would be an ordinary request, and fail."""
    look = proxy[0].replace("http://", "ws://") + "/graphql"
    query = f"""subscription {{ pipelineRunLogs(runId: "{team.run_id}") {{
        ... on PipelineRunLogsSubscriptionSuccess {{ messages {{ __typename }} }} }} }}"""
    with connect(
        look, subprotocols=[Subprotocol("graphql-ws")], additional_headers=basic(READER), max_size=None
    ) as socket_:
        socket_.send(json.dumps({"type": "connection_init"}))
        socket_.send(json.dumps({"type": "start", "id": "1", "payload": {"query": query}}))
        seen: set[str] = set()
        while "RunSuccessEvent" not in seen:
            message = json.loads(socket_.recv(timeout=60))
            if message["type"] == "data":
                seen |= {one["__typename"] for one in message["payload"]["data"]["pipelineRunLogs"]["messages"]}
        assert {"RunStartEvent", "MaterializationEvent"} <= seen
    with pytest.raises(Exception, match="401"), connect(look, subprotocols=[Subprotocol("graphql-ws")]):
        pass
