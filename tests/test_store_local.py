"""What only a folder does (`test_store_face.py` has what every store does): disks, permissions, kills."""

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from machine import small_disk

from eval_platform.errors import StoreError
from eval_platform.store import LocalStore, open_store

names = st.text(alphabet="ab-.=0", min_size=1, max_size=3).filter(lambda s: s not in {".", ".."})


@settings(max_examples=50, deadline=None)
@given(
    keys=st.sets(st.lists(names, min_size=1, max_size=3).map("/".join), max_size=8),
    prefix=st.from_regex(r"([ab-]/?){0,2}", fullmatch=True),
)
def test_listing_is_the_sorted_keys_with_that_prefix(tmp_path_factory, keys, prefix):
    # A key may not be a folder of another one on a file system.
    keys = {k for k in keys if not any(other.startswith(k + "/") for other in keys)}
    store = LocalStore(tmp_path_factory.mktemp("store"))
    for key in keys:
        store.put(key, b"x")
    assert [e.key for e in store.list(prefix)] == sorted(k for k in keys if k.startswith(prefix))


def test_a_full_disk_is_named_and_leaves_nothing_behind(tmp_path):
    with small_disk(tmp_path / "small", "64k") as folder:
        store = LocalStore(folder)
        assert store.create("small", b"x" * 1000)
        with pytest.raises(StoreError, match=r"cannot write .*/large: No space left(.|\n)*free space"):
            store.create("large", b"x" * 1_000_000)
        assert [e.key for e in store.list("")] == ["small"]
        assert store.create("after", b"x")


def test_a_root_that_cannot_be_written_is_named(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(StoreError, match="cannot write"):
        LocalStore(file).put("a", b"")
    with pytest.raises(StoreError, match="gopher"):
        open_store("gopher://x")


def test_killed_while_writing_leaves_no_half_object(tmp_path):
    program = (
        "import sys; from eval_platform.store import LocalStore\n"
        "s = LocalStore(sys.argv[1])\n"
        "print('go', flush=True)\n"
        "for i in range(10**6): s.put('k', bytes([i % 256]) * 3_000_000)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    store = LocalStore(tmp_path)
    while not any(True for _ in store.list("")):
        pass
    child.kill()
    child.wait()
    body = store.read("k")
    assert len(body) == 3_000_000
    assert len(set(body)) == 1
