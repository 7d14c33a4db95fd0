"""Real servers on 127.0.0.1: transformers' own, and one of OpenAI's completions that also tells log-likelihoods.

The latter is http.server over a checkpoint, computed by transformers alone; it shares nothing with our engine. The path
says which server it is:

    /v1/completions         as vLLM: `echo` and `logprobs` of the prompt, prompts as text or tokens
    /mute/v1/completions    does not know `echo`: log-likelihoods of what it draws only
    /bos/v1/completions     puts a BOS before every prompt
    /locked/v1/completions  refuses every key, and says it
    /busy/v1/completions    HTTP 429 to the first request, then as the first
    /down/v1/completions    HTTP 503 always
    /flaky/v1/completions   HTTP 503 to the third request

Every body that was asked is appended to `asked.jsonl` in its folder.
"""

import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

MODEL = "tiny"


class _Model:
    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        torch.set_num_threads(1)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def log_probabilities(self, tokens: list[int]) -> Any:
        import torch

        with torch.no_grad():
            return torch.log_softmax(self.model(torch.tensor([tokens])).logits[0].float(), dim=-1)

    def complete(self, body: dict[str, Any], *, bos: bool, echoes: bool) -> dict[str, Any]:
        prompt = body["prompt"]
        if prompt and isinstance(prompt[0], list):
            (prompt,) = prompt
        tokens = self.tokenizer(prompt, add_special_tokens=False)["input_ids"] if isinstance(prompt, str) else prompt
        tokens = [self.tokenizer.bos_token_id, *tokens] if bos else list(tokens)
        stops = body.get("stop") or []
        drawn: list[int] = []
        scores: list[Any] = []
        text, reason = "", "length"
        while len(drawn) < body.get("max_tokens", 16) and reason == "length":
            here = self.log_probabilities([*tokens, *drawn])[-1]
            best = int(here.argmax())
            drawn.append(best)
            scores.append((float(here[best]), float(here[best])))
            if best == self.tokenizer.eos_token_id:
                reason = "stop"
                break
            text = self.tokenizer.decode(drawn)
            ends = [text.find(stop) for stop in stops if stop in text]
            if ends:
                text, reason = text[: min(ends)], "stop"
        choice: dict[str, Any] = {"index": 0, "text": text, "finish_reason": reason}
        if body.get("logprobs"):
            if body.get("echo") and echoes:
                rows = self.log_probabilities(tokens)
                of_prompt = [(float(rows[i, t]), float(rows[i].max())) for i, t in enumerate(tokens[1:])]
                scores = [(None, None), *of_prompt, *scores]
            choice["logprobs"] = {
                "token_logprobs": [own for own, _ in scores],
                "top_logprobs": [None if best is None else {"best": best} for _, best in scores],
            }
        usage = {"prompt_tokens": len(tokens), "completion_tokens": len(drawn)}
        return {"object": "text_completion", "model": MODEL, "choices": [choice], "usage": usage}


def _handler(model: _Model, folder: Path) -> type[BaseHTTPRequestHandler]:
    was_busy: list[bool] = []
    flaky: list[bool] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with (folder / "asked.jsonl").open("a") as file:
                file.write(json.dumps({"path": self.path, **body}) + "\n")
            kind = self.path.removesuffix("v1/completions").strip("/")
            if kind == "locked":
                key = self.headers.get("Authorization", "").removeprefix("Bearer ")
                self.say(401, {"error": {"message": f"Incorrect API key provided: {key}"}})
            elif kind == "flaky" and (flaky.append(True) or len(flaky) == 3):
                self.say(503, {"error": {"message": "restarting"}})
            elif kind == "down":
                self.say(503, {"error": {"message": "out of memory"}})
            elif kind == "busy" and not was_busy:
                was_busy.append(True)
                self.say(429, {"error": {"message": "Rate limit reached"}})
            elif body["model"] != MODEL:
                self.say(404, {"error": {"message": f"The model `{body['model']}` does not exist"}})
            else:
                self.say(200, model.complete(body, bos=kind == "bos", echoes=kind != "mute"))

        def say(self, status: int, body: dict[str, Any]) -> None:
            text = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: Any) -> None: ...

    return Handler


@contextmanager
def completions_server(checkpoint: Path, folder: Path) -> Iterator[str]:
    """The server in a process of its own, a fork of this one, which has torch imported already; its address."""
    folder.mkdir(parents=True, exist_ok=True)

    def serve(port: int) -> None:
        ThreadingHTTPServer(("127.0.0.1", port), _handler(_Model(checkpoint), folder)).serve_forever()

    with forked_server(serve, folder / "server.log") as address:
        yield address


@contextmanager
def transformers_serve(checkpoint: Path, log: Path) -> Iterator[str]:
    """transformers' own server, what `transformers serve CHECKPOINT --device cpu` runs, in a fork of this process."""

    def serve(port: int) -> None:
        import torch
        from transformers.cli.serve import Serve

        torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
        Serve(force_model=str(checkpoint), device="cpu", host="127.0.0.1", port=port)

    with forked_server(serve, log) as address:
        yield address


@contextmanager
def forked_server(serve: Callable[[int], None], log: Path) -> Iterator[str]:
    """`serve(port)` in a fork of this process, which has torch imported already; ended by its process number."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pid = os.fork()
    if pid == 0:
        try:
            with log.open("wb") as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
            sys.stdout = sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115 -- until it is ended
            serve(port)
        except BaseException:  # noqa: BLE001 -- the last word of a process
            traceback.print_exc()
        finally:
            os._exit(1)
    try:
        while True:
            with socket.socket() as there:
                if there.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert os.waitpid(pid, os.WNOHANG) == (0, 0), log.read_text()
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        with suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
