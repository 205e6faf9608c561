"""`ingle render`: the exact prompt and token ids that a conversation becomes, without loading the model."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from ingle.cli.conversation import messages_in
from ingle.cli.flags import parse
from ingle.config import TextConfig
from ingle.errors import ConfigError, ModelError, printable

if TYPE_CHECKING:
    from ingle.text.load import TextSide


@dataclass(frozen=True)
class Render:
    """Print the exact prompt that a conversation becomes, and its tokens, without loading the model."""

    model: str
    """A model that is on this machine: a short name, org/name, a model's folder, or a .gguf file."""
    text: TextConfig
    prompt: Positional[str | None] = None
    """What the user says. Default: Hello!"""
    system: str | None = None
    """System message at the beginning."""
    messages: str | None = None
    """A file of messages, as JSON or JSON lines, in place of the question; - is stdin."""
    ids: bool = False
    """Print the token ids alone."""
    json: bool = False
    """Print prompt, ids and tokens as one JSON object."""


def main(argv: Sequence[str]) -> None:
    flags = parse(Render, argv, command="render")
    messages = _messages(flags)
    from ingle.hub.resolve import resolve_model
    from ingle.text.load import load_text_side

    source = resolve_model(flags.model)
    side = load_text_side(source.path, flags.text, source.recommended)
    if side.chat_template is None:
        raise ModelError(f"{flags.model} has no chat template: give one with --chat-template FILE")
    prompt = side.chat_template.prompt(messages)
    ids = side.tokenizer.encode(prompt, add_special_tokens=False)
    for notice in side.notices:
        print("notice:", notice, file=sys.stderr)
    if flags.json:
        print(json.dumps(_record(side, prompt, ids), ensure_ascii=False))
    elif flags.ids:
        print(*ids)
    else:
        print(printable(prompt, keep="\n\t"), end="" if prompt.endswith("\n") else "\n")
        print(f"--- {len(ids)} tokens", *_listed(side, ids), sep="\n")


def _messages(flags: Render) -> list[Mapping[str, Any]]:
    """Raises `ConfigError` and `RequestError`."""
    if flags.messages is None:
        asked: list[Mapping[str, Any]] = [{"role": "user", "content": flags.prompt or "Hello!"}]
    elif flags.prompt is not None:
        raise ConfigError("give either a question or --messages FILE")
    else:
        asked = list(messages_in(_read(flags.messages), f"--messages {flags.messages}"))
    return asked if flags.system is None else [{"role": "system", "content": flags.system}, *asked]


def _read(name: str) -> str:
    try:
        return sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--messages {name}: {getattr(error, 'strerror', None) or error}") from error


def _record(side: TextSide, prompt: str, ids: Sequence[int]) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "token_ids": list(ids),
        "tokens": [side.tokenizer.token(token_id) for token_id in ids],
        "special_token_ids": sorted(side.tokenizer.special_token_ids.intersection(ids)),
    }


def _listed(side: TextSide, ids: Sequence[int]) -> list[str]:
    """A token a line: its id, its text, or its bytes where they are part of a character, and whether it is special."""
    lines = []
    for token_id in ids:
        text, special = side.tokenizer.token(token_id), token_id in side.tokenizer.special_token_ids
        shown = str(side.tokenizer.token_bytes(token_id)) if "\ufffd" in text else printable(text)
        lines.append(f"{token_id:>7}  {shown}{'  (special)' if special else ''}")
    return lines
