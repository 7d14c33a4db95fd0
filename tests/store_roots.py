"""The kinds of place a results root may be, for tests that must hold on all of them.

A test module says `pytest_plugins = ["store_roots"]` and asks for `store` (an empty one) or `new_store` (a maker of
empty ones, which property tests may ask for). Kinds: a folder; a bucket of a real S3 server on this machine; and, with
TEST_S3_ROOT=s3://bucket/prefix and the usual AWS settings, a bucket of whichever server those name.
"""

import os
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import botocore.client
import pytest
from s3_server import CREDENTIALS, REAL_SERVER, S3Server, s3_server

from eval_platform.config import S3
from eval_platform.store import Store, open_store

REAL_ROOT = os.environ.get("TEST_S3_ROOT")
# A name that S3 signs, escapes in URLs and lists escaped: every test on S3 is one of such names too.
PREFIX = "a b+c%20/ü"


@pytest.fixture(scope="session")
def s3_session() -> Iterator[S3Server]:
    """moto; or the server that `ceph_gateway.py` has started and names."""
    real = os.environ.get(REAL_SERVER)
    with nullcontext(S3Server(real, moto=False)) if real else s3_server() as server:
        server.make_bucket("results")
        yield server


@pytest.fixture
def moto_only(s3_session: S3Server) -> None:
    """For a test of what S3 and moto have and Ceph 16 has not: keys to encrypt with, versions beside conditions, users
    that come into being as they are named."""
    if not s3_session.moto:
        pytest.skip("Ceph 16 has no keys of a service, no conditions beside versions, no users made by naming them")


@pytest.fixture(scope="module")
def s3_credentials() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture
def s3_asked() -> Iterator[Callable[[], Counter[str]]]:
    """Says what was asked of S3 since it was last called: how many LIST, GET, PUT and others."""
    calls: list[str] = []
    real = botocore.client.BaseClient._make_api_call

    def recorded(client: Any, operation: str, parameters: Any) -> Any:
        calls.append("LIST" if operation.startswith("List") else operation.removesuffix("Object").upper())
        return real(client, operation, parameters)

    def asked() -> Counter[str]:
        told = Counter(calls)
        calls.clear()
        return told

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(botocore.client.BaseClient, "_make_api_call", recorded)
        yield asked


@pytest.fixture(scope="module")
def new_s3_store(s3_session: S3Server, s3_credentials: None) -> Callable[[], Store]:
    settings = S3(endpoint=s3_session.endpoint)
    return lambda: open_store(f"s3://results/{PREFIX}/{uuid.uuid4().hex}", settings)


@pytest.fixture(scope="module", params=["folder", "s3", *(["s3-real"] if REAL_ROOT else [])])
def new_store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Store]:
    match request.param:
        case "folder":
            return lambda: open_store(str(tmp_path_factory.mktemp("store")))
        case "s3":
            return request.getfixturevalue("new_s3_store")
        case _:
            return lambda: open_store(f"{REAL_ROOT}/{uuid.uuid4().hex}")


@pytest.fixture
def store(new_store: Callable[[], Store]) -> Store:
    return new_store()


@pytest.fixture
def fewer(store: Store) -> Callable[[int], int]:
    """n rounds in a folder; a few where each is many requests."""
    return lambda n: max(2, n // 5) if store.uri.startswith("s3://") else n
