"""What only a bucket does: faults on the wire, credentials, several parts; a real server, and a wire that breaks."""

import os
import time
import traceback
import uuid

import boto3
import pytest
from pydantic import ValidationError
from wire import Answer, Cut, Hang, Success, Wire

from eval_platform.config import S3
from eval_platform.errors import StoreError, classify
from eval_platform.store import log, open_store, s3_requests
from eval_platform.store import s3 as s3_module
from eval_platform.store.s3 import S3Store

pytest_plugins = ["store_roots"]


@pytest.fixture
def wire(s3_session):
    with Wire(s3_session.port) as wire:
        yield wire


@pytest.fixture
def store(wire, s3_credentials, monkeypatch):
    """A store behind the wire, that has seen conditions kept; nobody waits long here."""
    monkeypatch.setattr(s3_requests, "_FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(s3_requests, "_LONGEST_WAIT_S", 0.05)
    store = S3Store(f"s3://results/{uuid.uuid4().hex}", S3(endpoint=wire.endpoint), deadline_s=5)
    store.create("first", b"")
    wire.requests.clear()
    return store


def straight(store, s3_session):
    """The same place, past the wire."""
    return S3Store(store.uri, S3(endpoint=s3_session.endpoint))


def client(s3_session):
    return boto3.client("s3", endpoint_url=s3_session.endpoint)


# ------------------------------------------------------------------------------------------------ faults that pass


@pytest.mark.parametrize(
    "fault",
    [
        Answer(503, "SlowDown"),
        Answer(503, "ServiceUnavailable"),
        Answer(500, "InternalError"),
        Answer(429, "TooManyRequests"),
        Answer(409, "ConditionalRequestConflict"),
        Answer(400, "RequestTimeout"),
        Answer(400, "BadDigest"),
        Cut(up=0),
        Cut(up=300),
        Cut(down=0),
        Cut(down=40),
    ],
    ids=str,
)
def test_what_passes_is_tried_again(store, wire, fault):
    wire.breaks(fault, times=2)
    assert store.create("k", b"x" * 1000)
    wire.breaks(fault, times=2)
    assert store.read("k") == b"x" * 1000
    wire.breaks(fault, times=2)
    store.put("k", b"y" * 1000)
    wire.breaks(fault, times=2)
    assert [(entry.key, entry.size) for entry in store.list("k")] == [("k", 1000)]
    wire.breaks(fault, times=2)
    store.delete("k")
    with pytest.raises(KeyError):
        store.read("k")


def test_a_download_cut_in_its_middle_is_read_again_whole(store, wire):
    body = os.urandom(300_000)
    store.put("k", body)
    wire.breaks(Cut(down=100_000), times=3, on="^GET")
    assert store.read("k") == body
    wire.breaks(Cut(down=50_000), on="^GET")
    assert store.read("k", 1_000, 200_000) == body[1_000:200_000]


def test_an_upload_cut_in_its_middle_leaves_what_was_there(store, wire, s3_session):
    store.put("k", b"old")
    store.deadline_s = store._requests.deadline_s = 0.3
    wire.breaks(Cut(up=100_000), times=1000, on="^PUT")
    with pytest.raises(StoreError, match=r"cannot write s3://results/.*/k \(\d+ tries in 0 s\)"):
        store.put("k", b"n" * 300_000)
    assert straight(store, s3_session).read("k") == b"old"
    with pytest.raises(StoreError, match=r"cannot create s3://results/.*/new"):
        store.create("new", b"n" * 300_000)
    assert [entry.key for entry in straight(store, s3_session).list("new")] == []


def test_a_server_that_hangs_is_asked_again(store, wire, monkeypatch):
    monkeypatch.setattr(s3_requests, "SILENCE_S", 0.2)
    store._requests._forget_client()
    wire.breaks(Hang(1.0))
    assert store.create("k", b"x")
    assert len(wire.requests) == 2


def test_who_has_little_time_is_not_kept_by_a_server_that_hangs(wire, s3_credentials, monkeypatch):
    monkeypatch.setattr(s3_requests, "CONNECT_S", 0.2)
    hurried = S3Store("s3://results/x", S3(endpoint=wire.endpoint), deadline_s=0.0)
    wire.breaks(Hang(10.0))
    began = time.monotonic()
    with pytest.raises(StoreError, match="cannot read s3://results/x/k"):
        hurried.read("k")
    assert time.monotonic() - began < 5


# ------------------------------------------------------------------------------------------------ who created it?


def test_a_creation_whose_answer_was_lost_is_ours_all_the_same(store, wire):
    wire.breaks(Cut(down=0), on="^PUT")
    assert store.create("k", b"mine")
    assert [line.split()[0] for line in wire.requests] == ["PUT", "PUT", "HEAD"]
    assert not store.create("k", b"mine")  # equal bytes do not make it the second one's


def test_a_creation_that_was_cut_off_is_not_ours_when_another_came_between(store, wire, s3_session):
    other = straight(store, s3_session)
    create = other.create

    class Between(Wire):
        def _fault_for(self, head):
            if head.startswith(b"PUT") and not self.requests:
                create("k", b"same bytes")
            return super()._fault_for(head)

    with Between(s3_session.port) as between:
        between.breaks(Cut(up=3), on="^PUT")
        slow = S3Store(store.uri, S3(endpoint=between.endpoint))
        assert not slow.create("k", b"same bytes")
        assert [line.split()[0] for line in between.requests] == ["PUT", "PUT", "HEAD"]


def test_a_server_that_ignores_conditions_is_refused(wire, s3_credentials):
    wire.breaks(Success(), times=2)
    store = S3Store("s3://results/careless", S3(endpoint=wire.endpoint))
    with pytest.raises(StoreError, match=r"(?s)s3://results/careless/k was created twice.*If-None-Match.*remedy"):
        store.create("k", b"x")


def test_conditions_are_proven_once(store, wire):
    for i in range(3):
        assert store.create(f"k{i}", b"x")
    assert len(wire.requests) == 3


# ------------------------------------------------------------------------------------------------ faults that stay


def test_the_deadline_ends_it(store, wire):
    store._requests.deadline_s = 0.3
    wire.breaks(Answer(503, "SlowDown", "reduce your request rate"), times=1000)
    with pytest.raises(
        StoreError, match=r"(?s)cannot read .*/k \(\d+ tries in 0 s\): SlowDown: reduce.*remedy.*overloaded"
    ) as error:
        store.read("k")
    assert classify(error.value) == "infrastructure"
    assert 3 < len(wire.requests) < 200


@pytest.mark.parametrize(
    ("answer", "remedy"),
    [
        (Answer(403, "AccessDenied"), "s3:ListBucket"),
        (Answer(403, "InvalidAccessKeyId"), "AWS_PROFILE"),
        (Answer(403, "SignatureDoesNotMatch"), "AWS_PROFILE"),
        (Answer(403, "RequestTimeTooSkewed"), "clock"),
        (Answer(400, "AuthorizationHeaderMalformed"), "AWS_REGION"),
        (Answer(404, "NoSuchBucket"), "make the bucket"),
        (Answer(501, "NotImplemented"), "use a server that"),
        (Answer(507, "InsufficientStorage"), "free space"),
        (Answer(400, "SomethingNew"), "documentation"),
    ],
    ids=lambda value: getattr(value, "code", ""),
)
def test_what_does_not_pass_is_told_at_once_with_its_remedy(store, wire, answer, remedy):
    for do in (
        lambda: store.create("k", b"x"),
        lambda: store.read("k"),
        lambda: list(store.list("k")),
        lambda: store.put("k", b""),
        lambda: store.delete("k"),
    ):
        wire.requests.clear()
        wire.breaks(answer)
        with pytest.raises(StoreError, match=rf"(?s){store.uri}/k: {answer.code}: .*remedy: .*{remedy}"):
            do()
        assert len(wire.requests) == 1


def test_a_bucket_that_is_not_there_is_named(s3_session, s3_credentials):
    store = S3Store("s3://nowhere/runs", S3(endpoint=s3_session.endpoint))
    for do in (lambda: store.create("k", b""), lambda: store.read("k"), lambda: list(store.list(""))):
        with pytest.raises(StoreError, match=r"(?s)s3://nowhere/runs/.*NoSuchBucket.*make the bucket"):
            do()


def test_a_name_that_no_bucket_has_is_told(s3_credentials):
    with pytest.raises(StoreError, match=r"(?s)s3://my bucket/k: .*nvalid bucket name.*remedy: correct the address"):
        S3Store("s3://my bucket", S3(endpoint="http://127.0.0.1:9")).read("k")


def test_a_server_that_is_not_there_is_named(s3_credentials):
    store = S3Store("s3://results", S3(endpoint="http://127.0.0.1:9"), deadline_s=1)
    with pytest.raises(StoreError, match=r"(?s)s3://results/k.*tries.*remedy: see whether http://127.0.0.1:9 answers"):
        store.create("k", b"")


# ------------------------------------------------------------------------------------------------ credentials


def test_expired_credentials_are_read_anew_once(store, wire, monkeypatch, moto_only):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAFRESHFRESHFRESH1")
    wire.breaks(Answer(400, "ExpiredToken"))
    assert store.create("k", b"x")
    assert ["AKIAFRESH" in request for request in wire.requests] == [False, True]


def test_credentials_that_stay_expired_are_an_error_that_says_so(store, wire):
    wire.breaks(Answer(400, "ExpiredToken", "The provided token has expired."), times=5)
    with pytest.raises(StoreError, match=r"(?s)create .*/k.*ExpiredToken.*remedy: log in again") as error:
        store.create("k", b"x")
    assert len(wire.requests) == 2
    assert classify(error.value) == "infrastructure"


def test_no_credential_is_ever_printed(store, wire, monkeypatch, tmp_path):
    secrets = {
        "AWS_ACCESS_KEY_ID": "AKIASECRETSECRET1234",
        "AWS_SECRET_ACCESS_KEY": "wJalr/secret+key",
        "AWS_SESSION_TOKEN": "FwoGZXIvYXdzEHMaD",
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    told = " ".join(secrets.values())
    careless = S3Store("s3://results/x", S3(endpoint=wire.endpoint), deadline_s=0.1)
    wire.breaks(Answer(403, "SignatureDoesNotMatch", f"you sent {told}"))
    with pytest.raises(StoreError) as refused:
        careless.read("k")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:password@127.0.0.1:9")
    with pytest.raises(StoreError) as unreachable:
        S3Store("s3://results/x", deadline_s=0.1).read("k")
    for error in (refused.value, unreachable.value):
        text = "".join(traceback.format_exception(error)) + repr(error)
        assert not [secret for secret in (*secrets.values(), "password") if secret in text]
    assert "you sent *** *** ***" in str(refused.value)
    store.create("records", log.write(store, "task", name="t").encode())
    written = b"".join(store.read(entry.key) for entry in store.list("")).decode()
    assert not [secret for secret in secrets.values() if secret in written]


def test_where_there_are_no_credentials_it_says_how_to_give_some(s3_session, s3_credentials, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    with pytest.raises(StoreError, match=r"(?s)s3://results/k: Unable to locate credentials.*remedy: set AWS_PROFILE"):
        S3Store("s3://results", S3(endpoint=s3_session.endpoint)).read("k")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(StoreError, match=r"(?s)nobody.*remedy: correct AWS_PROFILE"):
        S3Store("s3://results", S3(endpoint=s3_session.endpoint)).read("k")


# ------------------------------------------------------------------------------------------------ large objects


@pytest.fixture
def large(tmp_path, monkeypatch):
    monkeypatch.setattr(s3_module, "PART_BYTES", 5 * 2**20)  # the least that S3 takes
    file = tmp_path / "large"
    file.write_bytes(os.urandom(12 * 2**20 + 17))
    return file


def test_a_large_file_goes_up_in_parts_that_are_sent_again_when_cut(store, wire, s3_session, large):
    wire.breaks(Cut(up=2_000_000), times=2, on="PUT .*partNumber=2")
    wire.breaks(Answer(503, "SlowDown"), times=2, on="PUT .*partNumber=1")
    wire.breaks(Cut(down=0), on="POST .*uploadId=")  # completed, and the answer lost
    store.put("k", large)
    parts = [request for request in wire.requests if "partNumber" in request]
    assert len(parts) == 3 + 4
    assert all("content-md5" in request.lower() for request in parts)
    assert straight(store, s3_session).read("k") == large.read_bytes()


def test_a_large_file_that_cannot_be_sent_leaves_neither_parts_nor_a_torn_object(store, wire, s3_session, large):
    store.put("k", b"old")
    store._requests.deadline_s = 0.2
    wire.breaks(Cut(up=1_000_000), times=1000, on="PUT .*partNumber=3")
    with pytest.raises(StoreError, match="cannot write part 3 of s3://results/"):
        store.put("k", large)
    assert straight(store, s3_session).read("k") == b"old"
    assert "Uploads" not in client(s3_session).list_multipart_uploads(Bucket="results")


def test_a_large_file_is_created_in_one_piece(store, wire, large, monkeypatch):
    """Servers keep the condition for one piece only. It is not sent to hear that it is there already."""
    assert store.create("k", large)
    assert not store.create("k", large)
    assert [request.partition(" ")[0] for request in wire.requests] == ["GET", "PUT", "GET"]
    monkeypatch.setattr(s3_module, "MAX_CREATED_BYTES", 2**20)
    with pytest.raises(StoreError, match=r"cannot create s3://.*/l at once: 12,582,929 bytes"):
        store.create("l", large)


# ------------------------------------------------------------------------------------------------ settings


def test_encryption_and_storage_class_are_asked_for(store, wire, s3_session, moto_only):
    settings = S3(endpoint=wire.endpoint, encryption="aws:kms", kms_key="key-1", storage_class="STANDARD_IA")
    asking = S3Store(store.uri, settings)
    asking.put("small", b"x")
    asking.create("large", b"x" * 200_000)
    stored = {
        name: client(s3_session).head_object(Bucket=store.bucket, Key=store.prefix + name)
        for name in ("small", "large")
    }
    assert {name: (one["ServerSideEncryption"], one.get("StorageClass")) for name, one in stored.items()} == {
        "small": ("aws:kms", None),
        "large": ("aws:kms", "STANDARD_IA"),
    }


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"endpoint": "minio:9000"}, "http://"),
        ({"endpoint": "http://id:secret@minio:9000"}, "no credentials"),
        ({"kms_key": "k"}, "aws:kms"),
        ({"storage_class": "DEEP_ARCHIVE"}, "restored"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, match):
    with pytest.raises(ValidationError, match=match) as error:
        S3(**settings)
    assert "S3(" not in str(error.value)


def test_the_bucket_stands_where_it_is_told_to(s3_credentials):
    def url(settings, variable=None):
        with pytest.MonkeyPatch.context() as patch:
            if variable:
                patch.setenv("AWS_ENDPOINT_URL", variable)
            made = S3Store("s3://results/x", settings)._requests._client_here()
            return made.generate_presigned_url("get_object", Params={"Bucket": "results", "Key": "k"}).split("?")[0]

    assert url(S3(endpoint="http://minio.example:9000")) == "http://minio.example:9000/results/k"
    assert url(S3(endpoint="http://minio.example", path_style=False)) == "http://results.minio.example/k"
    assert url(S3(path_style=True), "http://minio.example") == "http://minio.example/results/k"
    assert url(S3()) == "https://results.s3.amazonaws.com/k"


@pytest.mark.parametrize("uri", ["s3://", "s3:///prefix"])
def test_an_address_without_a_bucket_is_refused(uri):
    with pytest.raises(StoreError, match="names no bucket"):
        open_store(uri)


def test_what_consoles_make_as_folders_is_not_listed(store, s3_session):
    client(s3_session).put_object(Bucket=store.bucket, Key=f"{store.prefix}evaluations/", Body=b"")
    store.create("evaluations/e/1.json", b"{}")
    assert [entry.key for entry in store.list("evaluations/")] == ["evaluations/e/1.json"]
    assert [entry.key for entry in store.list("evaluations/", delimiter="/")] == ["evaluations/e/"]
    assert [entry.key for entry in store.list("evaluations", delimiter="/")] == ["evaluations/"]


def test_a_listing_tells_the_service_s_own_times(store, s3_session):
    store.put("k", b"x")
    [entry] = store.list("k")
    told = client(s3_session).head_object(Bucket=store.bucket, Key=f"{store.prefix}k")["LastModified"]
    assert entry.modified_ns // 10**9 == int(told.timestamp())


def test_a_versioned_bucket_shows_what_is_there_now(s3_session, s3_credentials, moto_only):
    s3_session.make_bucket("versioned")
    client(s3_session).put_bucket_versioning(Bucket="versioned", VersioningConfiguration={"Status": "Enabled"})
    store = S3Store("s3://versioned", S3(endpoint=s3_session.endpoint))
    assert store.create("k", b"1")
    store.put("k", b"22")
    store.delete("k")  # leaves a marker
    assert list(store.list("")) == []
    with pytest.raises(KeyError):
        store.read("k")
    assert store.create("k", b"333")
    assert not store.create("k", b"4444")
    assert [(entry.key, entry.size) for entry in store.list("")] == [("k", 3)]
