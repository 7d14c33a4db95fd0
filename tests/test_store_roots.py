"""What a store is and who knows it: root id, checkpoint roots, watchers."""

import pytest
from store_processes import race

from eval_platform.errors import ConfigError, SchemaError
from eval_platform.store import open_root, register_root, watcher_id

pytest_plugins = ["store_roots"]


def test_a_store_gets_one_id_whoever_opens_it_first(new_store):
    store = new_store()
    ids = race(4, lambda i: open_root(store))
    assert len(set(ids)) == 1
    assert open_root(store) == ids[0]
    assert open_root(new_store()) != ids[0]


def test_a_newer_layout_is_refused_by_name(store):
    store.create("root.json", b'{"schema_version": 1, "root_id": "x", "layout": 2}')
    with pytest.raises(SchemaError, match=r"layout version 2.*\n.*upgrade"):
        open_root(store)


def test_a_root_name_stands_for_one_place(store):
    register_root(store, "runs", "/data/a")
    register_root(store, "runs", "/data/a")
    with pytest.raises(ConfigError, match=r"(?s)'runs' is /data/b here, but /data/a.*remedy"):
        register_root(store, "runs", "/data/b")
    register_root(store, "others", "/data/b")


def test_a_watcher_keeps_its_id(tmp_path):
    ids = race(4, lambda i: watcher_id(tmp_path / "state"))
    assert len(set(ids)) == 1
    assert watcher_id(tmp_path / "state") == ids[0]
    assert watcher_id(tmp_path / "elsewhere") != ids[0]
