"""Ranks as threads of one process: what each computes of a model, without what brings processes together."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ingle.config import EngineConfig
from ingle.device.torch.device import TorchDevice
from ingle.engine.ranks import share_of
from ingle.engine.startup import ModelFiles
from ingle.model.decoder import Decoder
from ingle.model.load import load_decoder
from ingle.parallel.layout import Layout
from ingle.request import Sampling, token_ids
from ingle.step import Admission, Chunk, Limits, Step
from ingle.weights.formats import PlainFormat

CPU = torch.device("cpu")
_PAGES = 16
"""Of a sequence, in each group of layers."""


@dataclass
class _Meeting:
    """Where threads exchange tensors."""

    size: int
    given: list[torch.Tensor | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.size)
        self.given = [None] * self.size

    def exchange(self, place: int, x: torch.Tensor) -> torch.Tensor:
        self.given[place] = x
        self.barrier.wait(30)
        every = torch.stack(list(self.given))  # type: ignore[arg-type]
        self.barrier.wait(30)
        return every


@dataclass(frozen=True)
class ThreadGroup:
    """An `ingle.kernels.group.Group`."""

    meeting: _Meeting
    place: int
    peers: None = None

    @property
    def size(self) -> int:
        return self.meeting.size

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        assert x.is_contiguous()
        return self.meeting.exchange(self.place, x).sum(0)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return self.meeting.exchange(self.place, x)


def shares(folder: Path, size: int, *, keeps_blocks: bool = False, **options: Any) -> list[Decoder]:
    """A checkpoint as `size` ranks have it; whole, of one."""
    config = EngineConfig.of(str(folder), dtype="float32", device="cpu", **options)
    meeting = _Meeting(size)
    loaded = []
    with closing(ModelFiles.read(config, folder).opened(config)) as opened:
        for place in range(size):
            share = share_of(config, opened, Layout(size).place(place))
            assert share.decoder is not None
            loaded.append(
                load_decoder(
                    share.decoder,
                    share.source,
                    matrices=PlainFormat(torch.float32, CPU, keeps_blocks=keeps_blocks),
                    dtype=torch.float32,
                    device=CPU,
                    max_model_len=256,
                    group=ThreadGroup(meeting, place) if size > 1 else None,
                )
            )
    return loaded


def logits_of(decoders: Sequence[Decoder], prompt: Sequence[int]) -> list[torch.Tensor]:
    """Of one forward by each of them: [len(prompt), vocab]."""
    with ThreadPoolExecutor(len(decoders)) as threads:
        return list(threads.map(lambda decoder: _logits(decoder, prompt), decoders))


@torch.inference_mode()
def _logits(decoder: Decoder, prompt: Sequence[int]) -> torch.Tensor:
    spec = decoder.config.kv_spec("float32")
    num_groups = len(spec.groups)
    limits = Limits(1, len(prompt), 16 * _PAGES, 16, windows=spec.windows)
    device = TorchDevice(decoder, limits, 1 + num_groups * _PAGES, CPU, spec)
    pages = [[1 + group * _PAGES + page for page in range(_PAGES)] for group in range(num_groups)]
    starting = Admission(0, token_ids(prompt), len(prompt), pages, Sampling(temperature=0.0), 0, ())
    step = Step([starting], chunks=[Chunk(0, 0, len(prompt), True)], num_tokens=len(prompt))
    device.apply(step)
    return decoder.logits(decoder.forward(device.tables.batch_of(step), device.kv_cache))
