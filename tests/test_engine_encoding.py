"""Tokens at the boundary, windows and truncation, against lm-evaluation-harness 0.4.13's own functions."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import BOS, EOS, make_metaspace_tokenizer, make_tokenizer

from eval_platform.engine.encoding import (
    Tokens,
    encode_pairs,
    encode_prompts,
    encode_texts,
    model_input,
    prefix_token,
    rolling_windows,
)
from eval_platform.errors import CheckpointError

pytest.importorskip("lm_eval")

TEXT = st.text(alphabet=" \n\tabe?:é東" + "\U0001f600", max_size=12) | st.sampled_from(
    ["", " ", "  ", "the river", "Question: the of\nAnswer:", f"{BOS}the", f"{EOS} the", "the ", "the\n\n", " Yes", BOS]
)


def peer(tokenizer: Any) -> Any:
    """lm-evaluation-harness's back end with this tokenizer and no model: only its tokenization is asked."""
    from lm_eval.models.huggingface import HFLM

    lm = HFLM.__new__(HFLM)
    lm.tokenizer = tokenizer
    lm.add_bos_token = None
    lm.custom_prefix_token_id = None
    lm.backend = "causal"
    lm.enable_thinking = False
    return lm


# Each text is asked for amid others, which must not show.
NEIGHBOURS = ["the river", f"{BOS}the", "", f"{EOS} the"]


def encode(tokenizer: Any, text: str) -> Tokens:
    return encode_texts(tokenizer, [*NEIGHBOURS, text])[text]


def encode_prompt(tokenizer: Any, text: str) -> Tokens:
    return encode_prompts(tokenizer, [*NEIGHBOURS[:2], text])[-1]


def encode_pair(tokenizer: Any, context: str, continuation: str) -> tuple[Tokens, Tokens]:
    return encode_pairs(tokenizer, [("the river", " Yes"), (context, continuation)])[-1]


TOKENIZERS = {
    "plain": make_tokenizer(),
    "adds BOS": make_tokenizer(adds_bos=True),
    "without BOS": make_tokenizer(bos=False),
    "SentencePiece style": make_metaspace_tokenizer(),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=100, deadline=None)
@given(context=TEXT, continuation=TEXT)
def test_pairs_are_lm_evals(kind: str, context: str, continuation: str) -> None:
    tokenizer = TOKENIZERS[kind]
    seen: list[Any] = []
    lm = peer(tokenizer)
    lm._loglikelihood_tokens = lambda requests, **_: seen.extend(requests)
    try:
        lm.loglikelihood([_instance(context, continuation)], disable_tqdm=True)
    except IndexError:  # an empty text after an empty context has no first token there
        assert encode_pair(tokenizer, context, continuation)[1] == []
        return
    ((_, their_context, their_continuation),) = seen
    ours = encode_pair(tokenizer, context, continuation)
    if their_context:
        assert ours == (their_context, their_continuation)
    else:  # a context of nothing but spaces: there an assertion fails later, here it counts as empty
        assert not context.strip()
        assert ours == encode_pair(tokenizer, "", context + continuation)


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=100, deadline=None)
@given(text=TEXT)
def test_texts_and_prompts_are_lm_evals(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    assert encode(tokenizer, text) == peer(tokenizer).tok_encode(text)
    ours = encode_prompt(tokenizer, text)
    theirs = peer(tokenizer).tok_batch_encode([text])[0][0].tolist() if tokenizer.encode(text) else []
    assert ours == (theirs or [prefix_token(tokenizer)])


@pytest.mark.parametrize(
    ("context", "continuation", "texts"),
    [
        ("the river", " Yes", ("the river", " Yes")),
        ("the river  ", "Yes", ("the river", "  Yes")),  # spaces move over the boundary
        ("the river\n", "Yes", ("the river", "\nYes")),  # as does any white space
        ("", "Yes", (BOS, "Yes")),
        ("", f"{BOS}Yes", (BOS, "Yes")),  # the prefix is not doubled
        ("   ", "Yes", (BOS, "   Yes")),
        (f"{BOS}the", " Yes", (f"{BOS}the", " Yes")),
    ],
)
def test_boundaries_by_hand(context: str, continuation: str, texts: tuple[str, str]) -> None:
    tokenizer = TOKENIZERS["plain"]
    assert tuple(tokenizer.decode(part) for part in encode_pair(tokenizer, context, continuation)) == texts


def test_one_bos_however_it_comes() -> None:
    tokenizer = TOKENIZERS["adds BOS"]
    for context in ("the river", f"{BOS}the river"):
        tokens, _ = encode_pair(tokenizer, context, " Yes")
        assert tokens.count(tokenizer.bos_token_id) == 1
        assert encode_prompt(tokenizer, context) == tokens


def test_without_bos_the_prefix_is_eos_and_without_either_an_error() -> None:
    assert prefix_token(TOKENIZERS["without BOS"]) == TOKENIZERS["without BOS"].eos_token_id
    neither = make_tokenizer(bos=False, eos=False)
    assert encode_pair(neither, "the", " river")[0] == neither.encode("the")
    for text in ("", "  "):
        with pytest.raises(CheckpointError, match="neither a BOS nor an EOS"):
            encode_pair(neither, text, "river")


@settings(max_examples=100, deadline=None)
@given(
    context=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    continuation=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    max_length=st.integers(6, 12),
)
def test_input_keeps_the_last_tokens(context: list[int], continuation: list[int], max_length: int) -> None:
    tokens, cut = model_input(context, continuation, max_length)
    assert tokens == (context + continuation)[-(max_length + 1) :][:-1]  # as in lm-eval's _loglikelihood_tokens
    assert len(tokens) + 1 + cut == len(context) + len(continuation)
    assert len(tokens) >= len(continuation)


@settings(max_examples=100, deadline=None)
@given(tokens=st.lists(st.integers(0, 99), max_size=60), max_length=st.integers(1, 20))
def test_rolling_windows_are_lm_evals(tokens: list[int], max_length: int) -> None:
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    windows = list(rolling_windows(tokens, 100, max_length))
    theirs = [
        ((context + continuation)[-(max_length + 1) :][:-1], continuation)
        for context, continuation in map(make_disjoint_window, get_rolling_token_windows(tokens, 100, max_length, 1))
    ]
    assert windows == theirs
    assert [token for _, targets in windows for token in targets] == tokens
    # Each target is predicted from what truly stands before it.
    known = [100, *tokens]
    done = 0
    for tokens_in, targets in windows:
        end = done + len(targets)
        assert tokens_in == known[max(0, end - max_length) : end]
        done = end


def _instance(context: str, continuation: str) -> Any:
    from lm_eval.api.instance import Instance

    return Instance(request_type="loglikelihood", doc={}, arguments=(context, continuation), idx=0)


@settings(max_examples=100, deadline=None)
@given(tokens=st.lists(st.integers(0, 99), max_size=60), max_length=st.integers(1, 20), data=st.data())
def test_strided_windows_score_every_token_once_with_all_the_context_that_fits(
    tokens: list[int], max_length: int, data: st.DataObject
) -> None:
    stride = data.draw(st.integers(1, max_length))
    whole, done = [99, *tokens], 0
    for tokens_in, targets in rolling_windows(tokens, 99, max_length, stride):
        assert targets == tokens[done : done + len(targets)]
        assert len(targets) <= (max_length if done == 0 else stride)
        done += len(targets)
        assert tokens_in == whole[max(0, done - max_length) : done]
    assert done == len(tokens)
    assert list(rolling_windows(tokens, 99, max_length, max_length)) == list(rolling_windows(tokens, 99, max_length))
