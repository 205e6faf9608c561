"""Bodies of many values: told before they are made, and never by counting what stands in strings."""

from __future__ import annotations

import json
import random
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingle.errors import RequestError
from ingle.server import decode
from ingle.server.decode import _numbers, count_values, decode_json

TEXTS = st.text(st.sampled_from('a,[]{}:"\\\n你'), max_size=12)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXTS,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=40,
)
BIG = 1 << 19
HI = {"role": "user", "content": "Hi"}


def values(data: Any) -> int:
    """Every value, but at most one of an empty list or object for what could stand in it."""
    if isinstance(data, dict):
        data = list(data.values())
    return 1 + sum(map(values, data)) + (not data) if isinstance(data, list) else 1


@settings(max_examples=300)
@given(JSON, st.booleans(), st.sampled_from([1, 2, 3, 7, 1000]))
def test_values_are_counted_wherever_the_text_is_cut(data: Any, ascii_only: bool, slice_bytes: int) -> None:
    text = json.dumps(data, ensure_ascii=ascii_only).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "_SLICE_BYTES", slice_bytes)
        assert count_values(text) == values(data)


BODIES: dict[str, Any] = {
    "a long prompt": {"prompt": 'x,"[{\\' * 200_000, "model": "m"},
    "a long message": {"messages": [HI, {"role": "user", "content": "[1, 2], " * 200_000}]},
    "many messages": {"messages": [HI] * 10_000, "stream": True},
    "prompts of token ids": {"prompt": [[random.randint(0, 99_999) for _ in range(5000)]] * 60},
    "token ids": {"prompt": [7] * 300_000, "max_tokens": 5},
    "texts": {"prompt": ["some text, and more" * 1000] * 100},
    "no prompt": {"prompt": {"a": [1, 2, "x" * BIG]}},
}


@pytest.mark.parametrize("name", BODIES)
@pytest.mark.parametrize("indent", [None, 1])
def test_large_bodies_are_decoded_as_they_are(name: str, indent: int | None) -> None:
    body = json.dumps(BODIES[name], indent=indent).encode()
    assert len(body) > 1 << 18
    assert decode_json(body) == msgspec.json.decode(body)


TOO_MUCH: dict[str, tuple[bytes, str]] = {
    "messages": (json.dumps({"messages": [HI] * 100_000}).encode(), "messages"),
    "parts": (
        json.dumps({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}] * 100_000}]}).encode(),
        "messages",
    ),
    "metadata": (json.dumps({"messages": [HI], "metadata": {f"{i}": 1 for i in range(100_000)}}).encode(), "metadata"),
    "stop": (json.dumps({"prompt": "a", "stop": ["x" * BIG]}).encode(), "stop"),
    "an unknown field": (b'{"prompt": "a", "x": [' + b"[]," * 500_000 + b"1]}", "x"),
    "texts": (b'{"prompt": [' + b'"",' * 500_000 + b'"a"]}', "prompt"),
    "prompts": (b'{"prompt": [' + b"[1]," * 500_000 + b"[1]]}", "prompt"),
    "objects for a prompt": (b'{"prompt": [' + b"{}," * 1_500_000 + b"{}]}", "prompt"),
    "nothing but lists": (b"[" + b"[]," * 5_000_000 + b"1]", ""),
}


@pytest.mark.parametrize("name", TOO_MUCH)
def test_more_values_than_any_request_needs_are_refused(name: str) -> None:
    body, param = TOO_MUCH[name]
    with pytest.raises(RequestError, match="taken") as caught:
        decode_json(body)
    assert (caught.value.param or "") == param


@pytest.mark.parametrize("body", [b"{" + b" " * BIG, b'{"a": "' + b"x" * BIG, b"[" * BIG, b'"' + b"\\" * BIG])
def test_what_is_no_json_is_an_error(body: bytes) -> None:
    with pytest.raises((ValueError, RequestError)):
        decode_json(body)


@pytest.mark.parametrize(
    "text", [b"[1,2,3,4,5,6,7,8,9]", b" [1 , 2,\n3, 4.5, -6, null, true]  ", b"[11111111111,2]", b"[]"]
)
def test_numbers_in_pieces(monkeypatch: pytest.MonkeyPatch, text: bytes) -> None:
    monkeypatch.setattr("ingle.server.decode._NUMBERS_BYTES", 3)
    assert _numbers(text) == json.loads(text)


@pytest.mark.parametrize(
    "text", [b"[1,,2,3,4]", b"[1,2,3,4,5,", b"[1,2,3,4] x", b"[1,2,3,4,]", b"[1,2,3,4", b"[,1,2,3,4]"]
)
def test_pieces_that_are_no_numbers(monkeypatch: pytest.MonkeyPatch, text: bytes) -> None:
    monkeypatch.setattr("ingle.server.decode._NUMBERS_BYTES", 3)
    with pytest.raises(ValueError):
        _numbers(text)
