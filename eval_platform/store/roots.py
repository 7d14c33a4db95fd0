"""What is this store, and which checkpoint roots and watchers are known to it?"""

import uuid
from pathlib import Path
from typing import Any

from eval_platform.errors import ConfigError, SchemaError
from eval_platform.store import layout
from eval_platform.store.base import Store
from eval_platform.store.local import LocalStore
from eval_platform.store.records import create_record, read_record, utc_now


def open_root(store: Store) -> str:
    """The store's root id; a store that has none yet gets one.

    Raises SchemaError when a newer eval-platform has laid the store out, StoreError when it cannot be written.
    """
    create_record(
        store, layout.ROOT, {"root_id": uuid.uuid4().hex, "layout": layout.LAYOUT_VERSION, "created_at": utc_now()}
    )
    return known_layout(store, read_record(store, layout.ROOT))["root_id"]


def known_layout(store: Store, root: dict[str, Any]) -> dict[str, Any]:
    """The record `root` of the store. Raises SchemaError when a newer eval-platform has laid the store out."""
    if root["layout"] > layout.LAYOUT_VERSION:
        raise SchemaError(
            f"{store.uri} has layout version {root['layout']}; this eval-platform knows up to {layout.LAYOUT_VERSION}",
            remedy="upgrade eval-platform on this machine",
        )
    return root


def register_root(store: Store, name: str, uri: str) -> None:
    """Remember which checkpoint root `name` is; keys begin with it, so it may never come to mean another place.

    Raises ConfigError when the name stands for another uri already.
    """
    key = layout.root_registration(name)
    create_record(store, key, {"uri": uri, "registered_at": utc_now()})
    registered = read_record(store, key)["uri"]
    if registered != uri:
        raise ConfigError(
            f"checkpoint root {name!r} is {uri} here, but {registered} in the results root {store.uri}",
            remedy="give the new place a name of its own in [[checkpoints]], or set another `results` folder",
        )


def watcher_id(state_dir: Path) -> str:
    """This installation's own random id, made once and kept in `state_dir`. Raises StoreError if it cannot be."""
    state = LocalStore(state_dir)
    state.create("watcher_id", uuid.uuid4().hex.encode())
    return state.read("watcher_id").decode().strip()
