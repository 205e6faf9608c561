"""All models on this machine that go by a name: ingle's store, what came by URLs, and the hubs' own caches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from ingle.errors import ModelError
from ingle.hub.caches import cached_models, remove_cached
from ingle.hub.catalog import find_entry, short_names
from ingle.hub.names import RepoRef, ShortName, UrlRef, parse_name
from ingle.hub.store import Store, delete, disk_errors
from ingle.hub.urls import stored_urls, url_folder


@dataclass(frozen=True)
class Held:
    name: str
    """As it is typed."""
    size: int
    """Bytes on the disk."""
    format: str
    """GGUF, safetensors, PyTorch; interrupted or damaged for what cannot be served as it is."""
    used_s: float
    """When it was last read, or else written; seconds since 1970."""
    place: Literal["store", "url", "huggingface", "modelscope"]
    path: Path
    """Its file, or its folder."""
    remove: Callable[[], None]
    """Raises `OSError` and `ModelError`."""
    trouble: str = ""
    """What is wrong with it."""
    short_name: str = ""
    """The catalog's for it, where that is another."""


def inventory(store: Store) -> Iterator[Held]:
    """Raises `ModelError` for a disk that refuses."""
    for name in store.names():
        yield _stored(name, store)
    for url, files, whole in stored_urls(store):
        size, used_s = sum(file.stat().st_size for file in files), max(file.stat().st_atime for file in files)
        remove = partial(delete, url_folder(url, store))
        yield Held(url, size, "GGUF" if whole else "interrupted", used_s, "url", files[0], remove)
    short = short_names()
    for model in cached_models():
        path = model.files[0] if model.files else model.repo_folder
        remove = partial(remove_cached, model)
        name = model.name.lower()
        known = short.get(name) or short.get(name.removesuffix(name.rpartition("/")[2].partition(":")[2]).rstrip(":"))
        yield Held(model.name, model.size, model.format, model.used_s, model.hub, path, remove, short_name=known or "")


def _stored(name: str, store: Store) -> Held:
    remove = partial(store.remove, name)
    try:
        model = store.get(name)
    except ModelError as error:
        return Held(name, 0, "damaged", 0.0, "store", store.root, remove, str(error))
    stat = model.path.stat()
    kind = model.path.suffix.removeprefix(".").upper()
    return Held(name, stat.st_size, kind, max(stat.st_atime, stat.st_mtime), "store", model.path, remove)


def held_by_name(name: str, store: Store, hub: str | None = None) -> list[Held]:
    """Those on this machine that a name means: of a GGUF repository without a quantization all that are here.

    Raises `ModelError` where there is none.
    """
    entry = find_entry(name)
    wanted = [parse_name(name, hub)] if entry is None else [*entry.references(hub), ShortName(entry.name)]
    found = [held for held in inventory(store) if any(_is_meant(held, reference) for reference in wanted)]
    if not found:
        called = name if entry is None else entry.name
        raise ModelError(f"there is no {called} on this machine", alternative="`ingle list` shows what is here")
    return found


def _is_meant(held: Held, reference: RepoRef | UrlRef | ShortName) -> bool:
    if isinstance(reference, ShortName):
        return held.place == "store" and held.name == reference.name.lower()
    if isinstance(reference, UrlRef):
        return held.place == "url" and held.name == reference.url.partition("?")[0]
    if held.place != reference.hub:
        return False
    repo, _, choice = held.name.removeprefix("modelscope:").partition(":")
    wanted = reference.choice
    return repo.lower() == reference.repo.lower() and (wanted is None or wanted.lower() == choice.lower())


def remove(held: Held) -> None:
    """From the disk. Raises `ModelError`."""
    with disk_errors(f"remove {held.name}"):
        held.remove()
