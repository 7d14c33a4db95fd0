"""Models behind a server, asked for real over HTTP: the numbers of our own engine, and everything around them."""

import json
import logging
import math
import socket
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from cli_tools import run_cli
from completions_server import MODEL, completions_server, transformers_serve
from fault_tools import WORDS, Place, forked
from tiny_models import make_checkpoint

from eval_platform.config import Config, load_config
from eval_platform.engine import Engine, load, load_served
from eval_platform.errors import ConfigError, EvalPlatformError, ServerError
from eval_platform.served import ServedModel, served_id, why_not
from eval_platform.values import Generation, Request, Response, RunSettings, Served, make_request

pytestmark = pytest.mark.slow

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
KEY = "sk-a-secret-of-ours"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_checkpoint(tmp_path_factory.mktemp("served") / "tiny")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def own(checkpoint: Path) -> Engine:
    return load(checkpoint, RunSettings(device="cpu", dtype="float32", engine_path="plain"))


@pytest.fixture(scope="module")
def server(checkpoint: Path, own: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with completions_server(checkpoint, tmp_path_factory.mktemp("server")) as address:
        yield address


@pytest.fixture(autouse=True)
def _no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "ANTHROPIC_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def entry(server: str | None, checkpoint: Path | None, path: str = "/v1/completions", **fields: Any) -> ServedModel:
    said: dict[str, Any] = {
        "name": "one",
        "provider": "local-completions",
        "model": MODEL,
        "endpoint": server and server + path,
        "as_of": "2026-11-22",
        "arguments": {"max_retries": 2, **({"tokenizer": str(checkpoint), "max_length": 256} if checkpoint else {})},
        **fields,
    }
    return ServedModel(**said)


def settings(one: ServedModel) -> RunSettings:
    return Config(folder=Path(), served=(one,)).run_settings(key=one.key)


def ask(one: ServedModel, requests: list[Request]) -> dict[tuple[str, int], Response]:
    answered = load_served(one, settings(one)).answer(requests)
    return {(response.request_id, response.repeat): response for response in answered}


def told(one: ServedModel, request: Request) -> str:
    with pytest.raises(EvalPlatformError) as caught:
        ask(one, [request])
    return f"{type(caught.value).__name__}: {caught.value}"


CHOICES = [
    make_request("choice", context, continuation)
    for context in ("Question: 7 + 8 =\nAnswer:", "the river mountain ", "")
    for continuation in (" seven", " Paris London", " a")
]
LONG = make_request("choice", "word by word " * 120, " seven twelve")
TEXTS = [make_request("rolling", text) for text in ("the mountain of Paris", "naïve café " * 90)]
WRITTEN = [
    make_request("generate", "Question: 7 + 8 =", settings=Generation(8, ("\n",))),
    make_request("generate", "the of and", settings=Generation(12)),
    make_request("generate", "copy sort", settings=Generation(12, ("e", "a", "o", "i", "u"))),
]


def test_over_http_are_the_numbers_of_our_own_engine(server: str, checkpoint: Path, own: Engine) -> None:
    """Log-likelihoods within rounding, the same texts; one request at a time, and four."""
    requests = [*CHOICES, *TEXTS, *WRITTEN]
    expected = {(response.request_id, response.repeat): response for response in own.answer(requests)}
    for concurrency in (1, 4):
        found = ask(entry(server, checkpoint, concurrency=concurrency), requests)
        assert found.keys() == expected.keys()
        for key, response in found.items():
            ours = expected[key]
            assert (response.text, response.n_tokens) == (ours.text, ours.n_tokens)
            assert response.is_greedy == ours.is_greedy
            if ours.log_likelihood is None:
                assert response.log_likelihood is None
                assert response.finish_reason == ours.finish_reason.replace("eos", "stop")
                assert response.completion_tokens == response.n_tokens
            else:
                assert ours.n_tokens is not None
                assert response.log_likelihood == pytest.approx(
                    ours.log_likelihood, abs=max(1e-4, 1e-5 * ours.n_tokens)
                )
            assert response.prompt_tokens is not None


def test_what_does_not_fit_is_counted(server: str, checkpoint: Path) -> None:
    (response,) = ask(entry(server, checkpoint), [LONG]).values()
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(checkpoint)(f"{LONG.context.rstrip()} {LONG.continuation}")["input_ids"]
    # The harness leaves one place of the window to the token that is drawn.
    assert response.truncated_left_tokens == pytest.approx(len(tokens) - 255, abs=1)
    assert response.truncated_left_tokens > 0
    assert response.prompt_tokens == 255


def test_every_repeat_of_a_sample_has_a_seed_of_its_own(server: str, checkpoint: Path, tmp_path: Path) -> None:
    how = Generation(2, (), temperature=0.7, top_p=0.9, top_k=5)
    requests = [make_request("generate", "the", settings=how, repeat=n) for n in range(3)]
    with completions_server(checkpoint, tmp_path) as address:
        ask(entry(address, checkpoint), requests)
    asked = [json.loads(line) for line in (tmp_path / "asked.jsonl").read_text().splitlines()]
    assert len({body["seed"] for body in asked}) == 3
    assert {(body["temperature"], body["top_p"], body["top_k"], body["max_tokens"]) for body in asked} == {
        (0.7, 0.9, 5, 2)
    }


def test_in_this_process(checkpoint: Path, own: Engine) -> None:
    """Back ends that need no server (vllm, sglang, hf) are asked in chunks, and tell of no tokens."""
    one = entry(None, None, provider="hf", model=str(checkpoint), arguments={"device": "cpu", "dtype": "float32"})
    requests = [*CHOICES, *TEXTS, WRITTEN[0]]
    found, expected = ask(one, requests), {(r.request_id, r.repeat): r for r in own.answer(requests)}
    for key, response in found.items():
        ours = expected[key]
        if ours.log_likelihood is None:
            assert (response.text, response.n_tokens, response.finish_reason) == (ours.text, None, "unknown")
        else:
            assert response.log_likelihood == pytest.approx(ours.log_likelihood, abs=1e-4)
            assert response.n_tokens == ours.n_tokens
        assert (response.prompt_tokens, response.completion_tokens) == (None, None)


# --- what goes wrong


def test_a_server_that_is_not_there(checkpoint: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{taken.getsockname()[1]}"
        said = told(entry(nobody, checkpoint), WRITTEN[0])
    assert said.startswith("ServerError")
    assert nobody in said
    assert "start the server" in said
    assert ServerError.class_ == "infrastructure"


@pytest.mark.parametrize(
    ("path", "fields", "expected"),
    [
        ("/v1/completions", {"model": "other"}, ("CheckpointError", "HTTP 404", "`other` does not exist", "`model`")),
        ("/down/v1/completions", {}, ("ServerError", "HTTP 503", "out of memory", "tried again")),
        ("/locked/v1/completions", {}, ("ConfigError", "HTTP 401", "Incorrect API key", "OPENAI_API_KEY")),
    ],
)
def test_what_a_server_refuses(
    server: str,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    path: str,
    fields: dict[str, Any],
    expected: tuple[str, ...],
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    said = told(entry(server, checkpoint, path, **fields), WRITTEN[0])
    for part in (*expected, f"{server}{path}"):
        assert part in said
    assert KEY not in said
    assert "API request failed" in caplog.text
    assert KEY not in caplog.text


def test_no_part_of_a_key_is_told(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where a long answer is cut, and not in the traceback that a try records."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    one = entry("http://127.0.0.1:1", checkpoint)
    engine = load_served(one, settings(one))

    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("x" * 290 + KEY)

    monkeypatch.setattr(engine._model, "generate_until", fail)
    with pytest.raises(EvalPlatformError) as caught:
        list(engine.answer([WRITTEN[0]]))
    assert "sk-" not in "".join(traceback.format_exception(caught.value))


def test_a_key_of_its_own(server: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Named by its variable: OpenAI's key goes to no other server, and a missing one is named."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    one = entry(server, checkpoint, "/locked/v1/completions", key_variable="OTHER_KEY")
    with pytest.raises(ConfigError, match="environment variable OTHER_KEY is not set"):
        load_served(one, settings(one))
    monkeypatch.setenv("OTHER_KEY", "other")
    said = told(one, WRITTEN[0])
    assert "Incorrect API key provided: ***" in said
    assert "set OTHER_KEY" in said
    assert KEY not in said
    with pytest.raises(ConfigError, match="variables of its own"):
        load_served(entry(None, checkpoint, provider="hf", key_variable="OTHER_KEY"), settings(one))


def test_a_busy_server_is_waited_for(server: str, checkpoint: Path) -> None:
    (response,) = ask(entry(server, checkpoint, "/busy/v1/completions"), WRITTEN[:1]).values()
    assert response.text


def test_log_likelihoods_that_are_none(server: str, checkpoint: Path) -> None:
    """A server that does not repeat the prompt would give 0 for every choice, and one with another tokenizer those of
    other tokens: both are found by the number of tokens."""
    for path in ("/mute/v1/completions", "/bos/v1/completions"):
        for request in (CHOICES[0], TEXTS[1]):
            said = told(entry(server, checkpoint, path), request)
            assert said.startswith("CheckpointError")
            assert "tokenizer" in said
            assert "log_likelihoods = false" in said
    said = told(entry(server, None, arguments={"tokenizer_backend": "none"}), CHOICES[0])
    assert said.startswith("ConfigError")
    assert "[served.arguments]" in said


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"provider": "openai-chat-completions"}, "OPENAI_API_KEY is not set"),
        ({"provider": "anthropic-chat"}, "ANTHROPIC_API_KEY is not set"),
        ({"provider": "local-complitions"}, "has no back end 'local-complitions'"),
        ({"arguments": {"tokenizer": "/nowhere/at/all"}}, "mend [served.arguments]"),
        ({"arguments": {"timeout": "soon"}}, "mend [served.arguments]"),
    ],
)
def test_what_cannot_be_made(fields: dict[str, Any], expected: str) -> None:
    one = entry("http://127.0.0.1:9", None, **fields)
    with pytest.raises(ConfigError) as caught:
        load_served(one, settings(one))
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"endpoint": f"http://me:{KEY}@host/v1/completions"}, "credentials out of the URL"),
        ({"endpoint": f"https://host/v1/completions?api_key={KEY}"}, "credentials out of the URL"),
        ({"endpoint": f"https://host/v1/completions?Subscription-Key={KEY}"}, "credentials out of the URL"),
        ({"endpoint": "host/v1"}, "write the whole URL"),
        ({"arguments": {"auth_token": KEY}}, "leave auth_token out"),
        ({"arguments": {"base_url": "http://x"}}, "base_url is said by the field endpoint"),
        ({"arguments": {"timeout": math.nan}}, "timeout is neither"),
        ({"as_of": "some day"}, "as_of"),
        ({"key_variable": KEY}, "key_variable"),
        ({"name": "a/b"}, "name"),
    ],
)
def test_what_a_configuration_may_not_say(tmp_path: Path, fields: dict[str, Any], expected: str) -> None:
    said = {"name": "one", "provider": "local-completions", "model": "m", "as_of": "2026-11-22", **fields}
    lines = [f"{name} = {json.dumps(value)}" for name, value in said.items() if name != "arguments"]
    lines += ["[served.arguments]", *(f"{k} = {json.dumps(v).lower()}" for k, v in said.get("arguments", {}).items())]
    file = tmp_path / "eval_platform.toml"
    file.write_text("[[served]]\n" + "\n".join(lines).replace(KEY.lower(), KEY))
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    assert expected in str(caught.value)
    assert "served.0" in str(caught.value)
    assert KEY not in str(caught.value)


def test_who_gives_log_likelihoods_is_as_the_harness_has_it() -> None:
    """Its classes for chat refuse the call; the table in served.py says the same without importing them."""
    import lm_eval.models
    import lm_eval.models.openai_completions  # registers one more
    from lm_eval.api.registry import get_model, model_registry

    looked = 0
    for name in {*lm_eval.models.MODEL_MAPPING, *model_registry.keys()} - {"eval-platform"}:
        try:
            kind: Any = get_model(name)
        except (ImportError, ValueError):  # its packages are not here, or registered twice
            continue
        looked += 1
        one = entry(None, None, provider=name, arguments={}, model="davinci-002")
        assert one.gives_log_likelihoods is not refuses(kind, "loglikelihood"), name
        if refuses(kind, "loglikelihood_rolling"):
            assert why_not(one, {"output_type": "loglikelihood_rolling"}) is not None, name
    assert looked > 25


def refuses(kind: Any, call: str) -> bool:
    try:
        getattr(kind, call)(object.__new__(kind), [])
    except NotImplementedError:
        return True
    except Exception:  # noqa: BLE001 -- it goes to work, with nothing of what it needs
        return False
    return False


def test_identity() -> None:
    """By provider, model, endpoint and day; how it is asked is none of it, what changes answers is in the settings."""
    one = entry("http://h", None)
    same = one.model_copy(update={"concurrency": 9, "name": "two", "run": "r", "price_input": 1.0})
    assert served_id(one.identity) == served_id(same.identity)
    assert settings(one).identity() == settings(one.model_copy(update={"arguments": {"timeout": 3}})).identity()
    assert settings(one).identity() != settings(one.model_copy(update={"arguments": {"eos_string": "x"}})).identity()
    others = [Served(**{**asdict(one.identity), field: "x"}) for field in ("provider", "model", "endpoint", "as_of")]
    assert len({served_id(served) for served in [one.identity, *others]}) == 5


# --- the whole road


def configured(place: Place, *models: ServedModel) -> list[str]:
    """A configuration file for `place` with these models; the command's first words."""
    lines = [f'results = "{place.results}"', f'state = "{place.folder / "state"}"']
    lines += ["[tasks]", f'folders = ["{place.tasks}"]', "[worker]", "retry_wait_seconds = 0.1"]
    for model in models:
        said = model.model_dump(mode="json", exclude_none=True, exclude={"arguments"})
        lines += ["[[served]]", *(f"{name} = {json.dumps(value)}" for name, value in said.items())]
        lines += ["[served.arguments]", *(f"{name} = {json.dumps(v)}" for name, v in model.arguments.items())]
    file = place.folder / "eval_platform.toml"
    file.write_text("\n".join(lines))
    return ["--config", str(file)]


def rows(config: list[str], query: str) -> list[dict[str, Any]]:
    answer = run_cli(*config, "sql", query, "--format", "json")
    assert answer.code == 0, answer.err
    return answer.json


def test_completions_from_the_command_to_sql(server: str, checkpoint: Path, tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.write_task("choices", 6)
    place.write_task("words", 4, **WORDS)
    one = entry(server, checkpoint, concurrency=2, run="curve", step=7, price_input=2.0, price_output=10.0)
    config = configured(place, one)
    waiting = run_cli(*config, "status")
    assert "run --served one" in waiting.out + waiting.err
    with forked(place):
        first = run_cli(*config, "run", "--served", "one")
        assert first.code == 0, first.out + first.err
        again = run_cli(*config, "run", "--served", "one", "--json")
        # The same model, taken to be of another day: another arrival, asked anew, and equal numbers are no fault.
        later = configured(place, one.model_copy(update={"as_of": one.as_of.replace(day=23)}))
        third = run_cli(*later, "run", "--served", "one", "--tasks", "choices", "--json")
        (first_id,) = rows(later, "select evaluation_id from evaluations where arrival = 2")
        rerun = run_cli(*later, "rerun", first_id["evaluation_id"], "--reason", "once more", "--json")
    assert [(row["status"], row["linked"]) for row in rerun.json] == [("published", False)]
    assert [row["linked"] for row in again.json] == [True, True]
    assert [(row["status"], row["linked"]) for row in third.json] == [("published", False)]

    (new, old) = rows(later, "select * from arrivals order by n desc")
    assert (new["n"], old["n"], new["kind"], old["kind"]) == (2, 1, "served", "served")
    assert (old["key"], old["run"], old["step"], old["uri"]) == ("served/one", "curve", 7, f"{server}/v1/completions")
    assert old["weights_id"] is None
    assert old["checkpoint_id"] == served_id(one.identity)
    found = rows(later, "select * from evaluations where arrival = 1 order by task")
    assert [(row["task"], row["kind"], row["status"]) for row in found] == [
        ("choices", "served", "published"),
        ("words", "served", "published"),
    ]
    for row in found:
        assert row["engine_path"] == "lm-eval local-completions"
        assert json.loads(row["versions"])["lm_eval"] == "0.4.13"
        assert json.loads(row["settings"])["backend"] == "local-completions"
        assert row["cost"] == pytest.approx((2 * row["prompt_tokens"] + 10 * row["completion_tokens"]) / 1e6)
        assert row["prompt_tokens"] > row["completion_tokens"] > 0
    board = rows(later, "select task, kind from leaderboard order by task")
    assert board == [{"task": "choices", "kind": "served"}]
    doctor = run_cli(*later, "doctor", "--json")
    (finding,) = [one for one in doctor.json if one["what"] == "served one"]
    assert finding["ok"]
    assert "answers (HTTP 501" in finding["found"]


def test_transformers_serve(checkpoint: Path, own: Engine, tmp_path: Path) -> None:
    """Chat over HTTP, where choices are skipped and said so; and plain completions, whose log-likelihoods it lacks."""
    pytest.importorskip("fastapi")
    pytest.importorskip("openai")
    place = Place(tmp_path)
    place.write_task("choices", 4)
    place.write_task("words", 3, **WORDS | {"description": "Say it."})
    said = {"provider": "local-chat-completions", "model": str(checkpoint), "arguments": {"max_retries": 1}}
    with transformers_serve(checkpoint, tmp_path / "server.log") as address:
        one = entry(address, None, "/v1/chat/completions", **said)
        config = configured(place, one)
        with forked(place):
            answer = run_cli(*config, "run", "--served", "one", "--json")
        assert answer.code == 0, answer.out + answer.err
        plain = entry(address, None, model=str(checkpoint), arguments={"max_retries": 1}, log_likelihoods=False)
        texts = ask(plain, WRITTEN[:2])
        wrong = told(plain.model_copy(update={"model": "nobody"}), WRITTEN[0])
        tokenizer = {"max_retries": 1, "tokenizer": str(checkpoint), "tokenized_requests": False}
        scored = told(plain.model_copy(update={"arguments": tokenizer, "log_likelihoods": None}), CHOICES[0])

    outcomes = {row["task"]: row for row in answer.json}
    assert {task: row["status"] for task, row in outcomes.items()} == {"choices": "skipped", "words": "published"}
    assert "multiple_choice needs log-likelihoods" in outcomes["choices"]["reasons"][0]
    state = run_cli(*config, "status", "--json").json
    assert {task["task"]: (task["state"], task["reason"]) for task in state[0]["tasks"]}["choices"] == (
        "skipped",
        "multiple_choice needs log-likelihoods, which local-chat-completions does not give",
    )
    assert "Nothing is missing" in run_cli(*config, "backfill").out
    shown = rows(config, "select prompt, response, finish_reason from samples order by position")
    messages = [json.loads(row["prompt"]) for row in shown]
    assert [message["role"] for message in messages[0]] == ["system", "user"]
    prompts = ["".join(f"{m['role']}: {m['content']}\n" for m in chat) + "assistant:" for chat in messages]
    requests = [make_request("generate", prompt, settings=Generation(4, ("\n",))) for prompt in prompts]
    ours = {response.request_id: response.text for response in own.answer(requests)}
    assert [row["response"] for row in shown] == [ours[request.request_id] for request in requests]
    (words,) = rows(config, "select chat, kind, prompt_tokens, completion_tokens, cost from evaluations")
    assert (words["chat"], words["kind"], words["cost"]) == (True, "served", None)
    assert words["prompt_tokens"] > words["completion_tokens"] > 0

    expected = {response.request_id: response for response in own.answer(WRITTEN[:2])}
    assert {key: response.text for (key, _), response in texts.items()} == {
        key: response.text for key, response in expected.items()
    }
    assert wrong.startswith("CheckpointError")
    assert "Server is pinned" in wrong
    assert scored.startswith("CheckpointError")
    assert "log_likelihoods = false" in scored


def test_the_command_wants_one_model(tmp_path: Path) -> None:
    config = configured(Place(tmp_path))
    for words in ([], ["--served", "one", "--checkpoint", "out/step_1"]):
        answer = run_cli(*config, "run", *words)
        assert answer.code == 2
        assert "give the folder of a checkpoint, or --served NAME" in " ".join(answer.err.replace("│", "").split())


def test_a_chat_endpoint_decides_about_chat(tmp_path: Path) -> None:
    one = entry("http://127.0.0.1:9", None, provider="local-chat-completions")
    config = Config(folder=tmp_path, served=(one,))
    assert config.run_settings(key=one.key, system_prompt="Be brief.").system_prompt == "Be brief."
    with pytest.raises(ConfigError, match="takes conversations only"):
        config.run_settings(key=one.key, chat=False)
    with pytest.raises(ConfigError, match="takes plain text only"):
        Config(folder=tmp_path, served=(entry(None, None),)).run_settings(key="served/one", chat=True)


def test_what_is_answered_is_not_asked_again(checkpoint: Path, own: Engine, tmp_path: Path) -> None:
    """A server that fails in the middle: the next try asks the rest."""
    place = Place(tmp_path / "place")
    place.write_task("words", 5, **WORDS)
    with completions_server(checkpoint, tmp_path) as address, forked(place):
        one = entry(address, checkpoint, "/flaky/v1/completions", log_likelihoods=False)
        one = one.model_copy(update={"arguments": {"max_retries": 1}})
        answer = run_cli(*configured(place, one), "run", "--served", "one", "--json")
    assert [row["status"] for row in answer.json] == ["published"]
    asked = [json.loads(line)["prompt"] for line in (tmp_path / "asked.jsonl").read_text().splitlines()]
    assert len(asked) == 6
    assert asked.count(asked[2]) == 2
    assert len(set(asked)) == 5
    assert len(set(place.journaled())) == 5


def test_a_failing_server_fails_the_task_and_a_retry_mends_it(server: str, checkpoint: Path, tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.write_task("words", 2, **WORDS)
    one = entry(server, checkpoint, "/down/v1/completions", arguments={"max_retries": 1, "tokenizer_backend": "none"})
    config = configured(place, one)
    with forked(place):
        failed = run_cli(*config, "run", "--served", "one", "--json")
    assert failed.code == 1
    assert "HTTP 503" in failed.json[0]["reasons"][0]
    (row,) = rows(config, "select failure_class, kind from evaluations where status = 'failed'")
    assert row == {"failure_class": "infrastructure", "kind": "served"}
    with forked(place):
        again = run_cli(*config, "retry", "served/one", "--reason", "it is up", "--json")
    assert again.code == 1  # it is tried again, and is not up
    assert "HTTP 503" in again.json[0]["reasons"][0]
    none = run_cli(*config, "run", "--served", "two")
    assert none.code == 2
    assert "no [[served]] model is called 'two'; there are one" in none.err
