"""How is one request to S3 made until it succeeds? With our own retries, a total deadline, and errors that people
can act on.

Endpoint, region, profile, role and credentials are found as every AWS tool finds them; `[s3]` of the configuration
adds what those settings lack. No credential ever stands in an error: what a server or a library says goes through
`_without_secrets`, and its own exception is not chained, since a try records tracebacks.
"""

import os
import random
import re
import threading
import time
from collections.abc import Callable
from datetime import datetime
from functools import cache
from typing import Any, TypeVar

import botocore.session
from botocore.config import Config as ClientConfig
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,
    EndpointConnectionError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
    SSLError,
)
from botocore.loaders import Loader, create_loader
from botocore.parsers import ResponseParserError
from botocore.utils import parse_timestamp

from eval_platform.config import S3
from eval_platform.errors import StoreError

# One request: 5 s to connect, 30 s without a byte, or as long as all tries may take where that is less (but 5 s). All
# tries of one request together: DEADLINE_S, and the last one that began before it.
CONNECT_S, SILENCE_S, DEADLINE_S = 5, 30, 60.0
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.1, 5.0
CONNECTIONS = 16

# What may pass by itself, beside every 5xx but "not implemented". ConditionalRequestConflict (409): another
# conditional write of this key is under way. BadDigest: the bytes were damaged on the wire.
_PASSING = {
    "BadDigest",
    "ConditionalRequestConflict",
    "InternalError",
    "OperationAborted",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "TooManyRequests",
    "429",
}
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"}
_WRONG_CREDENTIALS = (
    "the credentials are not those of this service: set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
    "to ones that are"
)
_WRONG_REGION = "set AWS_REGION, or `region` of the profile, to the bucket's own"
_FULL = "free space on that server or raise the quota; work goes on where it stopped"
_REMEDIES = {
    "NoSuchBucket": "make the bucket, or correct the address",
    "InvalidBucketName": "correct the address: s3://bucket/prefix",
    "AccessDenied": "grant s3:GetObject, s3:PutObject, s3:DeleteObject and s3:ListBucket on it (without ListBucket S3 "
    "answers 403 for whatever is absent)",
    "InvalidAccessKeyId": _WRONG_CREDENTIALS,
    "InvalidClientTokenId": _WRONG_CREDENTIALS,
    "InvalidToken": _WRONG_CREDENTIALS,
    "SignatureDoesNotMatch": _WRONG_CREDENTIALS,
    "RequestTimeTooSkewed": "set this machine's clock: S3 refuses requests that are 15 minutes off",
    "PermanentRedirect": _WRONG_REGION,
    "AuthorizationHeaderMalformed": _WRONG_REGION,
    "IllegalLocationConstraintException": _WRONG_REGION,
    "301": _WRONG_REGION,
    "KeyTooLongError": "shorten the folder names of the checkpoint, or the prefix of the results root",
    "NotImplemented": "use a server that has this (Amazon S3, Ceph and MinIO do)",
    "InvalidStorageClass": "correct [s3] storage_class",
    "KMS.NotFoundException": "correct [s3] kms_key",
    "QuotaExceeded": _FULL,
    "XMinioStorageFull": _FULL,
}
_REMEDIES |= {"403": _REMEDIES["AccessDenied"], "AllAccessDisabled": _REMEDIES["AccessDenied"]}
_LOG_IN = "log in again (`aws sso login`, or fresh AWS_* variables); work goes on where it stopped"
_NO_CREDENTIALS = "set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give this machine a role"

_USER_IN_URL = re.compile(r"//[^/@\s]+@")

T = TypeVar("T")


def code_of(error: ClientError) -> str:
    """S3's word for what is wrong; for an answer without a body (HEAD) the HTTP status."""
    return str(error.response.get("Error", {}).get("Code", ""))


def status_of(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


class Requests:
    """Requests to one S3 service, for any number of threads, and for children forked from this process.

    deadline_s: seconds for all tries of one request together.
    """

    def __init__(self, settings: S3, *, deadline_s: float = DEADLINE_S) -> None:
        self.settings = settings
        self.deadline_s = deadline_s
        self._making = threading.Lock()
        self._session: botocore.session.Session | None = None
        self._client: Any = None
        self._made_by = 0  # process number: a forked child must not share its parent's connections

    def run(self, what: str, call: Callable[[Any], T]) -> T:
        """`call(client)`, again and again until it succeeds. `what` says in an error what was tried, and on what.

        What is an answer to its caller (404, 412) the call catches itself. Of what it lets through, what may pass is
        tried again, until the deadline; the rest is a StoreError at once. An exception of another kind is the caller's.
        """
        began, tried, renewed = time.monotonic(), 0, False
        while True:
            tried += 1
            try:
                return call(self._client_here())
            except (BotoCoreError, ClientError, ResponseParserError) as error:
                expired = isinstance(error, ClientError) and code_of(error) in _EXPIRED
                again = _may_pass(error) or (expired and not renewed)
                wait = random.uniform(0.5, 1.0) * min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2.0 ** (tried - 1))
                spent = time.monotonic() - began
                if not again or spent + wait > self.deadline_s:
                    tries = f" ({tried} tries in {spent:.0f} s)" if tried > 1 else ""
                    raise self._explained(error, f"{what}{tries}") from None
                if expired:
                    # Whoever keeps the credentials file fresh has perhaps done so: it is read anew, once.
                    renewed = True
                    self._forget_client()
            time.sleep(wait)

    # -------------------------------------------------------------------------------------------- the client

    def _client_here(self) -> Any:
        with self._making:
            if self._client is None or self._made_by != os.getpid():
                self._session = botocore.session.get_session()
                self._session.register_component("data_loader", _service_models())
                parsers = self._session.get_component("response_parser_factory")
                parsers.set_parser_defaults(timestamp_parser=_timestamp)
                style = self._addressing()
                self._client = self._session.create_client(
                    "s3",
                    endpoint_url=self.settings.endpoint,
                    config=ClientConfig(
                        connect_timeout=CONNECT_S,
                        read_timeout=min(SILENCE_S, max(CONNECT_S, self.deadline_s)),
                        retries={"total_max_attempts": 1},
                        max_pool_connections=CONNECTIONS,
                        tcp_keepalive=True,
                        # Servers other than Amazon's refuse the checksums that boto3 would add; ours is Content-MD5.
                        request_checksum_calculation="when_required",
                        response_checksum_validation="when_required",
                        s3={"addressing_style": style} if style else None,
                    ),
                )
                self._made_by = os.getpid()
            return self._client

    def _forget_client(self) -> None:
        with self._making:
            self._client = None

    def _addressing(self) -> str | None:
        path_style = self.settings.path_style
        if path_style is None:
            # Who runs a server of their own seldom gives every bucket a host name.
            return "path" if self.settings.endpoint else None
        return "path" if path_style else "virtual"

    # -------------------------------------------------------------------------------------------- errors

    def _explained(self, error: Exception, what: str) -> StoreError:
        said = self._without_secrets(_said(error))
        return StoreError(f"cannot {what}: {said}", remedy=self._remedy(error))

    def _remedy(self, error: Exception) -> str:
        match error:
            case ClientError():
                code = code_of(error)
                if code in _EXPIRED:
                    return _LOG_IN
                if status_of(error) == 507:
                    return _FULL
                if _may_pass(error):
                    return "the service is overloaded or in trouble; work goes on where it stopped once it answers"
                return _REMEDIES.get(code, "look the error up in the documentation of the S3 service")
            case NoCredentialsError() | PartialCredentialsError():
                return _NO_CREDENTIALS
            case ParamValidationError():
                return _REMEDIES["InvalidBucketName"]
            case ProfileNotFound():
                return "correct AWS_PROFILE, or write that profile with `aws configure`"
            case SSLError():
                return "set AWS_CA_BUNDLE to the certificates that the server's was signed with, or correct its address"
            case _ if type(error).__name__ in ("NoRegionError", "InvalidRegionError"):
                return _WRONG_REGION
            case HTTPClientError() | ConnectionError() | IncompleteReadError() | ResponseParserError():
                return f"see whether {self._endpoint()} answers; [s3] endpoint and AWS_ENDPOINT_URL say where it is"
            case _ if "oken" in type(error).__name__ or "SSO" in type(error).__name__:
                return _LOG_IN
            case _:
                return _NO_CREDENTIALS

    def _endpoint(self) -> str:
        """Where the service is, without what a URL may carry before the host."""
        url = self._client.meta.endpoint_url if self._client is not None else self.settings.endpoint or "S3"
        return _USER_IN_URL.sub("//", url)

    def _without_secrets(self, text: str) -> str:
        """`text` without the credentials in use, should anyone ever repeat them."""
        try:
            found = self._session.get_credentials() if self._session else None
            frozen = found.get_frozen_credentials() if found else None
        except (BotoCoreError, ClientError):  # it is the credentials that cannot be had: there are none to hide
            frozen = None
        for secret in (frozen.access_key, frozen.secret_key, frozen.token) if frozen else ():
            if secret:
                text = text.replace(secret, "***")
        return _USER_IN_URL.sub("//", text)


@cache
def _service_models() -> Loader:
    """The description of S3's service, read once: a client made with it costs 30 ms, each of its own reading 160."""
    return create_loader()


def _timestamp(value: Any) -> datetime:
    """As botocore reads a time, but ISO 8601 at once: in a page of a listing that was four fifths of the work."""
    try:
        return datetime.fromisoformat(value)
    except (TypeError, ValueError):  # the time of a header (RFC 9110), or seconds since the epoch
        return parse_timestamp(value)


def _may_pass(error: Exception) -> bool:
    match error:
        case ClientError():
            return code_of(error) in _PASSING or (status_of(error) >= 500 and status_of(error) not in (501, 507))
        case SSLError():
            return "CERTIFICATE" not in str(error).upper()
        case EndpointConnectionError() | HTTPClientError() | ConnectionError() | IncompleteReadError():
            return True
        case ResponseParserError():  # an answer that was cut off
            return True
        case _:
            return False


def _said(error: Exception) -> str:
    if isinstance(error, ClientError):
        told = error.response.get("Error", {})
        return f"{code_of(error) or status_of(error)}: {told.get('Message') or f'HTTP status {status_of(error)}'}"
    return str(error)
