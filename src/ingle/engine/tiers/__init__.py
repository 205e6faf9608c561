"""Where pages are kept below the device: in host memory, and on a disk.

Contents go by name, as in the page pool: a hash of a page's tokens and of all before, and the group of layers. Names
say nothing of the model, so each tier keeps one model's apart from all others' by its identity.
"""

from __future__ import annotations

from typing import Protocol

from ingle.device.pages import Bytes

NAME_BYTES = 17
IDENTITY_BYTES = 16


class Tier(Protocol):
    """Contents by name, each as long as a page. For threads."""

    def __contains__(self, name: object) -> bool:
        """Whether `read` is likely to find it. Never waits."""
        ...

    def read(self, name: bytes, out: Bytes) -> bool:
        """Copies a content to `out`. False, with anything in `out`, where it is not there or not whole."""
        ...

    def write(self, name: bytes, page: Bytes) -> None:
        """Keeps a content, at the cost of those that nobody asked for the longest. May drop it."""
        ...

    def touch(self, name: bytes) -> None:
        """It was asked for, and found on the device."""
        ...

    @property
    def num_bytes(self) -> int:
        """That it holds."""
        ...

    @property
    def num_damaged(self) -> int:
        """Contents that were not whole."""
        ...
