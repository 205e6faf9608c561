"""JSON of any size up to the body's limit, decoded without holding up other requests.

Decoding makes objects, and one call of the decoder makes all of them under the interpreter's lock: 30 MB of empty lists
take a second or more, in which the server answers nobody. So a large body is first looked through by NumPy, which holds
no lock, for how many values it has; what no request needs is refused, and token ids are decoded prompt by prompt.
"""

from __future__ import annotations

from typing import Any

import msgspec

from ingle.errors import RequestError

_SMALL_BYTES = 256 << 10
"""Decoded at once, in some milliseconds. Every field but prompt and conversation is smaller in any sensible request."""
_MAX_CHAT_VALUES = 100_000
"""Numbers, strings, lists and objects in a conversation: 10,000 messages of several parts each."""
_CONVERSATIONS = frozenset(("messages", "input", "system", "instructions", "tools"))
_MAX_TOKEN_IDS = 8_000_000
_MAX_PROMPTS = 1024
_SLICE_BYTES = 4 << 20


def decode_json(body: bytes) -> Any:
    """What `body` holds. Raises `ValueError` and `RecursionError` where it is no JSON, `RequestError` for too much."""
    if len(body) <= _SMALL_BYTES:
        return msgspec.json.decode(body)
    _check_count(body, _MAX_TOKEN_IDS, "The body", None)
    fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    return {name: _field(name, bytes(raw)) for name, raw in fields.items()}


def _field(name: str, text: bytes) -> Any:
    if len(text) <= _SMALL_BYTES:
        return msgspec.json.decode(text)
    if name in _CONVERSATIONS:
        _check_count(text, _MAX_CHAT_VALUES, name, name)
    elif name == "prompt":
        return _prompt(text)
    else:
        shown = name[:80]
        raise RequestError(
            f"{shown} takes {len(text)} bytes, at most {_SMALL_BYTES} are taken", param=shown, code="field_too_large"
        )
    return msgspec.json.decode(text)


def _prompt(text: bytes) -> Any:
    start = b"".join(text[:64].split())
    if start.startswith(b"[["):  # no strings: each bracket begins a prompt
        if text.count(b"[") <= _MAX_PROMPTS + 1:
            return [msgspec.json.decode(raw) for raw in msgspec.json.decode(text, type=list[msgspec.Raw])]
        num_prompts = text.count(b"[") - 1
        raise RequestError(f"{num_prompts} prompts are too many, at most {_MAX_PROMPTS} are taken", param="prompt")
    if not start.startswith(b'"'):
        is_texts = start.startswith(b'["')
        _check_count(text, _MAX_PROMPTS if is_texts else _MAX_TOKEN_IDS // 4, "prompt", "prompt")
    return msgspec.json.decode(text)


def _check_count(text: bytes, most: int, what: str, param: str | None) -> None:
    count = count_values(text, most)
    if count > most:
        raise RequestError(
            f"{what} has more than {most} values, which is more than is taken", param=param, code="too_many_values"
        )


def count_values(text: bytes, most: int | None = None) -> int:
    """Numbers, strings, lists and objects in a JSON text, names of fields not counted; stops counting beyond `most`.

    Each but the first of a list or object stands behind a comma, and each first behind an opening bracket.
    """
    import numpy as np

    data = np.frombuffer(text, np.uint8)
    count, in_string, escaped = 1, 0, False
    for start in range(0, len(data), _SLICE_BYTES):
        part = data[start : start + _SLICE_BYTES]
        quotes = part == ord('"')
        escaped = _drop_escaped(part, quotes, escaped)
        # A sum of uint8 wraps at 256, which is even: its last bit still tells whether the quotes so far are odd.
        parity = np.add.accumulate(quotes, dtype=np.uint8)
        structural = (part == ord(",")) | (part == ord("[")) | (part == ord("{"))
        count += int(np.count_nonzero(structural & (((parity + np.uint8(in_string)) & 1) == 0)))
        in_string = (in_string + int(parity[-1])) & 1
        if most is not None and count > most:
            break
    return count


def _drop_escaped(part: Any, quotes: Any, escaped: bool) -> bool:
    """Takes those out of `quotes` that stand behind an odd number of backslashes. True if the next part's first would.

    `escaped` says so of this part's first.
    """
    import numpy as np

    positions = np.flatnonzero(part == ord("\\"))
    if escaped and len(part):
        quotes[0] = False
        positions = positions[1:] if len(positions) and positions[0] == 0 else positions
    if not len(positions):
        return False
    starts = np.flatnonzero(np.diff(positions, prepend=-2) != 1)  # of runs of backslashes
    lengths = np.diff(starts, append=len(positions))
    ends = positions[starts] + lengths  # what stands behind each run
    odd = ends[lengths % 2 == 1]
    quotes[odd[odd < len(part)]] = False
    return bool(len(odd) and odd[-1] == len(part))
