"""What lies in the bucket, and what was ever written there? Read with boto3 alone, by nothing of the platform's own.

The bucket keeps versions: an object that was written a second time, or deleted, has a history that says so, whatever
the platform's listings and readers make of it.
"""

from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import boto3
from botocore.config import Config as Settings

_AT_ONCE = 8
# moto copies all versions for each page of them, so that a page must hold all.
_PAGE = 1_000_000


@dataclass(frozen=True)
class Bucket:
    """Keys are those below the root's prefix. written: how often each was; deleted: those that ever were."""

    bodies: Mapping[str, bytes]
    written: Mapping[str, int]
    deleted: frozenset[str]

    def under(self, folder: str, suffix: str = "") -> list[str]:
        return sorted(key for key in self.bodies if key.startswith(folder) and key.endswith(suffix))


def keep_versions(endpoint: str, name: str) -> None:
    boto3.client("s3", endpoint_url=endpoint).put_bucket_versioning(
        Bucket=name, VersioningConfiguration={"Status": "Enabled"}
    )


def read(endpoint: str, uri: str) -> Bucket:
    """Everything below `uri` (s3://bucket/prefix)."""
    client = boto3.client("s3", endpoint_url=endpoint, config=Settings(max_pool_connections=_AT_ONCE))
    name, _, prefix = uri.removeprefix("s3://").partition("/")
    written: Counter[str] = Counter()
    deleted: set[str] = set()
    pages = client.get_paginator("list_object_versions").paginate(
        Bucket=name, Prefix=f"{prefix}/", PaginationConfig={"PageSize": _PAGE}
    )
    for page in pages:
        written.update(one["Key"].removeprefix(f"{prefix}/") for one in page.get("Versions", ()))
        deleted |= {one["Key"].removeprefix(f"{prefix}/") for one in page.get("DeleteMarkers", ())}
    there = sorted(written.keys() - deleted)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        bodies = pool.map(lambda key: client.get_object(Bucket=name, Key=f"{prefix}/{key}")["Body"].read(), there)
        return Bucket(dict(zip(there, bodies, strict=True)), written, frozenset(deleted))
