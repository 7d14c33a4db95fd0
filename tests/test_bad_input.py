"""Bad input on the whole road: a clear error that names file and remedy, the right exit code, nothing else harmed."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_tools import Answer, Lived, Place, lived_in, make_place, run_cli
from machine import without_power_over_files
from tiny_models import make_checkpoint

pytestmark = pytest.mark.timeout(900)  # one test waits for the whole place to be made


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> Lived:
    return lived_in(tmp_path_factory.getbasetemp() / "lived_in")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two shards."""
    folder = make_checkpoint(tmp_path_factory.mktemp("whole") / "model", seed=1)
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        shard = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def refused(answer: Answer, *words: str) -> None:
    """A user's mistake: code 2, nothing on standard output, the words (file, remedy) on standard error, no trace."""
    assert answer.code == 2, answer.err
    assert answer.out == ""
    assert answer.err.startswith("error: ")
    for word in words:
        assert word in answer.err, f"{word!r} is not in: {answer.err}"


# --- checkpoints


def no_checkpoint(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "notes.txt").write_text("nothing here")


def truncated(folder: Path) -> None:
    shard = folder / "model-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])


def missing_shard(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()


def pickle_only(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02.")


def config_is_no_json(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ')


def no_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (no_checkpoint, ("no weights yet (model.safetensors)",)),
        (truncated, ("model-00002-of-00002.safetensors",)),
        (missing_shard, ("model.safetensors.index.json names model-00002-of-00002.safetensors, which is missing",)),
        (pickle_only, ("pickle weights only (pytorch_model.bin)", "safe_serialization=True")),
        (config_is_no_json, ("config.json is not JSON", "save it again")),
        (no_tokenizer, ("no tokenizer", "tokenizer.save_pretrained(folder)")),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_folder_that_cannot_be_evaluated(
    spoil: Callable[[Path], None], words: tuple[str, ...], whole: Path, tmp_path: Path
) -> None:
    """By hand it is refused at once; in a watched folder `status` says why, and its neighbour goes on."""
    place = make_place(tmp_path / "place")
    shutil.copytree(whole, place.arriving(1))
    shutil.copytree(whole, place.arriving(2))
    spoil(place.arriving(1))
    place("tasks", "sync")

    refused(place("run", "--checkpoint", str(place.arriving(1))), str(place.arriving(1)), *words)

    by_key = {one["key"]: one for one in place("status", "--json").json}
    assert "found, not taken up yet" in by_key["run/a/step_2"]["reason"]
    if spoil is no_checkpoint:
        assert "run/a/step_1" not in by_key
    else:
        assert words[0] in by_key["run/a/step_1"]["reason"]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    place = make_place(tmp_path / "place")
    refused(place("run", "--checkpoint", str(tmp_path / "gone")), f"{tmp_path / 'gone'} cannot be read", "config.json")


@pytest.mark.slow
def test_a_model_class_nobody_knows_fails_and_says_so_once(lived: Lived) -> None:
    answer = lived.answers["500"]
    assert answer.code == 1
    assert {one["status"] for one in answer.json} == {"failed"}
    (reason,) = {reason for one in answer.json for reason in one["reasons"]}
    assert f"{lived.place.arriving(500) / 'config.json'}: field model_type: 'nobody'" in reason
    assert "remedy: " in reason
    told = lived.answers["status"].out
    assert told.count("'nobody'") == 1, "the same reason need not be told for every task"


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["300", "elsewhere"], ids=["NaN", "infinite"])
def test_weights_that_are_no_numbers_are_held_on_every_task(weights: str, lived: Lived) -> None:
    """Completions too: their text scores 0, which looks like a number."""
    answer = lived.answers[weights]
    assert answer.code == 3
    assert {one["task"] for one in answer.json} >= {"colours"}
    for one in answer.json:
        assert one["status"] == "held", one["task"]
        assert one["primary"]["value"] is None
        assert any("cannot be computed" in reason for reason in one["reasons"]), one["reasons"]
    if weights == "300":
        assert [one["task"] for one in answer.json] == ["colours", "stories", "words"]
        board = lived.place("sql", "select count(*) as n from leaderboard where step = 300", "--format", "json")
        assert board.json == [{"n": 0}]


# --- tasks

FINE = """
task: mine
documents: {generator: {name: copying, n: 4}}
doc_to_text: question
doc_to_target: answer
"""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (FINE + "colour: red\n", ("mine.yaml:6", "colour")),
        (FINE + "num_fewshot: many\n", ("mine.yaml:6", "num_fewshot")),
        (FINE.replace("question", '"{{nothing_there}}"'), ("mine.yaml", "doc_to_text", "nothing_there")),
        (FINE.replace("question", '"{{ question.__class__.__mro__ }}"'), ("mine.yaml", "doc_to_text", "__class__")),
        (FINE.replace("answer", "!function utils.answer"), ("mine.yaml:5", "`!function` is refused", "Jinja")),
        (FINE.replace("{generator: {name: copying, n: 4}}", "{file: empty.jsonl}"), ("mine.yaml", "empty.jsonl")),
        (FINE + "  - broken: [\n", ("mine.yaml is not YAML",)),
    ],
    ids=["unknown key", "wrong type", "missing field", "sandbox escape", "function", "empty dataset", "no YAML"],
)
def test_a_broken_task_file_stops_nothing_else(text: str, words: tuple[str, ...], tmp_path: Path) -> None:
    place = make_place(tmp_path / "place")
    tasks = place.folder / "my_tasks"
    (tasks / "empty.jsonl").write_text("")
    (tasks / "mine.yaml").write_text(text)

    answer = place("tasks", "sync")

    assert answer.code == 2
    assert answer.out.startswith("3 tasks in ")
    for word in (*words, "remedy: "):
        assert word in answer.err, f"{word!r} is not in: {answer.err}"
    assert "Traceback" not in answer.err
    assert list(json.loads(place.lock.read_text())["tasks"]) == ["colours", "stories", "words"]
    checked = place("tasks", "validate", str(tasks / "mine.yaml"), str(tasks / "words.yaml"), "--json")
    assert (checked.code, [one["ok"] for one in checked.json]) == (2, [False, True])
    # A name that was synced goes on meaning what it meant.
    (tasks / "mine.yaml").write_text(FINE)
    assert place("tasks", "sync").code == 0
    before = place("tasks", "list", "--json").json["mine"]
    (tasks / "mine.yaml").write_text(text)
    assert place("tasks", "sync").code == 2
    assert place("tasks", "list", "--json").json["mine"] == before
    assert any(not one["ok"] and "mine.yaml" in one["found"] for one in place("doctor", "--json").json)


def test_two_tasks_of_one_name(tmp_path: Path) -> None:
    place = make_place(tmp_path / "place")
    shutil.copy(place.folder / "my_tasks" / "words.yaml", place.folder / "my_tasks" / "more.yaml")
    answer = place("tasks", "sync", "--json")
    assert answer.code == 2
    assert answer.json["tasks"] == ["colours", "stories"]
    for word in ("two tasks are called words", "more.yaml", "words.yaml", "rename one of them"):
        assert word in answer.err
    refused(place("run", "--checkpoint", str(tmp_path), "--tasks", "words"), "is no checkpoint")


# --- configuration and folders


def test_a_configuration_with_faults(tmp_path: Path) -> None:
    file = tmp_path / "eval_platform.toml"
    file.write_text("[sensor]\ninterval_seconds = 0\ncolour = 1\n")
    answer = run_cli("--config", str(file), "status")
    refused(answer, str(file), "field sensor.interval_seconds", "field sensor.colour", "docs/configuration.md")
    file.write_text("results = \n")
    refused(run_cli("--config", str(file), "status"), f"{file} is not TOML")
    refused(run_cli("--config", str(tmp_path / "no.toml"), "status"), "no configuration file at", "--config")
    found = {one["what"]: one for one in run_cli("--config", str(file), "doctor", "--json").json}
    assert not found["configuration"]["ok"]
    file.write_text('results = "gs://bucket/results"\n')
    answer = run_cli("--config", str(file), "tasks", "sync")
    assert (answer.code, answer.out) == (1, "")
    assert "no store for gs://" in answer.err


@pytest.mark.parametrize("section", ["results", "state"])
def test_a_folder_that_cannot_be_made(section: str, tmp_path: Path) -> None:
    place = make_place(tmp_path / "place")
    (place.folder / "file").write_text("in the way")
    config = place.folder / "eval_platform.toml"
    config.write_text(f'{section} = "file/{section}"\n' + config.read_text())
    make_checkpoint(place.arriving(1))

    for command in (("run", "--checkpoint", str(place.arriving(1))), ("tasks", "sync"), ("up",)):
        answer = place(*command)
        assert (answer.code, answer.out) == (1 if section == "results" else 2, ""), command
        assert str(place.folder / "file" / section) in answer.err
        assert "remedy: " in answer.err
    doctor = place("doctor", "--json")
    assert doctor.code == 1
    (fault,) = [one for one in doctor.json if one["what"] == section]
    assert not fault["ok"]
    assert "set another folder" in fault["remedy"]


def test_results_without_the_right_to_write(tmp_path: Path) -> None:
    """Root may write everywhere: it gives that power up for the command."""
    place = make_place(tmp_path / "place")
    results = place.folder / "results"
    results.mkdir(mode=0o555)
    config = str(place.folder / "eval_platform.toml")
    command = without_power_over_files([sys.executable, "-m", "eval_platform.cli", "--config", config, "tasks", "sync"])
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (answer.returncode, answer.stdout) == (1, "")
    assert answer.stderr.startswith(f"error: cannot write {results}/")
    assert "Permission denied" in answer.stderr
    assert "set another `results` folder" in answer.stderr


def test_dagster_home_is_made_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`up` has a DAGSTER_HOME of its own, below `state`; one in the environment is not touched. See doctor."""
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    place = make_place(tmp_path / "place")
    place("tasks", "sync")
    found = {one["what"]: one for one in place("doctor", "--json").json}
    assert found["Dagster home"]["ok"]
    assert "made by `eval-platform up`" in found["Dagster home"]["found"]
    (place.folder / ".eval_platform" / "dagster").mkdir()
    doctor = place("doctor", "--json")
    (fault,) = [one for one in doctor.json if not one["ok"]]
    assert (doctor.code, fault["what"]) == (1, "Dagster home")
    assert "has no dagster.yaml" in fault["remedy"]


# --- SQL


@pytest.mark.slow
@pytest.mark.parametrize(
    "query",
    [
        "copy (select 1) to '{out}'",
        "create table mine as select 1",
        "delete from evaluations",
        "attach '{out}' as other",
        "select * from read_csv('/etc/passwd')",
        "select * from '{config}'",
        "select content from read_text('{config}')",
        "install httpfs",
        "set enable_external_access = true",
        "select 1; select 2",
    ],
)
def test_sql_that_writes_or_reads_outside(query: str, lived: Lived, tmp_path: Path) -> None:
    place = lived.place
    text = query.format(out=tmp_path / "out.csv", config=place.folder / "eval_platform.toml")
    refused(place("sql", text), "remedy: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_sql_that_is_wrong_says_what_is_there(lived: Lived) -> None:
    refused(lived.place("sql", "select * from leaderbord"), "perhaps leaderboard is meant")
    refused(lived.place("sql", "select valu from leaderboard"), "leaderboard has the columns")
    refused(lived.place("sql", ""), "the query is empty")


@pytest.mark.slow
def test_the_good_checkpoint_stands_beside_them_all(lived: Lived) -> None:
    place: Place = lived.place
    board = place("sql", "select task from leaderboard where step = 200 order by task", "--format", "json")
    assert [row["task"] for row in board.json] == ["colours", "stories", "words"]
