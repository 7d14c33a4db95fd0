"""Encoder-decoders answer as lm-evaluation-harness 0.4.13 does with backend="seq2seq", in any batch."""

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_oracle import Subject, ask, log_likelihood, tolerance
from safetensors.torch import load_file, save_file
from tiny_models import EOS, make_seq2seq_checkpoint
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, T5Config, T5ForConditionalGeneration

from eval_platform.engine import load
from eval_platform.errors import CheckpointError, ConfigError, TaskError
from eval_platform.values import Generation, RunSettings, make_request

WINDOW = 40
CPU = RunSettings(device="cpu")

PAIRS = [
    *[("Question: the river is\nAnswer:", f" {word}") for word in ("Yes", "No", "A.", "mountain 42 of the")],
    ("Question: the river is\nAnswer: ", "Yes"),
    ("the river  ", " No"),
    ("the river", "No"),
    (" ", "Yes the river"),
    ("", "Yes the river"),
    ("", f"{EOS}Yes"),
    (f"{EOS}the river", " is"),
    ("the river", f" is{EOS}"),
    ("café 東京", " naïve 東京"),  # 東京 is not in the vocabulary
    ("river mountain " * 60, " Yes"),  # cut on the left
    ("river mountain " * 60, " Yes No the of and to"),
]
DOCUMENTS = [
    "Yes",
    "the river is a mountain. " * 2,
    " ".join(f"the {i} of" for i in range(WINDOW)),
    "the of " * WINDOW,
]
PROMPTS = ["the river is", "Yes", "Question: 7 of 42?\nAnswer:", f"{EOS}the", "river mountain " * 60]


@pytest.fixture(scope="module", params=["t5", "flan_t5", "bart", "m2m_100"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    path = make_seq2seq_checkpoint(
        tmp_path_factory.mktemp(request.param), architecture=request.param, seed=6, max_length=WINDOW
    )
    model = AutoModelForSeq2SeqLM.from_pretrained(path).eval()
    return Subject(path, load(path, CPU), model, AutoTokenizer.from_pretrained(path), "auto")


def peer(tiny: Subject, batch_size: int = 1) -> Any:
    pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    theirs: Any = HFLM(str(tiny.path), backend="seq2seq", device="cpu", dtype="float32", batch_size=batch_size)
    # HFLM calls tie_weights() after loading, by which transformers 5.23 puts the embedding in place of the head that
    # Flan-T5 has of its own (see the test below): another model. Here it gets its head back.
    theirs.model.lm_head.weight = tiny.model.lm_head.weight
    return theirs


def instances(kind: Any, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def test_info_says_which_model_and_path(tiny: Subject, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        info = load(tiny.path, CPU).info
    assert (info.engine_path, info.max_length, info.device) == ("plain", WINDOW, "cpu")
    assert info.architecture == type(tiny.model).__name__
    assert "plain path: it is an encoder-decoder" in caplog.text


def test_what_lm_eval_does_to_a_head_of_its_own(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    path = make_seq2seq_checkpoint(tmp_path, architecture="flan_t5")
    stored = load_file(path / "model.safetensors")
    theirs: Any = HFLM(str(path), backend="seq2seq", device="cpu", dtype="float32")
    assert torch.equal(theirs.model.lm_head.weight, stored["shared.weight"])
    assert not torch.equal(theirs.model.lm_head.weight, stored["lm_head.weight"])


def test_a_head_of_its_own_is_used(tmp_path: Path) -> None:
    """T5 1.1 and Flan-T5 have one; transformers ties T5's whatever config.json says, unless the file holds another."""
    path = make_seq2seq_checkpoint(tmp_path, architecture="flan_t5")
    request = make_request("choice", *PAIRS[0])
    (own,) = load(path, CPU).answer([request])
    weights = load_file(path / "model.safetensors")
    weights["lm_head.weight"] = weights["shared.weight"].clone()
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    (tied,) = load(path, CPU).answer([request])
    assert abs(log_likelihood(own) - log_likelihood(tied)) > 1


@pytest.mark.parametrize("batch_size", [1, 4])
def test_log_likelihoods_equal_lm_evals(tiny: Subject, batch_size: int) -> None:
    theirs = peer(tiny, batch_size).loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True)
    requests = [make_request("choice", *pair) for pair in PAIRS]
    answered = ask(tiny.engine, requests)
    for request, (value, greedy) in zip(requests, theirs, strict=True):
        response = answered[request.request_id, 0]
        assert log_likelihood(response) == pytest.approx(value, abs=tolerance(response.n_tokens))
        assert response.is_greedy == greedy
        assert response.finish_reason == "scored"
    cut = answered[requests[-1].request_id, 0].truncated_left_tokens
    assert cut == len(tiny.tokenizer.encode(PAIRS[-1][0].rstrip())) - WINDOW


def test_every_budget_gives_what_one_request_alone_gives(tiny: Subject) -> None:
    requests = [make_request("choice", *pair) for pair in PAIRS]
    alone = {request.request_id: next(iter(tiny.engine.answer([request]))) for request in requests}
    for budget in (1, 60, 100_000):
        for (request_id, _), response in ask(tiny.with_budget(budget), requests).items():
            assert log_likelihood(response) == pytest.approx(
                log_likelihood(alone[request_id]), abs=tolerance(response.n_tokens)
            )


def test_greedy_continuations_are_known_as_greedy(tiny: Subject) -> None:
    """Continuations made of the model's own greedy text, where encoding gives its tokens back."""
    pairs = []
    for prompt in (f"the {word} is {i}" for i in range(8) for word in ("river", "time", "number", "café")):
        inputs = torch.tensor([tiny.tokenizer.encode(prompt)])
        drawn = tiny.model.generate(inputs, max_new_tokens=3, do_sample=False)[0, 1:].tolist()
        texts = [(tiny.tokenizer.decode(drawn[:length]), drawn[:length]) for length in (1, 2, 3)]
        pairs += [(prompt, t) for t, drawn in texts if tiny.tokenizer.encode(t, add_special_tokens=False) == drawn]
    assert pairs, "no greedy text survives encoding"
    requests = [make_request("choice", *pair) for pair in pairs]
    assert all(response.is_greedy for response in ask(tiny.engine, requests).values())


def test_rolling_equals_lm_evals(tiny: Subject) -> None:
    theirs = peer(tiny).loglikelihood_rolling(instances("loglikelihood_rolling", [(d,) for d in DOCUMENTS]), True)
    requests = [make_request("rolling", document) for document in DOCUMENTS]
    answered = ask(tiny.engine, requests)
    for request, value in zip(requests, theirs, strict=True):
        response = answered[request.request_id, 0]
        assert response.n_tokens == len(tiny.tokenizer.encode(request.context))
        assert log_likelihood(response) == pytest.approx(value, abs=tolerance(response.n_tokens))


def test_what_single_tokens_add_makes_up_the_log_likelihood(tiny: Subject) -> None:
    requests = [make_request("choice", *pair) for pair in PAIRS[:4]] + [make_request("rolling", DOCUMENTS[2])]
    for request in requests:
        scores = tiny.engine.token_scores(request)
        (whole,) = tiny.engine.answer([request])
        assert len(scores) == whole.n_tokens
        total = sum(score.log_probability for score in scores)
        assert total == pytest.approx(log_likelihood(whole), abs=tolerance(whole.n_tokens))


@pytest.mark.parametrize("stop", [(), ("e", "the"), ("a",), (EOS,)])
def test_greedy_text_equals_lm_evals(tiny: Subject, stop: tuple[str, ...]) -> None:
    """Their limit on new tokens grows with the prompt; `max_length`, which counts the start token too, fixes it."""
    new = 12
    how = {"until": list(stop), "max_gen_toks": new, "max_length": new + 1, "do_sample": False}
    theirs = peer(tiny).generate_until(instances("generate_until", [(p, dict(how)) for p in PROMPTS]), True)
    requests = [make_request("generate", prompt, settings=Generation(new, stop)) for prompt in PROMPTS]
    answered = ask(tiny.engine, requests)
    assert [answered[request.request_id, 0].text for request in requests] == theirs
    lengths = {answered[request.request_id, 0].n_tokens for request in requests}
    assert max(lengths) == new or stop


def test_a_prompt_in_a_batch_is_completed_as_alone(tiny: Subject) -> None:
    requests = [make_request("generate", prompt, settings=Generation(12, ("a",))) for prompt in PROMPTS]
    together = ask(tiny.engine, requests)
    for request in requests:
        (alone,) = tiny.engine.answer([request])
        assert together[request.request_id, 0] == alone


def test_sampling_is_seeded_by_the_request(tiny: Subject) -> None:
    requests = [
        make_request("generate", prompt, settings=Generation(8, temperature=1.0), repeat=repeat)
        for prompt in PROMPTS[:2]
        for repeat in range(2)
    ]
    together = ask(tiny.engine, requests)
    assert len({response.text for response in together.values()}) == len(requests)
    (again,) = tiny.engine.answer(requests[-1:])
    assert together[requests[-1].request_id, 1] == again


def test_the_window_holds_on_both_sides(tiny: Subject) -> None:
    longest = make_request("generate", "the river " * 60, settings=Generation(WINDOW))
    (response,) = tiny.engine.answer([longest])
    assert response.truncated_left_tokens == len(tiny.tokenizer.encode(longest.context)) - WINDOW
    with pytest.raises(TaskError, match=rf"asks for {WINDOW + 1} new tokens.*\n.*between 1 and {WINDOW}"):
        list(tiny.engine.answer([make_request("generate", "the", settings=Generation(WINDOW + 1))]))
    with pytest.raises(TaskError, match=f"more than the model's window of {WINDOW}"):
        list(tiny.engine.answer([make_request("choice", "the", " river" * (WINDOW + 1))]))
    with pytest.raises(TaskError, match="adds no token"):
        list(tiny.engine.answer([make_request("choice", "the", "")]))


def test_the_tree_is_refused(tiny: Subject) -> None:
    with pytest.raises(ConfigError, match="encoder-decoder"):
        load(tiny.path, RunSettings(device="cpu", engine_path="tree"))


@pytest.mark.parametrize("architecture", ["t5", "bart"])
def test_nan_weights_are_values(architecture: Any, tmp_path: Path) -> None:
    engine = load(make_seq2seq_checkpoint(tmp_path, architecture=architecture, nan=True), CPU)
    choice, rolling = make_request("choice", "the", " river"), make_request("rolling", "the river is")
    completion = make_request("generate", "the", settings=Generation(4))
    answered = ask(engine, [choice, rolling, completion])
    assert all(math.isnan(log_likelihood(response)) for response in answered.values())
    assert answered[choice.request_id, 0].is_greedy is False
    assert answered[completion.request_id, 0].finish_reason == "non_finite"


@pytest.mark.parametrize("field", ["decoder_start_token_id", "pad_token_id"])
def test_a_config_that_says_no_start_or_padding(field: str, tmp_path: Path) -> None:
    path = make_seq2seq_checkpoint(tmp_path, architecture="bart")
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: None}))
    with pytest.raises(CheckpointError, match=rf"config\.json: field {field} is missing"):
        load(path, CPU)


def test_without_a_tokenizer(tmp_path: Path) -> None:
    """transformers makes an empty one of T5's kind, to which every letter is unknown."""
    path = make_seq2seq_checkpoint(tmp_path)
    for file in path.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="tells no two letters apart"):
        load(path, CPU)


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    path = make_seq2seq_checkpoint(tmp_path)
    config = T5Config.from_pretrained(path)
    config.vocab_size = 20
    T5ForConditionalGeneration(config).save_pretrained(path)
    for request in (make_request("choice", "the river", " is"), make_request("rolling", "the river is")):
        with pytest.raises(CheckpointError, match="the model knows 20 tokens"):
            list(load(path, CPU).answer([request]))


def test_bfloat16_is_near(tiny: Subject) -> None:
    engine = load(tiny.path, RunSettings(device="cpu", dtype="bfloat16"))
    request = make_request("choice", *PAIRS[0])
    (exact,), (rounded,) = tiny.engine.answer([request]), engine.answer([request])
    assert engine.info.dtype == "bfloat16"
    assert log_likelihood(rounded) == pytest.approx(log_likelihood(exact), rel=0.05)
