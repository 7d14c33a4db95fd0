"""Model `eval-platform` inside lm-evaluation-harness: whatever it runs on `hf`, it runs on our engine, equally."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from lm_eval_oracle import HEAD
from transformers import AutoTokenizer

pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra `lm-eval`)")

from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM, hash_args
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tiny_models import make_checkpoint
from warm import run_warm

from eval_platform.errors import CheckpointError, ConfigError, TaskError
from eval_platform.lm_eval_model import EvalPlatformLM

MAX_LENGTH = 512

# It begins with BOS, which must not be added once more, and refuses a system message, as Gemma's does.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "[{{ m.role }}] {{ m.content }}{% if not loop.last or add_generation_prompt %}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)

TASKS = {
    # The mutual information asks every choice without a context too; document 3 is document 0 again.
    "choosing": """
output_type: multiple_choice
num_fewshot: 2
doc_to_text: "{{question}} "
doc_to_choice: choices
doc_to_target: label
metric_list: [{metric: acc}, {metric: acc_norm}, {metric: acc_mutual_info}]
""",
    "completing": """
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: ["\\n", "er"], max_gen_toks: 20, do_sample: false, temperature: 0.7}
""",
    "last_word": """
output_type: loglikelihood
doc_to_text: "{{passage.split(' ')[:-1] | join(' ')}}"
doc_to_target: "{{passage.split(' ')[-1]}}"
""",
    "whole_text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{passage}}"
""",
}
CHAT_TASKS = ["choosing", "completing"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_checkpoint(folder, seed=3, max_length=MAX_LENGTH, adds_bos=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    words = ["the river", "a mountain", "seven", "London ", "naïve café", "東京", "copy", "larger", "x [1] {y}"]
    rows = [
        {
            "question": f"Where is {words[i % 3]}?",
            "choices": [f"{words[(i + k) % 9]} {'of ' * k}{k}" for k in range(3)],
            "label": i % 3,
            # Every other passage is longer than the window.
            "passage": " ".join(f"{words[(i * j) % 9]} was {j}" for j in range(8 + (i % 2) * 150)),
        }
        for i in range(9)
    ]
    rows[3] = rows[0]
    for name, part in (("test", rows[:6]), ("dev", rows[6:])):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(HEAD.format(name=name, folder=folder) + text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def ours(checkpoint: Path) -> EvalPlatformLM:
    return EvalPlatformLM(str(checkpoint), device="cpu")


@pytest.fixture(scope="module")
def theirs(checkpoint: Path) -> HFLM:
    return HFLM(pretrained=str(checkpoint), dtype="float32", device="cpu", batch_size=4)


def evaluate(folder: Path, **how: Any) -> dict[str, Any]:
    how = {"tasks": list(TASKS), "bootstrap_iters": 0} | how
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    # Its decorator hides its parameters from a type checker.
    return cast(Any, simple_evaluate)(task_manager=manager, **how)


def asked(kind: Any, arguments: Sequence[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, args, i, metadata=("some_task", i, 1)) for i, args in enumerate(arguments)]


def assert_equal(ours: dict[str, Any], theirs: dict[str, Any], count: Callable[[str], int]) -> None:
    """The same samples and results. `count`: tokens of a text, at least."""
    assert set(ours["samples"]) == set(theirs["samples"])
    for name, samples in ours["samples"].items():
        for our, their in zip(samples, theirs["samples"][name], strict=True):
            assert (our["doc_id"], our["arguments"]) == (their["doc_id"], their["arguments"])
            for arguments, a, b in zip(our["arguments"], our["resps"], their["resps"], strict=True):
                assert_same_answer(a[0], b[0], count(arguments[-1]) if isinstance(arguments[-1], str) else 0)
    assert_same_scores(ours["results"], theirs["results"])


def assert_same_scores(ours: dict[str, dict[str, Any]], theirs: dict[str, dict[str, Any]]) -> None:
    assert set(ours) == set(theirs)
    for name, scores in theirs.items():
        assert set(ours[name]) == set(scores)
        for score, value in scores.items():
            if isinstance(value, float):
                # Counts of right answers differ by one sample or not at all; perplexities by rounding.
                assert ours[name][score] == pytest.approx(value, rel=1e-5), (name, score)
            else:
                assert ours[name][score] == value, (name, score)


def assert_same_answer(ours: Any, theirs: Any, n_tokens: int) -> None:
    if isinstance(theirs, str):
        assert ours == theirs
    elif isinstance(theirs, tuple | list):
        assert_same_answer(ours[0], theirs[0], n_tokens)
        assert ours[1] == theirs[1]
    else:
        assert ours == pytest.approx(theirs, abs=max(1e-4, 1e-5 * n_tokens), rel=0)


@pytest.fixture(scope="module")
def count(theirs: HFLM) -> Callable[[str], int]:
    return lambda text: len(theirs.tok_encode(text))


@pytest.fixture(scope="module")
def their_results(tasks: Path, theirs: HFLM) -> dict[str, Any]:
    return evaluate(tasks, model=theirs)


def test_by_name_it_gives_the_results_of_hf(
    tasks: Path, checkpoint: Path, their_results: dict[str, Any], count: Callable[[str], int]
) -> None:
    arguments = f"pretrained={checkpoint},dtype=float32,max_length={MAX_LENGTH},path=auto"
    results = evaluate(tasks, model="eval-platform", model_args=arguments, device="cpu", batch_size=4)
    assert_equal(results, their_results, count)
    assert results["config"]["model_dtype"] == "float32"
    assert results["max_length"] == MAX_LENGTH
    assert results["tokenizer_bos_token"] == their_results["tokenizer_bos_token"]


def test_as_an_instance_it_gives_the_results_of_hf(
    tasks: Path, ours: EvalPlatformLM, their_results: dict[str, Any], count: Callable[[str], int]
) -> None:
    assert_equal(evaluate(tasks, model=ours), their_results, count)


def test_the_comparison_could_fail(their_results: dict[str, Any], count: Callable[[str], int]) -> None:
    samples = their_results["samples"]
    texts = {sample["resps"][0][0] for sample in samples["completing"]}
    assert len(texts) > 1
    assert max(map(len, texts)) > 10
    assert 0 < their_results["results"]["choosing"]["acc,none"] < 1
    lengths = [count(sample["arguments"][0][0]) for sample in samples["whole_text"]]
    assert min(lengths) < MAX_LENGTH < max(lengths)


def test_a_shorter_window_cuts_as_theirs(tasks: Path, checkpoint: Path, count: Callable[[str], int]) -> None:
    names = ["choosing", "completing", "whole_text"]
    arguments = {"pretrained": str(checkpoint), "dtype": "float32", "max_length": 40}
    results = [
        evaluate(tasks, model=m, model_args=arguments, device="cpu", tasks=names) for m in ("eval-platform", "hf")
    ]
    assert_equal(results[0], results[1], count)


def test_conversations_are_those_of_hf(
    tasks: Path, ours: EvalPlatformLM, theirs: HFLM, count: Callable[[str], int]
) -> None:
    chat = {"apply_chat_template": True, "fewshot_as_multiturn": True, "tasks": CHAT_TASKS}
    chat |= {"system_instruction": "Be brief."}  # which the template refuses, so that it is left out
    results = [evaluate(tasks, model=model, **chat) for model in (ours, theirs)]
    assert "[user] Where is" in results[0]["samples"]["choosing"][0]["arguments"][0][0]
    assert_equal(results[0], results[1], count)
    assert ours.chat_template(True) == theirs.chat_template(True) == CHAT_TEMPLATE
    assert ours.chat_template(False) is None
    assert ours.tokenizer_name == theirs.tokenizer_name
    assert ours.eot_token_id == theirs.eot_token_id
    history = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "In"}]
    assert ours.apply_chat_template(history, False) == theirs.apply_chat_template(history, False)


def test_without_a_chat_template_it_says_so(tmp_path: Path) -> None:
    lm = EvalPlatformLM(str(make_checkpoint(tmp_path)))
    with pytest.raises(CheckpointError, match=r"has no chat template\n  remedy: leave out --apply_chat_template"):
        lm.apply_chat_template([{"role": "user", "content": "Where?"}])


CONTEXTS = ["Where is the river?", "seven seven", "naïve café", "Question: copy", "A. B."]


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"until": "e"},
        {"until": [], "max_new_tokens": 9},
        {"until": ["\n", " the"], "max_tokens": 30, "temperature": 0.0},
        {"max_gen_toks": 12, "max_tokens": 30, "do_sample": False, "temperature": 0.7, "top_p": 0.9},
        {"max_gen_toks": 12, "num_beams": 1},
        # A draw from one token is no draw: how each reads the arguments shows, and no generator does.
        {"max_gen_toks": 12, "temperature": 0.7, "top_k": 1},
        {"max_gen_toks": 12, "do_sample": True, "temperature": 1.5, "top_p": 1e-6},
    ],
    ids=str,
)
def test_generation_arguments_mean_what_they_mean_to_hf(
    ours: EvalPlatformLM, theirs: HFLM, arguments: dict[str, Any]
) -> None:
    requests = [asked("generate_until", [(context, dict(arguments)) for context in CONTEXTS]) for _ in range(2)]
    answers = ours.generate_until(requests[0], disable_tqdm=True)
    assert answers == theirs.generate_until(requests[1], disable_tqdm=True)
    assert all(request.args[1] == arguments for request in requests[0])  # which lm-eval logs and hashes


def test_what_the_task_leaves_open_the_checkpoint_says(tmp_path: Path, theirs: HFLM) -> None:
    make_checkpoint(tmp_path, seed=3, max_length=MAX_LENGTH, adds_bos=True)
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | {"top_k": 1}), encoding="utf-8")
    lm = EvalPlatformLM(str(tmp_path), device="cpu")
    drawn, greedy = (
        asked("generate_until", [(context, {"max_gen_toks": 12} | how) for context in CONTEXTS])
        for how in ({"do_sample": True, "temperature": 2.0}, {})
    )
    assert lm.generate_until(drawn, disable_tqdm=True) == theirs.generate_until(greedy, disable_tqdm=True)


def test_a_draw_asked_again_is_another_and_a_run_repeats(ours: EvalPlatformLM, checkpoint: Path) -> None:
    how = {"max_gen_toks": 12, "do_sample": True, "temperature": 1.0}
    texts = ours.generate_until(asked("generate_until", [("Where is", how)] * 4), disable_tqdm=True)
    assert len(set(texts)) == 4
    assert ours.generate_until(asked("generate_until", [("Where is", how)] * 4), disable_tqdm=True) == texts
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)  # as lm-eval's --seed does before it makes its model
        other = EvalPlatformLM(str(checkpoint), device="cpu")
    assert other.generate_until(asked("generate_until", [("Where is", how)] * 4), disable_tqdm=True) != texts


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"num_beams": 4}, "num_beams=4"),
        ({"repetition_penalty": 1.2, "min_p": 0.1}, "min_p=0.1, repetition_penalty=1.2"),
        ({"do_sample": True}, "do_sample is true, but temperature is 0"),
        ({"until": ["\n", 3]}, "until: 3 is no text"),
    ],
    ids=str,
)
def test_generation_arguments_it_lacks_are_refused(ours: EvalPlatformLM, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(TaskError) as raised:
        ours.generate_until(asked("generate_until", [("Where", arguments)]), disable_tqdm=True)
    assert str(raised.value).startswith("task some_task, generation_kwargs")
    assert said in str(raised.value)
    assert "remedy:" in str(raised.value)


def test_model_arguments_it_lacks_are_refused(checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match=r"no argument 'parallelize', 'peft'\n  remedy: use pretrained"):
        EvalPlatformLM(str(checkpoint), parallelize=True, peft="adapter")
    with pytest.raises(ConfigError, match=r"pretrained='gpt2' is no folder\n  remedy: download"):
        EvalPlatformLM("gpt2")


def test_every_answer_reaches_their_cache(ours: EvalPlatformLM, tmp_path: Path) -> None:
    """Also the model's own partial answers, which are what a run that died leaves behind."""
    contexts = [*CONTEXTS, CONTEXTS[0]]
    requests = {
        "loglikelihood": asked("loglikelihood", [(context, " the") for context in contexts]),
        "loglikelihood_rolling": asked("loglikelihood_rolling", [(context,) for context in contexts]),
        "generate_until": asked("generate_until", [(context, {"max_gen_toks": 5}) for context in contexts]),
    }
    cached = CachingLM(ours, str(tmp_path / "answers.db"))
    try:
        for kind, instances in requests.items():
            answers = getattr(ours, kind)(instances, disable_tqdm=True)
            assert len(answers) == len(contexts)
            assert answers[0] == answers[-1]
            for instance, answer in zip(instances, answers, strict=True):
                stored = cached.dbdict[hash_args(kind, instance.args)]
                assert stored == (list(answer) if isinstance(stored, list) else answer)
            assert getattr(cached, kind)(instances) == answers
    finally:
        cached.dbdict.close()
        ours.set_cache_hook(type(ours.cache_hook)(None))


def test_a_bar_only_when_it_is_wanted(ours: EvalPlatformLM, capsys: pytest.CaptureFixture[str]) -> None:
    requests = asked("loglikelihood", [(context, " the") for context in [*CONTEXTS, CONTEXTS[0]]])
    ours.loglikelihood(requests, disable_tqdm=True)
    assert capsys.readouterr().err == ""
    ours.loglikelihood(requests)
    assert "Running loglikelihood requests: 100%" in (bar := capsys.readouterr().err)
    assert "6/6" in bar


def test_no_requests_no_answers(ours: EvalPlatformLM) -> None:
    assert ours.loglikelihood([]) == ours.loglikelihood_rolling([]) == ours.generate_until([]) == []


def test_a_ruined_model_answers_nan(tmp_path: Path) -> None:
    lm = EvalPlatformLM(str(make_checkpoint(tmp_path, nan=True)))
    [(value, greedy)] = lm.loglikelihood(asked("loglikelihood", [("Where is", " the")]), disable_tqdm=True)
    assert math.isnan(value)
    assert greedy is False


_COMMAND_LINE = """
import functools, runpy
from lm_eval.tasks import TaskManager

# Their own 14,000 task files are not asked for here, and to index them takes 20 s.
TaskManager.__init__ = functools.partialmethod(TaskManager.__init__, include_defaults=False)
runpy.run_module("eval_platform.lm_eval_model", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
def test_their_command_line(tasks: Path, checkpoint: Path, tmp_path: Path, their_results: dict[str, Any]) -> None:
    words = ["run", "--model", "eval-platform", "--model_args", f"pretrained={checkpoint},dtype=float32"]
    words += ["--device", "cpu", "--batch_size", "4", "--include_path", str(tasks), "--tasks", ",".join(TASKS)]
    out, err = run_warm(_COMMAND_LINE, *words, "--output_path", str(tmp_path / "written"))
    assert err.count("batch_size means nothing") == 1
    [file] = (tmp_path / "written").rglob("results_*.json")
    written = json.loads(file.read_text(encoding="utf-8"))
    assert written["config"]["model"] == "eval-platform"
    # In the file there are standard errors too, which were not asked for above.
    found = {
        name: {k: v for k, v in scores.items() if "_stderr" not in k} for name, scores in written["results"].items()
    }
    wanted = {
        name: {k: v for k, v in scores.items() if "_stderr" not in k}
        for name, scores in their_results["results"].items()
    }
    assert_same_scores(found, wanted)
    assert "|choosing" in out
