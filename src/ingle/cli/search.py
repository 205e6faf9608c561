"""`ingle search`: models of a hub by a word of their name."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from tyro.conf import Positional

from ingle.cli.flags import parse
from ingle.cli.table import print_table
from ingle.errors import ConfigError, ModelError, printable
from ingle.hub.listing import Found
from ingle.hub.names import Hub, RepoRef, default_hub
from ingle.hub.origins import origin_of


@dataclass(frozen=True)
class Search:
    """Find models on a hub, those that are downloaded most first."""

    words: Positional[tuple[str, ...]] = ()
    """Of the model's name: `ingle search qwen3 gguf`."""
    hub: str | None = None
    """Which: huggingface or modelscope. Default: $INGLE_HUB, else huggingface."""
    limit: int = 20
    """Most models to print."""
    json: bool = False
    """Print JSON."""


def main(argv: Sequence[str]) -> None:
    flags = parse(Search, argv, command="search")
    words = " ".join(flags.words).strip()
    if not words:
        raise ConfigError("ingle search needs a WORD, such as qwen3")
    if not 0 < flags.limit <= 100:
        raise ConfigError(f"--limit {flags.limit} is not between 1 and 100")
    hub = default_hub(flags.hub)
    origin = origin_of(RepoRef(hub, words), _note)
    with origin.http:
        found = [_as_typed(each, hub) for each in origin.search(words, flags.limit)[: flags.limit]]
    if flags.json:
        print(json.dumps([asdict(each) for each in found], ensure_ascii=False, indent=1))
        return
    if not found:
        raise ModelError(f"{hub} has no model with {words!r:.100} in its name", alternative="try fewer words")
    rows = [
        (each.name, _short(each.downloads), _short(each.likes), each.task + ", gated" * each.gated) for each in found
    ]
    print_table(("NAME", "DOWNLOADS", "LIKES", "TASK"), rows, right={1, 2})


def _note(text: str) -> None:
    print(printable(text), file=sys.stderr)


def _as_typed(found: Found, hub: Hub) -> Found:
    """By the name that other commands take whatever hub is set."""
    return replace(found, name=f"modelscope:{found.name}") if hub == "modelscope" else found


def _short(number: int | None) -> str:
    if number is None:
        return ""
    for unit, size in (("M", 1_000_000), ("k", 1_000)):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return str(number)
