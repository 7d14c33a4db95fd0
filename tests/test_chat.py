"""Chat: prompts through the checkpoint's own template, on the whole road and against lm-evaluation-harness."""

import json
import logging
import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from cli_tools import run_cli
from lm_eval_oracle import HEAD, asked_by_us
from tiny_models import make_checkpoint, make_tokenizer

from eval_platform import warehouse
from eval_platform.checkpoints import locate
from eval_platform.config import Config, load_config
from eval_platform.engine import ChatTemplate, chat_template, resolve_settings
from eval_platform.engine.chat import DATE
from eval_platform.engine.encoding import encode_pairs, encode_prompts
from eval_platform.engine.settings import has_chat_template
from eval_platform.errors import CheckpointError, ConfigError, TaskError
from eval_platform.identity import content_id
from eval_platform.once import act
from eval_platform.plan import Wanted, plan
from eval_platform.store import arrivals, open_store, watcher_id
from eval_platform.tasks import Chat, build_task, read_lock, render, sync_tasks
from eval_platform.tasks.schema import TaskFile
from eval_platform.tasks.task import what_is_asked
from eval_platform.values import RunSettings
from eval_platform.worker import EXIT_DONE, EXIT_FAILED, work

CHATML = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% if not loop.last or "
    "add_generation_prompt %}</s>\n{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
FORGETS_SYSTEM = CHATML.replace("messages %}", "messages if m.role != 'system' %}")

TASKS = {
    "choosing": """
output_type: multiple_choice
num_fewshot: 2
description: "Choose well."
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: label
metric_list: [{metric: acc}, {metric: acc_norm}, {metric: acc_mutual_info}]
""",
    "begun": """
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: label
gen_prefix: "It is"
""",
    "completing": """
output_type: generate_until
num_fewshot: 1
doc_to_text: "{{question}}"
doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: ["er"], max_gen_toks: 12}
""",
    "whole_text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
""",
}
SYSTEM = "Be brief."
ROOT = Path(__file__).resolve().parent.parent


def make_chat_checkpoint(folder: Path, template: str | None = CHATML) -> Path:
    make_checkpoint(folder, seed=3, max_length=256, adds_bos=True)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


def write_tasks(folder: Path) -> None:
    folder.mkdir()
    words = ["the river", "a mountain", "seven", "London ", "naïve café", "東京"]
    rows = [
        {"question": f"Where is {words[i % 6]}?", "choices": [f"{words[(i + k) % 6]} {k}" for k in range(3)]}
        | {"label": i % 3}
        for i in range(8)
    ]
    for name, part in (("test", rows[:5]), ("dev", rows[5:])):
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(HEAD.format(name=name, folder=folder) + text, encoding="utf-8")


class Place:
    """A configuration, its store, and what a worker in this process makes of a checkpoint."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_tasks(folder / "tasks")
        (folder / "eval_platform.toml").write_text('[tasks]\nfolders = ["tasks"]\n[engine]\ndevice = "cpu"\n')
        self.config = load_config(folder / "eval_platform.toml")
        self.store = open_store(self.config.results)
        assert sync_tasks(self.config.tasks, self.store, self.config.lock_path).errors == ()

    def ask(self, checkpoint: Path, tasks: list[str] | None = None, **chat: Any) -> tuple[int, list[dict[str, Any]]]:
        found = locate(checkpoint, self.config.checkpoints, self.config.cache_dir, lambda done, total: None)
        arrival, _ = arrivals.register(self.store, watcher=watcher_id(self.config.state_dir), **asdict(found))
        messages: list[dict[str, Any]] = []
        wanted = Wanted(read_lock(self.config.lock_path), tasks, **chat)
        todo = plan(arrival, wanted, self.config, self.store)
        return work(todo, self.store, messages.append), messages

    def sql(self, text: str) -> list[dict[str, Any]]:
        warehouse.refresh(self.store, self.config.catalog_path)
        return warehouse.query(self.config.catalog_path, self.store, text).to_pylist()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_chat_checkpoint(tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path) -> Place:
    one = Place(tmp_path_factory.mktemp("place"))
    code, messages = one.ask(checkpoint)
    assert code == EXIT_DONE, messages
    code, messages = one.ask(checkpoint, chat=True, system_prompt=SYSTEM)
    assert code == EXIT_DONE, messages
    return one


def template_of(text: str, **tokenizer: Any) -> ChatTemplate:
    made = make_tokenizer(adds_bos=True, **tokenizer)
    made.chat_template = text
    return ChatTemplate(made, Path("/some/model"))


def said(
    template: ChatTemplate, *messages: tuple[str, str], continued: bool = False, needs_system: bool = False
) -> str:
    told = [{"role": role, "content": content} for role, content in messages]
    return template(told, continued=continued, needs_system=needs_system)


# -- the whole road


def test_requests_and_numbers_are_those_of_simple_evaluate(place: Place, checkpoint: Path) -> None:
    evaluator = pytest.importorskip("lm_eval.evaluator", reason="the oracle is lm-eval, which is not installed")
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    theirs = cast(Any, evaluator.simple_evaluate)(
        model="hf",
        model_args={"pretrained": str(checkpoint), "dtype": "float32"},
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=str(place.folder / "tasks"), include_defaults=False),
        batch_size=8,
        device="cpu",
        bootstrap_iters=0,
        apply_chat_template=True,
        fewshot_as_multiturn=True,
        system_instruction=SYSTEM,
    )
    rows = place.sql(
        "select s.*, e.settings ->> 'system_prompt' as system from samples s join evaluations e using (evaluation_id, "
        "attempt) where e.chat order by s.task, position"
    )
    chat = Chat(chat_template(checkpoint, place.config.run_settings(chat=True)), SYSTEM)
    assert {row["task"] for row in rows} == set(TASKS)
    assert {row["system"] for row in rows} == {SYSTEM}
    for name in TASKS:
        ours = [row for row in rows if row["task"] == name]
        asked = asked_by_us(list(render(build_task(place.folder / "tasks" / f"{name}.yaml"), chat=chat)))
        assert len(ours) == len(theirs["samples"][name]) == 5
        for row, request, their in zip(ours, asked, theirs["samples"][name], strict=True):
            arguments = [tuple(one) for one in their["arguments"]]
            if name == "completing":
                arguments = [(context, said["until"], said["max_gen_toks"]) for context, said in arguments]
            assert [one[:3] for one in request] == arguments
            answers = [reply[0] for reply in their["resps"]]
            if name == "completing":
                assert row["response"] == answers[0]
            elif name == "whole_text":
                assert row["log_likelihood"] == pytest.approx(float(answers[0]), abs=1e-3)
            else:
                scored = [choice["log_likelihood"] for choice in row["choices"]]
                assert scored == pytest.approx([float(value) for value, _ in answers[:3]], abs=1e-4)
        scores = {r["metric"]: r["value"] for r in place.sql(f"select * from scores where chat and task = '{name}'")}
        for metric, value in scores.items():
            assert value == pytest.approx(theirs["results"][name][f"{metric},none"], rel=1e-4), metric


def test_a_chat_is_another_evaluation_and_says_so(place: Place) -> None:
    rows = place.sql(
        "select task, chat, settings_id, settings, ask_id, prompts_id from evaluations order by task, chat"
    )
    base, chat = (row for row in rows if row["task"] == "choosing")
    assert (base["chat"], chat["chat"]) == (False, True)
    assert base["ask_id"] == chat["ask_id"]
    assert base["settings_id"] != chat["settings_id"]
    assert base["prompts_id"] != chat["prompts_id"]
    before, after = json.loads(base["settings"]), json.loads(chat["settings"])
    assert after == before | {"chat": True, "system_prompt": SYSTEM}
    prompts = place.sql("select distinct evaluation_id, prompt from samples where task = 'choosing' and position = 0")
    assert (
        sum(row["prompt"].startswith(f"<s><|system|>\n{SYSTEM}\n\nChoose well.</s>\n<|user|>") for row in prompts) == 1
    )


def test_boards_keep_chats_apart(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    from eval_platform import report
    from eval_platform.terminal import print_board

    key = {"key": "adhoc/model", "run": "adhoc", "step": 7, "task": "t", "metric": "acc", "ci_low": None}
    rows = [key | {"chat": chat, "value": value, "ci_high": None} for chat, value in ((False, 0.25), (True, 0.75))]
    print_board(rows)
    lines = {line.rpartition(" ")[0].strip(): line.split()[-1] for line in capsys.readouterr().out.splitlines()}
    assert (lines["adhoc/model"], lines["adhoc/model (chat)"]) == ("0.250", "0.750")
    import pyarrow as pa

    markdown = report.leaderboard_markdown(pa.Table.from_pylist(rows))
    assert "| adhoc/model | 7 | 0.250 |" in markdown
    assert "| adhoc/model (chat) | 7 | 0.750 |" in markdown


def test_a_template_that_fails_fails_the_task_and_names_the_users_folder(place: Place, tmp_path: Path) -> None:
    folder = make_chat_checkpoint(tmp_path / "broken", CHATML.replace("m.content", "m.content.strip(7)"))
    code, messages = place.ask(folder, ["choosing"], chat=True, system_prompt="Only this once.")
    assert code == EXIT_FAILED
    (failed,) = (message for message in messages if message["type"] == "failed")
    assert (failed["task"], failed["class"]) == ("choosing", "deterministic")
    assert f"the chat template in {folder} fails on a conversation of system, user" in failed["reason"]
    assert "remedy: mend the template, or ask without it: --no-chat" in failed["reason"]

    # A retry asks that very evaluation, what was said by hand included.
    (one,) = place.sql(
        "select evaluation_id, task_id, settings, checkpoint_id from evaluations where status = 'failed'"
    )
    todo = act(place.config, place.store, "retry", one["evaluation_id"], attempt=None, actor="me", reason="mended").todo
    assert todo is not None
    assert todo.settings.system_prompt == "Only this once."
    assert todo.settings.identity() == json.loads(one["settings"])
    identity = {"checkpoints": [one["checkpoint_id"]], "task_id": todo.tasks[0].task_id}
    assert content_id(identity | {"settings_id": content_id(todo.settings.identity())}) == one["evaluation_id"]


def test_auto_is_what_the_tokenizer_has(place: Place, tmp_path: Path) -> None:
    plain = make_chat_checkpoint(tmp_path / "plain", None)
    config = place.config.model_copy(update={"chat": place.config.chat.model_copy(update={"apply": "auto"})})
    assert resolve_settings(config.run_settings(), plain).chat is False
    with pytest.raises(CheckpointError, match=r"plain/tokenizer_config\.json: the tokenizer has no chat template"):
        resolve_settings(config.run_settings(chat=True), plain)
    (plain / "chat_template.jinja").write_text(CHATML)
    assert resolve_settings(config.run_settings(system_prompt="x"), plain).system_prompt == "x"
    assert resolve_settings(config.run_settings(chat=False), plain).chat is False


# -- settings and identity


RESOLVED = RunSettings(dtype="float32", max_length=256)


def test_without_chat_settings_have_the_id_they_always_had() -> None:
    before = {"dtype": "float32", "backend": "transformers", "quantization": None, "chat": False, "max_length": 256}
    before |= {"system_prompt": None, "seed": 0, "limit": None, "trust_remote_code": False}
    assert RESOLVED.identity() == before
    assert content_id(RESOLVED.identity()) == "f893b101c829c3d4bced1cc818a0751a"


def test_every_part_of_the_protocol_is_part_of_the_identity() -> None:
    on = replace(RESOLVED, chat=True)
    ids = [content_id(one.identity()) for one in (RESOLVED, on, replace(on, system_prompt=SYSTEM))]
    ids += [content_id(replace(on, shots_as_turns=turns).identity()) for turns in (True, False)]
    assert len(set(ids)) == len(ids)
    with pytest.raises(ValueError, match="resolved"):
        replace(RESOLVED, chat="auto").identity()


@pytest.mark.parametrize(
    ("tokenizer_config", "there"),
    [
        ({}, False),
        ({"chat_template": None}, False),
        ({"chat_template": "x"}, True),
        ({"chat_template": [{"name": "default", "template": "x"}]}, True),
    ],
)
def test_a_template_in_the_tokenizers_own_file_counts(tmp_path: Path, tokenizer_config: Any, there: bool) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    assert has_chat_template(tmp_path) is there


def configured(tmp_path: Path, **chat: Any) -> Config:
    roots = ({"name": "base", "path": "a"}, {"name": "tuned", "path": "b", "chat": "auto"})
    return Config(folder=tmp_path, chat=cast(Any, chat), checkpoints=cast(Any, roots))


def test_a_root_may_say_otherwise_and_a_run_has_the_last_word(tmp_path: Path) -> None:
    config = configured(tmp_path, system_prompt=SYSTEM, shots_as_turns=False)
    assert config.run_settings() == config.run_settings(key="base/a/step_1") == RunSettings()
    tuned = config.run_settings(key="tuned/a/step_1")
    assert (tuned.chat, tuned.system_prompt, tuned.shots_as_turns) == ("auto", SYSTEM, False)
    assert config.run_settings(key="tuned/a/step_1", chat=False) == RunSettings()
    assert config.run_settings(key="base/a", chat=True, system_prompt="Other.").system_prompt == "Other."
    assert config.asks_chat
    assert not Config(folder=tmp_path).asks_chat
    with pytest.raises(ConfigError, match="chat is off\n  remedy: give --chat too"):
        config.run_settings(key="base/a", system_prompt="Other.")


# -- templates


def test_a_prompt_is_what_hf_models_of_lm_eval_read(checkpoint: Path) -> None:
    huggingface = pytest.importorskip("lm_eval.models.huggingface", reason="the oracle is lm-eval")
    theirs = huggingface.HFLM(pretrained=str(checkpoint), dtype="float32", device="cpu")
    ours = chat_template(checkpoint, RESOLVED)
    told = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Where? "}]
    assert ours(told, continued=False, needs_system=True) == theirs.apply_chat_template(told)
    begun = [*told, {"role": "assistant", "content": "It is"}]
    prompt = ours(begun, continued=True, needs_system=True)
    assert prompt == theirs.apply_chat_template(begun, add_generation_prompt=False)
    assert prompt.endswith("<|assistant|>\nIt is")
    # Their tokens of a prompt and of a pair: one BOS, the template's.
    prompts = [ours(told, continued=False, needs_system=True), prompt]
    tokens, _ = theirs.tok_batch_encode(prompts[:1])
    assert encode_prompts(theirs.tokenizer, prompts)[0] == tokens[0].tolist()
    for prompt in prompts:
        (pair,) = encode_pairs(theirs.tokenizer, [(prompt, " Paris")])
        assert pair == theirs._encode_pair(prompt, " Paris")
        assert (pair[0] + pair[1]).count(theirs.tokenizer.bos_token_id) == 1


def test_a_template_without_bos_gets_the_one_that_the_tokenizer_adds() -> None:
    template = template_of(CHATML.replace("{{ bos_token }}", ""))
    tokenizer = make_tokenizer(adds_bos=True)
    (tokens,) = encode_prompts(tokenizer, [said(template, ("user", "Where?"))])
    assert tokens.count(tokenizer.bos_token_id) == 1


def test_a_refused_description_is_left_out_but_never_a_system_prompt(caplog: pytest.LogCaptureFixture) -> None:
    template = template_of(NO_SYSTEM)
    assert said(template, ("user", "Where?")) == "<s><|user|>\nWhere?</s>\n<|assistant|>\n"
    assert not template.leaves_out_system
    for _ in range(2):
        assert said(template, ("system", "Choose."), ("user", "Where?")) == said(template, ("user", "Where?"))
    assert template.leaves_out_system
    assert caplog.text.count("takes no system message: descriptions are left out") == 1
    for text in (NO_SYSTEM, FORGETS_SYSTEM):
        with pytest.raises(
            CheckpointError, match=r"/some/model takes no system message, and a system prompt was asked"
        ):
            said(template_of(text), ("system", SYSTEM), ("user", "Where?"), needs_system=True)


def test_a_template_that_asks_for_the_date_gets_always_the_same() -> None:
    # White space at its beginning is as without the date: Jinja strips before blocks and keeps before text.
    template = (
        "\n  {% if strftime_now is defined %}{% set date = strftime_now('%d %b %Y') %}{% endif %}\n {{ date }}{{ "
    )
    template += "messages[0].content }}"
    assert said(template_of(template), ("user", "!")) == "\n 26 Jul 2024!"
    assert said(template_of(template.replace("strftime_now('%d %b %Y')", "1")), ("user", "!")) == "\n 1!"
    for format_ in ("%Y-%m-%d", "%A, %B %-d, %Y", "%H:%M"):
        told = said(template_of(f"{{{{ strftime_now('{format_}') }}}}"), ("user", "!"))
        assert told == DATE.strftime(format_)


@pytest.mark.parametrize(
    "text",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
        "{{ 1 / 0 }}",
        "{{ nothing.at.all }}",
        "{% if %}",
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[7].content }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_hostile_or_broken_template_is_an_error_of_the_checkpoint(text: str) -> None:
    with pytest.raises(CheckpointError, match=r"the chat template in /some/model fails on a conversation of user: "):
        said(template_of(text), ("user", "Where?"))


# -- what a task file says


CAPITALS = {
    "task": "capitals",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": "x.jsonl"},
    "test_split": "test",
    "fewshot_split": "test",
    "doc_to_text": "q",
    "doc_to_target": "a",
    "num_fewshot": 2,
}


def test_a_task_says_its_chat_beside_its_base_protocol(tmp_path: Path) -> None:
    rows = [{"q": f"Q{i}?", "a": f"A{i}"} for i in range(4)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base = 'task: t\ndocuments: {file: x.jsonl}\ndoc_to_text: "{{q}}"\ndoc_to_target: a\nnum_fewshot: 2\n'
    base += "fewshot_config: {sampler: first_n}\ndescription: Base.\n"
    chat = (
        'chat:\n  system_prompt: Task.\n  shots_as_turns: false\n  description: ""\n  doc_to_text: "Say {{q}}"\n'
        '  gen_prefix: "So,"\n  num_fewshot: 1\n  generation_kwargs: {until: [], max_gen_toks: 7}\n'
    )
    (tmp_path / "t.yaml").write_text(base)
    plain = build_task(tmp_path / "t.yaml")
    (tmp_path / "t.yaml").write_text(base + chat)
    task = build_task(tmp_path / "t.yaml")
    template = template_of(CHATML)

    assert [item.requests for item in render(task)] == [item.requests for item in render(plain)]
    (item, *_) = render(task, chat=Chat(template))
    assert item.prompt == ("<s><|system|>\nTask.</s>\n<|user|>\nSay Q1? So, A1\n\nSay Q0?</s>\n<|assistant|>\nSo,")
    assert item.shots_used == 1
    generation = item.requests[0].settings
    assert generation is not None
    assert (generation.stop, generation.max_new_tokens) == ((), 7)
    (item, *_) = render(task, chat=Chat(template, system_prompt="Run.", shots_as_turns=True))
    assert item.prompt.startswith("<s><|system|>\nRun.</s>\n<|user|>\nSay Q1?</s>\n<|assistant|>\nSo, A1</s>\n<|user|>")
    (item, *_) = render(task, chat=Chat(template, system_prompt=""))
    assert item.prompt.startswith("<s><|user|>\nSay Q1? So, A1")


def test_the_ask_id_knows_the_chat_section_only_where_it_says_something() -> None:
    plain = what_is_asked(TaskFile.model_validate(CAPITALS), "d", "s")
    assert what_is_asked(TaskFile.model_validate(CAPITALS | {"chat": {}}), "d", "s") == plain
    other = what_is_asked(TaskFile.model_validate(CAPITALS | {"chat": {"system_prompt": "x"}}), "d", "s")
    assert other == plain | {"chat": {"system_prompt": "x"}}


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"chat": {"num_fewshot": 3}}, "num_fewshot 3 is more than the task's own 2"),
        ({"chat": {"shots": 1}}, "shots"),
        (
            {"chat": {"gen_prefix": "x"}, "output_type": "loglikelihood_rolling"},
            "a whole text that is scored is no conversation",
        ),
        ({"chat": {"generation_kwargs": {"until": "x"}}, "output_type": "loglikelihood"}, "no meaning"),
    ],
)
def test_what_a_chat_section_cannot_mean_is_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TaskFile.model_validate(CAPITALS | keys)


def test_the_example_of_the_documentation_works() -> None:
    (example,) = re.findall(r"```yml\n(.*?)```", (ROOT / "docs" / "task_files.md").read_text(), re.DOTALL)
    told = TaskFile.model_validate(CAPITALS | yaml.safe_load(example)).in_chat
    assert (told.doc_to_text, told.shots) == ("{{question}}\nAnswer with A, B, C or D.", 0)
    assert told.generation is not None
    assert (told.generation.stop, told.generation.max_new_tokens) == ((), 512)


def test_tasks_show_shows_the_prompt_as_the_model_sees_it(place: Place, checkpoint: Path) -> None:
    file = str(place.folder / "tasks" / "begun.yaml")
    answer = run_cli("tasks", "show", file, "--chat", "--tokenizer", str(checkpoint), "--system-prompt", SYSTEM)
    assert answer.code == 0
    assert (
        f"<s><|system|>\n{SYSTEM}</s>\n<|user|>\nWhere is the river?</s>\n<|assistant|>\nIt is\n--- scored: ' the"
        in (answer.out)
    )
    for wrong in (["--chat"], ["--tokenizer", str(checkpoint)], ["--system-prompt", "x"]):
        assert run_cli("tasks", "show", file, *wrong).code == 2


def test_a_task_error_inside_a_chat_still_names_its_document(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"q": "a", "a": "b"}\n{"q": "a"}\n')
    (tmp_path / "t.yaml").write_text("task: t\ndocuments: {file: x.jsonl}\ndoc_to_text: q\ndoc_to_target: '{{q}}'\n")
    task = build_task(tmp_path / "t.yaml")
    chat = task.definition.model_copy(update={"doc_to_text": "{{a}}"})
    with pytest.raises(TaskError, match="document 1: doc_to_text"):
        list(render(replace(task, definition=chat), chat=Chat(template_of(CHATML))))
