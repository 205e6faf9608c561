"""JSON of any size up to the body's limit, decoded without holding up other requests.

Decoding makes objects, and one call of the decoder makes all of them under the interpreter's lock: 30 MB of empty lists
take a second or more, in which the server answers nobody. So a large body is first looked through by NumPy, which holds
no lock, for how many values it has; what no request needs is refused, and token ids are decoded prompt by prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from ingle.errors import RequestError
from ingle.limits import limits

_SMALL_BYTES = 256 << 10
"""Decoded at once, in some milliseconds."""
_CONVERSATIONS = frozenset(("messages", "input", "system", "instructions", "tools"))
_MAX_TOKEN_IDS = 8_000_000
_SLICE_BYTES = 4 << 20
_NUMBERS_BYTES = 256 << 10


def decode_json(body: bytes) -> Any:
    """What `body` holds. Raises `ValueError` and `RecursionError` where it is no JSON, `RequestError` for too much."""
    _check_depth(body)
    small = min(_SMALL_BYTES, limits().max_field_bytes)
    if len(body) <= small:
        return msgspec.json.decode(body)
    _check_count(body, _MAX_TOKEN_IDS, "The body", None)
    fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    return {name: _field(name, bytes(raw)) for name, raw in fields.items()}


def _field(name: str, text: bytes) -> Any:
    if len(text) <= min(_SMALL_BYTES, limits().max_field_bytes):
        return msgspec.json.decode(text)
    if name in _CONVERSATIONS:
        _check_count(text, limits().max_json_values, name, name, "max_json_values")
    elif name == "prompt":
        return _prompt(text)
    else:
        shown = name[:80]
        if (told := limits().over("max_field_bytes", len(text), f"{shown} takes {len(text)} bytes")) is not None:
            raise RequestError(told, param=shown, code="field_too_large")
        _check_count(text, limits().max_json_values, shown, shown, "max_json_values")
    return msgspec.json.decode(text)


def _prompt(text: bytes) -> Any:
    start = b"".join(text[:64].split())
    if start.startswith(b"[["):  # no strings: each bracket begins a prompt
        num_prompts = text.count(b"[") - 1
        if (told := limits().over("max_prompts", num_prompts, f"{num_prompts} prompts are too many")) is not None:
            raise RequestError(told, param="prompt")
        return [msgspec.json.decode(raw) for raw in msgspec.json.decode(text, type=list[msgspec.Raw])]
    if not start.startswith(b'"'):
        if start.startswith(b'["'):
            _check_count(text, limits().max_prompts + 1, "prompt", "prompt", "max_prompts")
        else:
            _check_count(text, _MAX_TOKEN_IDS // 4, "prompt", "prompt")
            if b'"' not in text and b"{" not in text and text.count(b"[") == 1:
                return _numbers(text)
    return msgspec.json.decode(text)


def _numbers(text: bytes) -> list[Any]:
    """A list without others in it, decoded in pieces: between them other threads run."""
    found: list[Any] = []
    start, end = text.index(b"[") + 1, text.rfind(b"]")
    while 0 < end - start > _NUMBERS_BYTES and (comma := text.find(b",", start + _NUMBERS_BYTES, end)) != -1:
        found += msgspec.json.decode(b"[" + text[start:comma] + b"]")
        start = comma + 1
    if not text[start:end].strip():
        return list(msgspec.json.decode(text))  # which is empty, or says what is wrong
    found += msgspec.json.decode(text if not found else b"[" + text[start:])
    return found


def _check_count(text: bytes, most: int, what: str, param: str | None, limit: str = "") -> None:
    count = count_values(text, most)
    if count > most:
        by = limits().by(limit) if limit else ""
        raise RequestError(
            f"{what} has more than {most} values, which is more than is taken{by}", param=param, code="too_many_values"
        )


def _check_depth(body: bytes) -> None:
    """Most bodies have fewer brackets than may stand within each other, and are not looked through."""
    most = limits().max_json_depth
    if body.count(b"[") + body.count(b"{") > most and depth_of(body, most) > most:
        raise RequestError(
            f"The body is nested too deeply: at most {most} lists and objects within each other are taken"
            f"{limits().by('max_json_depth')}.",
            code="too_deep",
        )


def depth_of(text: bytes, most: int | None = None) -> int:
    """How many lists and objects a JSON text has within each other; stops counting beyond `most`."""
    import numpy as np

    deepest = depth = 0
    for part, outside in _outside_strings(text):
        steps = ((part == ord("[")) | (part == ord("{"))).astype(np.int8)
        steps -= (part == ord("]")) | (part == ord("}"))
        steps = steps[(steps != 0) & outside]
        if len(steps):
            depths = depth + np.cumsum(steps, dtype=np.int64)
            deepest, depth = max(deepest, int(depths.max())), int(depths[-1])
        if most is not None and deepest > most:
            break
    return deepest


def count_values(text: bytes, most: int | None = None) -> int:
    """Numbers, strings, lists and objects in a JSON text, names of fields not counted; stops counting beyond `most`.

    Each but the first of a list or object stands behind a comma, and each first behind an opening bracket.
    """
    import numpy as np

    count = 1
    for part, outside in _outside_strings(text):
        structural = (part == ord(",")) | (part == ord("[")) | (part == ord("{"))
        count += int(np.count_nonzero(structural & outside))
        if most is not None and count > most:
            break
    return count


def _outside_strings(text: bytes) -> Iterator[tuple[Any, Any]]:
    """The bytes of a JSON text, slice by slice, and which of them stand outside of strings."""
    import numpy as np

    data = np.frombuffer(text, np.uint8)
    in_string, escaped = 0, False
    for start in range(0, len(data), _SLICE_BYTES):
        part = data[start : start + _SLICE_BYTES]
        quotes = part == ord('"')
        escaped = _drop_escaped(part, quotes, escaped)
        # A sum of uint8 wraps at 256, which is even: its last bit still tells whether the quotes so far are odd.
        parity = np.add.accumulate(quotes, dtype=np.uint8)
        yield part, ((parity + np.uint8(in_string)) & 1) == 0
        in_string = (in_string + int(parity[-1])) & 1


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
