"""What computes: a device holds a model, its KV pages and tables with a row, or slot, for each running sequence.

Two answer to this interface: PyTorch's, on any device that it knows (`torch`), and ingle's own on a CPU (`native`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ingle.device.pages import Bytes
from ingle.step import Masks, Step

Ints = npt.NDArray[np.int64]


class LogprobRows(NamedTuple):
    """Log probabilities of R tokens and of the N most likely ones at their places."""

    token_ids: npt.NDArray[np.int32]
    """[R, 1 + N]: the token itself, then the most likely ones in falling order, it before its equals."""
    values: npt.NDArray[np.float32]
    """[R, 1 + N]"""
    ranks: npt.NDArray[np.int32]
    """[R]: 1 where the token is the most likely."""


class Report(NamedTuple):
    """What a step drew for its R rows, on the host."""

    token_ids: Ints
    """[R]"""
    finite: npt.NDArray[np.bool_]
    """[R], False where the model's logits held NaN or infinity."""
    logprobs: LogprobRows | None
    """Of all rows, with as many alternatives as any chunk wants; None where none does."""
    prompt_logprobs: dict[int, LogprobRows]
    """By index of the chunk in the step, for those that ask."""
    pooled: dict[int, npt.NDArray[np.float32]]
    """The same: a vector each."""


class Launched(Protocol):
    """A step whose forward is queued."""

    def logits(self, start: int, stop: int) -> npt.NDArray[np.float32]:
        """Of tokens of the step, [stop - start, vocab], where a chunk asks for log probabilities of its prompt."""
        ...

    def sample(self, masks: Masks) -> None:
        """Queues the draw, once; masks may be there for a step that is `masked`."""
        ...

    def report(self) -> Report:
        """Waits for the step."""
        ...


class PageCopies(Protocol):
    """Copies whole pages from and to host memory, in threads of their own, beside steps."""

    def buffer(self, num_pages: int) -> Bytes:
        """[num_pages, bytes of a page] of the memory that is copied from and to."""
        ...

    def read(self, page_ids: Sequence[int], out: Bytes) -> None:
        """Copies pages that are written, and whose steps were reported, to `out`, [pages, bytes of a page]."""
        ...

    def write(self, page_ids: Sequence[int], data: Bytes) -> None:
        """Copies `data` into pages that no step touches until this returns, unless it was launched before."""
        ...


class Device(Protocol):
    """Computes one step after the other; steps are done in the order in which they are queued."""

    def pages(self) -> PageCopies:
        """Asked for once, in the thread that launches steps, where pages are kept elsewhere as well."""
        ...

    def apply(self, step: Step) -> None:
        """Writes what a step changes in the tables of slots, and zeroes the pages that it names."""
        ...

    def forward(self, step: Step) -> Launched:
        """Queues the forward of a step that was applied."""
        ...

    def usable(self) -> bool:
        """Whether the device still computes, after a step has raised an exception."""
        ...

    def relieve(self) -> None:
        """Gives back what it keeps of freed memory: some ran out."""
        ...

    def progress(self) -> int:
        """A number that changes while a step is computed, however long it takes. From any thread."""
        ...

    def if_stuck(self, last_resort: Callable[[str], None]) -> None:
        """`last_resort` is called, from a thread, with the reason where a step will never end."""
        ...

    def close(self) -> None:
        """Lets go of what other devices wait for, or would wait for it. Nothing is computed after."""
        ...

    def capture_next(self) -> bool:
        """Captures one more CUDA graph that is likely to be needed; False when there is none left. One that cannot be
        captured is given up, and what it is for runs without."""
        ...
