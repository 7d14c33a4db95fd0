"""Where on this machine can a program that wants files read the store's objects? In the folder itself, or in a copy.

Only objects that are created once and never changed may be asked for: a copy is not compared with the store again, so
the second time nothing is downloaded.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from eval_platform.store.base import Store
from eval_platform.store.local import LocalStore


def local_files(store: Store, keys: Iterable[str], cache: Path) -> dict[str, Path]:
    """key -> a file with its bytes, for those of `keys` that the store has.

    Of a store elsewhere the copies lie in `cache`, a folder of this store's own, which grows with what is asked for and
    may be deleted at any time. Raises StoreError when the store cannot be read or the cache cannot be written.
    """
    if isinstance(store, LocalStore):
        return {key: path for key in keys if (path := store.path(key)).is_file()}
    copies = LocalStore(cache)  # a copy has the key's place below it, so that people find it
    wanted = {key: copies.path(key) for key in keys}
    missing = [key for key, path in wanted.items() if not path.is_file()]
    with ThreadPoolExecutor(store.requests_at_once) as pool:
        found = list(pool.map(lambda key: _copied(store, key, copies), missing))
    absent = {key for key, is_there in zip(missing, found, strict=True) if not is_there}
    return {key: path for key, path in wanted.items() if key not in absent}


def _copied(store: Store, key: str, copies: LocalStore) -> bool:
    """False when the store has no such key."""
    try:
        copies.put(key, store.read(key))
    except KeyError:
        return False
    return True
