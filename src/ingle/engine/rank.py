"""The process of any rank but the first: `ingle.parallel.team` has it started, and it does as it is told until that
ends."""

from __future__ import annotations

import contextlib
import gc
import os
import select
import socket
import sys
import threading
import traceback
from collections import deque
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol

from ingle.engine.child import end_with
from ingle.engine.own_files import own_files
from ingle.errors import IngleError, lack_of_memory, lack_of_package
from ingle.parallel.hosts import QUIET, Meeting
from ingle.parallel.layout import Layout
from ingle.parallel.messages import (
    Alive,
    Capture,
    CopyPages,
    Draw,
    FromRank,
    Imported,
    Join,
    Joined,
    Load,
    Loaded,
    Logits,
    RankFailed,
    Relieve,
    SharePages,
    ToRanks,
    said,
    to_ranks_decoder,
)
from ingle.parallel.reach import OF_A_RANK, SECRET_BYTES, Caller, Receiver, reach
from ingle.parallel.ring import Reader
from ingle.step import Masks, Step

if TYPE_CHECKING:
    from ingle.device import Device, Launched
    from ingle.parallel.group import Member
    from ingle.parallel.pages import RankPart

_BEAT_S = 0.5
_LOOK_S = 10.0
_REACH_S = 30.0
_KEPT = 4
"""Steps whose results are kept: more than are ever in flight."""


class _Voice:
    """Says what is, and that this process lives. Ends it when rank 0 has gone."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._saying = threading.Lock()

    def say(self, message: FromRank) -> None:
        with self._saying, contextlib.suppress(OSError):
            self._socket.sendall(said(message))

    def beat(self) -> None:
        while True:
            self.say(Alive())
            ready, _, _ = select.select([self._socket], [], [], _BEAT_S)
            if ready:  # nothing is ever sent: it is the end
                os._exit(1)


class _Ear(Protocol):
    """By which it is told."""

    def receive(self, timeout_s: float) -> bytes | None: ...


class _Ways(NamedTuple):
    """To rank 0 and from it."""

    control: socket.socket
    ear: _Ear
    rendezvous: int = -1


def main() -> int:
    how, *given = sys.argv[1:-2]
    parent, rank = map(int, sys.argv[-2:])
    end_with(parent)
    try:
        ways = _reached(given[0], int(given[1]), rank) if how == "reach" else _handed(*map(int, given))
    except IngleError as error:
        print(f"rank {rank}: {error}", file=sys.stderr)
        return 1
    voice = _Voice(ways.control)
    threading.Thread(target=voice.beat, name="beats", daemon=True).start()
    try:
        import torch  # noqa: F401  while rank 0 does so too

        voice.say(Imported())
        _Rank(rank, ways.rendezvous, voice).follow(_messages(ways.ear))
    except IngleError as error:
        voice.say(RankFailed(str(error), expected=True))
    except Exception as error:
        lack = lack_of_memory(error) or lack_of_package(error)
        voice.say(RankFailed(traceback.format_exc() if lack is None else str(lack), expected=lack is not None))
    # Not by tidying up: process groups, ended as the interpreter does, wait for ranks that are gone, or abort it.
    sys.stderr.flush()
    os._exit(1)


def _handed(control: int, ring: int, rendezvous: int, num_readers: int, index: int) -> _Ways:
    """Of a rank on the same machine, whose descriptors they are."""
    return _Ways(socket.socket(fileno=control), Reader(ring, num_readers, index), rendezvous)


def _reached(host: str, port: int, rank: int) -> _Ways:
    """Of one on another. What it proves itself by comes on standard input, which nobody else sees."""
    secret = sys.stdin.buffer.read(SECRET_BYTES)
    os.environ.setdefault(*QUIET)
    words, steps = (reach((host, port), secret, Caller(rank, role), _REACH_S) for role in OF_A_RANK)
    return _Ways(words, Receiver(steps))


def _messages(ear: _Ear) -> Iterator[ToRanks]:
    decoder = to_ranks_decoder()
    while True:
        message = ear.receive(_LOOK_S)
        if message is not None:
            yield decoder.decode(message)


class _Rank:
    def __init__(self, rank: int, rendezvous: int, voice: _Voice) -> None:
        self._rank, self._rendezvous, self._voice = rank, rendezvous, voice
        self._member: Member | None = None
        self._device: Device | None = None
        self._launched: deque[Launched] = deque(maxlen=_KEPT)
        self._pages: RankPart | None = None

    def follow(self, messages: Iterator[ToRanks]) -> None:
        for message in messages:
            match message:
                case Step():
                    self._step(message)
                case Draw(masks):
                    self._draw(masks)
                case Logits(start, stop):
                    if self._draws:
                        self._launched[-1].logits(start, stop)
                case Capture():
                    self.device.capture_next()
                case Relieve():
                    self.device.relieve()
                case SharePages():
                    self._share_pages(message)
                case CopyPages():
                    assert self._pages is not None, "pages are shared before they are copied"
                    self._pages.copy(message)
                case Load():
                    self._load(message)
                case Join():
                    self._join(message)

    @property
    def device(self) -> Device:
        assert self._device is not None, "a model is loaded first"
        return self._device

    def _step(self, step: Step) -> None:
        self.device.apply(step)
        self._launched.append(self.device.forward(step))
        if not step.masked:
            self._draw(Masks())

    @property
    def _draws(self) -> bool:
        return self._member is not None and self._member.place.is_last

    def _draw(self, masks: Masks) -> None:
        if self._draws:
            words = memoryview(bytearray(masks.words))  # PyTorch wants what it could write to
            self._launched[-1].sample(Masks(masks.slots, words))

    def _share_pages(self, message: SharePages) -> None:
        if self._pages is None:
            from ingle.parallel.pages import RankPart

            self._pages = RankPart(self.device.pages(), self._rank, self._voice.say)
        self._pages.share(message)

    def _join(self, join: Join) -> None:
        import torch

        from ingle.engine.ranks import ready_to_load
        from ingle.parallel import group

        place = Layout(join.tensor, join.pipeline).place(self._rank)
        device = torch.device(join.devices[self._rank])
        meeting = Meeting(self._rendezvous, tuple(join.hosts), join.port)
        ready = partial(ready_to_load, device.type)
        self._member = group.join(place, device, join.backend, meeting, own_kernels=join.own_kernels, meanwhile=ready)
        self._voice.say(Joined())

    def _load(self, load: Load) -> None:
        from ingle.engine.ranks import share_of
        from ingle.engine.startup import ModelFiles, Startup
        from ingle.engine.torch_build import TorchRunner

        member = self._member
        assert member is not None, "ranks join before they load"
        if self._pages is not None:
            self._pages.stop()
        self._device = self._pages = None
        self._launched.clear()
        config = load.config
        path = own_files(load.path, config.model, load.digest)
        opened = ModelFiles.read(config, path).opened(config)
        with contextlib.closing(opened):
            runner = TorchRunner(config, member.device.type, our_kernels=False, member=member)
            share = share_of(config, opened, member.place)
            _, loaded = runner.load(share, Startup(lambda stage: None))
        self._device = loaded.device
        gc.freeze()
        gc.enable()
        sizes = loaded.facts.weights
        experts = 0 if sizes.mixture is None else sizes.mixture.num_bytes
        page_bytes = loaded.facts.kv.page_bytes(loaded.memory.limits.page_size)
        self._voice.say(Loaded(sizes.total[1], sizes.head[1], sizes.looked_up[1], experts, page_bytes))
