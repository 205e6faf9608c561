"""Tensors from a file to a GPU by way of a few pinned buffers in host memory: some are filled while others are emptied.

A copy out of a mapped file waits for one page of it after the other, and then goes through a buffer of the driver's: it
is neither asynchronous nor fast. Here no tensor is ever whole in host memory, and none is copied there a second time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from queue import SimpleQueue

import torch

NUM_BUFFERS = 8
BUFFER_BYTES = 8 << 20


@dataclass(frozen=True)
class _Buffer:
    memory: torch.Tensor
    """uint8"""
    copied: torch.cuda.Event | None
    """When the device has what it last held; None where copies are done when they return."""


class Ring:
    """Buffers that loads take in turn. Loads in several threads overlap: each reads and sends its own chunks."""

    def __init__(
        self, device: torch.device, *, num_buffers: int = NUM_BUFFERS, buffer_bytes: int = BUFFER_BYTES
    ) -> None:
        on_gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]
        self._buffer_bytes = buffer_bytes
        self._free: SimpleQueue[_Buffer] = SimpleQueue()
        for _ in range(num_buffers):
            memory = torch.empty(buffer_bytes, dtype=torch.uint8, pin_memory=on_gpu)
            copied = torch.cuda.Event(blocking=True) if on_gpu else None  # type: ignore[no-untyped-call]
            self._free.put(_Buffer(memory, copied))

    def load(self, file: int, start: int, dtype: torch.dtype, out: torch.Tensor) -> None:
        """Fills `out`, contiguous and of any float dtype, with numbers of `dtype` of an open file, from byte `start`.

        Returns when all are read; what is queued on the current stream from then on finds them in `out`. Raises
        `OSError`, also for a file that ends too early.
        """
        numbers, step = out.view(-1), self._buffer_bytes // dtype.itemsize
        with self._sending():
            for first in range(0, len(numbers), step):
                part = numbers[first : first + step]
                with self._buffer() as memory:
                    filled = memory[: len(part) * dtype.itemsize]
                    _read(file, start + first * dtype.itemsize, filled)
                    stored = filled.view(dtype)
                    if dtype != part.dtype:  # converted over there
                        stored = stored.to(part.device, non_blocking=True)
                    part.copy_(stored, non_blocking=True)

    @contextmanager
    def _sending(self) -> Iterator[None]:
        """Copies within wait for what is queued so far, and what is queued afterwards waits for them."""
        if self._stream is None:
            yield
            return
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:  # also of what failed half-way: its memory will be used again
            current.wait_stream(self._stream)

    @contextmanager
    def _buffer(self) -> Iterator[torch.Tensor]:
        buffer = self._free.get()
        try:
            if buffer.copied is not None:
                buffer.copied.synchronize()
            yield buffer.memory
            if buffer.copied is not None:
                buffer.copied.record(self._stream)
        finally:
            self._free.put(buffer)


def _read(file: int, start: int, out: torch.Tensor) -> None:
    """Fills `out`, uint8 in host memory."""
    left = out.numpy().data
    while left:
        count = os.preadv(file, [left], start)
        if count == 0:
            raise OSError(f"the file ends at byte {start}, within it")
        left, start = left[count:], start + count
