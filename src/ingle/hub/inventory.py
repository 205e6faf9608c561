"""All models on this machine that go by a name: ingle's store, what came by URLs, and the hubs' own caches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from ingle.errors import ModelError
from ingle.hub.caches import CachedModel, Repository, cached_models, remove_cached
from ingle.hub.catalog import find_entry, short_names
from ingle.hub.disk import disk_errors
from ingle.hub.names import RepoRef, ShortName, UrlRef, parse_name
from ingle.hub.quantizations import named
from ingle.hub.store import Store
from ingle.hub.urls import StoredUrl, remove_url, stored_urls


@dataclass(frozen=True)
class Held:
    name: str
    """As it is typed."""
    size: int
    """Bytes on the disk."""
    format: str
    """GGUF, safetensors, PyTorch; interrupted, damaged or unreadable for what cannot be served as it is."""
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
    cached: CachedModel | None = None
    """Of a hub's cache."""


def inventory(store: Store) -> Iterator[Held]:
    """Raises `ModelError` for a store that cannot be read; of others' caches each says its own trouble."""
    for name in store.names():
        yield _stored(name, store)
    with disk_errors(f"read {store.root / 'downloads'}"):
        yield from [_by_url(each) for each in stored_urls(store)]
    short = short_names()
    for model in cached_models():
        name = model.name.lower()
        yield Held(
            name=model.name,
            size=model.size,
            format=model.format,
            used_s=model.used_s,
            place=model.repository.hub,
            path=model.weights[0] if model.variant is not None else model.repository.folder,
            remove=partial(remove_cached, model),
            trouble=model.trouble,
            short_name=short.get(name) or short.get(name.removesuffix(f":{model.label.lower()}")) or "",
            cached=model,
        )


def _stored(name: str, store: Store) -> Held:
    remove = partial(store.remove, name)
    try:
        with disk_errors(f"read model {name}"):
            model = store.get(name)
            stat = model.path.stat()
    except ModelError as error:
        return Held(name, 0, "damaged", 0.0, "store", store.root, remove, str(error))
    kind = model.path.suffix.removeprefix(".").upper()
    return Held(name, stat.st_size, kind, max(stat.st_atime, stat.st_mtime), "store", model.path, remove)


def _by_url(stored: StoredUrl) -> Held:
    """Raises `OSError`."""
    stats = [path.stat() for path in stored.files]
    used_s = max(max(stat.st_atime, stat.st_mtime) for stat in stats)
    kind = "GGUF" if stored.is_whole else "interrupted"
    size = sum(stat.st_size for stat in stats)
    return Held(stored.url, size, kind, used_s, "url", stored.files[0], partial(remove_url, stored))


def held_by_name(name: str, held: Sequence[Held], hub: str | None = None) -> list[Held]:
    """Those of an inventory that a name means: of a GGUF repository without a quantization all that are here.

    Raises `ModelError` where there is none.
    """
    entry = find_entry(name)
    typed = parse_name(name, hub) if entry is None else ShortName(entry.name)
    if isinstance(typed, RepoRef) and typed.revision is not None:
        raise ModelError(
            f"{typed} is one revision, and what several share cannot be told apart",
            alternative=f"`ingle rm {replace(typed, revision=None)}` removes all of them",
        )
    wanted = [typed, *([] if entry is None else entry.references(hub))]
    found = [each for reference in wanted for each in _meant(held, reference)]
    if not found:
        called = name if entry is None else entry.name
        raise ModelError(f"there is no {called} on this machine", alternative="`ingle list` shows what is here")
    return found


def _meant(held: Sequence[Held], reference: RepoRef | UrlRef | ShortName) -> list[Held]:
    if isinstance(reference, ShortName):
        return [each for each in held if each.place == "store" and each.name == reference.name.lower()]
    if isinstance(reference, UrlRef):
        return [each for each in held if each.place == "url" and each.name == str(reference)]
    repo = [each for each in held if each.cached is not None and _is_of(each.cached.repository, reference)]
    if reference.choice is None:
        return repo
    choice = reference.choice.lower()
    exact = [each for each in repo if each.cached is not None and each.cached.label.lower() == choice]
    kinds = [each.cached.variant for each in repo if each.cached is not None and each.cached.variant is not None]
    variant = named(kinds, reference.choice)
    return exact or [each for each in repo if each.cached is not None and variant and each.cached.variant is variant]


def _is_of(repository: Repository, reference: RepoRef) -> bool:
    return repository.hub == reference.hub and repository.name.lower() == reference.repo.lower()


def remove(held: Held) -> None:
    """From the disk. Raises `ModelError`."""
    with disk_errors(f"remove {held.name}"):
        held.remove()
