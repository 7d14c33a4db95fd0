"""What a person does with `eval-platform`, command by command, on checkpoints that were really evaluated."""

import io
import json
import re
import shlex
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
import typer
from cli_tools import Lived, Place, lived_in, parse, run_cli

from eval_platform import cli

# The first test waits for the whole place to be made.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

COMMAND = typer.main.get_command(cli.app)
COMMANDS = {
    **{(name,): command for name, command in COMMAND.commands.items() if name != "tasks"},  # type: ignore[attr-defined]
    **{("tasks", name): command for name, command in COMMAND.commands["tasks"].commands.items()},  # type: ignore[attr-defined]
}


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> Lived:
    return lived_in(tmp_path_factory.getbasetemp() / "lived_in")


@pytest.fixture(scope="module")
def place(lived: Lived) -> Place:
    return lived.place


def rows(place: Place, query: str) -> list[dict[str, object]]:
    answer = place("sql", query, "--format", "json")
    assert answer.code == 0, answer.err
    return answer.json


def evaluation(place: Place, step: int, task: str) -> str:
    found = rows(place, f"select evaluation_id from evaluations where key = 'run/a/step_{step}' and task = '{task}'")
    return str(found[0]["evaluation_id"])


# --- help


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_help_teaches_with_an_example_that_parses(path: tuple[str, ...]) -> None:
    command = COMMANDS[path]
    assert command.help
    assert command.epilog.startswith("Example: ")
    example = command.epilog.removeprefix("Example: ")
    words = shlex.split(example)
    assert tuple(word for word in words if word in path) == path
    parse(example)
    for parameter in command.params:
        assert parameter.help, f"{path}: {parameter.name} is not explained"


def test_help_and_version_need_no_heavy_package() -> None:
    program = (
        "import sys; sys.argv = ['eval-platform', '--help']\n"
        "from eval_platform import cli\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'duckdb', 'pandas', 'pyarrow', 'great_expectations', 'dagster'} & "
        "set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.splitlines()[-1] == "[]"
    assert "Exit codes" in answer.stdout


def test_wrong_usage_ends_with_2() -> None:
    assert run_cli("nonsense").code == 2
    assert run_cli("run").code == 2  # --checkpoint is missing
    wrong = run_cli("sql", "select 1", "--format", "xml")
    assert wrong.code == 2
    assert "'xml' is not one of" in wrong.err
    assert wrong.out == ""


# --- run


def test_run_publishes_and_says_the_score(lived: Lived) -> None:
    answer = lived.answers["100"]
    assert answer.code == 0
    header, line = answer.out.splitlines()
    assert header.split() == ["task", "status", "metric", "value", "95", "%", "interval", "n"]
    assert line.split()[:3] == ["colours", "published", "acc"]
    assert answer.err == ""


def test_run_as_json_is_json_alone(lived: Lived) -> None:
    told = lived.answers["200"].json
    assert [one["task"] for one in told] == ["colours", "stories", "words"]
    assert {one["status"] for one in told} == {"published"}
    assert {one["key"] for one in told} == {"run/a/step_200"}
    score = next(score for score in told[0]["scores"] if score["metric"] == "acc")
    assert score["n"] == 6
    assert score["ci_low"] <= score["value"] <= score["ci_high"]


def test_run_elsewhere_leaves_the_configured_results_alone(place: Place, lived: Lived) -> None:
    (told,) = lived.answers["elsewhere"].json
    assert told["key"].startswith("adhoc/infinite-")
    assert told["scores"][0]["n"] == 2
    assert (place.folder / "elsewhere" / "evaluations" / told["evaluation_id"] / "1.json").is_file()
    assert rows(place, "select count(*) as n from arrivals where key like 'adhoc/%'") == [{"n": 0}]


def test_a_suites_report(place: Place) -> None:
    told = place("report", "--suite", "first", "--format", "json").json
    lines = {line["key"]: line["scores"].get("colours", {}) for line in told["checkpoints"]}
    assert sorted(lines["run/a/step_100"]) == sorted(lines["run/a/step_200"]) == ["acc", "acc_norm"]
    (value,) = rows(place, "select value from leaderboard where key = 'run/a/step_100' and task = 'colours'")
    assert lines["run/a/step_100"]["acc"]["value"] == value["value"]
    sizes = {line["key"][-3:]: line["n_parameters"] for line in told["checkpoints"]}
    assert list(sizes) == ["500", "300", "200", "100"]
    assert sizes.pop("500") is None  # its weights were never loaded
    assert all(size > 1000 for size in sizes.values())
    shown = place("report", "--suite", "first").out
    assert "| checkpoint | size | colours (acc) |" in shown
    assert "- colours (`colours`) of run/a/step_300: held: log_likelihood_present:" in shown
    assert "of run/a/step_500: failed: " in shown
    assert ",colours,acc,true," in place("report", "--suite", "first", "--format", "csv").out
    assert "Nothing is evaluated yet" in place("report", "--suite", "first", "--limit", "3").out


# --- status, leaderboard, sql, samples


def test_status_fits_80_columns_and_says_why(lived: Lived) -> None:
    answer = lived.answers["status"]
    assert answer.code == 0
    lines = answer.out.split("\n\n")[0].splitlines()  # the hints below may be wrapped by the terminal
    assert max(map(len, lines)) <= 80
    told = {line.split()[1]: line.split()[0] for line in lines if "run/a/" in line}
    assert told["run/a/step_200"] == "published"
    assert told["run/a/step_300"] == "held"
    assert told["run/a/step_500"] == "failed"
    after = lines[next(i for i, line in enumerate(lines) if "step_300" in line) + 1]
    assert "colours: log_likelihood_present: 18 of 18 log-likelihoods are NaN" in after
    assert "`eval-platform retry ID-or-checkpoint --reason ...`" in answer.out


def test_status_for_machines_has_the_ids(place: Place) -> None:
    by_key = {one["key"]: one for one in place("status", "--json").json}
    held = by_key["run/a/step_300"]
    assert (held["state"], held["step"], held["run"]) == ("held", 300, "a")
    assert {task["task"]: task["state"] for task in held["tasks"]} == dict.fromkeys(
        ("colours", "stories", "words"), "held"
    )
    assert held["tasks"][0]["evaluation_id"] == evaluation(place, 300, "colours")
    whole = place("status", "--tasks").out
    assert held["tasks"][0]["evaluation_id"][:8] in whole


def test_status_of_an_empty_platform_says_where_to_write(lived: Lived) -> None:
    told = lived.answers["empty"].out
    assert "found, not taken up yet: `eval-platform up` does it by itself" in " ".join(told.split())


def test_leaderboard(place: Place) -> None:
    table = place("leaderboard").out
    assert "run/a/step_200" in table
    assert "step_300" not in table
    assert "| run/a/step_200 | 200 |" in place("leaderboard", "--format", "markdown").out
    keys = {row["key"] for row in place("leaderboard", "--format", "json").json}
    assert {"run/a/step_100", "run/a/step_200"} <= keys
    assert place("leaderboard", "--format", "csv").out.startswith("key,run,step,")


def test_sql_formats(place: Place) -> None:
    query = "select key, value from leaderboard where task = 'colours' and step = 200"
    (row,) = place("sql", query, "--format", "json").json
    assert place("sql", query, "--format", "csv").out == f"key,value\nrun/a/step_200,{row['value']!r}\n"
    assert place("sql", query).out.splitlines()[-1] == "(1 row)"
    assert place("sql", query, "--format", "markdown").out.splitlines()[1] == "|---|---:|"
    assert pq.read_table(io.BytesIO(place("sql", query, "--format", "parquet").raw)).to_pylist() == [row]
    assert place("sql", "-", "--format", "json", stdin=query).json == [row]


def test_samples_mark_the_chosen_and_the_right_choice(place: Place) -> None:
    told = place("samples", "--checkpoint", "run/a/step_200", "--task", "colours", "--json", "-n", "6").json
    assert [one["position"] for one in told] == list(range(6))
    for one in told:
        likeliest = max(one["choices"], key=lambda choice: choice["log_likelihood"])
        assert [choice["text"] for choice in one["choices"] if choice["chosen"]] == [likeliest["text"]]
        assert one["scores"]["acc"] == float(likeliest["right"])
    (right,) = [choice["text"] for choice in told[0]["choices"] if choice["right"]]
    assert right == "red"
    text = place("samples", "--checkpoint", "run/a/step_200", "--task", "colours", "-n", "1").out
    (line,) = [line for line in text.splitlines() if line.startswith("  -> ")]
    chosen = next(choice for choice in told[0]["choices"] if choice["chosen"])
    assert line.split()[1:3] == [repr(chosen["text"]), f"{chosen['log_likelihood']:.4f}"]
    wrong = place("samples", "--checkpoint", "run/a/step_200", "--task", "colours", "--wrong", "--json").json
    assert [one["position"] for one in wrong] == [one["position"] for one in told if one["scores"]["acc"] == 0]


def test_tokens_of_a_sample_add_up_to_what_was_stored(place: Place) -> None:
    (stored,) = place("samples", "--checkpoint", "run/a/step_200", "--task", "colours", "--json", "-n", "1").json
    asked = "tokens", "--checkpoint", str(place.arriving(200)), "--task", "colours", "--top", "2"
    told = place(*asked, "--json").json
    totals = [sum(token["log_probability"] for token in one["tokens"]) for one in told]
    assert totals == pytest.approx([choice["log_likelihood"] for choice in stored["choices"]], abs=1e-3)
    shown = place(*asked).out
    assert "── ' red'" in shown
    assert "likeliest there" in shown
    assert "none of their tokens is scored" in place(*asked[:4], "words").out
    assert place(*asked, "-k", "99").code == 2


def test_samples_of_text_and_of_what_is_nan(place: Place) -> None:
    said = place("samples", "--checkpoint", "run/a/step_200", "--task", "words", "-n", "1").out
    assert "copy: " in said
    assert "\nright  " in said
    broken = place("samples", "--evaluation", evaluation(place, 300, "colours")[:8], "-n", "1", "--json").json
    assert {choice["log_likelihood"] for choice in broken[0]["choices"]} == {None}


def test_samples_diff_shows_what_flipped(place: Place) -> None:
    a, b = "run/a/step_100", "run/a/step_200"
    told = place("samples", "--diff", a, b, "--task", "colours", "--json", "-n", "100").json
    both = rows(
        place,
        "select x.position, x.metrics['acc'] as a, y.metrics['acc'] as b from samples x join samples y "
        f"using (task_id, sample_id) where x.key = '{a}' and y.key = '{b}' and x.task = 'colours' and x.attempt = 1",
    )
    flips = {row["position"]: float(str(row["b"])) - float(str(row["a"])) for row in both if row["a"] != row["b"]}
    assert flips, "two random models that agree on every item show nothing: give another seed"
    assert {one["position"]: one["b"]["score"] - one["a"]["score"] for one in told["shown"]} == flips
    assert (told["items"], told["better"] + told["worse"]) == (6, len(flips))
    text = place("samples", "--diff", a, b, "--task", "colours")
    assert text.out.splitlines()[-1].startswith(f"6 items compared: {told['better']} better, {told['worse']} worse")


def test_samples_that_are_not_there(place: Place) -> None:
    unknown = place("samples", "--checkpoint", "run/a/step_20", "--task", "colours")
    assert (unknown.code, unknown.out) == (2, "")
    assert "perhaps run/a/step_200" in unknown.err
    assert "nothing is answered for" in place("samples", "--checkpoint", "run/a/step_200", "--task", "nope").err
    assert "which samples?" in place("samples").err
    nothing = place("samples", "--diff", "run/a/step_200", "run/a/step_300")
    assert nothing.code == 2
    assert "are not both published" in nothing.err


# --- tasks


def test_tasks(place: Place, lived: Lived) -> None:
    assert lived.answers["sync"].out.splitlines()[1] == "new or changed: colours, stories, words"
    again = place("tasks", "sync", "--json").json
    assert (again["tasks"], again["changed"], again["errors"]) == (["colours", "stories", "words"], [], [])
    listed = place("tasks", "list").out.splitlines()
    assert [line.split()[0] for line in listed] == ["task", "colours", "stories", "words"]
    assert place("tasks", "list", "--json").json["colours"]["chance"] == pytest.approx(1 / 3)
    shown = place("tasks", "show", "colours", "-k", "1").out
    assert "Question: what colour is grass?\nAnswer:\n--- scored: ' red'\n--- scored: ' green'  <- right\n" in shown
    assert "give a number from 0 to 5" in place("tasks", "show", "colours", "-k", "6").err
    unknown = place("tasks", "show", "colour")
    assert (unknown.code, "one of: colours" in unknown.err) == (2, True)
    file = place.folder / "my_tasks" / "words.yaml"
    assert place("tasks", "validate", str(file)).out == f"ok   {file}\n"


# --- a person's word


def test_what_has_no_number_cannot_be_released(place: Place) -> None:
    answer = place("release", evaluation(place, 300, "colours")[:10], "--reason", "please")
    assert answer.code == 2
    assert "cannot be released: its primary score acc is missing" in answer.err
    assert "eval-platform rerun" in answer.err


def test_retract_and_release_move_the_board_and_are_on_record(place: Place) -> None:
    one = evaluation(place, 200, "colours")
    shown = f"select count(*) as n from leaderboard where evaluation_id = '{one}'"
    assert place("retract", one[:12], "--reason", "test items leaked").code == 0
    assert rows(place, shown) == [{"n": 0}]
    twice = place("retract", one, "--reason", "again")
    assert (twice.code, "is held already" in twice.err) == (2, True)
    assert place("release", one, "--reason", "they did not", "--json").json["evaluation_id"] == one
    assert rows(place, shown) == [{"n": 1}]
    told = rows(place, f"select action, reasons from decisions where evaluation_id = '{one}' order by n")
    assert [row["action"] for row in told] == ["gate", "retract", "release"]
    assert told[1]["reasons"] == ["test items leaked"]
    assert place("recheck", one, "--reason", "look again").out.startswith("attempt 1, decision 4: published")
    assert place("release", one, "--reason", "").code == 2
    assert "is not an evaluation_id" in place("release", "xyz", "--reason", "r").err


def test_rerun_answers_here_when_no_platform_runs_and_retract_takes_every_attempt(place: Place) -> None:
    one = evaluation(place, 100, "colours")
    later = place("rerun", one, "--reason", "to see", "--later")
    assert later.out == f"attempt 2 of {one} is open; the next platform on {place.folder / 'results'} takes it up\n"
    answer = place("rerun", one, "--reason", "now please")
    assert answer.code == 0, answer.err
    assert "is open since an earlier rerun; no platform runs here, so it is answered now" in answer.out
    attempts = f"select attempt, status from evaluations where evaluation_id = '{one}' order by attempt"
    published = [{"attempt": 1, "status": "published"}, {"attempt": 2, "status": "published"}]
    assert rows(place, attempts) == published
    assert place("retract", one, "--reason", "off the board").code == 0
    assert rows(place, f"select count(*) as n from leaderboard where evaluation_id = '{one}'") == [{"n": 0}]
    for attempt in ("1", "2"):
        assert place("release", one, "--attempt", attempt, "--reason", "on again").code == 0
    assert rows(place, attempts) == published


def test_backfill_asks_what_is_missing_and_only_that(place: Place) -> None:
    answer = place("backfill", "--task", "words", "--json")
    assert answer.code == 0, answer.err
    assert [(one["key"], one["task"], one["status"]) for one in answer.json] == [
        ("run/a/step_100", "words", "published")
    ]
    assert rows(place, "select count(*) as n from leaderboard where key = 'run/a/step_100'") == [{"n": 2}]
    assert place("backfill", "--task", "words").out == "Nothing is missing.\n"
    unknown = place("backfill", "--task", "word")
    assert (unknown.code, "no task named word" in unknown.err) == (2, True)


def test_retry_forgives_what_failed(place: Place) -> None:
    key = "run/a/step_500"
    assert {row["key"] for row in rows(place, "select key from failed")} == {key}
    answer = place("retry", key, "--reason", "transformers upgraded", "--later")
    assert re.match(rf"{key}: \d+ failed tries are forgiven; the next platform on ", answer.out)
    assert rows(place, "select key from failed") == []
    assert next(one for one in place("status", "--json").json if one["key"] == key)["state"] == "queued"
    assert "nothing is needed" in place("retry", key, "--reason", "again").err
    assert "no checkpoint has arrived as run/b" in place("retry", "run/b", "--reason", "r").err


# --- doctor


def test_doctor_looks_at_everything(place: Place) -> None:
    answer = place("doctor", "--json")
    found = {one["what"]: one for one in answer.json}
    assert {"python", "torch", "device", "configuration", "checkpoints run", "results", "state", "tasks"} <= set(found)
    assert answer.code == 0, [one for one in answer.json if not one["ok"]]
    assert json.loads(answer.out)
    assert place("doctor").out.startswith("ok   python: ")
