"""docker/ says what is so: files that are named exist, services fit one another, and no image gets more than it needs.

`make lint-docker` asks the tools; this asks what they cannot know.
"""

import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_worker_contract import NOT_THE_WORKERS

from eval_platform.config import load_config
from eval_platform.launching.manifests import OWN_MANIFEST
from tests import servers

ROOT = Path(__file__).parent.parent
DOCKER = ROOT / "docker"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
COMPOSE = yaml.safe_load((DOCKER / "compose.yaml").read_text())
OURS = {name: one for name, one in COMPOSE["services"].items() if "build" in one}
VALUES = yaml.safe_load((DOCKER / "kubernetes" / "dagster-values.yaml").read_text())


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[<>=\[]", one)[0] for one in requirements}


def test_the_workers_group_is_what_the_package_asks_for_less_what_the_worker_never_imports() -> None:
    wanted, groups = PROJECT["project"]["dependencies"], PROJECT["dependency-groups"]
    assert set(groups["worker"]) < set(wanted)
    assert groups["metrics"] == PROJECT["project"]["optional-dependencies"]["metrics"]
    left_out = {name.replace("-", "_") for name in names(wanted) - names(groups["worker"])}
    assert left_out <= set(NOT_THE_WORKERS)  # with which test_worker_contract.py runs a worker


def test_every_service_of_ours_is_shut_in() -> None:
    assert {"prepare", "code_location", "webserver"} <= set(OURS)
    for name, service in COMPOSE["services"].items():
        assert "no-new-privileges:true" in service["security_opt"], name
        assert "privileged" not in service
        assert "healthcheck" in service or name in ("prepare", "proxy"), name
    for name, service in [*OURS.items(), ("proxy", COMPOSE["services"]["proxy"])]:
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
    for name in ("platform", "worker"):
        text = (DOCKER / f"{name}.Dockerfile").read_text()
        assert re.findall(r"^USER (.*)$", text, re.MULTILINE) == ["10001:10001"]
        assert not re.search(r"^(ARG|ENV) .*(PASSWORD|SECRET|KEY|TOKEN)", text, re.MULTILINE)


@pytest.mark.parametrize("what", ["it is told to stop", "the daemon dies"])
def test_code_server_and_daemon_end_together(what: str, tmp_path: Path) -> None:
    (port,) = servers.free_ports(1)
    program = f"""#!{sys.executable}
import os, pathlib, signal, socket, sys, time
starter, name = os.getppid(), pathlib.Path(sys.argv[0]).name
door = socket.create_server(("127.0.0.1", {port})) if name == "dagster" else None
os.symlink(f"{{os.getpid()}} {{signal.getsignal(signal.SIGINT) == signal.SIG_IGN}}", f"{tmp_path}/{{name}}.told")
while os.getppid() == starter:
    time.sleep(0.05)
"""
    for name, text in {"dagster": program, "dagster-daemon": program, "python": "#!/bin/sh\n"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    command = [word.replace("$$", "$").replace("4000", str(port)) for word in OURS["code_location"]["command"]]
    told = [tmp_path / "dagster.told", tmp_path / "dagster-daemon.told"]
    with subprocess.Popen(
        [*servers.AS_IN_A_CONTAINER, *command], env={"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    ) as both:
        try:
            deadline = time.monotonic() + 30
            while not all(one.is_symlink() for one in told):
                assert both.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
            server, daemon = (os.readlink(one).split() for one in told)
            # Who ignores SIGINT cannot end a run by it, and Dagster's server takes SIGTERM as it takes SIGINT.
            assert (server[1], daemon[1]) == ("False", "False")
            os.kill(both.pid if what == "it is told to stop" else int(daemon[0]), signal.SIGTERM)
            both.wait(timeout=20)
        finally:
            both.kill()


def test_whoever_owns_the_checkpoints_may_run_the_platform() -> None:
    example = dict(re.findall(r"^(\w+)=(.*)$", (DOCKER / ".env.example").read_text(), re.MULTILINE))
    for name, service in OURS.items():
        assert service["user"] == f"${{PLATFORM_USER:-{example['PLATFORM_USER']}}}", name
    for name in ("platform", "worker"):
        text = (DOCKER / f"{name}.Dockerfile").read_text()
        (volumes,) = re.findall(r"^VOLUME (.*)$", text, re.MULTILINE)
        (made,) = re.findall(r"install -d .*-m 1777 (.*)$", text, re.MULTILINE)
        assert made.split() == yaml.safe_load(volumes), name  # a new volume takes on the folder's mode
        assert f"USER {example['PLATFORM_USER']}\n" in text


def test_nothing_is_reachable_from_elsewhere_but_the_proxy() -> None:
    for name, service in COMPOSE["services"].items():
        for port in service.get("ports", []):
            assert name == "proxy" or port.startswith("127.0.0.1:"), (name, port)


def test_secrets_come_from_the_environment_and_are_all_asked_for() -> None:
    text = (DOCKER / "compose.yaml").read_text()
    example = dict(re.findall(r"^(\w+)=(.*)$", (DOCKER / ".env.example").read_text(), re.MULTILINE))
    required = set(re.findall(r"\$\{(\w+):\?", text))
    assert required == {"POSTGRES_PASSWORD", "S3_ACCESS_KEY", "S3_SECRET_KEY"}
    assert {example[name] for name in required} == {""}
    for name, value in re.findall(r"^ +(\w*(?:PASSWORD|SECRET|KEY)\w*): (.*)$", text, re.MULTILINE):
        assert value.startswith("${"), name


def test_services_find_one_another() -> None:
    services = COMPOSE["services"]
    (server,) = yaml.safe_load((DOCKER / "workspace.yaml").read_text())["load_from"]
    command = services[server["grpc_server"]["host"]]["command"][-1].split()
    assert f"--port={server['grpc_server']['port']}" in command
    assert f"--location-name={server['grpc_server']['location_name']}" in command
    # Elsewhere every healthy run would be called dead: its process is another namespace's. And nothing joins another
    # container's namespace: Docker does not start such a one again where the other is not there yet.
    assert "dagster-daemon" in command
    assert not [name for name, service in services.items() if {"pid", "network_mode", "ipc"} & set(service)]
    proxied = re.findall(r"proxy_pass http://([\w-]+):3000;", (DOCKER / "nginx.conf").read_text())
    assert sorted(proxied) == ["webserver", "webserver-readonly"]
    assert set(proxied) <= set(services)
    assert "--read-only" in services["webserver-readonly"]["command"]
    endpoint = load_config(DOCKER / "eval_platform.toml").s3.endpoint
    assert endpoint is not None
    assert endpoint.split("/")[2].split(":")[0] in services
    for name, service in services.items():
        assert set(service.get("depends_on", {})) <= set(services), name
        for volume in service.get("volumes", []):
            source = re.sub(r"\$\{\w+:-(.*?)\}", r"\1", volume).split(":")[0]
            made = ("./checkpoints", "./readers", "./operators")  # by who runs it
            assert source in COMPOSE["volumes"] or source in made or (DOCKER / source).exists(), (name, volume)
    assert set(yaml.safe_load((DOCKER / "compose.gpu.yaml").read_text())["services"]) == {"code_location"}


def jobs() -> dict[str, dict[str, Any]]:
    evaluate = yaml.safe_load((DOCKER / "kubernetes" / "evaluate" / "job.yaml").read_text())
    return {"evaluate": evaluate, "worker": yaml.safe_load(OWN_MANIFEST.read_text())}


@pytest.mark.parametrize("name", ["evaluate", "worker"])
def test_a_job_is_shut_in_and_gives_up_only_where_another_try_would_say_the_same(name: str) -> None:
    job = jobs()[name]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsUser"] == 10001
    assert not pod["automountServiceAccountToken"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    final = [rule["onExitCodes"] for rule in job["podFailurePolicy"]["rules"] if "onExitCodes" in rule]
    if name == "worker":
        assert (job["backoffLimit"], final) == (0, [])  # who launched it tries again
    else:
        from eval_platform import cli_shared as cli

        assert [one["containerName"] for one in final] == [container["name"]]
        assert final[0]["values"] == [cli.EXIT_FAILED, cli.EXIT_USAGE, cli.EXIT_HELD]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_what_kubernetes_mounts_is_made() -> None:
    folder = DOCKER / "kubernetes"
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    made = [one for file in kustomization["resources"] for one in yaml.safe_load_all((folder / file).read_text())]
    claims = {one["metadata"]["name"] for one in made if one["kind"] == "PersistentVolumeClaim"}
    accounts = {one["metadata"]["name"] for one in made if one["kind"] == "ServiceAccount"}
    configs = {one["name"] for one in kustomization["configMapGenerator"]}
    (ours,) = VALUES["dagster-user-deployments"]["deployments"]
    for pod in (ours, *(job["spec"]["template"]["spec"] for job in jobs().values())):
        for volume in pod["volumes"]:
            assert volume.get("persistentVolumeClaim", {}).get("claimName") in {None, *claims}
            assert volume.get("configMap", {}).get("name") in {None, *configs}
        assert pod.get("serviceAccountName") in {None, *accounts}
    config = load_config(folder / "eval_platform.toml")
    assert config.lock_path.name in kustomization["configMapGenerator"][0]["files"]
    assert VALUES["postgresql"]["postgresqlScheme"] == "postgresql+psycopg2"
    assert not VALUES["generatePostgresqlPasswordSecret"]
