"""Revisions of a repository on the Hugging Face hub as checkpoints, through the real client and a server of its API."""

import json
import re
import shutil
from dataclasses import asdict

import pytest
from checkpoint_factory import make_adapter, make_checkpoint
from hub_server import TOKEN, hub_server
from wire import Answer, Cut, Wire

from eval_platform.checkpoints import (
    Found,
    Watch,
    discover,
    downloads,
    hub,
    hub_requests,
    identify,
    locate,
    release,
    stage,
)
from eval_platform.config import Config, Root
from eval_platform.errors import CheckpointChanged, CheckpointError, CheckpointGone, StoreError
from eval_platform.values import Arrival, Incomplete

VALUES = 20_000  # float32 numbers of each of two tensors


def nothing(done, total):
    pass


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    top = tmp_path_factory.mktemp("models")
    return [make_checkpoint(top / f"m{seed}", seed=seed, shards=seed, values=VALUES) for seed in (1, 2)]


@pytest.fixture
def site(monkeypatch):
    """An empty hub, which the client of this process asks."""
    from huggingface_hub import constants

    with hub_server() as served, Wire(int(served.endpoint.rpartition(":")[2])) as wire:
        served.wire = wire
        monkeypatch.setattr(constants, "ENDPOINT", wire.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "")
        monkeypatch.setattr(hub_requests, "FIRST_WAIT_S", 0.01)
        monkeypatch.setattr(hub, "_REMEMBER_S", 0.0)
        yield served


@pytest.fixture
def repository(site, models):
    from hub_server import Repository

    made = site.repositories["org/model"] = Repository()
    made.push("main", models[0], README__md=b"hello")
    made.push("stage1-step1000-tokens2B", models[0])
    made.push("stage1-step2000-tokens4B", models[1])
    made.tags["v1.0"] = made.branches["main"]
    return made


def look(known=None, sweep=(), **root):
    roots = [Root(name="h", path="hf://org/model", **root)]
    return {one.key: one for one in discover(roots, known or {}, Watch(), sweep)}


def arrived(found, n=1):
    assert isinstance(found, Found)
    return Arrival(n=n, **asdict(found))


def test_revisions_are_found_with_their_steps_and_are_the_checkpoints_that_folders_are(
    site, repository, models, tmp_path
):
    found = look(revisions=["*step*"])
    assert [(one.key, one.step, one.run) for one in found.values()] == [
        ("h/stage1-step2000-tokens4B", 2000, "h"),  # newest first
        ("h/stage1-step1000-tokens2B", 1000, "h"),
    ]
    assert set(look()) == {*found, "h/main", "h/v1.0"}
    one = found["h/stage1-step2000-tokens4B"]
    assert one.uri == f"hf://org/model@{repository.branches['stage1-step2000-tokens4B']}"
    assert look(dict.fromkeys(found, ""), revisions=["*step*"]) == {}

    site.requests.clear()
    staged = stage(arrived(one), tmp_path, nothing)
    here = identify(models[1], tmp_path / "other", nothing)
    assert (staged.checkpoint_id, staged.weights_id, staged.kind) == (*asdict(here).values(), "transformers")
    assert len(site.asked("/lfs/")) == 4  # two headers, two files
    release(staged)

    # The same files under another commit: nothing is downloaded again.
    again = repository.push("main", models[1], README__md=b"other words")
    known = {"h/main": hub.fingerprint("org/model", "0" * 40)}
    moved = look(known, ["h/main"], revisions=["main"])["h/main"]
    assert moved.uri.endswith(again)
    site.requests.clear()
    staged = stage(arrived(moved, 2), tmp_path, nothing)
    assert (staged.checkpoint_id, site.asked("/lfs/")) == (here.checkpoint_id, [])
    release(staged)
    assert look({"h/main": moved.fingerprint}, ["h/main"], revisions=["main"]) == {}


def test_a_branch_that_moves_between_listing_and_download_leaves_what_arrived(repository, models, tmp_path):
    one = look(revisions=["stage1-step1000*"])["h/stage1-step1000-tokens2B"]
    repository.push("stage1-step1000-tokens2B", models[1])
    staged = stage(arrived(one), tmp_path, nothing)
    assert staged.checkpoint_id == identify(models[0], tmp_path, nothing).checkpoint_id
    release(staged)
    del repository.commits[one.uri.rpartition("@")[2]]  # its history was rewritten since
    with pytest.raises(CheckpointGone, match=r"hf://org/model@[0-9a-f]{40}: there is no such revision"):
        stage(arrived(one), tmp_path / "new", nothing)


def test_a_download_that_is_cut_goes_on_and_one_that_is_not_the_hubs_is_refused(
    site, repository, models, tmp_path, monkeypatch
):
    monkeypatch.setattr(downloads, "CHUNK_BYTES", 40_000)
    one = look(revisions=["stage1-step1000*"])["h/stage1-step1000-tokens2B"]
    site.wire.breaks(Cut(down=100), times=3, on="GET /org/model/resolve")
    site.wire.breaks(Answer(503, "SlowDown"), times=2, on="GET /org")
    site.corrupt = True
    with pytest.raises(StoreError, match=r"model.safetensors: what came has another hash than the hub tells"):
        stage(arrived(one), tmp_path, nothing)
    site.corrupt = False
    monkeypatch.setattr(hub_requests, "PATIENCE_S", 0.0)
    begun = len(site.asked("/lfs/"))

    def fall(done, total):
        if done > 2 * 40_000:
            site.wire.breaks(Answer(503, "x"), times=100, on="resolve/.*model.safetensors")

    with pytest.raises(StoreError, match=r"does not answer \(503\)"):
        stage(arrived(one), tmp_path, fall)
    site.wire._faults.clear()
    before = len(site.asked("/lfs/"))
    staged = stage(arrived(one), tmp_path, nothing)
    assert before - begun >= 3
    # One header, and what was left of the five chunks.
    assert len(site.asked("/lfs/")) - before <= 1 + 5 - (before - begun - 1)
    assert staged.checkpoint_id == identify(models[0], tmp_path, nothing).checkpoint_id
    release(staged)


def test_what_the_hub_refuses_names_repository_revision_and_remedy(site, repository, models, tmp_path, monkeypatch):
    def said(named):
        with pytest.raises((CheckpointError, CheckpointGone)) as caught:
            locate(named, [], tmp_path, nothing)
        return str(caught.value)

    assert re.search("hf://org/none@main: there is no such repository.*\n.*HF_TOKEN", said("hf://org/none"))
    assert re.search("hf://org/model@nope: there is no such revision.*\n.*branches and tags", said("org/model@nope"))
    repository.access = "gated"
    assert re.search("hf://org/model@main is gated.*\n.*accept its licence at .*/org/model", said("org/model@main"))
    repository.access = "private"
    told = look()["h"]
    assert isinstance(told, Incomplete)
    assert told.refused
    assert "it is private" in told.reason
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert isinstance(look()["h/main"], Found)
    staged = stage(arrived(look()["h/main"]), tmp_path, nothing)
    release(staged)
    texts = [file.read_text(errors="ignore") for file in tmp_path.rglob("*") if file.is_file()]
    assert not any(TOKEN in text for text in texts)

    repository.push("pickled", models[0])
    files = repository.commits[repository.branches["pickled"]]
    files["pytorch_model.bin"] = files.pop("model.safetensors")
    assert "pickle weights only (pytorch_model.bin)" in look()["h/pickled"].reason
    files = repository.commits[repository.push("hostile", models[0])]
    files["additional_chat_templates/../../../evil.jinja"] = b"x"
    found = look()["h/hostile"]
    staged = stage(arrived(found), tmp_path / "a" / "b" / "c", nothing)
    assert not list(tmp_path.rglob("evil*"))
    release(staged)

    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    site.requests.clear()
    told = look()["h"]
    assert (told.refused, site.requests) == (True, [])
    assert "HF_HUB_OFFLINE is set" in told.reason
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set"):
        stage(arrived(found), tmp_path / "new", nothing)


def test_a_revision_named_by_hand_has_the_key_of_its_root_or_of_its_content(repository, models, tmp_path):
    root = Root(name="h", path="hf://org/model", revisions=["stage*"])
    known = locate("org/model@stage1-step1000-tokens2B", [root], tmp_path, nothing)
    assert known == look()["h/stage1-step1000-tokens2B"]
    adhoc = locate("org/model@main", [root], tmp_path, nothing)
    assert adhoc.key == f"adhoc/model-{identify(models[0], tmp_path, nothing).checkpoint_id[:8]}"
    assert (adhoc.run, adhoc.uri) == ("model", f"hf://org/model@{repository.branches['main']}")


def test_an_adapter_and_its_base_on_the_hub(site, repository, models, tmp_path):
    from hub_server import Repository

    folder = make_adapter(tmp_path / "adapter", "org/model")
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "revision": "v1.0"}))
    tuned = site.repositories["me/tuned"] = Repository()
    tuned.push("main", folder)
    [found] = discover([Root(name="t", path="hf://me/tuned")], {}, Watch())
    staged = stage(arrived(found), tmp_path / "cache", nothing)
    beside = make_adapter(tmp_path / "local" / "adapter", models[0])
    (beside / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
    assert staged.kind == "adapter"
    assert (staged.path / "model.safetensors").read_bytes() == (models[0] / "model.safetensors").read_bytes()
    here = stage(Arrival("l", 1, look_at(beside), str(beside), "l"), tmp_path / "cache", nothing)
    assert here.checkpoint_id == staged.checkpoint_id == identify(beside, tmp_path / "cache", nothing).checkpoint_id
    release(here)
    release(staged)
    repository.tags.clear()
    tuned.push("main", folder, README__md=b"new")
    [waits] = discover([Root(name="t", path="hf://me/tuned")], {}, Watch())
    assert isinstance(waits, Incomplete)
    assert "adapter_config.json: the base model: hf://org/model@v1.0: there is no such revision" in waits.reason


def test_a_base_in_a_folder_that_goes_is_no_arrival_that_went(site, models, tmp_path):
    from hub_server import Repository

    base = tmp_path / "base"
    shutil.copytree(models[0], base)
    folder = make_adapter(tmp_path / "adapter", base)
    site.repositories["me/tuned"] = Repository()
    site.repositories["me/tuned"].push("main", folder)
    [found] = discover([Root(name="t", path="hf://me/tuned")], {}, Watch())
    own = sum(file.stat().st_size for file in folder.iterdir())

    def goes(done, total):
        if total > 2 * own:  # the adapter is here, and its base is next
            (base / "model.safetensors").unlink(missing_ok=True)

    with pytest.raises(CheckpointChanged, match=r"base/model.safetensors disappeared while hf://me/tuned@"):
        stage(arrived(found), tmp_path / "cache", goes)


def told(*files):
    return json.dumps([{"type": "file", "oid": "0" * 40, **file} for file in files]).encode(), {}


def test_of_who_answers_in_the_hubs_place_nothing_is_taken_that_was_not_asked_for(
    site, repository, models, tmp_path, monkeypatch
):
    commit = repository.branches["main"]
    repository.tags.clear()
    repository.branches = dict.fromkeys(["../../up", "a//b", "/etc", ".", "x" * 300, "ü" * 100, "v2"], commit)
    seen = look()
    assert set(seen) == {"h/v2", "h/" + "=C3=BC" * 100}
    assert isinstance(seen.pop("h/v2"), Found)
    assert "its name is too long for a key" in seen.popitem()[1].reason

    site.instead["/refs"] = b'{"branches": [{"name": "x", "targetCommit": "../../x"}]}', {}
    assert "is no hub (branches.0.targetCommit: " in look()["h"].reason
    site.instead["/refs"] = b'{"branches": [{"name": "\\ud800", "targetCommit": "x"}]}', {}
    assert "is no hub (" in look()["h"].reason
    site.instead.clear()

    commit = repository.push("v2", models[0], README__md=b"new")
    for files, why in (
        (told({"path": "config.json", "size": 10**15}), "is no hub (0.size: "),
        (told({"path": "config.json", "size": -1}), "is no hub (0.size: "),
        (told({"path": "config.json", "size": 2, "oid": "../../x"}), "is no hub (0.oid: "),
        (told({"path": "config.json"}), "is no hub (0.size: "),
        ((b"[" * 100_000, {}), "is no hub ("),
        (told({"path": "model\0.safetensors", "size": 8}, {"path": "../x.jinja", "size": 1}), "no files of a model"),
    ):
        site.instead[f"/tree/{commit}"] = files
        assert why in look()["h/v2"].reason
        hub._judged.clear()
    monkeypatch.setattr(hub, "_MOST_FILES", 3)
    next_page = {"Link": f'<{site.endpoint}/api/models/org/model/tree/{commit}?cursor=1>; rel="next"'}
    site.instead[f"/tree/{commit}"] = told({"path": "config.json", "size": 1})[0], next_page
    assert "a folder of it has no end (3 files)" in look()["h/v2"].reason
    monkeypatch.setattr(hub, "_MOST_FILES", 100)
    site.instead.clear()

    # A configuration that would fill the memory is refused by the size that is told.
    huge = {"path": "config.json", "size": 300_000_000}, {"path": "tokenizer.json", "size": 2}
    weights = {"path": "model.safetensors", "size": len(repository.commits[commit]["model.safetensors"])}
    site.instead[f"/tree/{commit}"] = told(*huge, weights)
    site.requests.clear()
    assert "config.json has 300,000,000 bytes" in look()["h/v2"].reason
    assert not site.asked("config.json")
    site.instead.clear()
    hub._judged.clear()

    found = look()["h/v2"]
    site.endless = True
    monkeypatch.setattr(downloads, "CHUNK_BYTES", 40_000)
    with pytest.raises(StoreError, match=r"model.safetensors: what came are not the 40,000 bytes from 40,000 on"):
        stage(arrived(found), tmp_path, nothing)
    assert site.sent < 1 << 27


def test_a_revision_that_cannot_be_looked_at_holds_no_other_up(site, repository, monkeypatch):
    monkeypatch.setattr(hub, "_REMEMBER_S", 30.0)
    broken, other = "h/stage1-step2000-tokens4B", "h/stage1-step1000-tokens2B"
    site.instead[f"/tree/{repository.branches['stage1-step2000-tokens4B']}"] = b"[{}]", {}
    first = look(revisions=["stage1*"])
    assert "is no hub (0.type: Field required)" in first[broken].reason
    assert "waits its turn" in first[other].reason  # a hub that does not answer is asked once in a look
    second = look(revisions=["stage1*"])
    assert second[broken] == first[broken]
    assert isinstance(second[other], Found)


def test_what_waits_is_asked_for_twice_a_minute(site, repository, models, tmp_path, monkeypatch):
    from hub_server import Repository

    monkeypatch.setattr(hub, "_REMEMBER_S", 30.0)
    repository.access = "gated"
    site.repositories["org/none"] = Repository()
    (tmp_path / "empty").mkdir()
    site.repositories["org/none"].push("main", tmp_path / "empty", README__md=b"hello")
    site.repositories["org/base"] = Repository()
    commit = site.repositories["org/base"].push("main", models[0])
    del site.repositories["org/base"].commits[commit]["tokenizer.json"]
    make_adapter(tmp_path / "runs" / "step_1", "org/base")
    roots = [
        Root(name="gated", path="hf://org/model"),
        Root(name="none", path="hf://org/none"),
        Root(name="local", path=str(tmp_path / "runs"), quiet_seconds=0),
    ]

    def reasons():
        return {one.key: one.reason for one in discover(roots, {}, Watch())}

    for _ in range(3):  # three commits, and after one that is refused the others have their turn in the next look
        before = reasons()
    assert "is gated" in before["gated/main"]
    assert before["none/main"] == "no files of a model"
    assert "the base model hf://org/base cannot be used: no tokenizer" in before["local/step_1"]
    site.requests.clear()
    assert (reasons(), site.requests) == (before, [])


def test_a_hub_that_does_not_answer_is_told_without_the_password_in_its_address(site, repository, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(hub_requests, "LOOK_S", 0.05)
    site.wire.breaks(Answer(429, "x"), times=20, on="refs")
    assert "too many requests from here (429)" in look()["h"].reason
    monkeypatch.setattr(constants, "ENDPOINT", "http://me:s3cr3t@127.0.0.1:9")
    reason = look()["h"].reason
    assert "the hub at http://127.0.0.1:9 does not answer (ConnectError)" in reason
    assert "s3cr3t" not in reason
    told_wait = hub_requests._told_wait
    assert [told_wait(one) for one in ({"RateLimit": '"api";r=0;t=55'}, {"Retry-After": "7"}, {})] == [56, 7, 0]


def look_at(folder):
    from eval_platform.checkpoints.files import list_folder

    return list_folder(folder).fingerprint


def test_a_root_says_which_revisions(tmp_path):
    def config(**root):
        return Config(folder=tmp_path, checkpoints=(Root(name="h", **root),))

    assert config(path="hf://org/model@main").checkpoints[0].revisions == ()
    for wrong, told in (
        ({"path": "hf://a/b/c"}, "must be like hf://org/model"),
        ({"path": "hf://org/model@main", "revisions": ["x"]}, "names one revision already"),
        ({"path": "folder", "revisions": ["x"]}, "revisions are of a repository"),
    ):
        with pytest.raises(ValueError, match=told):
            config(**wrong)
