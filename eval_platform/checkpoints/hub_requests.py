"""How is the Hugging Face hub asked? Again where that may help, and no longer than whoever asks can wait.

Requests go through huggingface_hub's session: its endpoint (HF_ENDPOINT), its token (HF_TOKEN, or what `hf auth login`
has kept; left out where a redirect leads to another host), its refusal to go online (HF_HUB_OFFLINE). No token and no
signed address is ever part of a message, and no answer is read further than what was asked for.
"""

import re
import time
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from eval_platform.errors import CheckpointError, CheckpointGone, EvalPlatformError, StoreError

# All tries of one request together: for a worker, which would lose its turn; for a watcher, which looks again in half
# a minute and has other places to look at; and where the hub has had too many requests, counted over five minutes.
PATIENCE_S, LOOK_S, WINDOW_S = 60.0, 5.0, 330.0
FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 8.0
_TIMEOUT_S = (5.0, 30.0, 30.0, 30.0)  # to connect, without a byte read, without one written, for a free connection
_MAY_PASS = frozenset({408, 429, 500, 502, 503, 504})
_MOST_TOLD_BYTES = 32 << 20  # an answer of the API: a page has a thousand files, the word on a revision names them all
_AGAIN = "it is asked again by itself; look at the network, and at HF_ENDPOINT"

_T = TypeVar("_T")


def endpoint() -> str:
    """The hub's address, or that of the mirror in its place."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def _shown_endpoint() -> str:
    """For messages: the address of a mirror may hold a password."""
    return re.sub(r"//[^/@\s]+@", "//", endpoint())


def read(body: bytes, form: TypeAdapter[_T], repository: str) -> _T:
    """The JSON in `body`, which must have this form. Raises StoreError."""
    try:
        return form.validate_json(body, strict=True)
    except ValidationError as error:  # such as the page of a proxy, with status 200; or cut at _MOST_TOLD_BYTES
        first = error.errors(include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        why = f"{where}: {first['msg']}" if where else first["msg"]
        raise StoreError(
            f"hf://{repository}: what answers at {_shown_endpoint()} is no hub ({why})",
            remedy="look at HF_ENDPOINT and at proxies",
        ) from None


def ask(
    repository: str,
    revision: str | None,
    path: str,
    *,
    watching: bool,
    headers: Mapping[str, str] | None = None,
    most: int = _MOST_TOLD_BYTES,
) -> tuple[bytes, Any]:
    """(at most `most` bytes, the answer as httpx has it) for a path below the endpoint.

    repository, revision: whose files are asked for, for messages. watching: whoever asks looks again soon, and waits no
    longer than LOOK_S. Raises CheckpointError, CheckpointGone and StoreError as `hub.commit_of` says.
    """
    # HTTPError is of the httpx that huggingface_hub uses, which has had two names.
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled  # pyright: ignore[reportPrivateImportUsage]

    where = f"hf://{repository}" + (f"@{revision}" if revision else "")
    began, wait = time.monotonic(), FIRST_WAIT_S
    while True:
        patience_s = LOOK_S if watching else PATIENCE_S
        pause = wait
        try:
            body, answer = _get(f"{endpoint()}/{path}", headers or {}, most)
        except OfflineModeIsEnabled:
            raise CheckpointError(
                f"{where} cannot be looked at: HF_HUB_OFFLINE is set",
                remedy="unset HF_HUB_OFFLINE where the hub can be reached, or download the model into a watched folder",
            ) from None
        except (OSError, HTTPError) as error:  # its text may hold a signed address
            told = StoreError(
                f"{where}: the hub at {_shown_endpoint()} does not answer ({type(error).__name__})", remedy=_AGAIN
            )
        else:
            if answer.status_code < 400:
                return body, answer
            told = _refused(answer.status_code, answer.headers, where, f"{_shown_endpoint()}/{repository}")
            if answer.status_code not in _MAY_PASS:
                raise told
            if answer.status_code == 429:
                pause = max(wait, _told_wait(answer.headers))
                patience_s = LOOK_S if watching else WINDOW_S
        if time.monotonic() - began + pause > patience_s:
            raise told
        time.sleep(pause)
        wait = min(2 * wait, _LONGEST_WAIT_S)


def _get(address: str, headers: Mapping[str, str], most: int) -> tuple[bytes, Any]:
    from huggingface_hub.utils import build_hf_headers, get_session

    sent = {**build_hf_headers(library_name="eval-platform"), **headers}
    body = bytearray()
    with get_session().stream("GET", address, headers=sent, timeout=_TIMEOUT_S) as answer:
        for block in answer.iter_bytes():
            body += block
            if len(body) > most:
                break
    return bytes(body[:most]), answer


def _told_wait(headers: Mapping[str, str]) -> float:
    """Seconds after which the hub wants to be asked again; 0 where it does not say."""
    from huggingface_hub.utils import parse_ratelimit_headers

    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return limit.reset_in_seconds + 1.0
    after = headers.get("Retry-After", "")
    return float(after) if re.fullmatch(r"[0-9]{1,9}", after) else 0.0


def _refused(status: int, headers: Mapping[str, str], where: str, page: str) -> EvalPlatformError:
    """What the hub means by a status of 400 or more, and its X-Error-Code."""
    code = headers.get("X-Error-Code")
    token = "set HF_TOKEN (or run `hf auth login`)"
    if code == "GatedRepo":
        return CheckpointError(
            f"{where} is gated, and this user may not read it", remedy=f"accept its licence at {page}, then {token}"
        )
    if code == "RevisionNotFound":
        return CheckpointGone(f"{where}: there is no such revision", remedy=f"see its branches and tags at {page}")
    # 401 is what the hub says of what does not exist, too; but not of a token that it does not know.
    if code == "RepoNotFound" or (status == 401 and "Invalid credentials" not in headers.get("X-Error-Message", "")):
        return CheckpointError(
            f"{where}: there is no such repository, or it is private",
            remedy=f"mend its name; for a private one {token} of a user who may read it",
        )
    if status in (401, 403):
        return CheckpointError(f"{where}: the hub refuses this user ({status})", remedy=f"{token} that may read it")
    if status == 404:
        return CheckpointGone(f"{where}: the hub no longer has it", remedy=f"look at {page}")
    if status == 429:
        return StoreError(
            f"{where}: the hub has had too many requests from here (429)",
            remedy=f"it is asked again by itself; who has a token may ask more often: {token}",
        )
    return StoreError(f"{where}: the hub at {_shown_endpoint()} does not answer ({status})", remedy=_AGAIN)
