"""From what the user calls a model to the files on this machine's disk."""

from __future__ import annotations

import difflib
import os
import re
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ingle.errors import ModelError
from ingle.hub.catalog import CATALOG, find_entry
from ingle.hub.local import is_gguf, refuse_file, refuse_folder, refuse_missing
from ingle.hub.progress import Progress, show_progress
from ingle.hub.pull import pull_model
from ingle.hub.store import Store, check_name, quote

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
"""Such as Qwen/Qwen3-0.6B."""
_MODEL_SUFFIXES = (".gguf", ".safetensors", ".bin", ".zip", ".tar", ".gz", ".onnx", ".pth", ".json")


@dataclass(frozen=True)
class ModelSource:
    name: str
    """The short name, or the path as the user gave it."""
    path: Path
    kind: Literal["folder", "gguf"]
    """A Hugging Face model folder with its config.json, or one .gguf file."""


def resolve_model(name: str, store: Store | None = None) -> ModelSource:
    """Find a model: the path of a Hugging Face folder or of a .gguf file, or the short name of a stored model.

    A path that exists wins over a short name. Raises `ModelError` that says what to do when there is no such model.
    """
    if (source := _from_path(name)) is not None:
        return source
    store = store or Store()
    entry = find_entry(name)
    short = entry.name if entry is not None else check_name(name)
    stored = store.names()
    if short in stored:
        return ModelSource(short, store.get(short).path, "gguf")
    if entry is not None:
        raise ModelError(f"model {short} is not on this machine yet: run `ingle pull {short}`")
    raise ModelError(_unknown(short, stored))


def ensure_model(name: str, progress: Progress | None = None, store: Store | None = None) -> ModelSource:
    """`resolve_model`, but a model of the catalog that is not in the store yet is pulled first.

    Progress is shown on stderr unless `progress` is given.
    """
    store = store or Store()
    entry = find_entry(name)
    if entry is not None and _from_path(name) is None and entry.name not in store.names():
        shown = show_progress() if progress is None else nullcontext(progress)
        with shown as progress:
            progress.note(f"{entry.name} is not on this machine yet: pulling it")
            pull_model(entry.name, progress, store)
    return resolve_model(name, store)


def _from_path(name: str) -> ModelSource | None:
    """The model at a path; None when `name` can only be a short name."""
    try:
        path = Path(name).expanduser() if name.startswith("~") else Path(name)
        is_file, is_folder = path.is_file(), path.is_dir()
        if is_folder and (path / "config.json").is_file():
            return ModelSource(name, path.absolute(), "folder")
    except PermissionError as error:
        raise ModelError(
            f"{quote(name)} cannot be looked into: {error.strerror}",
            alternative="give the user who runs ingle the right to read it",
        ) from error
    except OSError as error:
        raise ModelError(f"{quote(name)} cannot be looked up: {error.strerror}") from error
    except RuntimeError as error:  # "~" of a user that does not exist
        raise ModelError(f"{quote(name)} cannot be looked up: {error}") from error
    if is_file and is_gguf(path):
        return ModelSource(name, path.absolute(), "gguf")
    looks_like_path = os.sep in name or name.startswith(("~", ".")) or path.suffix.lower() in _MODEL_SUFFIXES
    if not looks_like_path:
        return None
    if is_folder:
        refuse_folder(name, path)
    if is_file:
        refuse_file(name, path)
    hub = "; models of the Hugging Face hub are not downloaded" if _HUB_NAME.fullmatch(name) else ""
    refuse_missing(name, path, hub)


def _unknown(short: str, stored: list[str]) -> str:
    available = sorted({*stored, *(name for entry in CATALOG for name in (entry.name, *entry.aliases))})
    near = difflib.get_close_matches(short, available, n=3, cutoff=0.5)
    if near:
        return f"there is no model {short}; did you mean {' or '.join(near)}? (`ingle pull NAME` fetches a model)"
    names = ", ".join(entry.name for entry in CATALOG)
    return f"there is no model {short}: `ingle pull NAME` fetches one of {names}, or give a folder or .gguf file"
