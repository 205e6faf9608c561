"""The user's ModelScope account: MODELSCOPE_API_TOKEN, else what `modelscope login` has left.

That is a pickle, of which only the opcodes are read: nothing of it is built or called.
"""

from __future__ import annotations

import os
import pickletools
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

from ingle.errors import ConfigError

TOKENS_PAGE = "https://modelscope.cn/my/myaccesstoken"
_COOKIE = "m_session_id"
_MAX_BYTES = 1 << 20


def headers() -> dict[str, str]:
    """Of a request in the user's name. Old interfaces of the hub take the cookie alone.

    Raises `ConfigError` for a token that cannot be one.
    """
    token = os.environ.get("MODELSCOPE_API_TOKEN")
    if token is not None:  # an empty one means none
        token = token.strip()
        if token and not _is_token(token):
            raise ConfigError(f"MODELSCOPE_API_TOKEN holds what no token is made of: copy it from {TOKENS_PAGE}")
        return {"Authorization": f"Bearer {token}", "Cookie": f"{_COOKIE}={token}"} if token else {}
    session = _stored_session()
    return {"Cookie": f"{_COOKIE}={session}"} if session is not None else {}


def _is_token(text: str) -> bool:
    return text.isascii() and text.isprintable() and not set(text) & set(' ;,"\\')


def _stored_session() -> str | None:
    home = Path(os.environ.get("MODELSCOPE_HOME") or "~/.modelscope").expanduser()
    try:
        with (home / "credentials" / "cookies").open("rb") as file:
            values = list(_values(file.read(_MAX_BYTES)))
    except (OSError, ValueError, IndexError, KeyError):  # no login, or one in a form of its own
        return None
    after = dict[str, object]()  # the attributes of the cookie: each value follows its name
    for name, value in pairwise(values):
        if name == "version":  # the first of the next cookie
            if after.get("name") == _COOKIE:
                break
            after = {}
        if isinstance(name, str):
            after.setdefault(name, value)
    expires = after.get("expires")
    session = after.get("value")
    if after.get("name") != _COOKIE or not isinstance(session, str) or not _is_token(session):
        return None
    return None if isinstance(expires, int) and expires < time.time() else session


def _values(pickled: bytes) -> Iterator[object]:
    """The strings and numbers of a pickle in their order, and None for what else there is."""
    memo = dict[int, object]()
    last: object = None
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name == "MEMOIZE":
            memo[len(memo)] = last
        elif "PUT" in opcode.name:
            memo[int(str(argument))] = last
        else:
            if "GET" in opcode.name:
                last = memo[int(str(argument))]
            elif "UNICODE" in opcode.name or "INT" in opcode.name or "LONG" in opcode.name:
                last = argument
            else:
                last = None
                if opcode.name not in ("NONE", "NEWTRUE", "NEWFALSE"):
                    continue
            yield last
