"""The store in an S3 bucket: the same face, an object for a file.

What "created once" rests on is one request, PutObject with `If-None-Match: *`: the one condition that Amazon S3, Ceph
and MinIO all keep (Ceph ignores it when a multipart upload is completed, so what is created goes up in one piece;
Ceph 16 ignores it in buckets with versions too, which is found out like any server that ignores it).
A server that knows no such condition would let two workers win one slot; it is found out by the first object created
and refused.
"""

import hashlib
import math
import os
import uuid
from base64 import b64encode
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

from eval_platform.config import S3
from eval_platform.errors import StoreError
from eval_platform.store.base import Entry, check_key, check_prefix
from eval_platform.store.s3_requests import CONNECTIONS, DEADLINE_S, Requests, code_of, status_of

SCHEME = "s3://"
PAGE_KEYS = 1000  # what S3 lists at most in one answer
MAX_CREATED_BYTES = 5 * 2**30  # what one PutObject may carry
PART_BYTES = 16 * 2**20
_MAX_PARTS = 10_000
_UPLOADS_AT_ONCE = 4
# The prompts of a task are the same for every checkpoint: what is large is not sent to hear that it is there.
_LOOKED_FOR_BYTES = 2**20
# Smaller ones cost more in the classes for rarely read objects, and beats are written again and again.
_CLASSED_BYTES = 128 * 2**10
# Whose object this is, for a writer that lost the answer to its own request.
_WRITER = "eval-platform-writer"
_ABSENT = ("NoSuchKey", "404")


class S3Store:
    """Keys are below `prefix` in `bucket`; `uri` is s3://bucket/prefix. Writers on any number of machines may share it.

    deadline_s: seconds for all tries of one request together.
    """

    requests_at_once = CONNECTIONS

    def __init__(self, uri: str, settings: S3 | None = None, *, deadline_s: float = DEADLINE_S) -> None:
        self.bucket, _, prefix = uri.removeprefix(SCHEME).partition("/")
        prefix = prefix.strip("/")
        if not uri.startswith(SCHEME) or not self.bucket:
            raise StoreError(f"{uri} names no bucket", remedy="write s3://bucket/prefix")
        self.prefix = f"{prefix}/" if prefix else ""
        self.uri = f"{SCHEME}{self.bucket}/{prefix}".rstrip("/")
        self.settings = settings or S3()
        self._requests = Requests(self.settings, deadline_s=deadline_s)
        self._conditions_proven = False

    def list(self, prefix: str, delimiter: str | None = None, after: str | None = None) -> Iterator[Entry]:
        check_prefix(prefix)
        where: dict[str, Any] = {"Bucket": self.bucket, "Prefix": self.prefix + prefix, "MaxKeys": PAGE_KEYS}
        if delimiter is not None:
            where["Delimiter"] = delimiter
        if after is not None:
            where["StartAfter"] = self.prefix + after
        while True:
            page = self._requests.run(f"list {self._named(prefix)}", lambda client: client.list_objects_v2(**where))
            for entry in self._entries(page):
                # S3 starts after a key, and so would give a common prefix again that begins before it.
                if after is None or entry.key > after:
                    yield entry
            if not page.get("IsTruncated"):
                return
            where["ContinuationToken"] = page["NextContinuationToken"]

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        return self._read(key, start, end)

    def read_listed(self, entry: Entry, start: int = 0, end: int | None = None) -> bytes:
        """As `read`, of the very object that was listed: KeyError also when another has since taken its place."""
        return self._read(entry.key, start, end, entry.etag)

    def _read(self, key: str, start: int, end: int | None, etag: str | None = None) -> bytes:
        where = self._where(key)
        empty = end is not None and end <= start
        if start or end is not None:
            # An empty range cannot be asked for; a byte of it tells whether the key is there.
            where["Range"] = f"bytes={start}-" if end is None else f"bytes={start}-{max(end - 1, start)}"

        def get(client: Any) -> bytes | None:
            try:
                answer = client.get_object(**where)
                # Compared here, because servers differ in what they take If-Match to be.
                if etag is not None and answer["ETag"].strip('"') != etag:
                    answer["Body"].close()  # unread: its connection, which holds the rest, goes with it
                    return None
                return answer["Body"].read()
            except ClientError as error:
                if code_of(error) in _ABSENT:
                    return None
                if status_of(error) == 416:  # begins behind the end
                    return b""
                raise

        body = self._requests.run(f"read {self._named(key)}", get)
        if body is None:
            raise KeyError(key)
        return b"" if empty else body

    def put(self, key: str, body: bytes | Path) -> None:
        size = _size(body)
        if isinstance(body, Path) and size > PART_BYTES:
            self._put_parts(key, body, size)
            return
        with _Body(body) as whole:
            self._requests.run(
                f"write {self._named(key)}", lambda client: client.put_object(**self._where(key), **self._object(whole))
            )

    def create(self, key: str, body: bytes | Path) -> bool:
        size = _size(body)
        if size > MAX_CREATED_BYTES:
            raise StoreError(
                f"cannot create {self._named(key)} at once: {size:,} bytes, S3 takes {MAX_CREATED_BYTES:,}",
                remedy="ask fewer items in one task",
            )
        if size >= _LOOKED_FOR_BYTES and self._is_there(key):
            return False
        writer = uuid.uuid4().hex
        with _Body(body) as whole:
            created = self._create(key, whole, writer)
            if created and not self._conditions_proven and self._create(key, whole, writer, again=True):
                raise StoreError(
                    f"{self._named(key)} was created twice: this server ignores If-None-Match",
                    remedy="keep results on a server that has conditional writes, or in a folder",
                )
        self._conditions_proven = True
        return created

    def delete(self, key: str) -> None:
        self._requests.run(f"delete {self._named(key)}", lambda client: client.delete_object(**self._where(key)))

    # ------------------------------------------------------------------------------------------------ writing

    def _create(self, key: str, whole: "_Body", writer: str, *, again: bool = False) -> bool:
        unsure = False  # whether an earlier try may have been carried out, its answer lost

        def put(client: Any) -> bool:
            nonlocal unsure
            try:
                client.put_object(
                    **self._where(key), **self._object(whole), IfNoneMatch="*", Metadata={_WRITER: writer}
                )
            except ClientError as error:
                if status_of(error) == 412:
                    return unsure and not again and self._is_of(client, key, writer)
                unsure = True
                raise
            except BotoCoreError:
                unsure = True
                raise
            return True

        return self._requests.run(f"create {self._named(key)}", put)

    def _is_there(self, key: str) -> bool:
        try:
            self.read(key, 0, 1)
        except KeyError:
            return False
        return True

    def _is_of(self, client: Any, key: str, writer: str) -> bool:
        try:
            found = client.head_object(**self._where(key))
        except ClientError as error:
            if code_of(error) in _ABSENT:  # deleted since
                return False
            raise
        return found.get("Metadata", {}).get(_WRITER) == writer

    def _put_parts(self, key: str, body: Path, size: int) -> None:
        """In several parts at once, each with its checksum; the object changes when the last step is done."""
        named, writer = self._named(key), uuid.uuid4().hex
        part_bytes = max(PART_BYTES, math.ceil(size / _MAX_PARTS))
        begun = self._requests.run(
            f"write {named}",
            lambda client: client.create_multipart_upload(
                **self._where(key), **self._stored_as(size), Metadata={_WRITER: writer}
            ),
        )
        upload = {**self._where(key), "UploadId": begun["UploadId"]}

        def send(number: int) -> dict[str, Any]:
            part = _read_part(body, (number - 1) * part_bytes, part_bytes)
            sent = self._requests.run(
                f"write part {number} of {named}",
                lambda client: client.upload_part(**upload, PartNumber=number, Body=part, ContentMD5=_md5(part)),
            )
            return {"PartNumber": number, "ETag": sent["ETag"]}

        def complete(client: Any) -> None:
            try:
                client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})
            except ClientError as error:
                # Completed by an earlier try whose answer was lost.
                if code_of(error) != "NoSuchUpload" or not self._is_of(client, key, writer):
                    raise

        try:
            with ThreadPoolExecutor(_UPLOADS_AT_ONCE) as pool:
                parts = list(pool.map(send, range(1, math.ceil(size / part_bytes) + 1)))
            self._requests.run(f"write {named}", complete)
        except BaseException as error:
            try:
                self._requests.run(f"abandon {named}", lambda client: client.abort_multipart_upload(**upload))
            except StoreError as left:
                error.add_note(f"its parts are left in the bucket, where they cost storage: {left}")
            raise

    def _object(self, whole: "_Body") -> dict[str, Any]:
        return {"Body": whole.from_start(), "ContentMD5": whole.md5, **self._stored_as(whole.size)}

    def _stored_as(self, size: int) -> dict[str, Any]:
        """Encryption and storage class of an object of `size` bytes."""
        settings = self.settings
        stored: dict[str, Any] = {}
        if settings.encryption:
            stored["ServerSideEncryption"] = settings.encryption
        if settings.kms_key:
            stored["SSEKMSKeyId"] = settings.kms_key
        if settings.storage_class and size >= _CLASSED_BYTES:
            stored["StorageClass"] = settings.storage_class
        return stored

    # ------------------------------------------------------------------------------------------------ naming

    def _where(self, key: str) -> dict[str, Any]:
        check_key(key)
        return {"Bucket": self.bucket, "Key": self.prefix + key}

    def _named(self, key: str) -> str:
        return f"{SCHEME}{self.bucket}/{self.prefix}{key}"

    def _entries(self, page: dict[str, Any]) -> Iterator[Entry]:
        """A page's objects and common prefixes in the order of their keys."""
        found = [Entry(item["Prefix"], 0, "") for item in page.get("CommonPrefixes", ())]
        found += [
            Entry(item["Key"], item["Size"], item["ETag"].strip('"'), round(item["LastModified"].timestamp() * 1e9))
            for item in page.get("Contents", ())
        ]
        for entry in sorted(found, key=lambda entry: entry.key):
            # What consoles make as a folder, an empty object whose name ends in a slash, is none of ours.
            if not (entry.etag and entry.key.endswith("/")):
                yield replace(entry, key=entry.key.removeprefix(self.prefix))


class _Body:
    """What is sent, perhaps several times: its size, its checksum, and itself from the start."""

    def __init__(self, body: bytes | Path) -> None:
        self._file = body.open("rb") if isinstance(body, Path) else None
        self._bytes = b"" if isinstance(body, Path) else body
        self.size = _size(body)
        if self._file is not None:
            digest = hashlib.file_digest(self._file, lambda: hashlib.md5(usedforsecurity=False))
            self.md5 = b64encode(digest.digest()).decode()
        else:
            self.md5 = _md5(self._bytes)

    def from_start(self) -> Any:
        if self._file is None:
            return self._bytes
        self._file.seek(0)
        return self._file

    def __enter__(self) -> "_Body":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()


def _size(body: bytes | Path) -> int:
    return body.stat().st_size if isinstance(body, Path) else len(body)


def _md5(body: bytes) -> str:
    """Content-MD5 (RFC 1864): the one checksum that every S3 server compares with what it got."""
    return b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()


def _read_part(file: Path, start: int, length: int) -> bytes:
    with file.open("rb") as opened:
        opened.seek(start, os.SEEK_SET)
        return opened.read(length)
