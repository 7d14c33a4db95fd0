"""Log-likelihoods and completions against two oracles: one request at a time by hand, and lm-evaluation-harness."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_oracle import Subject, ask, check_scored, greedy_by_hand, log_likelihood, subject, tolerance
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import ARCHITECTURES, BOS, EOS, make_checkpoint
from transformers import AutoModelForCausalLM

from eval_platform.engine import load
from eval_platform.engine.encoding import encode_texts
from eval_platform.errors import CheckpointError, TaskError
from eval_platform.values import Generation, Request, Response, RunSettings, make_request

WINDOW = 64
WORDS = ["the", "river", "is", "a", "mountain", "Question:", "Answer:", "Yes", "No", "東京", "café", "42", "over", ")"]
PROMPT = st.lists(st.sampled_from(WORDS), min_size=1, max_size=60).map(" ".join)


@pytest.fixture(
    scope="module",
    params=[("llama", "plain"), ("gpt2", "plain"), *((architecture, "tree") for architecture in ARCHITECTURES)],
    ids="-".join,
)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    architecture, engine_path = request.param
    folder = tmp_path_factory.mktemp(architecture)
    # One architecture with a tokenizer that adds BOS by itself: in this many tests it cannot hide.
    adds_bos = architecture == "llama"
    checkpoint = make_checkpoint(folder, architecture=architecture, max_length=WINDOW, adds_bos=adds_bos)
    return subject(checkpoint, engine_path)


@pytest.fixture(scope="module", params=["plain", "tree"])
def llama(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return subject(make_checkpoint(tmp_path_factory.mktemp("one"), max_length=WINDOW), request.param)


CHOICE = st.builds(
    lambda context, spaces, continuation: make_request("choice", context + spaces, continuation),
    st.just("") | PROMPT,
    st.sampled_from(["", " ", "\n\n"]),
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=6).map(lambda words: " " + " ".join(words)),
)
ROLLING = st.lists(st.sampled_from(WORDS), max_size=200).map(lambda words: make_request("rolling", " ".join(words)))


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(requests=st.lists(CHOICE | ROLLING, max_size=12, unique_by=lambda request: request.request_id))
def test_scores_are_those_of_one_request_at_a_time(tiny: Subject, requests: list[Request]) -> None:
    answered = ask(tiny.engine, requests)
    for request in requests:
        check_scored(tiny, request, answered[request.request_id, 0])


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    requests=st.lists(CHOICE | ROLLING, min_size=2, max_size=10, unique_by=lambda request: request.request_id),
    budgets=st.tuples(st.integers(1, 200), st.integers(200, 4000)),
)
def test_the_batch_does_not_show(llama: Subject, requests: list[Request], budgets: tuple[int, int]) -> None:
    few, many = (ask(llama.with_budget(budget), requests) for budget in budgets)
    for key, response in few.items():
        other = many[key]
        assert log_likelihood(response) == pytest.approx(log_likelihood(other), abs=tolerance(response.n_tokens))
        assert response.n_tokens == other.n_tokens


def test_asking_twice_gives_the_same_bits(tiny: Subject) -> None:
    requests = [make_request("choice", "the river is", f" {word}") for word in WORDS]
    requests += [make_request("generate", word, settings=Generation(8, temperature=1.0)) for word in WORDS]
    assert ask(tiny.engine, requests) == ask(tiny.engine, requests)


def test_one_token_choices_of_a_context_share_one_row(llama: Subject) -> None:
    rows: list[int] = []
    base = llama.engine._model.base_model  # type: ignore[attr-defined]
    forward = base.forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        rows.append(len(kwargs["input_ids"]))
        return forward(*args, **kwargs)

    base.forward = counting
    try:
        requests = [make_request("choice", "Question: the river", letter) for letter in "ABCD"]
        # The same tokens cut at another place read the same input too, but score another part of it.
        requests.append(make_request("choice", "Question:", " the riverA"))
        answered = ask(llama.engine, requests)
    finally:
        base.forward = forward
    assert sum(rows) == 1
    for request in requests:
        check_scored(llama, request, answered[request.request_id, 0])


def test_truncation_is_counted_and_scored_like_the_rest(tiny: Subject) -> None:
    long = " ".join(["river"] * 3 * WINDOW)
    requests = [make_request("choice", long, " Yes"), make_request("choice", long, " No the river")]
    answered = ask(tiny.engine, requests)
    for request in requests:
        response = answered[request.request_id, 0]
        assert response.truncated_left_tokens > WINDOW
        check_scored(tiny, request, response)


def test_an_empty_document_has_probability_one(llama: Subject) -> None:
    request = make_request("rolling", "")
    assert ask(llama.engine, [request])[request.request_id, 0] == Response(request.request_id, 0, 0.0, None)


def test_nothing_asked_nothing_answered(llama: Subject) -> None:
    assert list(llama.engine.answer([])) == []


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (make_request("choice", "the river", ""), "adds no token"),
        (make_request("choice", "", ""), "adds no token"),
        (make_request("choice", "", BOS), "adds no token"),
        (make_request("choice", "the", " river" * 2 * WINDOW), f"window of {WINDOW}"),
        (make_request("choice", "the"), "without a continuation"),
        (make_request("generate", "the"), "without settings"),
        (make_request("generate", "the", settings=Generation(WINDOW)), f"{WINDOW} new tokens"),
        (make_request("generate", "the", settings=Generation(0)), "0 new tokens"),
    ],
)
def test_what_has_no_answer_is_refused_by_name_before_anything_runs(
    llama: Subject, request_: Request, words: str
) -> None:
    requests = [make_request("choice", "the river", " Yes"), request_]
    with pytest.raises(TaskError, match=f"{request_.request_id}.*{words}"):
        next(llama.engine.answer(requests))


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    small, large = (make_checkpoint(tmp_path / str(vocab), vocab=vocab) for vocab in (300, 512))
    for file in large.glob("tokenizer*"):
        (small / file.name).write_bytes(file.read_bytes())
    engine = load(small, RunSettings(device="cpu"))
    with pytest.raises(CheckpointError, match="the model knows 300 tokens"):
        next(engine.answer([make_request("choice", "the mountain", " river")]))


# -- completions


STOPS = st.sampled_from([(), ("\n",), ("e",), (" the",), ("a", "th"), ("er ", "o", "\n\n")])


@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompts=st.lists(PROMPT, min_size=1, max_size=5, unique=True), stop=STOPS)
def test_greedy_text_is_that_of_one_prompt_at_a_time(tiny: Subject, prompts: list[str], stop: tuple[str, ...]) -> None:
    generation = Generation(8, stop)
    room = WINDOW - generation.max_new_tokens
    requests = [make_request("generate", prompt, settings=generation) for prompt in prompts]
    answered = ask(tiny.engine, requests)
    for request in requests:
        response = answered[request.request_id, 0]
        tokens = encode_texts(tiny.tokenizer, [request.context])[request.context]
        assert (response.text, response.finish_reason) == greedy_by_hand(tiny, tokens[-room:], generation)
        assert response.truncated_left_tokens == max(0, len(tokens) - room)
        assert response.log_likelihood is None
        assert response.is_greedy is None


def test_a_stop_string_may_cross_tokens(llama: Subject) -> None:
    """Take text the model really writes, and stop at every piece of it that spans two of its tokens."""
    crossings = 0
    for prompt in WORDS[:6]:
        drawn = greedy_tokens(llama, prompt, 8)
        texts = [llama.tokenizer.decode(drawn[:i]) for i in range(9)]
        for i in range(1, 8):
            seam = len(texts[i])
            stop = texts[i + 1][seam - 1 : seam + 1]
            if len(stop) < 2 or "�" in stop or stop in texts[i]:
                continue
            crossings += 1
            request = make_request("generate", prompt, settings=Generation(8, (stop,)))
            response = ask(llama.engine, [request])[request.request_id, 0]
            assert response.text == texts[i + 1][: texts[i + 1].index(stop)]
            assert (response.finish_reason, response.n_tokens) == ("stop", i + 1)
    assert crossings > 5


def greedy_tokens(tiny: Subject, prompt: str, n: int) -> list[int]:
    tokens = encode_texts(tiny.tokenizer, [prompt])[prompt]
    for _ in range(n):
        with torch.no_grad():
            tokens.append(int(tiny.model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[-n:]


def test_end_of_sequence_ends_and_is_not_text(tmp_path: Path) -> None:
    """A model whose every token is followed by the end, whatever its prompt; the generation config names two ends."""
    path = make_checkpoint(tmp_path, architecture="gpt2", max_length=WINDOW)
    model = AutoModelForCausalLM.from_pretrained(path)
    end = model.get_input_embeddings().weight.shape[0] - 1
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(model.lm_head.weight[end] * 100)
    model.generation_config.eos_token_id = [1, end]
    model.save_pretrained(path)
    engine = load(path, RunSettings(device="cpu"))
    request = make_request("generate", "the river", settings=Generation(9))
    response = ask(engine, [request])[request.request_id, 0]
    assert (response.finish_reason, response.n_tokens) == ("eos", 1)


def test_samples_depend_on_seed_request_and_repeat_only(llama: Subject) -> None:
    warm = Generation(12, temperature=1.0)
    requests = [make_request("generate", prompt, settings=warm, repeat=k) for prompt in WORDS[:5] for k in range(3)]
    together = ask(llama.engine, requests)
    alone = {}
    for request in reversed(requests):
        alone |= ask(llama.engine, [request])
    assert together == alone
    texts = [response.text for response in together.values()]
    assert len(set(texts)) == len(texts)  # repeats differ
    other = ask(load(llama.path, RunSettings(device="cpu", seed=1)), requests)
    assert all(other[key].text != response.text for key, response in together.items())


def test_sampling_of_one_token_is_greedy(llama: Subject) -> None:
    for generation in (Generation(8, temperature=1.0, top_k=1), Generation(8, temperature=1.0, top_p=1e-9)):
        sampled = make_request("generate", "the river", settings=generation)
        greedy = make_request("generate", "the river", settings=Generation(8))
        answered = ask(llama.engine, [sampled, greedy])
        assert answered[sampled.request_id, 0].text == answered[greedy.request_id, 0].text


# -- oracle 2: lm-evaluation-harness 0.4.13


@pytest.fixture(scope="module")
def peer(tiny: Subject) -> Iterator[Any]:
    pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(tiny.path), device="cpu", dtype="float32", batch_size=3, max_length=WINDOW)


def instances(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=args, idx=i) for i, args in enumerate(arguments)]  # type: ignore[arg-type]


PAIRS = [
    *[("Question: the river is\nAnswer:", f" {word}") for word in ("Yes", "No", "A.", "B.", "mountain 42")],
    ("Question: the river is\nAnswer: ", "Yes"),
    ("the river  ", " No"),
    ("the of and to " * 3, "\n\n東京 café"),
    ("", "Yes the river"),
    ("", f"{BOS}Yes"),
    (f"{BOS}the river", " is"),
    ("river mountain " * 60, " Yes"),  # cut on the left
    ("river mountain " * 60, " Yes No the of and to"),
]
DOCUMENTS = [
    "Yes",
    "the river is a mountain. " * 4,
    " ".join(f"{i} 東京 café" for i in range(30)),
    " ".join(f"the {i} of" for i in range(WINDOW)),
]
# Its windows read the same tokens and differ only in how many of them they score.
PERIODIC_DOCUMENT = "the of " * WINDOW


def test_log_likelihoods_equal_lm_evals(tiny: Subject, peer: Any) -> None:
    requests = [make_request("choice", *pair) for pair in PAIRS]
    theirs = peer.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True)
    answered = ask(tiny.engine, requests)
    for request, (their_value, their_greedy) in zip(requests, theirs, strict=True):
        response = answered[request.request_id, 0]
        assert log_likelihood(response) == pytest.approx(their_value, abs=tolerance(response.n_tokens))
        check_scored(tiny, request, response)
        assert response.is_greedy == their_greedy


def test_greedy_continuations_are_known_as_greedy_by_both(tiny: Subject, peer: Any) -> None:
    """The flag is True somewhere: continuations made of the model's own greedy text, where that text survives."""
    pairs = []
    for word in WORDS:
        text = tiny.tokenizer.decode(greedy_tokens(tiny, word, 2), skip_special_tokens=True)
        if text and "�" not in text:
            pairs.append((word, text))
    requests = [make_request("choice", *pair) for pair in pairs]
    theirs = peer.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    answered = ask(tiny.engine, requests)
    ours = [answered[request.request_id, 0].is_greedy for request in requests]
    assert ours == [greedy for _, greedy in theirs]
    assert any(ours)


def test_rolling_equals_lm_evals(tiny: Subject, peer: Any) -> None:
    requests = [make_request("rolling", document) for document in DOCUMENTS]
    theirs = peer.loglikelihood_rolling(instances("loglikelihood_rolling", [(d,) for d in DOCUMENTS]), True)
    answered = ask(tiny.engine, requests)
    for request, their_value in zip(requests, theirs, strict=True):
        response = answered[request.request_id, 0]
        assert log_likelihood(response) == pytest.approx(their_value, abs=tolerance(response.n_tokens))


def test_a_periodic_document_is_scored_right_where_lm_eval_is_wrong(tiny: Subject, peer: Any) -> None:
    """Rows of one input but unequal continuations: lm-evaluation-harness 0.4.13 scores the shorter at the wrong places.

    models/utils.py:Collator.get_cache hands the longest one's logits to all, and models/huggingface.py gathers from
    their start, not their end. With its logits cache off it is right; so are we, by hand too.
    """
    request = make_request("rolling", PERIODIC_DOCUMENT)
    response = ask(tiny.engine, [request])[request.request_id, 0]
    check_scored(tiny, request, response)
    peer.logits_cache = False
    try:
        (theirs,) = peer.loglikelihood_rolling(instances("loglikelihood_rolling", [(PERIODIC_DOCUMENT,)]), True)
    finally:
        peer.logits_cache = True
    assert log_likelihood(response) == pytest.approx(theirs, abs=tolerance(response.n_tokens))


@pytest.mark.parametrize("stop", [(), ("e", "the"), (EOS,)])
def test_greedy_text_equals_lm_evals(tiny: Subject, peer: Any, stop: tuple[str, ...]) -> None:
    prompts = ["the river is", "Question: Yes\nAnswer:", "東京", "mountain " * 80, f"{BOS}the"]
    # A batch of theirs looks at its first prompt only to know whether BOS is there already: ask them one by one.
    theirs = [
        peer.generate_until(instances("generate_until", [(p, {"until": list(stop), "max_gen_toks": 10})]), True)[0]
        for p in prompts
    ]
    requests = [make_request("generate", prompt, settings=Generation(10, stop)) for prompt in prompts]
    answered = ask(tiny.engine, requests)
    assert [answered[request.request_id, 0].text for request in requests] == theirs


# -- weights that are not numbers


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nan_weights_give_nan_not_numbers_and_not_exceptions(
    architecture: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Short rows above all: torch's fused attention on CPU hides NaN queries over fewer than 16 keys."""
    engine = load(make_checkpoint(tmp_path, architecture=architecture, nan=True), RunSettings(device="cpu"))
    requests = [
        make_request("choice", "the", " river"),
        make_request("choice", "the river is a mountain and " * 4, " Yes"),
        make_request("rolling", "Yes No"),
        make_request("generate", "the", settings=Generation(5)),
        make_request("generate", "the river is a mountain", settings=Generation(5)),
        make_request("generate", "the", settings=Generation(5, temperature=1.0)),
    ]
    for response in ask(engine, requests).values():
        assert math.isnan(log_likelihood(response))
        assert not response.is_greedy
        assert response.finish_reason in ("scored", "non_finite")
    assert sum("first seen for request" in message for message in caplog.messages) == 1
    assert sum("is not finite (NaN or infinity)" in message for message in caplog.messages) == 1
