"""Pages as they are kept elsewhere: all that one holds, end to end."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


class HostPages:
    """Pages in host memory, copied by whichever thread asks."""

    def __init__(self, data: Bytes) -> None:
        """`data`: [places, sides, num_pages, bytes of one side of a page in one place]."""
        self._data = data

    def buffer(self, num_pages: int) -> Bytes:
        places, sides, _, side_bytes = self._data.shape
        return np.empty((num_pages, places * sides * side_bytes), np.uint8)

    def read(self, page_ids: Sequence[int], out: Bytes) -> None:
        for page_id, page in zip(page_ids, out, strict=True):
            np.copyto(self._view(page), self._data[:, :, page_id])  # without the interpreter's lock

    def write(self, page_ids: Sequence[int], data: Bytes) -> None:
        for page_id, page in zip(page_ids, data, strict=True):
            np.copyto(self._data[:, :, page_id], self._view(page))

    def _view(self, page: Bytes) -> Bytes:
        places, sides, _, side_bytes = self._data.shape
        return page.reshape(places, sides, side_bytes)
