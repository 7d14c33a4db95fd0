"""Where is it kept? Files created once: the truth that everything else mirrors.

One module a question: `arrivals`, `tries`, `journal`, `leases`, `commits`, `decisions`, `log`, each imported by name.
"""

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


def open_store(uri: str) -> Store:
    """The store at `uri`: a folder (S3 comes with its own issue). Raises StoreError for any other scheme."""
    if "://" in uri and not uri.startswith("file://"):
        scheme = uri.split("://", 1)[0]
        raise StoreError(f"results root {uri}: no store for {scheme}://", remedy="give a folder")
    return LocalStore(uri.removeprefix("file://"))
