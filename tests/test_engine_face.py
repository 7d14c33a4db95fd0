"""Every engine has one face: what the worker and a conversation ask of any of them, and what it records of it."""

import inspect
from dataclasses import fields

import pytest

from eval_platform.engine import Engine, EngineInfo, ServedEngine
from eval_platform.engine.plain import PlainEngine
from eval_platform.engine.seq2seq import Seq2SeqEngine
from eval_platform.engine.served import ServedInfo
from eval_platform.engine.tree import TreeEngine

FACE = ["answer", "info", "remembering", "token_scores"]


@pytest.mark.parametrize("kind", [PlainEngine, TreeEngine, Seq2SeqEngine, ServedEngine])
def test_every_engine_has_the_face(kind: type) -> None:
    assert sorted(name for name in vars(Engine) if not name.startswith("_")) == FACE
    for name in FACE:
        if kind is ServedEngine and name in ("token_scores", "info"):
            continue  # the first it has not, as its docstring says; the second it sets
        promised, there = getattr(Engine, name), getattr(kind, name)
        if isinstance(promised, property):
            assert isinstance(there, property)
        else:
            assert inspect.signature(there).parameters.keys() == inspect.signature(promised).parameters.keys()


def test_what_is_recorded_of_an_engine_is_known_of_each() -> None:
    of_its_model_alone = {"architecture", "vocab_size"}
    served = {field.name for field in fields(ServedInfo)}
    assert served == {field.name for field in fields(EngineInfo)} - of_its_model_alone
