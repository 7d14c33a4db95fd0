"""Results of a real lm-evaluation-harness are taken over: SQL says the very numbers of its files."""

import json
import math
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
from cli_tools import run_cli
from lm_eval_oracle import HEAD
from tiny_models import make_checkpoint

from eval_platform.config import Root
from eval_platform.errors import SchemaError
from eval_platform.keeping.harness import place_of
from eval_platform.keeping.harness_results import read_results

TASKS = {
    "choosing": """
output_type: multiple_choice
num_fewshot: 2
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: label
metric_list: [{metric: acc}, {metric: acc_norm}, {metric: acc_mutual_info}]
metadata: {version: 2.0}
""",
    "completing": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6}
metric_list: [{metric: exact_match}]
filter_list:
  - {name: strict-match, filter: [{function: regex, regex_pattern: "^(the)"}, {function: take_first}]}
  - {name: flexible-extract, filter: [{function: take_first}]}
""",
    "last_word": """
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: "{{choices[label]}}"
metric_list: [{metric: acc}]
""",
    "whole_text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
""",
}
GROUP = "group: both\ntask: [choosing, last_word]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
NAMES = {name: f"{name}@lm-eval" + ("-2shot" if name == "choosing" else "") for name in TASKS}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `lm_eval run --output_path --log_samples` leaves: made by the calls that it makes."""
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra `lm-eval`)")
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager

    folder = tmp_path_factory.mktemp("harness")
    words = ["the river", "a mountain", "seven", "London", "naïve café", "東京"]
    rows = [
        {"question": f"Where is {words[i % 6]}?", "choices": [words[(i + k) % 6] for k in range(3)], "label": i % 3}
        for i in range(6)
    ]
    for name in ("test", "dev"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(HEAD.format(name=name, folder=folder) + text)
    (folder / "both.yaml").write_text(GROUP)
    model = make_checkpoint(folder / "models/tiny/checkpoint-500", seed=3)
    tracker = EvaluationTracker(output_path=str(folder / "written"))
    results = cast(Any, simple_evaluate)(
        model="hf",
        model_args=f"pretrained={model},dtype=float32",
        tasks=["both", "completing", "whole_text"],
        device="cpu",
        batch_size=4,
        bootstrap_iters=1,
        log_samples=True,
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        evaluation_tracker=tracker,
    )
    samples = results.pop("samples")
    tracker.save_results_aggregated(results=results, samples=samples)
    for name in results["configs"]:
        tracker.save_results_samples(task_name=name, samples=samples[name])
    return folder / "written"


@pytest.fixture
def theirs(written: Path, tmp_path: Path) -> Path:
    """A copy of the one folder of results, to be changed."""
    [folder] = written.iterdir()
    return Path(shutil.copytree(folder, tmp_path / folder.name))


def results_of(folder: Path) -> tuple[Path, dict[str, Any]]:
    [file] = folder.rglob("results_*.json")
    return file, json.loads(file.read_text())


def rewrite(file: Path, said: dict[str, Any]) -> None:
    file.write_text(json.dumps(said))


def run(tmp_path: Path, *words: str) -> Any:
    config = tmp_path / "eval_platform.toml"
    config.write_text('results = "results"\nstate = "state"\n')
    return run_cli("--config", str(config), *words)


def take(tmp_path: Path, source: Path, *words: str) -> Any:
    return run(tmp_path, "import-lm-eval", str(source), *words, "--json")


def sql(tmp_path: Path, text: str) -> list[dict[str, Any]]:
    answer = run(tmp_path, "sql", "--format", "json", text)
    assert answer.code == 0, answer
    return json.loads(answer.out)


def lines_of(folder: Path, task: str) -> tuple[Path, list[dict[str, Any]]]:
    [file] = folder.rglob(f"samples_{task}_*.jsonl")
    return file, [json.loads(line) for line in file.read_text().splitlines()]


def stored(tmp_path: Path) -> set[str]:
    return {str(path) for path in (tmp_path / "results").rglob("*") if path.is_file()}


def test_sql_says_the_numbers_of_their_files(written: Path, tmp_path: Path) -> None:
    _, said = results_of(written)
    done = take(tmp_path, written)
    assert done.code == 0, done
    told = done.json["told"]
    assert {one["task"]: one["status"] for one in told if one["kind"] == "taken"} == dict.fromkeys(
        NAMES.values(), "published"
    )
    assert [one["text"] for one in told if one["kind"] == "left_out"] == [
        "both: a group, which is a mean over tasks; its tasks are taken over"
    ]

    scores = {
        (row["task"], row["metric"]): (row["value"], row["standard_error"], row["n"])
        for row in sql(tmp_path, "select task, metric, value, standard_error, n from scores")
    }
    wanted = {}
    for name in TASKS:
        for key, value in said["results"][name].items():
            metric, _, filter_name = key.partition(",")
            if filter_name and not metric.endswith("_stderr"):
                error = said["results"][name][f"{metric}_stderr,{filter_name}"]
                called = metric if filter_name == "none" else key
                wanted[NAMES[name], called] = (value, None if error == "N/A" else error, 6)
    assert scores == wanted
    assert ("completing@lm-eval", "exact_match,strict-match") in scores

    kinds = sql(tmp_path, "select distinct kind, origin, chat, dtype, versions ->> 'lm_eval' as v from evaluations")
    assert kinds == [{"kind": "imported", "origin": "imported", "chat": False, "dtype": "float32", "v": "0.4.13"}]
    board = sql(tmp_path, "select task, metric, value, kind, run, step from leaderboard order by task")
    assert [row["task"] for row in board] == sorted(NAMES.values())
    assert {(row["kind"], row["step"]) for row in board} == {("imported", 500)}
    assert board[0]["run"].endswith("models/tiny")

    # Every sample: its prompt, what was answered, log-likelihoods and metrics.
    samples = sql(tmp_path, "select * from samples order by position")
    for name in TASKS:
        _, lines = lines_of(written, name)
        rows = [row for row in samples if row["task"] == NAMES[name]]
        firsts = [line for line in lines if line["filter"] in ("none", "strict-match")]
        assert [row["prompt"] for row in rows] == [line["arguments"]["gen_args_0"]["arg_0"] for line in firsts]
        for row, line in zip(rows, firsts, strict=True):
            metrics = dict(row["metrics"])
            if name == "choosing":
                found = [choice["log_likelihood"] for choice in row["choices"]]
                found += [choice["unconditional_log_likelihood"] for choice in row["choices"]]
                assert found == [float(one[0][0]) for one in line["resps"]]
                assert [choice["text"] for choice in row["choices"]] == line["doc"]["choices"]
                assert row["target"] == line["target"]
                assert {metric: float(line[metric]) for metric in ("acc", "acc_norm", "acc_mutual_info")} == metrics
            elif name == "completing":
                assert row["response"] == line["resps"][0][0]
                assert dict(row["extracted"])["strict-match"] == line["filtered_resps"][0]
            elif name == "last_word":
                assert (row["log_likelihood"], str(row["is_greedy"])) == (
                    float(line["resps"][0][0][0]),
                    line["resps"][0][0][1],
                )
            else:
                assert row["log_likelihood"] == float(line["resps"][0][0])

    # The same again adds nothing; the root is whole; the gate can be asked once more, the model cannot.
    before = stored(tmp_path)
    again = take(tmp_path, written)
    assert {one["kind"] for one in again.json["told"]} == {"present", "left_out"}
    assert stored(tmp_path) == before
    whole = run(tmp_path, "verify", "--json")
    assert whole.json["ok"], whole.json
    slot = told[0]["evaluation_id"] or told[1]["evaluation_id"]
    assert "published" in run(tmp_path, "recheck", slot, "--reason", "look again").out
    refused = run(tmp_path, "rerun", slot, "--reason", "why not")
    assert refused.code == 2
    assert "cannot be asked here" in refused.err

    # Killed between commits and decisions, the same command decides.
    shutil.rmtree(tmp_path / "results/decisions")
    told = [one for one in take(tmp_path, written).json["told"] if one["task"]]
    assert {(one["kind"], one["status"]) for one in told} == {("present", "published")}
    # Carried into another root it is what it was.
    assert run(tmp_path, "export", str(tmp_path / "elsewhere")).code == 0
    config = tmp_path / "other.toml"
    config.write_text('results = "elsewhere"\nstate = "other"\n')
    there = run_cli("--config", str(config), "sql", "--format", "json", "select task from leaderboard order by all")
    assert [row["task"] for row in json.loads(there.out)] == sorted(NAMES.values())


def test_what_is_wrong_is_named_and_the_others_go_on(theirs: Path, tmp_path: Path) -> None:
    file, said = results_of(theirs)
    said["results"]["last_word"]["acc,none"] = "N/A"
    said["results"]["whole_text"]["bits_per_byte,none"] = math.nan
    rewrite(file, said)
    log, lines = lines_of(theirs, "completing")
    log.write_text("".join(json.dumps(line | {"exact_match": 1.0}) + "\n" for line in lines))
    log, lines = lines_of(theirs, "choosing")
    lines[0]["resps"][0][0][0] = "nan"
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (theirs / "results_torn.json").write_text(file.read_text()[:-50])
    (theirs / "results_other.json").write_text('{"results": []}')
    done = take(tmp_path, theirs)
    assert done.code == 1
    faults = [one["text"] for one in done.json["told"] if one["kind"] == "fault"]
    assert len(faults) == 3
    for part in (
        f'{file}: field results.last_word.acc,none is "N/A"',
        "results_torn.json cannot",
        "results_other.json",
    ):
        assert any(part in fault for fault in faults), (part, faults)
    status = {one["task"]: (one["status"], one["text"]) for one in done.json["told"] if one["kind"] == "taken"}
    assert {name: one for name, (one, _) in status.items()} == {
        NAMES["choosing"]: "held",
        NAMES["completing"]: "held",
        NAMES["whole_text"]: "held",
    }
    assert (
        "the sample log is not of these results: exact_match,strict-match of the samples is 1"
        in status[NAMES["completing"]][1]
    )
    assert "1 of 36 log-likelihoods are NaN" in status[NAMES["choosing"]][1]
    assert "cannot be computed" in status[NAMES["whole_text"]][1]


def test_files_of_older_releases(theirs: Path, tmp_path: Path) -> None:
    """To 0.4.2: no counts, no directions, no names of filters, arguments as lists, numbers as numbers."""
    file, said = results_of(theirs)
    for key in ("n-samples", "higher_is_better", "lm_eval_version", "task_hashes", "model_name", "group_subtasks"):
        said.pop(key, None)
    said["config"] = {"model": "hf", "model_args": said["config"]["model_args"], "limit": None}
    del said["results"]["both"], said["groups"]
    for reported in said["results"].values():
        reported.pop("sample_len", None)
    rewrite(file, said)
    for task in TASKS:
        log, lines = lines_of(theirs, task)
        for line in lines:
            del line["filter"], line["metrics"]
            line["arguments"] = [list(one.values()) for one in line["arguments"].values()]
            if task == "choosing":
                line["resps"] = [[[float(one[0][0]), one[0][1] == "True"]] for one in line["resps"]]
        log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = take(tmp_path, file)
    assert done.code == 0, done
    assert {one["status"] for one in done.json["told"]} == {"published"}
    rows = sql(tmp_path, "select task, metric, value, n from scores")
    assert {row["n"] for row in rows} == {None}
    for name in TASKS:
        for row in rows:
            if row["task"] == NAMES[name]:
                key = row["metric"] if "," in row["metric"] else f"{row['metric']},none"
                assert row["value"] == said["results"][name][key]
    extracted = sql(tmp_path, "select distinct map_keys(extracted) as k from samples where task like 'completing%'")
    assert extracted == [{"k": ["strict-match", "flexible-extract"]}]


def test_other_results_of_one_model_contradict_or_are_told_apart(theirs: Path, tmp_path: Path) -> None:
    file, said = results_of(theirs)
    for log in theirs.glob("*.jsonl"):
        log.unlink()
    for name in ("completing", "whole_text"):
        del said["results"][name]
    rewrite(file, said)
    first = take(tmp_path, file, "--run", "mine")
    assert first.code == 0
    later = file.with_name("results_2031-01-01T00-00-00.000000.json")
    said["date"] += 1000
    said["results"]["choosing"]["acc,none"] = 1.0  # more than a standard error from before
    rewrite(later, said)
    told = {one["task"]: one for one in take(tmp_path, later, "--run", "mine").json["told"]}
    choosing = told[NAMES["choosing"]]
    assert (choosing["attempt"], choosing["status"]) == (2, "held")
    assert "gave other scores before" in choosing["text"]
    assert (told[NAMES["last_word"]]["attempt"], told[NAMES["last_word"]]["status"]) == (2, "published")
    of_both = (
        f"select attempt, status from evaluations where evaluation_id = '{choosing['evaluation_id']}' order by all"
    )
    assert [tuple(row.values()) for row in sql(tmp_path, of_both)] == [(1, "held"), (2, "held")]

    # Another checkpoint, says who imports it; and of some items only, so that it is on no board.
    said["config"]["limit"] = 3
    said["n-samples"]["last_word"]["effective"] = 3
    rewrite(later, said)
    told = {one["task"]: one for one in take(tmp_path, later, "--run", "mine", "--step", "9").json["told"]}
    assert {(one["attempt"], one["status"]) for one in told.values() if one["task"]} == {(1, "published")}
    board = sql(tmp_path, "select step, task from leaderboard where run = 'mine' order by all")
    assert [tuple(row.values()) for row in board] == [(9, NAMES["choosing"]), (500, NAMES["last_word"])]


@pytest.mark.parametrize(
    ("arguments", "key", "run_name", "step"),
    [
        ({"pretrained": "/disk/run7/checkpoint-500"}, "disk/run7/checkpoint-500", "disk/run7", 500),
        ("pretrained=org/Llama-3-8B,dtype=float16", "org/Llama-3-8B", "org/Llama-3-8B", None),
        ("pretrained=org/p,revision=step3000", "org/p/step3000", "org/p", 3000),
        ("pretrained=org/p,revision=main", "org/p", "org/p", None),
        ("pretrained=org/p,peft=../adapters/iter_20", "adapters/iter_20", "adapters", 20),
        ({"pretrained": "/watched/a/at 7"}, "watched/a/at=207", "a", 7),
    ],
)
def test_where_a_model_stands(tmp_path: Path, arguments: Any, key: str, run_name: str, step: int | None) -> None:
    roots = [Root(name="watched", path="/watched", pattern="{run}/at {step}")]
    place = place_of(read_results(named(tmp_path, arguments)), roots, None, None)
    assert (place.key, place.run, place.step) == (f"imported/{key}", run_name, step)
    of_a_person = place_of(read_results(named(tmp_path, arguments)), roots, "mine", 8)
    assert (of_a_person.key, of_a_person.run, of_a_person.step) == (f"imported/{key}/step-8", "mine", 8)
    assert of_a_person.identity != place.identity


def test_credentials_are_not_kept(tmp_path: Path) -> None:
    said = "model=gpt,base_url=https://me:hush@host/v1?key=hush,api_key=hush,batch_size=4,max_length=100"
    model = read_results(named(tmp_path, said)).model
    assert model.which == {"model": "gpt", "base_url": "https://host/v1"}
    assert model.arguments == {"max_length": "100"}


def test_a_file_that_does_not_say_which_model(tmp_path: Path) -> None:
    with pytest.raises(SchemaError, match=r"results_1\.json: field config\.model_args does not say"):
        read_results(named(tmp_path, None))


def named(folder: Path, arguments: Any) -> Path:
    file = folder / "results_1.json"
    said = {"results": {"t": {"acc,none": 0.5}}, "config": {"model": "hf", "model_args": arguments}}
    file.write_text(json.dumps(said))
    return file
