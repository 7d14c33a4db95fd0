"""Suites: named lists of tasks, from the configuration to Dagster's groups and a report's table."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from cli_tools import Place, make_place
from tiny_models import make_checkpoint

from assets.results import evaluate_asset
from eval_platform.checkpoints import locate
from eval_platform.cli_shared import suite_lock
from eval_platform.config import Config, Engine, Tasks, load_config
from eval_platform.errors import ConfigError
from eval_platform.plan import Wanted, plan
from eval_platform.report import as_rows, board_of_rows, suite_markdown
from eval_platform.store import LocalStore, arrivals, commits
from eval_platform.tasks import SkippedTask, TaskLock, find_suite, library_tasks, read_lock, shipped_suites, sync_tasks
from eval_platform.tasks.reading import read_task_file
from eval_platform.tasks.selection import LIBRARY
from eval_platform.worker import EXIT_DONE, work

OWN = {"mine": ("copying", "addition"), "others": ("addition", "parity")}


@pytest.mark.parametrize("name", shipped_suites())
def test_a_shipped_suite_names_tasks_and_scores_that_are_there(name: str) -> None:
    suite = find_suite(name, {})

    assert suite.suite == name
    assert suite.about
    assert suite.citation
    assert set(suite.tasks) <= set(library_tasks())
    for column in suite.columns:
        definition = read_task_file(LIBRARY / f"{column.task}.yaml")
        assert set(column.beside) <= set(definition.score_names) - {definition.primary_metric}


def test_a_suite_that_is_not_there_or_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"no suite 'instructevl'.*did you mean 'instructeval'"):
        find_suite("instructevl", OWN)
    with pytest.raises(ConfigError, match="would mean two"):
        find_suite("instructeval", {"instructeval": ("copying",)})


@pytest.mark.parametrize(("text", "said"), [('results = ["a"]', "group in Dagster"), ("empty = []", "names no task")])
def test_a_suite_that_cannot_be_meant_is_refused(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "eval_platform.toml").write_text(f"[suites]\n{text}\n")

    with pytest.raises(ConfigError, match=said):
        load_config(tmp_path / "eval_platform.toml")


def _sync(folder: Path, tasks: Tasks) -> Any:
    return sync_tasks(tasks, LocalStore(folder / "results"), folder / "lock.json", OWN)


def test_configured_suites_select_their_tasks_and_name_their_group(tmp_path: Path) -> None:
    report = _sync(tmp_path, Tasks(include=("successor",), suites=("mine", "others")))

    suites = {name: task.suites for name, task in read_lock(tmp_path / "lock.json").tasks.items()}
    assert suites == {"copying": ("mine",), "addition": ("mine", "others"), "parity": ("others",), "successor": ()}
    asset = evaluate_asset(report.lock, lambda name: name)
    groups = {key.path[1]: group for key, group in asset.group_names_by_key.items() if key.path[0] == "results"}
    assert groups == {"copying": "mine", "addition": "mine", "parity": "others", "successor": "results"}
    assert asset.group_names_by_key[dg.AssetKey("checkpoint")] == "checkpoints"


def test_a_suite_that_names_a_task_which_is_not_there_says_so(tmp_path: Path) -> None:
    report = sync_tasks(
        Tasks(suites=("mine",)), LocalStore(tmp_path / "r"), tmp_path / "l.json", {"mine": ("copying", "coppying")}
    )

    assert list(report.lock.tasks) == ["copying"]
    assert [str(error).partition("\n")[0] for error in report.errors] == [
        "suite mine: there is no task 'coppying' (did you mean 'copying'?)"
    ]


# --- the table


def _row(key: str, task: str, metric: str, value: float, **other: Any) -> dict[str, Any]:
    known = {"run": "a", "step": int(key.rpartition("_")[2]), "n_parameters": None, "primary_metric": "prefix_match"}
    status = {"status": "published", "attempt": 1, "finished_at": 1, "reasons": []}
    number = {"standard_error": 0.03, "ci_low": value - 0.06, "ci_high": value + 0.06, "n": 200}
    return {"key": key, "task": task, "metric": metric, "value": value, **known, **status, **number, **other}


LOCK = TaskLock({}, {"drop_instructeval": SkippedTask("drop", "no file drop.json", "get it")})
COLUMNS = ("mmlu_instructeval", "bbh_instructeval", "drop_instructeval", "crass_instructeval", "humaneval_instructeval")


def _locked(*names: str) -> TaskLock:
    from dagster_world import locked

    tasks = {name: replace(locked(name, "a", "d"), primary_metric="prefix_match") for name in names}
    return TaskLock(tasks, LOCK.skipped)


def test_a_table_has_both_rules_and_says_what_is_missing() -> None:
    rows = [
        _row("r/s_2", "mmlu_instructeval", "prefix_match", 0.416, n_parameters=6_700_000_000),
        _row("r/s_2", "mmlu_instructeval", "exact_match", 0.4),
        _row("r/s_2", "bbh_instructeval", "prefix_match", 0.333, status="held", reasons=["too good", "odd"]),
        _row("r/s_1", "mmlu_instructeval", "prefix_match", 0.3, standard_error=None),
    ]
    board = board_of_rows(find_suite("instructeval", {}), _locked("mmlu_instructeval", "bbh_instructeval"), rows)
    text = suite_markdown(board)

    assert "| r/s_2 | 6.7B | 41.6 ± 3.0 (200) | held | skipped |" in text
    assert "| r/s_1 |  | 30.0 (200) |  | skipped |" in text
    assert "| checkpoint | MMLU (prefix_match) | MMLU (exact_match) | BBH (prefix_match) | BBH (exact_match) |" in text
    assert "| r/s_2 | 41.6 ± 3.0 (200) | 40.0 ± 3.0 (200) | held | held |" in text
    assert "- BBH (`bbh_instructeval`) of r/s_2: held: too good; odd" in text
    assert "- BBH (`bbh_instructeval`) of r/s_1: not evaluated" in text
    assert "- DROP (`drop_instructeval`): no data: no file drop.json" in text
    assert "- CRASS (`crass_instructeval`): not configured" in text
    assert [line.average for line in board.lines] == [None, None]


def test_the_average_is_of_all_its_columns_or_none() -> None:
    values = dict(zip(COLUMNS, (0.5, 0.4, 0.3, 0.2, 0.1), strict=True))
    rows = [_row("r/s_1", task, "prefix_match", value) for task, value in values.items()]
    rows.append(_row("r/s_1", "hhh_instructeval", "prefix_match", 1.0))  # does not count in it
    suite = find_suite("instructeval", {})
    (line,) = board_of_rows(suite, TaskLock({}), rows).lines

    assert line.average is not None
    assert line.average.value == pytest.approx(0.3)
    assert line.average.standard_error == pytest.approx(0.03 / 5**0.5)
    (short,) = board_of_rows(suite, TaskLock({}), rows[1:]).lines
    assert short.average is None


def test_a_published_attempt_stands_before_a_newer_one_that_is_not() -> None:
    rows = [
        _row("r/s_1", "mmlu_instructeval", "prefix_match", 0.5),
        _row("r/s_1", "mmlu_instructeval", "prefix_match", 0.9, status="held", attempt=2, finished_at=2),
    ]
    (line,) = board_of_rows(find_suite("instructeval", {}), _locked("mmlu_instructeval"), rows).lines

    assert line.scores["mmlu_instructeval"]["prefix_match"].value == 0.5
    assert line.missing == {}


def test_rows_for_programs_have_a_reason_where_they_have_no_number() -> None:
    rows = [_row("r/s_1", "mmlu_instructeval", "prefix_match", 0.5)]
    board = board_of_rows(find_suite("instructeval", {}), _locked("mmlu_instructeval"), rows)
    found = {row["task"]: (row["value"], row["missing"]) for row in as_rows(board)}

    assert found["mmlu_instructeval"] == (0.5, None)
    assert found["drop_instructeval"] == (None, "no data: no file drop.json")
    assert found["hhh_instructeval"] == (None, "not configured")


# --- as a person asks, and a worker does


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """Of the suite `mine` one task is one's own, one has no data, and one is not there; none is configured."""
    monkeypatch.delenv("EVAL_PLATFORM_DATA", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    place = make_place(tmp_path)
    config = (tmp_path / "eval_platform.toml").read_text().replace("[tasks]", '[tasks]\ninclude = ["stories"]')
    config = config.replace("[suites]", '[suites]\nmine = ["colours", "drop", "nowhere"]')
    (tmp_path / "eval_platform.toml").write_text(config)
    return place


def test_a_suite_that_is_not_configured_gets_a_lock_of_its_own(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    assert place("tasks", "sync").code == 0
    config = load_config(place.folder / "eval_platform.toml")
    before = place.lock.read_bytes()
    config.state_dir.mkdir(exist_ok=True)

    lock, names = suite_lock(config, LocalStore(config.results), read_lock(place.lock), place.lock, "mine")

    assert names == ["colours", "drop"]
    assert (list(lock.tasks), list(lock.skipped)) == (["colours"], ["drop"])
    assert "suite mine: there is no task 'nowhere'" in capsys.readouterr().err
    assert place.lock.read_bytes() == before
    listed = place("tasks", "list", "--suite", "mine")
    assert "not configured: colours, drop, nowhere" in listed.out
    told = place("report", "--suite", "mine").out
    assert told.startswith("## mine\n\n_Nothing is evaluated yet._")
    assert "- drop (`drop`): no data" in told
    assert "- nowhere (`nowhere`): not configured" in told
    assert place("run", "--checkpoint", "x", "--suite", "mine", "--tasks", "colours").code == 2


LONG = """
task: long
documents: {generator: {name: copying, n: 2}, fewshot: {generator: {name: copying, n: 40, split: train}}}
doc_to_text: question
doc_to_target: answer
num_fewshot: 40
fewshot_config: {sampler: first_n}
max_input_tokens: 100000
generation_kwargs: {until: [], max_gen_toks: 4}
metric_list: [{metric: prefix_match}, {metric: exact_match}]
"""


def test_a_worker_drops_shots_that_do_not_fit_the_window(tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "long.yaml").write_text(LONG)
    path = make_checkpoint(tmp_path / "step_1", max_length=256)
    store, lock = LocalStore(tmp_path / "results"), tmp_path / "lock.json"
    sync_tasks(Tasks(folders=(str(tmp_path / "tasks"),)), store, lock)
    config = Config(folder=tmp_path, state=str(tmp_path / "state"), engine=Engine(device="cpu", path="plain"))
    arrival, _ = arrivals.register(store, watcher="test", **asdict(locate(path, (), config.cache_dir, lambda *_: None)))
    told: list[dict[str, Any]] = []

    assert work(plan(arrival, Wanted(read_lock(lock)), config, store), store, told.append) == EXIT_DONE, told

    (done,) = [one for one in told if one["type"] == "committed"]
    record = commits.read(store, done["evaluation_id"], done["attempt"])
    assert record is not None
    samples = commits.read_samples(store, record).to_pylist()
    assert len(samples) == 2
    assert all(0 < sample["shots_used"] < 40 and sample["truncated_left_tokens"] == 0 for sample in samples)
    assert record["n_parameters"] > 1000


def test_two_configurations_in_one_folder_have_a_lock_each(tmp_path):
    for name in ("eval_platform.toml", "nightly.toml", "x.y.toml"):
        (tmp_path / name).write_text("")
    locks = [load_config(tmp_path / name).lock_path.name for name in ("eval_platform.toml", "nightly.toml", "x.y.toml")]
    assert locks == ["eval_platform.lock.json", "nightly.lock.json", "x.y.lock.json"]
