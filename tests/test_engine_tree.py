"""The tree engine against one request at a time: shared beginnings, budgets, orders, slots, and memory run out."""

import logging
import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_oracle import (
    Subject,
    ask,
    check_completed,
    check_scored,
    counted,
    decoding_with,
    distinct_prefixes,
    distinct_targets,
    inputs_of,
    log_likelihood,
    prompt_of,
    running_with,
    subject,
    tolerance,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import make_checkpoint
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from eval_platform.engine import decoding, load
from eval_platform.engine.attention import IMPLEMENTATION, DecodingPass, Reach, Slots, running
from eval_platform.engine.head import Head
from eval_platform.engine.packed import PackedModel
from eval_platform.errors import TaskError
from eval_platform.values import Generation, Request, RunSettings, make_request

WINDOW = 96
WORDS = ["the", "river", "is", "a", "mountain", "Question:", "Answer:", "Yes", "No", "東京", "café", "42", "over", ")"]
SHOTS = " ".join(random.Random(5).choices(WORDS, k=45)).split(" ")
PLAIN = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def tree(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    folder = tmp_path_factory.mktemp(request.param)
    return subject(make_checkpoint(folder, architecture=request.param, max_length=WINDOW), "tree")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return subject(make_checkpoint(tmp_path_factory.mktemp("llama"), max_length=WINDOW), "tree")


# -- scoring

WORD_LISTS = st.lists(st.sampled_from(WORDS), max_size=6)
CONTEXT = st.one_of(
    st.just(""),
    # Cut anywhere in a common beginning, then on in a way of its own.
    st.builds(lambda cut, rest: " ".join(SHOTS[:cut] + rest), st.integers(1, len(SHOTS)), WORD_LISTS),
    # Beyond the window, so that it is cut on the left.
    st.builds(lambda rest: " ".join(SHOTS * 3 + rest), WORD_LISTS),
)
CONTINUATION = st.lists(st.sampled_from(WORDS), min_size=1, max_size=5).map(lambda words: " " + " ".join(words))
CHOICE = st.builds(lambda context, text: make_request("choice", context, text), CONTEXT, CONTINUATION)
LETTERS = st.builds(
    lambda context, letters: [make_request("choice", context or "the", letter) for letter in letters],
    CONTEXT,
    st.lists(st.sampled_from([" Yes", " No", "A", "B", ")"]), min_size=1, unique=True),
)
ROLLING = st.builds(
    lambda cut, rest: make_request("rolling", " ".join(SHOTS[:cut] + rest)),
    st.integers(0, len(SHOTS)),
    st.lists(st.sampled_from(WORDS), max_size=120),
)


def flat(groups: Sequence[Request | list[Request]]) -> list[Request]:
    found: dict[tuple[str, int], Request] = {}
    for group in groups:
        for request in group if isinstance(group, list) else [group]:
            found[request.request_id, request.repeat] = request
    return list(found.values())


REQUESTS = st.lists(CHOICE | LETTERS | ROLLING, min_size=1, max_size=8).map(flat)
BUDGET = st.integers(1, 40) | st.integers(41, 400)
MIN_SHARED = st.integers(1, 20)


@settings(PLAIN, max_examples=10)
@given(requests=REQUESTS, budget=BUDGET, min_shared=MIN_SHARED)
def test_scores_are_those_of_one_request_at_a_time(
    tree: Subject, requests: list[Request], budget: int, min_shared: int
) -> None:
    with running_with(tree, budget=budget, min_shared=min_shared) as engine:
        answered = ask(engine, requests)
    for request in requests:
        check_scored(tree, request, answered[request.request_id, 0])


@settings(PLAIN, max_examples=10)
@given(requests=REQUESTS, data=st.data())
def test_order_batching_budget_and_duplicates_change_nothing(
    tree: Subject, requests: list[Request], data: st.DataObject
) -> None:
    with running_with(tree) as engine:
        together = ask(engine, requests)
    again = [make_request(r.kind, r.context, r.continuation, repeat=k) for r in requests for k in (0, 1)]
    mixed = data.draw(st.permutations(again))
    cut = data.draw(st.integers(0, len(mixed)))
    with running_with(tree, budget=data.draw(BUDGET), min_shared=data.draw(MIN_SHARED)) as engine:
        apart = ask(engine, mixed[:cut]) | ask(engine, mixed[cut:])
    for (request_id, _), response in apart.items():
        other = together[request_id, 0]
        assert log_likelihood(response) == pytest.approx(log_likelihood(other), abs=tolerance(response.n_tokens))
        assert (response.n_tokens, response.truncated_left_tokens) == (other.n_tokens, other.truncated_left_tokens)


@settings(PLAIN, max_examples=15)
@given(requests=REQUESTS, budget=BUDGET)
def test_no_token_and_no_row_of_the_head_is_computed_twice(
    llama: Subject, requests: list[Request], budget: int
) -> None:
    rows = [window for request in requests for window in inputs_of(llama, request)]
    repeated = [*requests, *(make_request(r.kind, r.context, r.continuation, repeat=1) for r in requests)]
    with running_with(llama, budget=budget) as engine, counted(engine) as computed:
        ask(engine, repeated)
    assert computed["forward_tokens"] == distinct_prefixes(tokens_in for tokens_in, _ in rows)
    assert computed["head_rows"] == distinct_targets(rows)
    assert computed["forwards"] >= computed["forward_tokens"] / budget


@pytest.mark.parametrize("path", ["tree", "plain"])
def test_what_single_tokens_add_makes_up_the_log_likelihood(path: str, tmp_path: Path) -> None:
    model = subject(make_checkpoint(tmp_path, max_length=WINDOW), path)
    requests = [
        make_request("choice", " ".join(SHOTS[:9]), " river Yes 東京"),
        make_request("choice", "", " the"),
        make_request("rolling", " ".join(WORDS[:6])),
        # Windows that are equal, with other windows between them.
        make_request("rolling", " ".join(["the river is"] * 60)),
        make_request("rolling", ""),
    ]
    for request in requests:
        scores = model.engine.token_scores(request, alternatives=3)
        (whole,) = model.engine.answer([request])
        check_scored(model, request, whole)
        assert len(scores) == whole.n_tokens
        total = sum(score.log_probability for score in scores)
        assert total == pytest.approx(log_likelihood(whole), abs=tolerance(whole.n_tokens))
        if whole.is_greedy is not None:
            assert all(score.is_greedy for score in scores) == whole.is_greedy
        for score in scores:
            values = [value for _, value in score.alternatives]
            assert len(values) == 3
            assert values == sorted(values, reverse=True)
            assert (score.log_probability == values[0]) == score.is_greedy
        if request.kind == "choice":
            assert request.continuation == model.tokenizer.decode([score.token for score in scores])
    with pytest.raises(TaskError, match="no token to score"):
        model.engine.token_scores(make_request("generate", "the", settings=Generation(1)))


# -- completions


PROMPTS = st.lists(
    st.builds(
        lambda cut, rest: " ".join(SHOTS[:cut] + rest),
        st.integers(1, len(SHOTS)),
        st.lists(st.sampled_from(WORDS), max_size=3),
    ),
    min_size=1,
    max_size=6,
    unique=True,
)


@settings(PLAIN, max_examples=8)
@given(
    prompts=PROMPTS,
    lengths=st.lists(st.integers(1, 8), min_size=6, max_size=6),
    stop=st.sampled_from([(), ("e",), (" the", "a")]),
    slots=st.integers(1, 4),
    least_shared=st.integers(1, 40),
    budget=st.integers(1, 100),
)
def test_greedy_texts_are_those_of_one_prompt_at_a_time(
    tree: Subject,
    prompts: list[str],
    lengths: list[int],
    stop: tuple[str, ...],
    slots: int,
    least_shared: int,
    budget: int,
) -> None:
    requests = [
        make_request("generate", prompt, settings=Generation(length, stop))
        for prompt, length in zip(prompts, lengths, strict=False)
    ]
    # A prompt that is the beginning of all the others, and one that ends in the middle of another's words.
    requests += [make_request("generate", SHOTS[0], settings=Generation(3))]
    requests += [make_request("generate", prompts[0][:-1] or "the", settings=Generation(7, stop))]
    requests = flat(requests)
    with decoding_with(tree, slots=slots, least_shared=least_shared, budget=budget) as engine:
        answered = ask(engine, requests)
    for request in requests:
        check_completed(tree, request, answered[request.request_id, 0])


def test_completions_that_end_early_make_room_for_others(tree: Subject) -> None:
    """Twenty prompts of four lengths in three slots; the slots grow once on the way."""
    words = random.Random(11)
    requests = [
        make_request(
            "generate",
            " ".join(SHOTS[: words.randint(1, 30)] + words.choices(WORDS, k=k % 4)),
            settings=Generation((1, 2, 5, 12)[k % 4]),
        )
        for k in range(20)
    ]
    requests = flat(requests)
    with pytest.MonkeyPatch.context() as patch, decoding_with(tree, slots=3) as engine:
        patch.setattr(decoding, "_GROWTH", 1)
        answered = ask(engine, requests)
    for request in requests:
        check_completed(tree, request, answered[request.request_id, 0])


def test_repeats_of_a_prompt_are_prefilled_once(llama: Subject) -> None:
    warm = Generation(5, temperature=1.0)
    requests = [make_request("generate", " ".join(SHOTS), settings=warm, repeat=k) for k in range(12)]
    with counted(llama.engine) as computed:
        answered = ask(llama.engine, requests)
    drawn = sum(response.n_tokens - 1 for response in answered.values())  # a last token is not read again
    assert computed["forward_tokens"] == len(prompt_of(llama, requests[0])) + drawn
    assert len({response.text for response in answered.values()}) > 6


def test_prompts_of_one_beginning_share_it(llama: Subject) -> None:
    requests = [make_request("generate", " ".join([*SHOTS, word]), settings=Generation(1)) for word in WORDS]
    with decoding_with(llama, slots=4, least_shared=1) as engine, counted(engine) as computed:
        ask(engine, requests)
    assert computed["forward_tokens"] == distinct_prefixes(prompt_of(llama, request) for request in requests)


def test_samples_do_not_depend_on_their_neighbours(llama: Subject) -> None:
    warm = Generation(8, temperature=1.0, top_p=0.95)
    requests = [
        make_request("generate", " ".join(SHOTS[:cut]), settings=warm, repeat=k)
        for cut in (1, 20, 21)
        for k in range(4)
    ]
    together = ask(llama.engine, requests)
    greedy = [make_request("generate", " ".join(SHOTS[:cut]), settings=Generation(6)) for cut in (5, 20, 45)]
    with decoding_with(llama, slots=3) as engine:
        among_others = ask(engine, [*greedy, *reversed(requests)])
    for request in requests:
        alone = ask(llama.engine, [request])[request.request_id, request.repeat]
        assert alone == together[request.request_id, request.repeat]
        assert alone == among_others[request.request_id, request.repeat]


# -- memory


@contextmanager
def out_of_memory_at(calls: set[int]) -> Iterator[list[int]]:
    """The forwards of these numbers fail as torch does when the CPU's memory runs out; yields how many there were."""
    count = [0]

    def failing(method: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            count[0] += 1
            if count[0] in calls:
                raise RuntimeError(
                    "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you "
                    "tried to allocate 68719476736 bytes. Error code 12 (Cannot allocate memory)"
                )
            return method(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PackedModel, "run", failing(PackedModel.run))
        patch.setattr(PackedModel, "decode", failing(PackedModel.decode))
        yield count


@settings(PLAIN, max_examples=8)
@given(requests=REQUESTS, calls=st.sets(st.integers(1, 12), min_size=1, max_size=2))
def test_scoring_loses_nothing_when_memory_runs_out(llama: Subject, requests: list[Request], calls: set[int]) -> None:
    with running_with(llama, budget=130) as engine, out_of_memory_at(calls) as count:
        answered = ask(engine, requests)
        assert engine._budget == 130 // 2 ** len([call for call in calls if call <= count[0]])
    for request in requests:
        check_scored(llama, request, answered[request.request_id, 0])


@settings(PLAIN, max_examples=8)
@given(prompts=PROMPTS, calls=st.sets(st.integers(1, 16), min_size=1, max_size=2))
def test_decoding_loses_nothing_when_memory_runs_out(llama: Subject, prompts: list[str], calls: set[int]) -> None:
    greedy = [make_request("generate", prompt, settings=Generation(1 + i)) for i, prompt in enumerate(prompts)]
    warm = Generation(4, temperature=1.0)
    drawn = [make_request("generate", prompt, settings=warm, repeat=k) for prompt in prompts[:2] for k in (0, 1)]
    undisturbed = ask(llama.engine, drawn)
    with decoding_with(llama, slots=4), out_of_memory_at(calls):
        answered = ask(llama.engine, [*greedy, *drawn])
    for request in greedy:
        check_completed(llama, request, answered[request.request_id, 0])
    for key, response in undisturbed.items():
        assert answered[key] == response


def test_one_request_that_does_not_fit_is_said_and_not_tried_for_ever(llama: Subject) -> None:
    scoring = make_request("choice", "the river", " is")
    completing = make_request("generate", "the river", settings=Generation(4))
    for request in (scoring, completing):
        with running_with(llama), out_of_memory_at(set(range(1, 100))) as count:
            with pytest.raises(MemoryError, match="one request does not fit into memory"):
                list(llama.engine.answer([request]))
            assert count[0] < 20


# -- half precision


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_as_near_to_float32_as_the_plain_path(
    dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two right computations differ by the number format's rounding; so the yardsticks are the plain path's distance
    from float32, and from itself at another batch size (nearer, since it rounds at the same places).
    """
    path = make_checkpoint(tmp_path, max_length=WINDOW)
    words = random.Random(2)
    prompts = [" ".join(SHOTS[: words.randint(0, 15)] + words.choices(WORDS, k=3)) for _ in range(520)]
    # The most probable token after each prompt is the text of a completion of one token.
    requests = flat([make_request("generate", prompt, settings=Generation(1)) for prompt in prompts])
    assert len(requests) >= 500
    scored = flat([make_request("choice", prompt, " river Yes") for prompt in prompts[:200]])
    answers = {}
    for name, in_dtype, engine_path, batch_tokens in (
        ("tree", dtype, "tree", 512),
        ("plain", dtype, "plain", 4096),
        ("plain, small batches", dtype, "plain", 200),
        ("float32", "float32", "plain", 4096),
    ):
        run = RunSettings(device="cpu", dtype=in_dtype, engine_path=engine_path, batch_tokens=batch_tokens)
        answers[name] = ask(load(path, run), [*requests, *scored])

    def difference(a: str, b: str) -> tuple[float, float]:
        """(share of prompts after which the most probable token differs, root mean square difference in nats)."""
        one, other = answers[a], answers[b]
        texts = [one[r.request_id, 0].text != other[r.request_id, 0].text for r in requests]
        nats = [log_likelihood(one[r.request_id, 0]) - log_likelihood(other[r.request_id, 0]) for r in scored]
        share, error = sum(texts) / len(texts), math.sqrt(sum(d * d for d in nats) / len(nats))
        with capsys.disabled():
            print(f"\n{dtype}, {a} against {b}: {share:.1%} other tokens, {error:.4f} nats", end="")
        return share, error

    ours, theirs = difference("tree", "float32"), difference("plain", "float32")
    assert ours[0] <= theirs[0] + 0.01
    assert ours[1] <= 1.25 * theirs[1]
    ours, theirs = difference("tree", "plain"), difference("plain", "plain, small batches")
    assert ours[0] <= 2 * theirs[0] + 0.01
    assert ours[1] <= 2 * theirs[1] + 0.01


# -- finite weights whose activations are not


@pytest.fixture(scope="module", params=["float32", "float16"])
def overflowing(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Subject, int]:
    """A model that overflows in its first layer's MLP at one token, " 42", whatever stands before it."""
    path = make_checkpoint(tmp_path_factory.mktemp("overflow"), max_length=WINDOW)
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    (bad,) = AutoTokenizer.from_pretrained(path).encode(" 42", add_special_tokens=False)
    huge = {"float32": 1e20, "float16": 1e3}[request.param]
    first = model.model.layers[0]
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 0.0
        model.model.embed_tokens.weight[bad] = 0.0
        model.model.embed_tokens.weight[bad, 0] = 10.0
        first.self_attn.o_proj.weight.zero_()
        # One unit of the MLP that sees the first dimension only.
        for projection in (first.mlp.gate_proj, first.mlp.up_proj):
            projection.weight[0] = 0.0
            projection.weight[0, 0] = huge
    model.save_pretrained(path)
    return subject(path, "tree", dtype=request.param), bad


def test_what_overflows_at_some_tokens_is_nan_there_and_nowhere_else(
    overflowing: tuple[Subject, int], caplog: pytest.LogCaptureFixture
) -> None:
    tiny, bad = overflowing
    words = random.Random(9)
    requests = [make_request("choice", "the", " 42"), make_request("choice", "42", " the")]
    requests += [make_request("choice", "the 42", " the"), make_request("choice", "the", " 42 river")]
    for k in range(24):
        context = SHOTS[: words.randint(1, 40)] if k % 2 else words.choices(["the", "river", "is", "42"], k=6)
        requests.append(make_request("choice", " ".join(context), f" {words.choice(WORDS)} {words.choice(WORDS)}"))
    requests = flat([*requests, make_request("rolling", " ".join(SHOTS * 3)), make_request("rolling", "the river is")])
    expected = {
        request.request_id: any(bad in tokens_in for tokens_in, _ in inputs_of(tiny, request)) for request in requests
    }
    assert 5 < sum(expected.values()) < len(requests) - 5
    tiny.engine._warned = False  # type: ignore[attr-defined]
    for budget in (2048, 7):
        with running_with(tiny, budget=budget) as engine, caplog.at_level(logging.WARNING):
            answered = ask(engine, requests)
        for request in requests:
            response = answered[request.request_id, 0]
            assert math.isnan(log_likelihood(response)) == expected[request.request_id]
            if expected[request.request_id]:
                assert not response.is_greedy
            elif tiny.engine.info.dtype == "float32":
                check_scored(tiny, request, response)
    (said,) = [message for message in caplog.messages if "is not finite" in message]
    assert "in layer 1," in said
    assert any(request_id in said for request_id, is_bad in expected.items() if is_bad)


def test_a_completion_stops_where_its_prompt_overflows_and_its_neighbours_go_on(
    overflowing: tuple[Subject, int],
) -> None:
    tiny, bad = overflowing
    prompts = ["the river", "the 42 river", "the river is a 42", "the river is", " ".join(SHOTS[:20])]
    requests = [make_request("generate", prompt, settings=Generation(6)) for prompt in prompts]
    with decoding_with(tiny, slots=2, least_shared=1) as engine:
        answered = ask(engine, requests)
    for request in requests:
        response = answered[request.request_id, 0]
        if bad in prompt_of(tiny, request):
            assert (response.finish_reason, response.n_tokens) == ("non_finite", 0)
            assert math.isnan(log_likelihood(response))
        elif response.finish_reason != "non_finite" and tiny.engine.info.dtype == "float32":
            check_completed(tiny, request, response)


def test_what_overflowed_in_a_slot_reaches_nobody_who_has_it_next(overflowing: tuple[Subject, int]) -> None:
    """It lies behind what a shorter prompt fills there, and is masked as long as another row is longer."""
    tiny, bad = overflowing

    def completing(prompt: str) -> Request:
        return make_request("generate", prompt, settings=Generation(6))

    def first_token(prompt: str) -> int:
        return prompt_of(tiny, completing(prompt))[0]

    # Prompts are taken in the order of their tokens: a long one, beside it one that overflows, then a short one.
    words = [word for word in WORDS if bad not in prompt_of(tiny, completing(word))]
    begins = sorted({first_token(word): word for word in words}.items())
    long = " ".join([begins[0][1], *(word for word in SHOTS[:30] if word != "42")])
    shorts = [completing(word) for _, word in begins[2:]]
    alone = {request.request_id: ask(tiny.engine, [request])[request.request_id, 0] for request in shorts}
    tested = 0
    for short in shorts:
        if alone[short.request_id].finish_reason == "non_finite":
            continue
        asked = [completing(long), completing(f"{begins[1][1]} river is a mountain river 42"), short]
        with decoding_with(tiny, slots=2) as engine:
            answered = ask(engine, asked)
        assert answered[asked[1].request_id, 0].finish_reason == "non_finite"
        assert answered[short.request_id, 0].text == alone[short.request_id].text
        tested += answered[asked[0].request_id, 0].n_tokens > 1  # so long it was masked
    assert tested


def test_a_decoding_step_says_in_which_layer_a_number_was_none(overflowing: tuple[Subject, int]) -> None:
    tiny, bad = overflowing
    config, packed = tiny.model.config, tiny.engine._packed  # type: ignore[attr-defined]
    shape = (1, config.num_key_value_heads, 1, config.hidden_size // config.num_attention_heads)
    slots = Slots(*([torch.zeros(shape, dtype=tiny.model.dtype) for _ in range(2)] for _ in "kv"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "first_broken", "")
        _, broken = packed.decode([bad], [0], slots, [0], [])
        assert broken is not None
        assert broken.rows.tolist() == [True]
        assert packed.first_broken == "layer 1"


def test_layers_may_have_different_numbers_of_key_value_heads() -> None:
    """In a decoding step, against plain attention over what the slots hold."""
    draw = torch.Generator().manual_seed(0)
    lengths, capacity, depth = [2, 0, 3], 6, 8
    heads_of_layers = (1, 4, 2)
    slots = Slots()
    for heads in heads_of_layers:
        for stored in (slots.keys, slots.values):
            stored.append(torch.randn(len(lengths), heads, capacity, depth, generator=draw))
    before = [(keys.clone(), values.clone()) for keys, values in zip(slots.keys, slots.values, strict=True)]
    a_pass = DecodingPass(
        positions=torch.tensor(lengths),
        reaches=[Reach(None)],
        slots=slots,
        lengths=torch.tensor(lengths),
        longest=max(lengths),
        groups=[],
    )
    with torch.inference_mode(), running(a_pass):
        for heads, (keys, values) in zip(heads_of_layers, before, strict=True):
            query, key, value = (torch.randn(1, n, len(lengths), depth, generator=draw) for n in (4, heads, heads))
            made, _ = AttentionInterface()[IMPLEMENTATION](torch.nn.Module(), query, key, value, Reach(None))
            for row, length in enumerate(lengths):
                held = ((keys, key), (values, value))
                seen = [torch.cat([old[row, :, :length], new[0, :, row, None]], 1) for old, new in held]
                each = [states.repeat_interleave(4 // heads, 0) for states in seen]
                expected = torch.nn.functional.scaled_dot_product_attention(query[0, :, row, None], *each)
                torch.testing.assert_close(made[0, row], expected[:, 0])


def test_an_infinite_logit_is_no_prediction() -> None:
    """Its token has the highest logit, and its log-probability is NaN: infinity less infinity."""

    class Model:
        config = LlamaConfig()

        def __init__(self) -> None:
            self.layer = torch.nn.Linear(2, 3, bias=False)
            self.layer.weight.data = torch.tensor([[1.0, 0.0], [torch.inf, 0.0], [0.0, 1.0]])

        def get_output_embeddings(self) -> torch.nn.Linear:
            return self.layer

    value, greedy = Head(Model(), "torch", "torch").score(torch.tensor([[1.0, 1.0]]), [0, 0], [0, 1])  # type: ignore[arg-type]
    assert value.isnan().all()
    assert not greedy.any()
