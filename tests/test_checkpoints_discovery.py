"""What arrives under a root: found once, when it is whole and quiet, whatever else lies there."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from checkpoint_factory import make_checkpoint
from machine import without_power_over_files

from eval_platform.checkpoints import Found, Watch, discover, hold, locate
from eval_platform.checkpoints.description import describe
from eval_platform.checkpoints.watch import CAPACITY
from eval_platform.config import Root
from eval_platform.errors import CheckpointError, ConfigError
from eval_platform.values import Arrival, Incomplete


class Clock:
    """Wall time that a test moves. Starts well after every file's own time."""

    def __init__(self):
        self.now = time.time() + 1000

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def top(tmp_path):
    folder = tmp_path / "runs"
    folder.mkdir()
    return folder


def root(top, name="r", **fields):
    return Root(name=name, path=str(top), **fields)


def look(roots, known=None, watch=None, sweep=()):
    """(found, incomplete) by key."""
    roots = roots if isinstance(roots, list) else [roots]
    seen = list(discover(roots, known or {}, Watch() if watch is None else watch, sweep))
    return (
        {one.key: one for one in seen if isinstance(one, Found)},
        {one.key: one for one in seen if isinstance(one, Incomplete)},
    )


def overwrite(file: Path, data: bytes | None = None):
    """In place, same size unless `data` is given, with a new mtime."""
    before = file.stat()
    file.write_bytes(data or bytes(before.st_size))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000_000))


def test_checkpoints_are_found_under_several_roots(top, tmp_path):
    make_checkpoint(top / "a/step_10")
    make_checkpoint(top / "a/step_20")
    make_checkpoint(tmp_path / "other/solo")
    found, incomplete = look([root(top, quiet_seconds=0), root(tmp_path / "other", "o", quiet_seconds=0)])
    assert set(found) == {"r/a/step_10", "r/a/step_20", "o/solo"}
    assert not incomplete
    assert found["r/a/step_10"].uri == str(top / "a/step_10")
    assert (found["r/a/step_10"].run, found["r/a/step_10"].step) == ("a", 10)
    assert (found["o/solo"].run, found["o/solo"].step) == ("o", None)


def test_what_is_no_checkpoint_is_passed_over(top):
    for name in ("logs", ".hidden/step_1", "a/b/c"):
        (top / name).mkdir(parents=True)
    (top / "notes.txt").write_text("x")
    (top / "logs/events").write_text("x")
    make_checkpoint(top / ".hidden/step_1")
    make_checkpoint(top / "a/step_1")
    (top / "a/latest").symlink_to("step_1")
    found, incomplete = look(root(top, quiet_seconds=0))
    assert set(found) == {"r/a/step_1"}
    assert not incomplete


def test_final_model_above_its_checkpoints_hides_none(top):
    # transformers' Trainer: save_model(output_dir) beside output_dir/checkpoint-<step>
    make_checkpoint(top / "out")
    make_checkpoint(top / "out/checkpoint-10")
    (top / "out/checkpoint-10/1_Pooling").mkdir()
    (top / "out/checkpoint-10/1_Pooling/config.json").write_text("{}")
    found, incomplete = look(root(top, quiet_seconds=0))
    assert set(found) == {"r/out", "r/out/checkpoint-10"}
    assert not incomplete


def test_the_root_may_be_a_checkpoint_itself(top):
    make_checkpoint(top)
    found, _ = look(root(top, quiet_seconds=0))
    assert set(found) == {"r"}
    assert look(root(top), {"r": found["r"].fingerprint}) == ({}, {})


def test_a_training_config_above_checkpoints_is_not_waited_for(top):
    make_checkpoint(top / "run/step_1")
    (top / "run/config.json").write_text("{}")
    assert set(look(root(top, quiet_seconds=0))[1]) == set()
    known = {"r/run/step_1": look(root(top, quiet_seconds=0))[0]["r/run/step_1"].fingerprint}
    assert look(root(top), known) == ({}, {})
    shutil.rmtree(top / "run/step_1")
    assert look(root(top))[1]["r/run"].reason == "no weights yet (model.safetensors)"


def test_odd_names_become_legal_keys(top):
    make_checkpoint(top / "läuft gut=ja/step 3")
    found, _ = look(root(top, quiet_seconds=0))
    assert set(found) == {"r/l=C3=A4uft=20gut=3Dja/step=203"}
    assert next(iter(found.values())).run == "läuft gut=ja"


def test_a_name_that_is_not_utf8_is_told_and_stops_nothing(top):
    make_checkpoint(top / "good")
    os.mkdir(os.fsencode(top) + b"/bad\xff")
    found, incomplete = look(root(top, quiet_seconds=0))
    assert set(found) == {"r/good"}
    assert [one.refused for one in incomplete.values()] == [True]
    assert "not UTF-8" in next(iter(incomplete.values())).reason


def test_a_missing_root_is_told_and_stops_nothing(top, tmp_path):
    make_checkpoint(top / "a")
    found, incomplete = look([root(tmp_path / "none", "n"), root(top, quiet_seconds=0)])
    assert set(found) == {"r/a"}
    assert "is no folder; create it" in incomplete["n"].reason


def test_a_folder_without_the_right_to_it_is_told_and_stops_nothing(top):
    make_checkpoint(top / "a")
    (top / "locked").mkdir(mode=0o000)
    code = (
        "import sys; sys.path[:0] = sys.argv[2:]\n"
        "from test_checkpoints_discovery import look, root\n"
        "found, incomplete = look(root(sys.argv[1], quiet_seconds=0))\n"
        "print([*found], incomplete['r/locked'].reason)"
    )
    command = without_power_over_files([sys.executable, "-c", code, str(top), str(Path(__file__).parent)])
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert told.startswith("['r/a'] ")
    assert "cannot be read" in told


def test_a_pattern_with_an_unknown_field_is_a_configuration_error(top):
    for pattern in ("{run}/{stp}", "{step}/{step}"):
        with pytest.raises(ConfigError, match=r"use \{run\} and \{step\}"):
            look(root(top, pattern=pattern))


# Quiet period


def test_a_new_folder_is_found_once_it_was_quiet(top, clock):
    make_checkpoint(top / "c")
    watch = Watch(clock)
    found, incomplete = look(root(top, quiet_seconds=10), watch=watch)
    assert not found
    assert "unchanged for 0 of the 10 s" in incomplete["r/c"].reason
    clock.now += 9.9
    assert not look(root(top, quiet_seconds=10), watch=watch)[0]
    clock.now += 0.1
    assert set(look(root(top, quiet_seconds=10), watch=watch)[0]) == {"r/c"}
    # found again, until it is registered; then neither
    found = look(root(top, quiet_seconds=10), watch=watch)[0]
    known = {"r/c": found["r/c"].fingerprint}
    assert look(root(top, quiet_seconds=10), known, watch) == ({}, {})
    assert look(root(top, quiet_seconds=10), known, watch) == ({}, {})
    assert watch.to_json() == "{}"


def test_shards_allocated_ahead_and_filled_later_wait_until_the_last_byte(top, clock):
    """Right size, right header, data still coming: only time can tell."""
    folder = make_checkpoint(top / "c", shards=2, values=256)
    shard = folder / "model-00002-of-00002.safetensors"
    whole = shard.read_bytes()
    watch = Watch(clock)
    done = len(whole) - 1024
    shard.write_bytes(whole[:done] + bytes(1024))
    while done < len(whole):
        assert not look(root(top, quiet_seconds=10), watch=watch)[0]
        clock.now += 9
        with shard.open("r+b") as file:
            file.seek(done)
            file.write(whole[done : done + 256])
        done += 256
        os.utime(shard, ns=(0, int(clock.now * 1e9)))
    assert not look(root(top, quiet_seconds=10), watch=watch)[0]
    clock.now += 10
    found, _ = look(root(top, quiet_seconds=10), watch=watch)
    assert set(found) == {"r/c"}
    assert shard.read_bytes() == whole


def test_an_optimizer_still_being_saved_keeps_the_folder_waiting(top, clock):
    folder = make_checkpoint(top / "c")
    watch = Watch(clock)
    look(root(top, quiet_seconds=10), watch=watch)
    clock.now += 9
    (folder / "optimizer.pt").write_bytes(b"x")
    look(root(top, quiet_seconds=10), watch=watch)
    clock.now += 9
    assert not look(root(top, quiet_seconds=10), watch=watch)[0]
    clock.now += 1
    assert look(root(top, quiet_seconds=10), watch=watch)[0]


def test_a_clock_stepping_back_makes_it_wait_again_never_less(top, clock):
    make_checkpoint(top / "c")
    watch = Watch(clock)
    look(root(top, quiet_seconds=10), watch=watch)
    clock.now += 9 - 3600
    assert not look(root(top, quiet_seconds=10), watch=watch)[0]
    clock.now += 9
    assert not look(root(top, quiet_seconds=10), watch=watch)[0]
    clock.now += 1
    assert look(root(top, quiet_seconds=10), watch=watch)[0]


def test_the_watch_travels_in_a_cursor(top, clock):
    make_checkpoint(top / "c")
    watch = Watch(clock)
    look(root(top, quiet_seconds=10), watch=watch)
    clock.now += 10
    watch = Watch.from_json(watch.to_json(), clock)
    assert look(root(top, quiet_seconds=10), watch=watch)[0]


@pytest.mark.parametrize(
    "text",
    [None, "", "{", "[]", "3", '{"r/c": 3}', '{"r/c": ["x", NaN]}', '{"r/c": ["x", -Infinity]}', '{"r/c": [1, 2]}'],
)
def test_a_cursor_from_elsewhere_is_forgotten_not_believed(text):
    assert Watch.from_json(text).to_json() == "{}"


def test_success_as_the_last_file_needs_no_waiting(top):
    folder = make_checkpoint(top / "c")
    assert not look(root(top, quiet_seconds=1000))[0]
    (folder / "_SUCCESS").touch()
    assert set(look(root(top, quiet_seconds=1000))[0]) == {"r/c"}


def test_success_does_not_make_half_a_checkpoint_whole(top):
    folder = make_checkpoint(top / "c", shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    (folder / "_SUCCESS").touch()
    found, incomplete = look(root(top))
    assert not found
    assert "which is missing" in incomplete["r/c"].reason


def test_success_left_from_an_earlier_upload_proves_nothing(top):
    folder = make_checkpoint(top / "c")
    (folder / "_SUCCESS").touch()
    time.sleep(0.02)  # the file system's clock ticks every few ms
    overwrite(folder / "tokenizer_config.json", b"{ }")
    found, incomplete = look(root(top, quiet_seconds=1000))
    assert not found
    assert "unchanged for" in incomplete["r/c"].reason


def test_a_root_may_require_success(top, clock):
    folder = make_checkpoint(top / "c")
    watch = Watch(clock)
    asked = root(top, quiet_seconds=10, require_success=True)
    for _ in range(3):
        found, incomplete = look(asked, watch=watch)
        assert not found
        assert "_SUCCESS" in incomplete["r/c"].reason
        clock.now += 100
    (folder / "_SUCCESS").touch()
    assert look(asked, watch=watch)[0]


def test_refused_is_said_only_once_nothing_changes(top, clock):
    folder = make_checkpoint(top / "c")
    (folder / "tokenizer.json").unlink()
    clock.now = time.time()
    watch = Watch(clock)
    assert not look(root(top, quiet_seconds=60), watch=watch)[1]["r/c"].refused
    clock.now += 60
    refused = look(root(top, quiet_seconds=60), watch=watch)[1]["r/c"]
    assert refused.refused
    assert "tokenizer.save_pretrained" in refused.reason


def test_a_real_copy_in_progress_is_found_once_and_whole(top, tmp_path):
    """Another process copies file by file, slowly; we look all the time."""
    source = make_checkpoint(tmp_path / "source", shards=2, values=4096)
    copy = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import os, sys, time\n"
            "source, target = sys.argv[1:]\n"
            "os.mkdir(target)\n"
            "for name in sorted(os.listdir(source)):\n"
            "    with open(f'{source}/{name}', 'rb') as a, open(f'{target}/{name}', 'wb', buffering=0) as b:\n"
            "        while block := a.read(4096):\n"
            "            b.write(block); time.sleep(0.02)\n",
            str(source),
            str(top / "c"),
        ]
    )
    watch = Watch()
    seen = []
    deadline = time.monotonic() + 60
    while not seen and time.monotonic() < deadline:
        running = copy.poll() is None
        found, _ = look(root(top, quiet_seconds=0.3), watch=watch)
        seen = list(found.values())
        assert not (seen and running)
        time.sleep(0.01)
    assert copy.wait() == 0
    assert len(list((top / "c").iterdir())) == len(list(source.iterdir()))


# Known folders


def test_known_folders_are_not_entered(top, monkeypatch):
    for i in range(50):
        make_checkpoint(top / f"run/step_{i}")
    asked = root(top, quiet_seconds=0)
    known = {key: found.fingerprint for key, found in look(asked)[0].items()}
    assert len(known) == 50
    entered = []
    scandir = os.scandir

    def counting(path):
        entered.append(Path(path).name)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", counting)
    assert look(asked, known) == ({}, {})
    assert entered == ["runs", "run"]
    entered.clear()
    make_checkpoint(top / "run/step_new")
    assert set(look(asked, known)[0]) == {"r/run/step_new"}
    assert set(entered) == {"runs", "run", "step_new"}
    entered.clear()
    assert set(look(asked, known, sweep=["r/run/step_7"])[0]) == {"r/run/step_new"}
    assert set(entered) == {"runs", "run", "step_new", "step_7"}


def test_ten_thousand_known_folders_cost_little(top):
    (top / "run").mkdir()
    for i in range(10_000):
        (top / f"run/step_{i}").mkdir()
    known = {f"r/run/step_{i}": "x" for i in range(10_000)}
    start = time.process_time()
    assert look(root(top), known) == ({}, {})
    assert time.process_time() - start < 1


def test_a_known_folder_that_changed_is_found_by_the_sweep_after_its_quiet_period(top, clock):
    folder = make_checkpoint(top / "c")
    asked = root(top, quiet_seconds=10)
    watch = Watch(clock)
    look(asked, watch=watch)
    clock.now += 10
    first = look(asked, watch=watch)[0]["r/c"].fingerprint
    known = {"r/c": first}
    assert look(asked, known, watch) == ({}, {})
    make_checkpoint(folder, seed=1)
    os.utime(folder / "model.safetensors", ns=(0, time.time_ns() + 10**9))
    assert look(asked, known, watch) == ({}, {})
    assert "unchanged for" in look(asked, known, watch, sweep=["r/c"])[1]["r/c"].reason
    clock.now += 10
    # Watched now: the sweep need not come round again.
    second = look(asked, known, watch)[0]["r/c"]
    assert second.fingerprint != first
    assert look(asked, {"r/c": second.fingerprint}, watch, sweep=["r/c"]) == ({}, {})


def test_a_half_finished_re_upload_is_no_arrival(top, clock):
    folder = make_checkpoint(top / "c", shards=2)
    asked = root(top, quiet_seconds=10)
    known = {"r/c": look(root(top, quiet_seconds=0))[0]["r/c"].fingerprint}
    watch = Watch(clock)
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"")
    for _ in range(3):
        assert not look(asked, known, watch, sweep=["r/c"])[0]
        clock.now += 100


def test_holding_a_folder_does_not_change_it(top, tmp_path):
    folder = make_checkpoint(top / "c")
    (folder / "_SUCCESS").touch()
    one = look(root(top))[0]["r/c"]
    arrival = Arrival(one.key, 1, one.fingerprint, one.uri, one.run)
    assert hold(arrival, tmp_path / "cache")
    assert look(root(top), {"r/c": one.fingerprint}, sweep=["r/c"]) == ({}, {})


def test_a_backlog_larger_than_the_watch_passes_through_newest_first(top, clock):
    template = make_checkpoint(top / "step_0", values=1)
    count = CAPACITY + 30
    for i in range(1, count):
        folder = top / f"step_{i}"
        folder.mkdir()
        for file in template.iterdir():
            os.link(file, folder / file.name)
        os.utime(folder, ns=(0, i * 10**9))
    os.utime(template, ns=(0, 0))
    asked = root(top, quiet_seconds=10)
    watch = Watch(clock)
    known: dict[str, str] = {}
    order = []
    for _ in range(20):
        found, incomplete = look(asked, known, watch)
        assert len(json.loads(watch.to_json())) <= CAPACITY
        assert len(watch.to_json()) < 100 * CAPACITY
        assert len(found) + len(incomplete) == count - len(known)
        for key, one in list(found.items())[:50]:
            known[key] = one.fingerprint
            order.append(key)
        clock.now += 10
        if len(known) == count:
            break
    assert len(known) == count
    assert order[:3] == [f"r/step_{count - 1}", f"r/step_{count - 2}", f"r/step_{count - 3}"]


# Run, step, tokens


def write(folder, name, value):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))


@pytest.mark.parametrize(
    ("relative", "run", "step"),
    [
        ("a/step_100", "a", 100),
        ("a/checkpoint-0500", "a", 500),
        ("a/seed_1/iter7", "a/seed_1", 7),
        ("step_5", "r", 5),
        ("step_5-99999999999999999999", "r", 5),  # more than SQL holds: no step
        ("a/global_step100-hf", "a", 100),
        ("a/epoch=3-step=40", "a", 40),
        ("Llama-3.2-1B", "r", None),
        ("a/final", "a", None),
        ("a/step_1000/hf", "a", 1000),
        ("", "r", None),
    ],
)
def test_run_and_step_from_the_path(tmp_path, relative, run, step):
    about = describe(tmp_path, "r", relative)
    assert (about.run, about.step, about.tokens_seen, dict(about.tags)) == (run, step, None, {})


def test_each_source_wins_over_the_one_after_it(tmp_path):
    pattern = "{run}/ckpt.{step}/hf"
    relative = "big/run/ckpt.7/hf"
    about = describe(tmp_path, "r", relative, pattern)
    assert (about.run, about.step) == ("big/run", 7)
    assert describe(tmp_path, "r", "x/y_3", pattern).step == 3
    write(tmp_path, "trainer_state.json", {"global_step": 8, "num_input_tokens_seen": 80, "log_history": []})
    about = describe(tmp_path, "r", relative, pattern)
    assert (about.run, about.step, about.tokens_seen) == ("big/run", 8, 80)
    own = {"run": "mine", "step": 0, "tokens_seen": 0, "time": "2026-11-21T10:00:00Z", "tags": {"lr": "3e-4"}, "x": 1}
    write(tmp_path, "checkpoint.json", own)
    about = describe(tmp_path, "r", relative, pattern)
    assert (about.run, about.step, about.tokens_seen, about.tags) == ("mine", 0, 0, {"lr": "3e-4"})


def test_a_trainer_that_does_not_count_tokens_says_nothing_about_them(tmp_path):
    write(tmp_path, "trainer_state.json", {"global_step": 8, "num_input_tokens_seen": 0})
    assert describe(tmp_path, "r", "x").tokens_seen is None


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("{", "is not JSON"),
        ("[]", "the file"),
        ('{"step": "5"}', "field step"),
        ('{"step": -1}', "field step"),
        ('{"step": true}', "field step"),
        ('{"step": 9223372036854775808}', "field step"),
        ('{"step": 1.5}', "field step"),
        ('{"run": ""}', "field run"),
        ('{"tokens_seen": []}', "field tokens_seen"),
        ('{"tags": {"lr": 3}}', "field tags.lr"),
        ('{"time": "yesterday"}', "field time"),
    ],
)
def test_a_malformed_checkpoint_json_is_refused_naming_the_field(top, text, field):
    folder = make_checkpoint(top / "c")
    write(folder, "checkpoint.json", text)
    make_checkpoint(top / "d")
    found, incomplete = look(root(top, quiet_seconds=0))
    assert set(found) == {"r/d"}
    assert incomplete["r/c"].refused
    assert str(folder / "checkpoint.json") in incomplete["r/c"].reason
    assert field in incomplete["r/c"].reason
    assert "remedy" in incomplete["r/c"].reason


# A folder named by hand


def nothing(done, total):
    pass


def test_a_folder_named_by_hand_has_the_key_of_its_innermost_root(top, tmp_path):
    folder = make_checkpoint(top / "a/step_3")
    inner = locate(folder, [root(tmp_path, "outer"), root(top)], tmp_path / "cache", nothing)
    assert (inner.key, inner.run, inner.step) == ("r/a/step_3", "a", 3)
    assert inner == look(root(top, quiet_seconds=0))[0]["r/a/step_3"]


def test_a_folder_outside_every_root_is_named_by_its_content(top, tmp_path):
    one = locate(make_checkpoint(tmp_path / "x/step_3"), [root(top)], tmp_path / "cache", nothing)
    same = locate(make_checkpoint(tmp_path / "y/step_3"), [root(top)], tmp_path / "cache", nothing)
    other = locate(make_checkpoint(tmp_path / "z/step_3", seed=1), [root(top)], tmp_path / "cache", nothing)
    assert one.key == same.key != other.key
    assert one.key.startswith("adhoc/step_3-")
    assert len(one.key) == len("adhoc/step_3-") + 8
    assert (one.run, one.step) == ("x", 3)


def test_a_folder_that_is_no_checkpoint_is_an_error_that_says_why(tmp_path):
    with pytest.raises(CheckpointError, match="no weights yet"):
        locate(tmp_path, [], tmp_path / "cache", nothing)
    with pytest.raises(CheckpointError, match="give the folder"):
        locate(tmp_path / "none", [], tmp_path / "cache", nothing)
