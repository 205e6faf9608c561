"""Pages of all ranks as pages of one device: what is kept of a page is what all ranks have of it, end to end.

Rank 0 alone knows what is kept, and by which name. It has the others copy their parts from and to memory that all of
them map, so that a page is kept and brought back whole or not at all, and ranks cannot come to differ in what they
have. The ring puts copies behind the steps that were told before.
"""

from __future__ import annotations

import itertools
import mmap
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np

from ingle.device import PageCopies
from ingle.device.pages import Bytes
from ingle.parallel.messages import Copied, CopyPages, SharePages
from ingle.parallel.team import Team

_LOOK_S = 0.25


@dataclass
class _Asked:
    """What some ranks have not answered."""

    num_left: int
    ended: threading.Event = field(default_factory=threading.Event)
    failure: str = ""


class RankPages:
    """`PageCopies` of all ranks, of which `own` is this process's."""

    def __init__(
        self, own: PageCopies, team: Team, page_bytes: Sequence[int], wait_for_steps: Callable[[], None]
    ) -> None:
        """`page_bytes`: of each rank. `wait_for_steps`: until this rank too has applied all that were told."""
        self._own, self._team, self._wait_for_steps = own, team, wait_for_steps
        self._starts = [0, *accumulate(page_bytes)]
        self._num_bytes = 0
        self._shared: dict[int, tuple[int, Bytes]] = {}
        """By the address of a buffer: its number, and what this rank copies through."""
        self._numbers = itertools.count()
        self._asked: dict[int, _Asked] = {}
        team.on_copied(_told(self._asked))
        self._file = os.memfd_create("ingle ranks' pages", os.MFD_CLOEXEC)
        weakref.finalize(self, os.close, self._file)

    def buffer(self, num_pages: int) -> Bytes:
        start = self._num_bytes
        whole = num_pages * self._starts[-1]
        self._num_bytes += -(-whole // mmap.PAGESIZE) * mmap.PAGESIZE
        os.ftruncate(self._file, self._num_bytes)
        message = SharePages(
            f"/proc/{os.getpid()}/fd/{self._file}", len(self._shared), start, num_pages, list(self._starts)
        )
        buffer = _mapped(self._file, message)
        self._team.tell(message)
        self._shared[_address(buffer)] = message.buffer, self._own.buffer(num_pages)
        return buffer

    def read(self, page_ids: Sequence[int], out: Bytes) -> None:
        number, through = self._ask(page_ids, out, to_device=False)
        try:
            self._own.read(page_ids, through)
            out[:, : self._starts[1]] = through
        finally:
            self._wait(number)  # the memory is theirs until they have answered

    def write(self, page_ids: Sequence[int], data: Bytes) -> None:
        self._wait_for_steps()
        number, through = self._ask(page_ids, data, to_device=True)
        try:
            through[:] = data[:, : self._starts[1]]
            self._own.write(page_ids, through)
        finally:
            self._wait(number)

    def _ask(self, page_ids: Sequence[int], rows: Bytes, *, to_device: bool) -> tuple[int, Bytes]:
        buffer, through = self._shared[_address(rows)]
        number = next(self._numbers)
        self._asked[number] = _Asked(self._team.num_ranks - 1)
        self._team.tell(CopyPages(number, buffer, list(page_ids), to_device))
        return number, through[: len(page_ids)]

    def _wait(self, number: int) -> None:
        """Raises `EngineError` where a rank is gone, and `RuntimeError` where one did not copy its part."""
        asked = self._asked[number]
        while not asked.ended.wait(_LOOK_S):
            self._team.check()
        del self._asked[number]
        if asked.failure:
            raise RuntimeError(asked.failure)


def _told(asked: dict[int, _Asked]) -> Callable[[Copied], None]:
    """For the one thread that hears the ranks, which keeps no device alive."""

    def hear(message: Copied) -> None:
        each = asked[message.number]
        each.failure = each.failure or message.failure
        each.num_left -= 1
        if each.num_left == 0:
            each.ended.set()

    return hear


class RankPart:
    """What another rank does of it: copies its parts, in a thread beside its steps."""

    def __init__(self, own: PageCopies, rank: int, say: Callable[[Copied], None]) -> None:
        self._own, self._rank, self._say = own, rank, say
        self._shared: dict[int, tuple[Bytes, Bytes]] = {}
        """By number: this rank's part of each page, and what it copies through."""
        self._copies: queue.SimpleQueue[CopyPages | None] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="pages", daemon=True).start()

    def share(self, message: SharePages) -> None:
        file = os.open(message.path, os.O_RDWR | os.O_CLOEXEC)
        try:
            rows = _mapped(file, message)
        finally:
            os.close(file)
        part = rows[:, message.starts[self._rank] : message.starts[self._rank + 1]]
        self._shared[message.buffer] = part, self._own.buffer(message.num_pages)

    def copy(self, message: CopyPages) -> None:
        """Begins, behind the steps that were launched."""
        self._copies.put(message)

    def stop(self) -> None:
        self._copies.put(None)

    def _run(self) -> None:
        while (message := self._copies.get()) is not None:
            failure = ""
            try:
                self._copy(message)
            except Exception as error:
                failure = f"rank {self._rank}: {type(error).__name__}: {error}"
            self._say(Copied(message.number, failure))

    def _copy(self, message: CopyPages) -> None:
        part, through = (rows[: len(message.page_ids)] for rows in self._shared[message.buffer])
        if message.to_device:
            through[:] = part
            self._own.write(message.page_ids, through)
        else:
            self._own.read(message.page_ids, through)
            part[:] = through


def _mapped(file: int, message: SharePages) -> Bytes:
    """[pages, bytes of all ranks]"""
    width = message.starts[-1]
    memory = mmap.mmap(file, message.num_pages * width, offset=message.offset)
    return np.frombuffer(memory, np.uint8).reshape(message.num_pages, width)


def _address(rows: Bytes) -> int:
    return int(rows.__array_interface__["data"][0])


class Progress:
    """How many steps were told, and how many of them this rank has applied."""

    def __init__(self) -> None:
        self.num_told = self.num_applied = 0

    def wait(self, check: Callable[[], None]) -> None:
        """Until all are applied that are told now."""
        told = self.num_told
        while self.num_applied < told:
            check()
            time.sleep(0.001)
