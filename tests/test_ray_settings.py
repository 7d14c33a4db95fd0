"""What [ray] may say, what goes over to its nodes, and what is told of a wrong address: no Ray is needed for these."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Literal

import pytest

from eval_platform import launching
from eval_platform.config import Config, Engine, Ray, Worker
from eval_platform.launching.environment import open_environment
from eval_platform.launching.ray import RayError
from eval_platform.plan import Plan, PlannedTask, plan_of
from eval_platform.store import LocalStore
from eval_platform.values import Arrival
from tests.servers import free_ports


def test_who_asks_ray_for_gpus_never_computes_on_a_cpu_in_silence(tmp_path: Path) -> None:
    def device(num_gpus: float, engine: str = "auto", launcher: Literal["subprocess", "ray"] = "ray") -> str:
        asked = Ray(num_gpus=num_gpus)
        config = Config(folder=tmp_path, worker=Worker(launcher=launcher), ray=asked, engine=Engine(device=engine))
        return config.run_settings().device

    assert device(1) == device(0.25) == "cuda"
    assert device(0) == "auto"
    assert device(1, "cpu") == "cpu"
    assert device(1, launcher="subprocess") == "auto"  # workers are processes of this machine


def test_no_secret_goes_where_others_can_read_it() -> None:
    secrets = ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID", "AWS_SESSION_TOKEN", "HF_TOKEN", "HUGGINGFACE_API_KEY")
    never = ("EVAL_PLATFORM_POSTGRES", "EVAL_PLATFORM_WEBHOOK", "RAY_AUTH_TOKEN", "HTTPS_PROXY", "OPENAI_API_KEY")
    secrets += ("HF_PASSWD", "PYTHON_INDEX_CREDENTIALS", "HF_HUB_PAT", "AWS_PROXY_AUTH", "HUGGING_FACE_HUB_TOKEN")
    mine = {
        **dict.fromkeys((*secrets, *never), "secret"),
        **dict.fromkeys(("AWS_ENDPOINT_URL_S3", "HF_ENDPOINT"), "https://me:secret@store.example/a"),
        "AWS_ENDPOINT_URL": "https://store.example/a@b",
        **dict.fromkeys(("AWS_REGION", "HF_HOME", "TOKENIZERS_PARALLELISM", "PYTHONPATH", "OMP_NUM_THREADS"), "sent"),
        "PATH": "of this machine",
        "MY_TOKEN": "named",
    }
    sent = open_environment(mine, ("MY_TOKEN", "EVAL_PLATFORM_WEBHOOK", "NOT_SET"))
    assert not [value for value in sent.values() if "secret" in value]
    assert sent["AWS_ENDPOINT_URL"] == "https://store.example/a@b"
    assert {name for name, value in sent.items() if value == "sent"} == {
        *("AWS_REGION", "HF_HOME", "TOKENIZERS_PARALLELISM", "PYTHONPATH", "OMP_NUM_THREADS"),
    }
    assert sent["MY_TOKEN"] == "named"
    assert "PATH" not in sent


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_token_file_that_cannot_be_read_is_told(
    tmp_path: Path, page: str, content: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "token"
    if content is not None:
        file.write_bytes(content)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(file))
    with pytest.raises(RayError, match=rf"cannot be read from {file}: (.|\n)*RAY_AUTH_TOKEN_PATH"):
        launch(tmp_path, page)


class Page(BaseHTTPRequestHandler):
    """A web server that is something else."""

    says = b""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.says)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def page() -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), Page)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def launch(folder: Path, address: str) -> None:
    worker = Worker(launcher="ray")
    config = Config(
        folder=folder,
        results=str(folder / "results"),
        state=str(folder / "state"),
        worker=worker,
        ray=Ray(address=address),
    )
    arrival = Arrival("runs/a", 1, "fingerprint", "file:///a", "a", 1, None, {})
    store = LocalStore(folder / "results")
    todo: Plan = plan_of(arrival, (PlannedTask("sums", "task", "ask"),), {}, config.run_settings(), config, store)
    launching.launch(todo, config)


def test_an_address_that_does_not_answer_is_told(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    with pytest.raises(
        RayError, match=rf"at http://127\.0\.0\.1:{port} does not answer: .*refused(.|\n)*\[ray\] address"
    ):
        launch(tmp_path, f"http://127.0.0.1:{port}")
    assert not (tmp_path / "state" / "workers").exists()


@pytest.mark.parametrize("says", [b"<html>a router's login</html>", b'{"jobs": []}', b"[1]"])
def test_an_address_of_something_else_is_told(
    tmp_path: Path, page: str, says: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Page, "says", says)
    with pytest.raises(RayError, match=r"answers as no job server of Ray's does: (.|\n)*port 8265"):
        launch(tmp_path, page)
