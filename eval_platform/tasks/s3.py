"""One object of an S3 bucket, read whole: `documents: {file: s3://bucket/path.jsonl}`.

Endpoint, region and credentials are boto3's own: AWS_ENDPOINT_URL, AWS_PROFILE and so on.
"""

from eval_platform.errors import NoData, TaskError

SCHEME = "s3://"
_ABSENT = ("NoSuchKey", "NoSuchBucket", "404")


def read_object(url: str) -> bytes:
    """The bytes under `url`. Raises NoData when S3 cannot be asked from here, TaskError when it has no such object."""
    bucket, _, key = url.removeprefix(SCHEME).partition("/")
    if not bucket or not key:
        raise TaskError(f"{url} names no object", remedy="write s3://bucket/path/to/file.jsonl")
    # Imported here: a second, which only tasks on S3 should pay.
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        client = boto3.client("s3", config=Config(connect_timeout=5, retries={"total_max_attempts": 2}))
        return client.get_object(Bucket=bucket, Key=key)["Body"].read()
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "")
        if code in _ABSENT:
            raise TaskError(f"there is no {url} ({code})", remedy="correct bucket and key") from error
        raise NoData(url, [f"S3 refused it: {error}"], remedy="give this user the right to read it") from error
    except (BotoCoreError, ValueError) as error:  # ValueError: an endpoint that is no URL
        raise NoData(
            url,
            [f"S3 cannot be asked: {error}"],
            remedy="set AWS credentials and, for a store of your own, its endpoint",
        ) from error
