"""The answers that may be asked for again, and continued: for some time, and as long as there is room."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec

from ingle.errors import RequestError

_OVERHEAD_BYTES = 1024
"""That an entry takes beside its texts."""


@dataclass(frozen=True)
class Stored:
    id: str
    response: bytes
    """JSON of the whole answer."""
    items: bytes
    """JSON of all items that it answers, those of the answers before it too: an entry needs no other."""
    expires_s: float
    owner: str = ""
    """Whose it is; empty for all whose keys have no name, and where none is asked for."""

    @property
    def num_bytes(self) -> int:
        return len(self.response) + len(self.items) + _OVERHEAD_BYTES

    def input_items(self) -> list[dict[str, Any]]:
        return msgspec.json.decode(self.items, type=list[dict[str, Any]])

    def output_items(self) -> list[dict[str, Any]]:
        output: list[dict[str, Any]] = msgspec.json.decode(self.response)["output"]
        return output


class OwnedResponses:
    """Those of one client: another's are not there."""

    def __init__(self, store: ResponseStore, owner: str) -> None:
        self._store = store
        self._owner = owner
        self.keeps = store.keeps

    def put(self, response_id: str, response: bytes, items: bytes) -> None:
        self._store.put(response_id, response, items, self._owner)

    def get(self, response_id: str, param: str = "response_id") -> Stored:
        """Raises `RequestError` (404)."""
        return self._store.get(response_id, param, self._owner)

    def delete(self, response_id: str) -> None:
        """Raises `RequestError` (404)."""
        self._store.delete(response_id, self._owner)


class ResponseStore:
    """In memory. The oldest goes first. Safe to use from any thread."""

    def __init__(
        self, max_bytes: int = 256 << 20, max_age_s: float = 24 * 3600.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._max_bytes = max_bytes
        self._max_age_s = max_age_s
        self._clock = clock
        self._entries: OrderedDict[str, Stored] = OrderedDict()
        """In the order in which they came, which is that in which they expire."""
        self._lock = threading.Lock()
        self.num_bytes = 0

    @property
    def keeps(self) -> bool:
        """Whether it keeps anything at all."""
        return self._max_bytes > 0

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, response_id: str, response: bytes, items: bytes, owner: str = "") -> None:
        """Unless it is larger than the whole store."""
        entry = Stored(response_id, response, items, self._clock() + self._max_age_s, owner)
        with self._lock:
            self._drop_expired()
            if entry.num_bytes > self._max_bytes:
                return
            self._entries[response_id] = entry
            self.num_bytes += entry.num_bytes
            while self.num_bytes > self._max_bytes:
                self._drop(next(iter(self._entries)))

    def get(self, response_id: str, param: str = "response_id", owner: str = "") -> Stored:
        """Raises `RequestError` (404) for one that is not here, or no longer, or another's."""
        with self._lock:
            self._drop_expired()
            entry = self._entries.get(response_id)
            if entry is None or entry.owner != owner:
                kept = (
                    f"Responses are kept for {self._max_age_s / 3600:g} hours at most, as long as there is room, and "
                )
                why = kept + "not if store is false." if self.keeps else "This server keeps none: see --response-store."
                raise RequestError(
                    f"The response {response_id!r:.100} does not exist here. {why}",
                    param=param,
                    code="response_not_found",
                    status=404,
                )
            return entry

    def delete(self, response_id: str, owner: str = "") -> None:
        """Raises `RequestError` (404) as `get` does."""
        self.get(response_id, owner=owner)
        with self._lock:
            if response_id in self._entries:
                self._drop(response_id)

    def _drop_expired(self) -> None:
        now = self._clock()
        while self._entries and next(iter(self._entries.values())).expires_s <= now:
            self._drop(next(iter(self._entries)))

    def _drop(self, response_id: str) -> None:
        self.num_bytes -= self._entries.pop(response_id).num_bytes
