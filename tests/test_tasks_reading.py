"""Task files: what is accepted, and that each way to be wrong is refused with file, line, key and remedy."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from eval_platform.errors import TaskError
from eval_platform.tasks import TaskFile
from eval_platform.tasks.metrics import DEFAULT_METRICS, FILTERS, METRIC_ARGUMENTS, METRICS
from eval_platform.tasks.reading import read_task_file, task_name

GOOD = """task: sums
documents: {file: sums.jsonl}
doc_to_text: question
doc_to_target: answer
"""
CHOICES = """task: sums
documents: {file: sums.jsonl}
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: label
"""


def _file(folder: Path, text: str) -> Path:
    path = folder / "sums.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_are_filled_in(tmp_path: Path) -> None:
    task = read_task_file(_file(tmp_path, GOOD))

    assert task.metrics == ("exact_match",)
    assert task.primary_metric == "exact_match"
    assert task.higher_is_better is True
    assert task.generation is not None
    assert task.generation.stop == ("\n\n",)
    assert task.generation.max_new_tokens == 256


def test_a_key_without_a_value_is_absent(tmp_path: Path) -> None:
    said = read_task_file(_file(tmp_path, GOOD + "description:\nfewshot_config:\nmetric_list:\nnum_fewshot:\n"))

    assert said == read_task_file(_file(tmp_path, GOOD))


# What is wrong -> (the file, what the error must say beside the file's name)
WRONG: dict[str, tuple[str, list[str]]] = {
    "unknown key": (GOOD + "num_fewshoot: 3\n", [":5", "num_fewshoot", "did you mean 'num_fewshot'"]),
    "unknown key inside": (GOOD.replace("file:", "fil:"), [":2", "documents.fil", "did you mean 'file'"]),
    "wrong type": (GOOD + "num_fewshot: five\n", [":5", "num_fewshot", "integer"]),
    "a number for a truth": (GOOD + "num_fewshot: true\n", [":5", "num_fewshot", "integer"]),
    "negative shots": (GOOD + "num_fewshot: -1\n", [":5", "num_fewshot", "greater"]),
    "no repeats": (GOOD + "repeats: 0\n", [":5", "repeats"]),
    "unquoted yes and no": (
        CHOICES.replace("choices\n", "[yes, no]\n"),
        [":5", "doc_to_choice", "not True; put it in quotes"],
    ),
    "no task": (GOOD.replace("task: sums\n", ""), ["task", "required"]),
    "a name with a slash": (GOOD.replace("sums\n", "a/b\n", 1), [":1", "task"]),
    "two sources": (GOOD + "dataset_path: json\n", ["once"]),
    "two of our sources": (GOOD.replace("{", "{files: [a], "), [":2", "name one source"]),
    "no source": (GOOD.replace("{file: sums.jsonl}", "{sample: 3}"), ["where the documents are"]),
    "lm-eval keys with ours": (GOOD + "test_split: test\n", ["test_split belongs to `dataset_path`"]),
    "a split not said": (GOOD.replace("documents: {file: sums.jsonl}", "dataset_path: x/y"), ["which split is asked"]),
    "no data files": (
        GOOD.replace("documents: {file: sums.jsonl}", "dataset_path: json\ntest_split: test"),
        ["data_files"],
    ),
    "no target": (GOOD.replace("doc_to_target: answer\n", ""), ["doc_to_target is missing"]),
    "no text": (GOOD.replace("doc_to_text: question\n", ""), ["doc_to_text is missing"]),
    "no choices": (GOOD + "output_type: multiple_choice\n", ["doc_to_choice is missing"]),
    "unknown output type": (GOOD + "output_type: choice\n", [":5", "output_type", "multiple_choice"]),
    "unknown metric": (GOOD + "metric_list: [{metric: exact_mach}]\n", [":5", "did you mean 'exact_match'"]),
    "metric of another kind": (GOOD + "metric_list: [{metric: acc_norm}]\n", ["acc_norm does not apply"]),
    "metric twice": (GOOD + "metric_list: [{metric: f1}, {metric: f1}]\n", ["twice"]),
    "wrong aggregation": (GOOD + "metric_list: [{metric: f1, aggregation: max}]\n", [":5", "aggregated by mean"]),
    "wrong direction": (GOOD + "metric_list: [{metric: f1, higher_is_better: false}]\n", [":5", "higher is better"]),
    "metric argument": (GOOD + "metric_list: [{metric: f1, ignore_case: true}]\n", [":5", "takes no ignore_case"]),
    "metric regex": (
        GOOD + "metric_list: [{metric: exact_match, regexes_to_ignore: ['(']}]\n",
        [":5", "not a regular expression"],
    ),
    "unknown filter": (
        GOOD + "filter_list: [{name: a, filter: [{function: regexp}]}]\n",
        [":5", "did you mean 'regex'"],
    ),
    "filter regex": (
        GOOD + "filter_list: [{name: a, filter: [{function: regex, regex_pattern: '['}]}]\n",
        [":5", "not a regular expression"],
    ),
    "filter argument": (
        GOOD + "filter_list: [{name: a, filter: [{function: lowercase, fallback: x}]}]\n",
        [":5", "takes no fallback"],
    ),
    "filters of one name": (
        GOOD + "filter_list: [{name: a, filter: [{function: take_first}]}, {name: a, filter: [{function: regex}]}]\n",
        ["two filters of one name"],
    ),
    "filter on choices": (
        CHOICES + "filter_list: [{name: a, filter: [{function: take_first}]}]\n",
        ["filter_list applies to completions"],
    ),
    "primary metric": (GOOD + "primary_metric: acc\n", ["no score 'acc'", "exact_match"]),
    "direction of the primary": (GOOD + "higher_is_better: false\n", ["higher_is_better", "higher is better"]),
    "chance out of range": (GOOD + "chance: 50\n", ["chance", "outside the range"]),
    "share out of range": (GOOD + "quality: {empty_share: 2}\n", [":5", "quality.empty_share"]),
    "generation settings of choices": (CHOICES + "generation_kwargs: {until: x}\n", ["generation_kwargs"]),
    "sampling at temperature 0": (GOOD + "generation_kwargs: {do_sample: true}\n", [":5", "temperature above 0"]),
    "empty stop": (GOOD + "generation_kwargs: {until: ['']}\n", [":5", "empty stop string"]),
    "two lengths": (GOOD + "generation_kwargs: {max_gen_toks: 3, max_tokens: 3}\n", [":5", "keep one"]),
    "unknown sampler": (GOOD + "fewshot_config: {sampler: random}\n", [":5", "fewshot_config.sampler", "first_n"]),
    "dead key": (GOOD + "fewshot_config: {fewshot_indices: [1]}\n", [":5", "fewshot_indices has no effect"]),
    "a date": (GOOD + "metadata: {version: 2024-01-01}\n", [":5", "metadata", "put the value in quotes"]),
    "infinity": (GOOD + "chance: .inf\n", [":5", "chance", "finite"]),
    "a function": (GOOD + "process_docs: !function utils.f\n", [":5", "process_docs", "`!function` is refused"]),
    "a function inside": (
        GOOD + "metric_list: [{metric: !function utils.f}]\n",
        [":5", "metric_list.0.metric", "`!function` is refused"],
    ),
    "a Python object": (GOOD + "metadata: !!python/object/apply:os.system ['true']\n", [":5", "metadata", "refused"]),
    "a refused key": (GOOD + "process_results: x\n", [":5", "process_results is not supported", "run no code"]),
    "a group": ("group: g\ntask: [a, b]\n", [":1", "a group is no task"]),
    "a list of tasks": ("task: [a, b]\n", [":1", "a list of tasks is a group"]),
    "a doubled key": (GOOD + "task: other\n", [":5", "task stands twice"]),
    "a key that is a list": (GOOD + "[a, b]: 3\n", [":5", "must be a text"]),
    "no mapping": ("- a\n- b\n", ["not a mapping"]),
    "an empty file": ("", ["not a mapping"]),
    "no YAML": ("task: [1\nb: 2", ["not YAML", "line 2"]),
    "an alias of itself": ("task: &a [*a]\n", [":1", "contains itself"]),
    "a bomb of aliases": (
        "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
        + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdef", "bcdefg", strict=True)),
        ["more than 100000 values"],
    ),
    "too deep": ("task: " + "[" * 5000, ["nested too deeply"]),
    "includes itself": ("include: sums.yaml\n", ["includes itself"]),
    "includes nothing": ("include: other.yaml\n", ["other.yaml", "cannot be read"]),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_refused_by_name(wrong: str, tmp_path: Path) -> None:
    text, said = WRONG[wrong]
    path = _file(tmp_path, text)

    with pytest.raises(TaskError) as caught:
        read_task_file(path)

    message = str(caught.value)
    assert str(tmp_path) in message
    assert "remedy: " in message
    for part in said:
        assert part in message


@pytest.mark.parametrize(
    ("fewshot", "leaks"),
    [
        ("fewshot_split: test\ntest_split: test", False),
        ("test_split: test", True),
        ("validation_split: dev", False),
        ("validation_split: dev\nfewshot_split: dev", True),
        ("test_split: test\ntraining_split: train", False),
    ],
)
def test_shots_that_may_show_the_answer_are_refused(fewshot: str, leaks: bool, tmp_path: Path) -> None:
    head = "dataset_path: some/dataset\nnum_fewshot: 2\n" + fewshot
    path = _file(tmp_path, GOOD.replace("documents: {file: sums.jsonl}", head))

    if not leaks:
        assert read_task_file(path).shots == 2
        return
    with pytest.raises(TaskError, match="its answer may stand in its own prompt"):
        read_task_file(path)


def test_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "sums.yaml"
    path.write_bytes(GOOD.encode() + b"title: \xff\n")

    with pytest.raises(TaskError, match="not UTF-8"):
        read_task_file(path)


def test_the_name_of_a_broken_file_is_still_known(tmp_path: Path) -> None:
    assert task_name(_file(tmp_path, GOOD + "num_fewshot: five\n")) == "sums"
    assert task_name(_file(tmp_path, "task: [")) is None


def test_own_keys_win_over_included_ones(tmp_path: Path) -> None:
    (tmp_path / "base").write_text(GOOD + "num_fewshot: 3\nrepeats: 2\n")
    task = read_task_file(_file(tmp_path, "include: base\nnum_fewshot: 1\n"))

    assert (task.num_fewshot, task.repeats, task.task) == (1, 2, "sums")


def test_an_error_in_an_included_file_names_that_file(tmp_path: Path) -> None:
    (tmp_path / "base").write_text(GOOD + "num_fewshot: x\n")

    with pytest.raises(TaskError, match=r"base:5: num_fewshot"):
        read_task_file(_file(tmp_path, "include: base\n"))


_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(sorted(TaskFile.model_fields)) | st.text(max_size=6), _values, max_size=5))
def test_any_mapping_is_a_task_or_a_clear_error(
    tmp_path_factory: pytest.TempPathFactory, extra: dict[str, Any]
) -> None:
    path = tmp_path_factory.mktemp("any") / "sums.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(GOOD), **extra}, allow_unicode=True), encoding="utf-8")

    task, refused = None, None
    try:
        task = read_task_file(path)
    except TaskError as error:
        refused = error

    if refused is not None:
        assert str(path.parent) in str(refused)
        assert refused.remedy
    if task is not None:
        assert TaskFile.model_validate(task.model_dump(mode="json", by_alias=True)) == task


def test_the_vocabulary_holds_together() -> None:
    for output_type, names in DEFAULT_METRICS.items():
        assert all(output_type in METRICS[name].output_types for name in names)
    assert set(METRIC_ARGUMENTS) <= set(METRICS)
    for metric in METRICS.values():
        assert metric.low < metric.high
        assert not metric.proportion or (metric.low, metric.high, metric.aggregation) == (0, 1, "mean")


def test_the_vocabulary_that_is_shared_with_lm_eval_means_the_same() -> None:
    registry = pytest.importorskip("lm_eval.api.registry", reason="needs the extra lm-eval")
    import lm_eval.filters
    from lm_eval.api.registry import filter_registry

    shared = {name for name in METRICS if registry.is_higher_better(name) is not None}
    assert shared > {"acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match", "perplexity", "bits_per_byte"}
    for name in shared - {"f1"}:  # another f1, as metrics.py says
        metric = METRICS[name]
        assert registry.is_higher_better(name) == metric.higher_is_better
        aggregation = registry.get_metric_aggregation(name)
        assert registry.get_aggregation(metric.aggregation) == aggregation
    assert {k: list(v) for k, v in DEFAULT_METRICS.items()} == registry.DEFAULT_METRIC_REGISTRY
    assert lm_eval.filters is not None
    ours = {"even_indents", "first_block", "code_fence"}  # of programs
    assert set(FILTERS) - ours <= set(filter_registry.keys())
