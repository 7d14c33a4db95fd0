"""Would the tests see it? One bug at a time is planted into the engine: the comparison with one request at a time must
fail, and the check at load must send the model to the plain path wherever the bug shows in what that check runs.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_oracle import Subject, ask, check_completed, check_scored, decoding_with, running_with, subject
from model_families import FAMILIES, make_family
from test_engine_trie import check_what_is_kept

from eval_platform.engine import attention, load, narrowing, tree
from eval_platform.engine.attention import StreamPass
from eval_platform.engine.decoding import _Run
from eval_platform.engine.head import Head
from eval_platform.engine.packed import PackedModel
from eval_platform.engine.stream import Forward, Kept, Piece
from eval_platform.values import Generation, RunSettings, make_request

Plant = Callable[[pytest.MonkeyPatch], None]

WORDS = ["the", "river", "is", "a", "mountain", "Question:", "Answer:", "Yes", "No", "東京", "café", "42", "over", ")"]
_draw = random.Random(4)
SHOTS = " ".join(_draw.choices(WORDS, k=18))
SCORED = [
    make_request("choice", f"{SHOTS} {' '.join(_draw.choices(WORDS, k=k))}", f" {' '.join(_draw.choices(WORDS, k=3))}")
    for k in (1, 2, 4, 5)
]
# Of unlike lengths, so that samples retire while others go on.
COMPLETED = [
    make_request("generate", f"{SHOTS} {' '.join(_draw.choices(WORDS, k=k))}", settings=Generation(2 + 2 * (k % 3)))
    for k in range(6)
]


@pytest.fixture(scope="module")
def subjects(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Subject]:
    @cache
    def of(name: str) -> Subject:
        (family,) = [family for family in FAMILIES if family.name == name]
        return subject(make_family(tmp_path_factory.mktemp("family"), family), "tree")

    return of


def compare(tiny: Subject) -> None:
    """As the tests of the tree and of the families do: small forwards, everything shared, few slots."""
    with running_with(tiny, budget=17) as engine:
        answered = ask(engine, SCORED)
    for request in SCORED:
        check_scored(tiny, request, answered[request.request_id, 0])
    with decoding_with(tiny, slots=3, least_shared=2, budget=17) as engine:
        completed = ask(engine, COMPLETED)
    for request in COMPLETED:
        check_completed(tiny, request, completed[request.request_id, 0])


# -- the bugs


def causal_off_by(keys: int) -> Plant:
    """A row of a piece sees so many keys after itself (or, negative, before itself no longer)."""

    def causal(query: Any, key: Any, value: Any, positions: Any, how: Any) -> Any:
        return attention._blocked(query, key, value, positions, positions - keys, how)

    return lambda patch: patch.setattr(attention, "_causal", causal)


def positions_after_a_branch(patch: pytest.MonkeyPatch) -> None:
    run = PackedModel.run

    def shifted(self: PackedModel, forward: Forward, wanted: Any = None) -> Any:
        positions = forward.positions.copy()
        for piece in forward.pieces:
            positions[piece.row : piece.stop] += piece.node.parent is not None
        return run(self, replace(forward, positions=positions), wanted)

    patch.setattr(PackedModel, "run", shifted)


def block_of_another_node(patch: pytest.MonkeyPatch) -> None:
    """What is kept of a node are the keys and values of as many rows at the start of its forward."""
    run = PackedModel.run

    def mistaken(self: PackedModel, forward: Forward, wanted: Any = None) -> Any:
        keep = [(Piece(piece.node, piece.first, piece.last, 0), block) for piece, block in forward.keep]
        return run(self, replace(forward, keep=keep), wanted)

    patch.setattr(PackedModel, "run", mistaken)


def how(**changes: Callable[[Any], Any]) -> Plant:
    """Attention's arguments changed on their way."""
    original = attention.How

    def changed(*given: Any) -> Any:
        made = original(*given)
        return replace(made, **{name: change(getattr(made, name)) for name, change in changes.items()})

    return lambda patch: patch.setattr(attention, "How", changed)


def window_plus(tokens: int) -> Plant:
    return how(window=lambda window: None if window is None else window + tokens)


def ignored(name: str) -> Plant:
    return how(**{name: lambda _: None})


def merge_by(share_of: Callable[[Any, Any], Any]) -> Plant:
    def merge(output: Any, lse: Any, other: Any, other_lse: Any) -> None:
        output.lerp_(other, share_of(lse, other_lse)[..., None])
        lse.copy_(lse.logaddexp(other_lse))

    return lambda patch: patch.setattr(attention, "_merge", merge)


def target_row_off_by(rows: int) -> Plant:
    want = tree._want

    def off(wanted: Any, end: Any, first: int, tokens: Sequence[int], part: int) -> None:
        want(wanted, end, first + rows, tokens, part)

    return lambda patch: patch.setattr(tree, "_want", off)


def last_layer_off_by(rows: int) -> Plant:
    wanted_rows = narrowing._rows

    def off() -> Any:
        found = wanted_rows()
        return None if found is None else (found + rows).clamp_min(0)

    return lambda patch: patch.setattr(narrowing, "_rows", off)


def last_attention_of_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        StreamPass, "_wanted_in", lambda self, *_: torch.empty(0, dtype=torch.long) if self.is_narrow else None
    )


def slot_not_moved(patch: pytest.MonkeyPatch) -> None:
    retire = _Run._retire

    def still(self: Any, ended: Sequence[Any]) -> Iterator[Any]:
        slots = [*self._slots.keys, *self._slots.values]
        before = [states.clone() for states in slots]
        retired = list(retire(self, ended))
        for states, was in zip(slots, before, strict=True):
            states.copy_(was)
        yield from retired

    patch.setattr(_Run, "_retire", still)


def decoding_off(**shifts: int) -> Plant:
    """`lengths` or `positions` of a decoding forward, so many tokens off."""
    decode = PackedModel.decode

    def shifted(self: PackedModel, tokens: Any, positions: Any, slots: Any, lengths: Any, groups: Any) -> Any:
        positions = [position + shifts.get("positions", 0) for position in positions]
        lengths = [max(0, length + shifts.get("lengths", 0)) for length in lengths]
        return decode(self, tokens, positions, slots, lengths, groups)

    return lambda patch: patch.setattr(PackedModel, "decode", shifted)


def head_does_not(name: str, value: Any) -> Plant:
    make = Head.__init__

    def without(self: Any, *args: Any, **kwargs: Any) -> None:
        make(self, *args, **kwargs)
        assert getattr(self, name) != value
        setattr(self, name, value)

    return lambda patch: patch.setattr(Head, "__init__", without)


# Name: (the bug, a family in which it shows, whether the check at load sees it).
BUGS: dict[str, tuple[Plant, str, bool]] = {
    "a row sees the key after it": (causal_off_by(1), "llama", True),
    "a row does not see itself": (causal_off_by(-1), "llama", True),
    "positions after a branch, by one": (positions_after_a_branch, "llama", True),
    "positions after a branch, by one, learned": (positions_after_a_branch, "gpt2", True),
    "the kept block of another node": (block_of_another_node, "llama", True),
    "window ignored": (ignored("window"), "mistral", True),
    "window ignored, in some layers": (ignored("window"), "gemma2", True),
    # Wider than the check's sequences: only the comparison on long prompts can see it.
    "wide window ignored": (ignored("window"), "mistral, wide window", False),
    "window one too long": (window_plus(1), "mistral", True),
    "window one too short": (window_plus(-1), "mistral", True),
    "wide window one too long": (window_plus(1), "mistral, wide window", False),
    "sinks ignored": (ignored("sinks"), "gpt_oss", True),
    "soft-capping ignored": (ignored("softcap"), "gemma2", True),
    "merge in equal parts": (merge_by(lambda lse, _: lse * 0 + 0.5), "llama", True),
    "merge the wrong way round": (merge_by(lambda lse, other: (lse - other).sigmoid()), "llama", True),
    # What the check at load does not run: gathering of targets, and slots of several samples.
    "target read one row late": (target_row_off_by(1), "llama", False),
    "target read one row early": (target_row_off_by(-1), "llama", False),
    # There the last layer is then computed for all rows.
    "the last products of the row before": (last_layer_off_by(-1), "llama", False),
    "the last attention left out": (last_attention_of_nothing, "llama", False),
    "slot not moved on retirement": (slot_not_moved, "llama", False),
    "decoding forgets the newest key": (decoding_off(lengths=-1), "llama", True),
    "decoding sees an empty slot": (decoding_off(lengths=1), "llama", True),
    "decoding one position on": (decoding_off(positions=1), "gpt2", True),
}


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "mistral, wide window", "gemma2", "gpt_oss"])
def test_without_a_bug_nothing_fails(name: str, subjects: Callable[[str], Subject]) -> None:
    compare(subjects(name))


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_seen(name: str, subjects: Callable[[str], Subject], monkeypatch: pytest.MonkeyPatch) -> None:
    plant, family, _ = BUGS[name]
    tiny = subjects(family)
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        compare(tiny)


@pytest.mark.parametrize("name", BUGS)
def test_the_check_at_load_sees_a_planted_bug_where_it_can(
    name: str, subjects: Callable[[str], Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant, family, seen_at_load = BUGS[name]
    path = subjects(family).path
    plant(monkeypatch)
    taken = load(path, RunSettings(device="cpu", engine_path="auto")).info.engine_path
    assert taken == ("plain" if seen_at_load else "tree")


@pytest.mark.parametrize(
    "name",
    [
        "a row sees the key after it",
        "positions after a branch, by one",
        "the kept block of another node",
        "window ignored",
        "window one too long",
        "sinks ignored",
        "merge in equal parts",
        "decoding one position on",
    ],
)
def test_the_check_at_load_sees_it_in_bfloat16_though_experts_change(
    name: str, subjects: Callable[[str], Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = subjects("gpt_oss").path
    BUGS[name][0](monkeypatch)
    assert load(path, RunSettings(device="cpu", dtype="bfloat16")).info.engine_path == "plain"


@pytest.mark.parametrize(
    ("family", "name", "value"), [("cohere", "_scale", 1.0), ("granite", "_scale", 1.0), ("gemma2", "_cap", None)]
)
def test_a_head_that_does_less_than_the_model_is_seen_at_load(
    family: str, name: str, value: Any, subjects: Callable[[str], Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    path: Path = subjects(family).path
    head_does_not(name, value)(monkeypatch)
    assert load(path, RunSettings(device="cpu", engine_path="auto")).info.engine_path == "plain"


def test_blocks_that_are_not_dropped_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """They change no number, only memory; the test of what is kept sees them."""
    monkeypatch.setattr(Kept, "drop", lambda self, node: None)
    with pytest.raises(AssertionError):
        check_what_is_kept([(0, 1, 2), (0, 1, 3), (4, 5)], min_shared=1, budget=2)
