"""Under which names a server knows its model where nobody chose them. None that it shows is a path of the machine."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ingle.hub.catalog import find_entry
from ingle.hub.resolve import ModelSource

_HUB_CACHE = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/[^/]+")
_PART = re.compile(r"-\d{5}-of-\d{5}$")


@dataclass(frozen=True)
class ServedNames:
    shown: tuple[str, ...]
    """Those that `/v1/models` lists; answers carry the first."""
    also: tuple[str, ...] = ()
    """Others under which requests may ask for it."""


def served_names(source: ModelSource, given: str) -> ServedNames:
    """`given` is what the user called the model."""
    if not _is_path(source, given):
        entry = find_entry(given)
        others = () if entry is None else (entry.name, *entry.aliases, *map(str, entry.references()))
        return _names(source.name, given, *others)
    path = source.path
    if source.kind == "gguf":
        return _names(_PART.sub("", path.stem), given, str(path), path.name, path.stem)
    resolved = path.resolve()
    cached = _HUB_CACHE.search(str(path)) or _HUB_CACHE.search(str(resolved))
    name = f"{cached[1]}/{cached[2]}" if cached else resolved.name or "model"
    return _names(name, given, given.rstrip("/"), str(path), path.name, resolved.name)


def _names(shown: str, *also: str) -> ServedNames:
    return ServedNames((shown,), tuple(name for name in dict.fromkeys(also) if name not in (shown, "", ".", "..")))


def _is_path(source: ModelSource, given: str) -> bool:
    """Whether `given` is where the model lies, and no name of it."""
    try:
        return Path(given).expanduser().absolute() == source.path.absolute()
    except RuntimeError:  # "~" of a user that does not exist
        return False
