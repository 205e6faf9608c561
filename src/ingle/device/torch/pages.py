"""Pages of a GPU, copied beside its steps: on a stream of its own, through pinned memory."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

from ingle.device.pages import Bytes


class GpuPages:
    """Copies pages in any thread but the one that launches steps, which is not held up.

    `capturing` is locked while a CUDA graph is captured: what other threads ask of CUDA then would spoil the capture.
    """

    def __init__(self, pages: torch.Tensor, capturing: threading.Lock) -> None:
        """`pages`: `KvCache.raw`. Steps are launched on the stream that is the current one now."""
        flat = pages.view(pages.shape[0] * pages.shape[1], pages.shape[2], -1)
        self._pages = flat.view(torch.int64)  # a page has 8 tokens at least
        self._capturing = capturing
        self._steps = torch.cuda.current_stream(pages.device)
        self._stream = torch.cuda.Stream(pages.device)  # type: ignore[no-untyped-call]

    def buffer(self, num_pages: int) -> Bytes:
        rows, _, words = self._pages.shape
        memory: Bytes = torch.empty(num_pages, rows * words * 8, dtype=torch.uint8, pin_memory=True).numpy()
        return memory

    @torch.inference_mode()
    def read(self, page_ids: Sequence[int], out: Bytes) -> None:
        """The steps that wrote these pages were reported, so no stream need wait for another."""
        with self._capturing, torch.cuda.stream(self._stream):
            gathered = self._pages.index_select(1, self._ids(page_ids)).transpose(0, 1)
            torch.from_numpy(out).view(torch.int64).copy_(gathered.reshape(len(page_ids), -1), non_blocking=True)
            self._stream.synchronize()

    @torch.inference_mode()
    def write(self, page_ids: Sequence[int], data: Bytes) -> None:
        """A launched step may be about to zero one of these pages: it goes first."""
        rows, _, words = self._pages.shape
        with self._capturing, torch.cuda.stream(self._stream):
            self._stream.wait_stream(self._steps)
            brought = torch.from_numpy(data).view(torch.int64).to(self._pages.device, non_blocking=True)
            brought = brought.view(len(page_ids), rows, words).transpose(0, 1)
            self._pages.index_copy_(1, self._ids(page_ids), brought)
            self._stream.synchronize()

    def _ids(self, page_ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor(page_ids, dtype=torch.int64, device=self._pages.device)
