"""A real server of OpenAI's completions on 127.0.0.1: http.server over a checkpoint, computed by transformers alone.

It shares nothing with our engine. The path says which server it is:

    /v1/completions         as vLLM: `echo` and `logprobs` of the prompt, prompts as text or tokens
    /mute/v1/completions    does not know `echo`: log-likelihoods of what it draws only
    /bos/v1/completions     puts a BOS before every prompt
    /locked/v1/completions  refuses every key, and says it
    /busy/v1/completions    HTTP 429 to the first request, then as the first
    /down/v1/completions    HTTP 503 always

Every body that was asked is appended to `asked.jsonl` in its folder.
"""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
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
    readable, writable = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(_Model(checkpoint), folder))
            os.write(writable, str(server.server_port).encode())
            os.close(writable)
            server.serve_forever()
        finally:
            os._exit(1)
    os.close(writable)
    port = os.read(readable, 16).decode()
    os.close(readable)
    assert port, "the server ended before it listened"
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        os.kill(pid, signal.SIGTERM)
        os.waitpid(pid, 0)
