"""What is asked? Requests in a file, one JSON object a line."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from eval_platform.errors import TaskError
from eval_platform.values import Generation, Request, make_request


def write_requests(file: Path, requests: Iterable[Request]) -> None:
    """One object a line: kind, context, and continuation or settings where the kind has them."""
    with file.open("w", encoding="utf-8") as lines:
        for request in requests:
            body = {
                "kind": request.kind,
                "context": request.context,
                "continuation": request.continuation,
                "settings": asdict(request.settings) if request.settings else None,
            }
            lines.write(json.dumps({name: part for name, part in body.items() if part is not None}) + "\n")


def read_requests(file: Path, limit: int | None = None) -> list[Request]:
    """The first `limit` requests of a file as `write_requests` writes it. Raises TaskError naming the line."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()[:limit]
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(
            f"{file} cannot be read: {error}", remedy="give a file of requests, one object a line"
        ) from error
    requests = []
    for number, line in enumerate(lines, 1):
        try:
            body = json.loads(line)
            settings = body.pop("settings", None)
            if settings is not None:
                settings = Generation(**{**settings, "stop": tuple(settings.get("stop", ()))})
            requests.append(make_request(**body, settings=settings))
            _check(requests[-1])
        except (ValueError, TypeError, AttributeError) as error:
            raise TaskError(
                f"{file}: line {number} is no request: {error}",
                remedy='write {"kind": "choice", "context": "2 + 2 =", "continuation": " 4"}, or kind "rolling" with a '
                'context, or "generate" with a context and {"settings": {"max_new_tokens": 64, "stop": ["\\n"]}}',
            ) from error
    if not requests:
        raise TaskError(f"{file} has no requests", remedy="write one object a line")
    return requests


def _check(request: Request) -> None:
    needed = {"choice": ("continuation",), "rolling": (), "generate": ("settings",)}
    if request.kind not in needed:
        raise ValueError(f"its kind is {request.kind!r}")
    for field in needed[request.kind]:
        if getattr(request, field) is None:
            raise ValueError(f"a {request.kind} needs {field}")
