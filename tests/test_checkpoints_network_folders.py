"""Folders on a network file system, written over minutes by another machine: nothing is found before it is whole.

What NFS shows is done to real files: times of another clock, times that stand still while a file grows, a name before
its bytes, `.nfs...` of deleted files that somebody has open, and the rename of a whole folder at the end.
"""

import os
import shutil
import time

import pytest
from checkpoint_factory import make_checkpoint

from eval_platform.checkpoints import Found, Watch, discover
from eval_platform.checkpoints.files import list_folder
from eval_platform.config import Root

HOUR_NS = 3600 * 10**9


class Clock:
    now = 1_800_000_000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def look(tmp_path, clock):
    (tmp_path / "nfs").mkdir()
    watch = Watch(clock)

    def look(seconds=0):
        """What is seen so many seconds after the last look."""
        clock.now += seconds
        [seen] = discover([Root(name="r", path=str(tmp_path / "nfs"), quiet_seconds=30)], {}, watch)
        return seen

    return look


def stamp(folder, ns):
    for file in folder.iterdir():
        os.utime(file, ns=(ns, ns))


@pytest.mark.parametrize("skew_ns", [-HOUR_NS, HOUR_NS])
def test_a_save_that_grows_for_minutes_under_another_clock(tmp_path, look, skew_ns):
    whole = make_checkpoint(tmp_path / "whole", values=4096)
    folder = tmp_path / "nfs" / "step_1"
    shutil.copytree(whole, folder)
    body = (whole / "model.safetensors").read_bytes()
    then = time.time_ns() + skew_ns
    (folder / "model.safetensors").write_bytes(b"")
    stamp(folder, then)
    assert "its header is not written yet" in look().reason  # the name is there before its bytes
    for tenth in range(1, 11):
        (folder / "model.safetensors").write_bytes(body[: len(body) * tenth // 10])
        (folder / "optimizer.pt").write_bytes(bytes(tenth))
        stamp(folder, then)  # the times stand still: only sizes tell
        seen = look(60)
        assert not isinstance(seen, Found)
        assert not seen.refused
    (folder / "optimizer.pt").write_bytes(bytes(100))
    stamp(folder, then)
    assert "unchanged for 0 of the 30 s" in look(29).reason
    (folder / ".nfs000000000001a2b").write_bytes(b"left by a process that still has it open")
    assert "unchanged for 29 of the 30 s" in look(29).reason
    (folder / ".nfs000000000001a2b").unlink()
    assert isinstance(look(1), Found)


@pytest.mark.parametrize("unfinished", ["step_1.tmp", "tmp-checkpoint-1", "step_1.incomplete"])
def test_a_folder_renamed_at_the_end_is_found_under_its_last_name_only(tmp_path, look, unfinished):
    folder = make_checkpoint(tmp_path / "nfs" / unfinished)
    for _ in range(3):
        assert "its name says that it is not whole yet" in look(60).reason
    folder.rename(tmp_path / "nfs" / "step_1")
    assert "unchanged for 0 of the 30 s" in look(60).reason
    found = look(30)
    assert (found.key, found.step) == ("r/step_1", 1)


def test_files_are_opened_to_be_looked_at_and_one_without_the_right_is_told(tmp_path):
    folder = make_checkpoint(tmp_path / "c")
    (folder / "config.json").chmod(0)
    assert list_folder(folder, opened=True) == list_folder(folder)
