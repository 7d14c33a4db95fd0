"""Ids: the same content gives the same id, any change another."""

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval_platform.identity import canonical_json, content_id, escape_key, ordered_id, unescape_key

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(st.dictionaries(st.text(), json_values))
def test_order_of_keys_does_not_matter(value):
    assert content_id(value) == content_id(dict(reversed(value.items())))


def test_an_id_is_32_hex_digits_of_sha256_over_canonical_json():
    body = b'{"a":[1,"\xc3\xa9"],"b":null}'
    assert canonical_json({"b": None, "a": [1, "é"]}) == body
    assert content_id({"b": None, "a": [1, "é"]}) == hashlib.sha256(body).hexdigest()[:32]


def test_nan_has_no_identity():
    with pytest.raises(ValueError, match="JSON compliant"):
        content_id({"a": float("nan")})


def test_order_matters_in_a_sequence():
    assert ordered_id([1, 2]) != ordered_id([2, 1])
    assert ordered_id(["a", "b"]) != ordered_id(["ab"])
    assert ordered_id([]) == hashlib.sha256(b"").hexdigest()[:32]


@given(st.text())
def test_keys_are_escaped_reversibly(text):
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    key = escape_key(text)
    assert unescape_key(key) == text
    assert all(c.isascii() and (c.isalnum() or c in "._/-=") for c in key)
    assert json.loads(json.dumps(key)) == key
