"""A further turn of a conversation computes what is new, and answers as an engine does that remembers nothing."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_oracle import Subject, ask, counted, decoding_with, log_likelihood, prompt_of, subject, tolerance
from tiny_models import make_checkpoint

from eval_platform.engine import remembering
from eval_platform.engine.remembering import Remembered
from eval_platform.engine.stream import Block, Kept
from eval_platform.engine.trie import Node
from eval_platform.values import Generation, Request, Response, make_request

WINDOW = 160
WORDS = ["the", "river", "is", "a", "mountain", "Question:", "Answer:", "Yes", "No", "東京", "café", "42", "over", ")"]
SYSTEM = " ".join(random.Random(5).choices(WORDS, k=24))
GREEDY = Generation(6)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    folder = tmp_path_factory.mktemp(request.param)
    return subject(make_checkpoint(folder, architecture=request.param, max_length=WINDOW), "tree")


def drawn_by_hand(tiny: Subject, prompt: Sequence[int]) -> list[int]:
    """Greedy tokens, six or up to the end token."""
    drawn: list[int] = []
    while len(drawn) < GREEDY.max_new_tokens and tiny.tokenizer.eos_token_id not in drawn:
        with torch.no_grad():
            drawn.append(int(tiny.model(torch.tensor([[*prompt, *drawn]]), use_cache=False).logits[0, -1].argmax()))
    return drawn


def in_common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def test_a_turn_computes_only_the_tokens_that_are_new(tiny: Subject) -> None:
    text = SYSTEM
    known: list[int] = []
    first = asked = 0  # tokens of the first prompt, and of the one before
    beyond = 0
    with tiny.engine.remembering():
        for turn in range(4):
            request = make_request("generate", text, settings=GREEDY)
            prompt = prompt_of(tiny, request)
            drawn = drawn_by_hand(tiny, prompt)
            with counted(tiny.engine) as computed:
                (response,) = tiny.engine.answer([request])
            assert response.text == tiny.tokenizer.decode(drawn, skip_special_tokens=True)
            # The prompt's last position is computed in any case: what it predicts is asked for.
            shared = min(in_common(prompt, known), len(prompt) - 1)
            assert computed["forward_tokens"] == len(prompt) - shared + len(drawn) - 1
            beyond += max(0, shared - asked) if asked else 0
            known, asked = [*prompt, *drawn[:-1]], len(prompt)
            first = first or asked
            text = f"{text}{response.text} {WORDS[turn]} {WORDS[turn + 3]}"
    assert beyond > 3  # of what was drawn too, not of prompts alone
    with counted(tiny.engine) as computed:
        list(tiny.engine.answer([make_request("generate", SYSTEM, settings=Generation(1))]))
    assert computed["forward_tokens"] == first  # nothing is kept afterwards


def conversations(engine: Any) -> tuple[list[list[Request]], list[dict[tuple[str, int], Response]]]:
    """Three turns of six conversations that share a beginning, some of several samples, and choices after some."""
    texts = [SYSTEM[: len(SYSTEM) - 9 * (k % 3)] + f" {WORDS[k]}" for k in range(6)]
    asked: list[list[Request]] = []
    answers: list[dict[tuple[str, int], Response]] = []
    for turn in range(3):
        requests = []
        for k, text in enumerate(texts):
            settings = GREEDY if k % 2 else Generation(1 + k, temperature=1.0)
            requests += [
                make_request("generate", text, settings=settings, repeat=repeat) for repeat in range(1 + k % 3)
            ]
            if k in (1, 4):
                requests += [make_request("choice", text, " the river"), make_request("rolling", f"{text} over")]
        answered = ask(engine, requests)
        asked.append(requests)
        answers.append(answered)
        for k, text in enumerate(texts):
            first = next(r for r in requests if r.context == text)
            texts[k] += f"{answered[first.request_id, k % (1 + k % 3)].text} {WORDS[(turn + k) % 5]}"
    return asked, answers


def same(one: Response, other: Response) -> bool:
    if one.log_likelihood is not None:
        return abs(log_likelihood(one) - log_likelihood(other)) <= tolerance(one.n_tokens or 0)
    return (one.text, one.finish_reason, one.n_tokens) == (other.text, other.finish_reason, other.n_tokens)


@pytest.mark.parametrize(("slots", "budget"), [(64, 2048), (3, 40)])
def test_many_conversations_are_answered_as_without_a_memory(tiny: Subject, slots: int, budget: int) -> None:
    with decoding_with(tiny, slots=slots, least_shared=4, budget=budget) as engine:
        with counted(engine) as cold:
            asked, expected = conversations(engine)
        with engine.remembering(), counted(engine) as warm:
            again, answers = conversations(engine)
    assert again == asked
    for requests, one, other in zip(asked, answers, expected, strict=True):
        for request in requests:
            key = request.request_id, request.repeat
            assert same(one[key], other[key]), request
    # Of three turns the first is new; that all begin alike saves the cold engine some as well.
    assert warm["forward_tokens"] < 0.7 * cold["forward_tokens"]
    assert warm["head_rows"] == cold["head_rows"]


def test_keys_of_another_place_are_seen(tiny: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted bug: what is remembered comes back at other positions."""
    cut = remembering._cut

    def rolled(blocks: Sequence[Block], start: int, stop: int) -> list[Block]:
        found = cut(blocks, start, stop)
        for block in found:
            block.layers = [(keys.roll(1, 1), values.roll(1, 1)) for keys, values in block.layers]
        return found

    asked, expected = conversations(tiny.engine)
    monkeypatch.setattr(remembering, "_cut", rolled)
    with tiny.engine.remembering():
        different = 0
        for requests, one in zip(asked, expected, strict=True):
            other = ask(tiny.engine, requests)
            different += sum(not same(one[key], other[key]) for key in one)
    assert different


def test_memory_run_out_forgets_and_loses_nothing(tiny: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    first = make_request("generate", SYSTEM, settings=GREEDY)
    (answer,) = tiny.engine.answer([first])
    second = [make_request("generate", f"{SYSTEM}{answer.text} {word}", settings=GREEDY) for word in WORDS[:4]]
    expected = ask(tiny.engine, second)
    packed: Any = type(tiny.engine._packed)  # type: ignore[attr-defined]
    run, calls = packed.run, 0

    def failing(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise MemoryError
        return run(*given)

    with tiny.engine.remembering():
        ask(tiny.engine, [first])
        monkeypatch.setattr(packed, "run", failing)
        calls = 1
        answers = ask(tiny.engine, second)
    assert calls > 2
    assert answers == expected


def test_the_plain_path_remembers_nothing_and_answers(tmp_path: Path) -> None:
    plain = subject(make_checkpoint(tmp_path, max_length=WINDOW), "plain")
    request = make_request("generate", "the river", settings=Generation(3))
    expected = ask(plain.engine, [request])
    with plain.engine.remembering():
        assert ask(plain.engine, [request]) == expected


# -- the memory itself


def block(start: int, end: int) -> Block:
    states = torch.arange(start, end, dtype=torch.float32)[None, :, None].clone()
    return Block(start, end, [(states, -states)])


SIZE = 8  # bytes of one token: a key and a value


def laid(memory: Remembered, tokens: Sequence[int], most: int) -> tuple[list[float], set[Node]]:
    kept = Kept()
    array = torch.tensor(tokens).numpy()
    node = Node(None, 0, array)
    whole = memory.lay(kept, [(array, node, most)])
    return [float(x) for part in kept.blocks.get(node, ()) for x in part.layers[0][0].flatten()], whole


def test_the_longest_beginning_is_found() -> None:
    memory = Remembered(10**6)
    for tokens in ([1, 2, 3], [1, 2, 4, 5], [1, 9], [7]):
        memory.add(
            torch.tensor(tokens).numpy(), [block(0, 1), block(1, len(tokens))] if len(tokens) > 1 else [block(0, 1)]
        )
    assert laid(memory, [1, 2, 4, 5, 6], 4)[0] == [0, 1, 2, 3]
    assert laid(memory, [1, 2, 4, 6], 3)[0] == [0, 1, 2]
    assert laid(memory, [1, 2, 4, 5], 3)[0] == [0, 1, 2]
    assert laid(memory, [8, 2], 1)[0] == []
    assert len(laid(memory, [7], 1)[1]) == 1
    assert laid(memory, [7], 0) == ([], set())


def test_the_least_recently_used_goes_first_and_the_limit_holds() -> None:
    memory = Remembered(10 * SIZE)
    a, b, c = ([k] * 4 for k in (1, 2, 3))
    memory.add(torch.tensor(a).numpy(), [block(0, 4)])
    memory.add(torch.tensor(b).numpy(), [block(0, 4)])
    assert memory.bytes == 8 * SIZE
    laid(memory, [*a, 5], 4)
    memory.add(torch.tensor(c).numpy(), [block(0, 4)])
    assert memory.bytes == 8 * SIZE
    assert [len(laid(memory, [*tokens, 5], 4)[0]) for tokens in (a, b, c)] == [4, 0, 4]
    memory.add(torch.tensor([6] * 11).numpy(), [block(0, 11)])  # more than fits: nothing else goes for it
    assert [len(laid(memory, [*tokens, 5], 4)[0]) for tokens in (a, c)] == [4, 4]
    # What goes on from a takes its place.
    memory.add(torch.tensor([*a, 5, 5]).numpy(), [block(0, 6)])
    assert len(memory) == 2
    assert memory.bytes == 10 * SIZE


def test_what_is_shared_is_counted_once() -> None:
    memory = Remembered(10**6)
    shared = block(0, 100)
    for k in range(5):
        memory.add(torch.tensor([0] * 100 + [k + 1]).numpy(), [shared, block(100, 101)])
    assert memory.bytes == 105 * SIZE
    memory.clear()
    assert (memory.bytes, len(memory)) == (0, 0)
