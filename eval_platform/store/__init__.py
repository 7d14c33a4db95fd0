"""Where is it kept? Files created once: the truth that everything else mirrors."""

from eval_platform.errors import StoreError
from eval_platform.store.base import Entry, Store
from eval_platform.store.local import LocalStore
from eval_platform.store.records import create_record, find_record, read_record, utc_now

__all__ = ["Entry", "LocalStore", "Store", "create_record", "find_record", "open_store", "read_record", "utc_now"]


def open_store(uri: str) -> Store:
    """The store at `uri`: a folder (S3 comes with its own issue). Raises StoreError for any other scheme."""
    if "://" in uri and not uri.startswith("file://"):
        scheme = uri.split("://", 1)[0]
        raise StoreError(f"results root {uri}: no store for {scheme}://", remedy="give a folder")
    return LocalStore(uri.removeprefix("file://"))
