"""The files and batches of one client: what it made, and no other's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ingle.server.batch.records import Batch, File, StoredBatch
from ingle.server.batch.store import Incoming, Store, no_batch, no_file


class OwnedStore:
    """Raises the same `RequestError` (404) for another's as for what does not exist."""

    def __init__(self, store: Store, owner: str) -> None:
        self._store = store
        self.owner = owner
        self.now: Callable[[], float] = store.now
        self.root = store.root
        self.limits = store.limits

    def files(self) -> list[File]:
        """All that have not expired, the oldest first."""
        return [kept.shown() for kept in self._store.files() if kept.owner == self.owner]

    def file(self, file_id: str) -> File:
        kept = self._store.file(file_id)
        if kept.owner != self.owner:
            raise no_file(file_id)
        return kept.shown()

    def content(self, file_id: str) -> Path:
        return self._store.content(self.file(file_id).id)

    def delete(self, file_id: str) -> None:
        self._store.delete(self.file(file_id).id)

    def incoming(self) -> Incoming:
        """For a file that arrives piece by piece. Raises `RequestError` where there are too many."""
        return self._store.incoming(self.owner)

    def batches(self) -> list[Batch]:
        """As they are shown, the oldest first."""
        return [self._store.shown(stored) for stored in self._store.batches() if stored.owner == self.owner]

    def batch(self, batch_id: str) -> Batch:
        stored = self._store.stored_batch(batch_id)
        if stored.owner != self.owner:
            raise no_batch(batch_id)
        return self._store.shown(stored)

    def add_batch(self, stored: StoredBatch) -> None:
        """Raises `RequestError` where its input is gone, or there are too many."""
        self._store.add_batch(stored)

    def ask_to_cancel(self, batch_id: str) -> Batch:
        """Raises `RequestError` also for one that has ended."""
        return self._store.ask_to_cancel(self.batch(batch_id).id)
