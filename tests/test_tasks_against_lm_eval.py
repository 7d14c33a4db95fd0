"""Prompts equal lm-evaluation-harness 0.4.13's, byte for byte: whole task files, and random tasks."""

import json
import string
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from eval_platform.tasks import Chat, Task, build_task, render
from eval_platform.tasks.building import _assemble
from eval_platform.tasks.schema import TaskFile

pytest.importorskip("lm_eval", reason="the oracle is lm-eval, which is not installed (extra `lm-eval`)")

from tests.lm_eval_oracle import asked_by_config, asked_by_lm_eval, asked_by_us

WORDS = ["alpha", "beta", "gamma ray", "déjà vu", "  spaced", "trailing ", "7", "a\nb", "日本", "{{x}}", "[1, 2]"]


def _questions(n: int) -> list[dict[str, Any]]:
    return [
        {
            "question": f"Question {i}: {WORDS[i % len(WORDS)]}?",
            "choices": [f"{WORDS[(i + k) % len(WORDS)]} {k}" for k in range(3)],
            "label": i % 3,
            "answer": f"answer {i} {WORDS[(i * 3) % len(WORDS)]}",
            "passage": f"A passage about {WORDS[i % len(WORDS)]}. It ends with {i}",
        }
        for i in range(n)
    ]


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


HEAD = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/test.jsonl
    dev: {folder}/dev.jsonl
test_split: test
"""

FILES = {
    "choices_zero_shot": """
output_type: multiple_choice
doc_to_text: "{{question}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: label
""",
    "choices_five_shots": """
output_type: multiple_choice
fewshot_split: dev
num_fewshot: 5
doc_to_text: "{{question.strip()}}\\nA. {{choices[0]}}\\nB. {{choices[1]}}\\nAnswer:"
doc_to_choice: ["A", "B", "C"]
doc_to_target: label
description: "The following are questions about {{passage[:9]}}.\\n\\n"
""",
    "choices_shots_from_the_asked_split": """
output_type: multiple_choice
fewshot_split: test
num_fewshot: 3
doc_to_text: question
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
""",
    "choices_first_n": """
output_type: multiple_choice
fewshot_split: dev
fewshot_config:
  sampler: first_n
num_fewshot: 4
fewshot_delimiter: "\\n###\\n"
target_delimiter: ""
doc_to_text: "{{passage}} "
doc_to_choice: {a: "yes", b: "no", c: "may be"}
doc_to_target: "{{['yes', 'no', 'may be'][label]}}"
""",
    "choices_first_n_from_the_asked_split": """
output_type: multiple_choice
fewshot_split: test
fewshot_config:
  sampler: first_n
num_fewshot: 4
doc_to_text: question
doc_to_choice: choices
doc_to_target: label
""",
    "choices_with_mutual_information": """
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: label
metric_list:
  - metric: acc
  - metric: acc_mutual_info
""",
    "choices_after_a_prefix": """
output_type: multiple_choice
fewshot_split: dev
num_fewshot: 2
doc_to_text: question
doc_to_choice: choices
doc_to_target: label
gen_prefix: "The answer is"
""",
    "contexts_to_choose_from": """
output_type: multiple_choice
fewshot_split: dev
num_fewshot: 2
doc_to_text: label
doc_to_choice: "{{[passage ~ ' one', passage ~ ' two', passage ~ ' three']}}"
doc_to_target: answer
""",
    "completion": """
fewshot_split: dev
num_fewshot: 3
doc_to_text: "Q: {{question}}\\nA:"
doc_to_target: answer
description: "Answer.\\n"
generation_kwargs:
  until: ["\\n", "Q:"]
  max_gen_toks: 17
  do_sample: false
  temperature: 0.0
""",
    "completion_by_default": """
doc_to_text: question
doc_to_target: "{{answer}}"
fewshot_delimiter: "\\n--\\n"
""",
    "completion_sampled": """
doc_to_text: question
doc_to_target: "{{[answer, passage]}}"
fewshot_split: dev
num_fewshot: 1
repeats: 2
generation_kwargs:
  until: "\\n"
  temperature: 0.7
""",
    "completion_with_samples_in_the_file": """
num_fewshot: 2
fewshot_config:
  sampler: first_n
  samples:
    - {question: "What is one?", answer: One.}
    - {question: "What is two?", answer: Two., choices: null}
doc_to_text: "Q: {{question}}\\nA:"
doc_to_target: "{{answer}}"
gen_prefix: "Well, "
""",
    "completion_with_other_shots": """
fewshot_split: dev
num_fewshot: 2
fewshot_config:
  doc_to_text: "Example: {{question}}"
  target_delimiter: " => "
  fewshot_delimiter: "\\n"
doc_to_text: "Q: {{question | regex_replace('[0-9]', 'N')}}"
doc_to_target: answer
""",
    "completion_of_a_choice": """
fewshot_split: dev
num_fewshot: 2
doc_to_text: question
doc_to_choice: choices
doc_to_target: label
""",
    "last_word": """
output_type: loglikelihood
fewshot_split: dev
num_fewshot: 2
doc_to_text: "{{passage.split(' ')[:-1] | join(' ')}}"
doc_to_target: "{{' ' + passage.split(' ')[-1]}}"
should_decontaminate: true
doc_to_decontamination_query: passage
metadata: {version: 1.0}
""",
    "whole_text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{passage}}"
metric_list:
  - metric: word_perplexity
  - metric: bits_per_byte
""",
}


@pytest.mark.parametrize("name", FILES)
def test_a_task_file_of_lm_eval_asks_what_it_asks_there(name: str, tmp_path: Path) -> None:
    _write(tmp_path / "test.jsonl", _questions(17))
    _write(tmp_path / "dev.jsonl", _questions(30)[20:])
    file = tmp_path / f"{name}.yaml"
    file.write_text(HEAD.format(name=name, folder=tmp_path) + FILES[name], encoding="utf-8")

    ours = list(render(build_task(file)))

    assert asked_by_us(ours) == asked_by_lm_eval(tmp_path, name)


class _Told:
    """A template that shows the messages and how they end, so that no difference can hide; for us and for lm-eval."""

    def __call__(self, messages: Any, *, continued: bool, needs_system: bool) -> str:
        return json.dumps([messages, not continued], ensure_ascii=False)

    def theirs(self, messages: Any, add_generation_prompt: bool = True) -> str:
        return json.dumps([messages, add_generation_prompt], ensure_ascii=False)


def _in_chat(as_turns: bool, system_prompt: str | None) -> tuple[Chat, dict[str, Any]]:
    """The same conversation as we are told of it and as lm-eval is."""
    theirs = {"apply_chat_template": True, "chat_template": _Told().theirs}
    return (
        Chat(_Told(), system_prompt, as_turns),
        {**theirs, "fewshot_as_multiturn": as_turns, "system_instruction": system_prompt},
    )


CONTEXTS_AFTER_A_PREFIX = FILES["contexts_to_choose_from"] + 'gen_prefix: "So:"\n'


@pytest.mark.parametrize("as_turns", [True, False], ids=["turns", "one_turn"])
@pytest.mark.parametrize("name", [*FILES, "contexts_after_a_prefix"])
def test_in_a_chat_a_task_file_asks_what_it_asks_there(name: str, as_turns: bool, tmp_path: Path) -> None:
    _write(tmp_path / "test.jsonl", _questions(7))
    _write(tmp_path / "dev.jsonl", _questions(30)[20:])
    file = tmp_path / f"{name}.yaml"
    said = FILES.get(name, CONTEXTS_AFTER_A_PREFIX)
    file.write_text(HEAD.format(name=name, folder=tmp_path) + said, encoding="utf-8")
    ours, theirs = _in_chat(as_turns, "Be brief.")

    asked = asked_by_us(list(render(build_task(file), chat=ours)))

    assert asked == asked_by_lm_eval(tmp_path, name, **theirs)
    assert (asked != asked_by_us(list(render(build_task(file))))) == (name != "whole_text")


def test_included_files_mean_the_same(tmp_path: Path) -> None:
    _write(tmp_path / "test.jsonl", _questions(5))
    _write(tmp_path / "dev.jsonl", _questions(3))
    (tmp_path / "_base").write_text(
        HEAD.format(name="base", folder=tmp_path)
        + FILES["choices_five_shots"].replace("num_fewshot: 5", "num_fewshot: 1")
    )
    file = tmp_path / "child.yaml"
    file.write_text("include: _base\ntask: child\nfewshot_split: dev\nnum_fewshot: 2\n")

    assert asked_by_us(list(render(build_task(file)))) == asked_by_lm_eval(tmp_path, "child")


def test_csv_and_parquet_rows_are_those_that_lm_eval_sees(tmp_path: Path) -> None:
    import pandas

    frame = pandas.DataFrame(
        {
            "n": ["01", "2", ""],
            "x": [1.5, 2.0, None],
            "text": ["plain", 'with "quotes", comma', "line\nbreak"],
            "b": [True, False, True],
        }
    )
    frame.to_csv(tmp_path / "t.csv", index=False)
    frame.to_parquet(tmp_path / "t.parquet", index=False)
    for kind in ("csv", "parquet"):
        file = tmp_path / f"from_{kind}.yaml"
        file.write_text(
            f"task: from_{kind}\ndataset_path: {kind}\ndataset_kwargs: {{data_files: {{test: {tmp_path}/t.{kind}}}}}\n"
            'test_split: test\ndoc_to_text: "{{n}}|{{x}}|{{text}}|{{b}}"\ndoc_to_target: "{{text}}"\n'
        )
        assert asked_by_us(list(render(build_task(file)))) == asked_by_lm_eval(tmp_path, f"from_{kind}")


def test_mmlu_as_shipped_asks_what_lm_evals_own_file_asks(tmp_path: Path) -> None:
    import lm_eval.tasks

    from eval_platform.tasks.sync import LIBRARY

    theirs = Path(lm_eval.tasks.__file__).parent / "mmlu" / "default"
    (tmp_path / "_default_template_yaml").write_text((theirs / "_default_template_yaml").read_text())
    text = (theirs / "mmlu_abstract_algebra.yaml").read_text()
    data = LIBRARY / "data" / "mmlu_abstract_algebra"
    text += '\n"dataset_path": json\n"dataset_name": null\n"num_fewshot": 5\n"dataset_kwargs": {"data_files": '
    text += f'{{"test": "{data}_test.jsonl", "dev": "{data}_dev.jsonl"}}}}\n'
    (tmp_path / "mmlu_abstract_algebra.yaml").write_text(text)

    ours = list(render(build_task(LIBRARY / "mmlu_abstract_algebra.yaml")))

    assert len(ours) == 100
    assert asked_by_us(ours) == asked_by_lm_eval(tmp_path, "mmlu_abstract_algebra")


# Random tasks. Texts carry what breaks prompts: white space at the ends, digits, brackets, braces, other scripts.
_text = st.text(alphabet=string.ascii_letters + "  \n\t0123456789[]{}é日'\"", min_size=1, max_size=12)
_delimiter = st.sampled_from(["", " ", "\n", "\n\n", " -> ", "\n###\n"])
_row = st.fixed_dictionaries(
    {"q": _text, "a": _text, "cs": st.lists(_text, min_size=3, max_size=3), "i": st.integers(0, 2)}
)


@st.composite
def _tasks(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    kind = draw(st.sampled_from(["multiple_choice", "generate_until", "loglikelihood"]))
    shots = draw(st.integers(0, 4))
    source = draw(st.sampled_from(["dev", "test"]))
    config: dict[str, Any] = {
        "task": "random",
        "test_split": "test",
        "output_type": kind,
        "num_fewshot": shots,
        "fewshot_split": source,
        "fewshot_config": {"sampler": draw(st.sampled_from(["default", "first_n"]))},
        "doc_to_text": draw(st.sampled_from(["q", "{{q}}\nA:", "{{q.strip()}} ", "<{{q}}{{i}}>\n"])),
        "target_delimiter": draw(_delimiter),
        "fewshot_delimiter": draw(_delimiter),
        "description": draw(st.sampled_from(["", "About {{q}}.\n", "Read."])),
    }
    prefix = draw(st.sampled_from([None, "So", "So ", "{{q[:1]}}!"]))
    if prefix is not None:
        config["gen_prefix"] = prefix
    if kind == "multiple_choice":
        config["doc_to_choice"] = draw(st.sampled_from(["cs", "{{cs}}", ["x", "y ", " z"]]))
        config["doc_to_target"] = draw(st.sampled_from(["i", "{{i}}"]))
    else:
        config["doc_to_target"] = draw(st.sampled_from(["a", "is {{a}}"]))
        if kind == "generate_until":
            config["generation_kwargs"] = {"until": draw(st.sampled_from(["\n", ["\n", "A:"]]))}
    # Copies of a row try the sampler's second draw.
    rows = draw(st.lists(_row, min_size=6, max_size=9, unique_by=lambda row: json.dumps(row, sort_keys=True)))
    rows = rows + [rows[k] for k in draw(st.lists(st.integers(0, 5), max_size=2))]
    return config, {"test": rows, "dev": draw(st.lists(_row, min_size=4, max_size=6))}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(_tasks())
def test_random_tasks_ask_what_lm_eval_asks(drawn: tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]) -> None:
    config, splits = drawn
    task = _task(config, splits)

    assert asked_by_us(list(render(task))) == asked_by_config(config, splits)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(_tasks(), st.booleans(), st.sampled_from([None, "Be brief.", "Be brief.\n"]))
def test_random_tasks_in_a_chat_ask_what_lm_eval_asks(
    drawn: tuple[dict[str, Any], dict[str, list[dict[str, Any]]]], as_turns: bool, system_prompt: str | None
) -> None:
    config, splits = drawn
    ours, theirs = _in_chat(as_turns, system_prompt)

    asked = asked_by_us(list(render(_task(config, splits), chat=ours)))

    assert asked == asked_by_config(config, splits, **theirs)


def _task(config: dict[str, Any], splits: dict[str, list[dict[str, Any]]]) -> Task:
    definition = TaskFile.model_validate(
        {
            **config,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {split: f"{split}.jsonl" for split in splits}},
        }
    )
    shots = splits[config["fewshot_split"]] if config["num_fewshot"] else []
    return _assemble(definition, splits["test"], shots, chance=None, identity="")
