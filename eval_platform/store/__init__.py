"""Where is it kept? Files created once: the truth that everything else mirrors.

One module a question: `arrivals`, `tries`, `journal`, `leases`, `commits`, `decisions`, `log`, each imported by name.
"""

from eval_platform.config import S3
from eval_platform.errors import StoreError
from eval_platform.store.base import Entry, Store
from eval_platform.store.local import LocalStore
from eval_platform.store.records import create_record, find_record, read_record, utc_now
from eval_platform.store.roots import open_root, register_root, watcher_id

__all__ = [
    "Entry",
    "LocalStore",
    "Store",
    "create_record",
    "find_record",
    "open_root",
    "open_store",
    "read_record",
    "register_root",
    "utc_now",
    "watcher_id",
]


def open_store(uri: str, s3: S3 | None = None) -> Store:
    """The store at `uri`: a folder, or s3://bucket/prefix with the settings `s3`.

    Nothing is asked of it yet. Raises StoreError for any other scheme, or an address without a bucket.
    """
    if uri.startswith("s3://"):
        from eval_platform.store.s3 import S3Store  # botocore is a third of a second that a folder need not pay

        return S3Store(uri, s3)
    if "://" in uri and not uri.startswith("file://"):
        scheme = uri.split("://", 1)[0]
        raise StoreError(f"results root {uri}: no store for {scheme}://", remedy="give a folder or s3://bucket/prefix")
    return LocalStore(uri.removeprefix("file://"))
