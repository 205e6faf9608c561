"""A step as tensors: what kernels are given."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from ingle.kv import KvSpec

if TYPE_CHECKING:
    from ingle.step import Chunk


CODE_TYPES = {"int8": torch.int8, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
"""Of each of `ingle.kv.CODES`, as PyTorch has it."""


def query_block(dim: int) -> int:
    """Query tokens of one prompt chunk that one program of the GPU's attention kernel handles, for a cache's `dim`."""
    return 128 if 128 < dim <= 256 else 64


@dataclass(frozen=True, slots=True)
class DecodeWork:
    """The keys that decoding sequences see in equal shares, as a GPU's attention kernel goes through them."""

    starts: torch.Tensor
    """int32 [N, 4]: of each share the sequence and the key it begins with, and that sequence's slot and length. Only
    as many rows are written as there are iterations."""
    num_iterations: torch.Tensor
    """int64 [1]: over all sequences, each of which reads some keys of one of them."""
    arrived: torch.Tensor
    """int32 [B, Hkv], zeros: how many shares of a sequence are done, while a kernel runs."""


class StepInputs(NamedTuple):
    """All that a step brings to the device, int64. Padding belongs to the padding slot, or counts nothing."""

    row_slots: torch.Tensor
    """[T], each token's sequence, as its slot."""
    positions: torch.Tensor
    """[T], of each token in its sequence."""
    slots: torch.Tensor
    """[B], decoding sequences first."""
    kv_lengths: torch.Tensor
    """[B], tokens of each sequence that its last token attends to, itself included."""
    decode_lengths: torch.Tensor
    """[B], the same for decoding sequences, which come first, and 0 for others."""
    query_starts: torch.Tensor
    """[B + 1], each sequence's first row in T."""
    query_blocks: torch.Tensor
    """[2 N], for each block of prompt tokens its sequence in [0, B) and its first row in T."""
    num_query_blocks: torch.Tensor
    """[1]"""
    sample_rows: torch.Tensor
    """[R], rows of T whose next token is drawn."""
    sample_slots: torch.Tensor
    """[R]"""
    sample_positions: torch.Tensor
    """[R], of the tokens to be drawn."""


@dataclass(slots=True)
class Batch:
    """T tokens of B sequences, as the layers of one group see them (`ingle.kv`): decoding sequences, with one token
    each, come first. Index tensors are int64."""

    inputs: StepInputs
    token_ids: torch.Tensor
    """[T]"""
    all_kv_places: tuple[torch.Tensor, ...]
    """Of each group [T], where each token's key and value go: page * page_size + offset."""
    all_page_tables: tuple[torch.Tensor, ...]
    """Of each group int32 [S, P], the pages of every slot."""
    num_decodes: int
    """Decoding sequences; in a captured step, at most so many."""
    num_blocks: int
    """Blocks of prompt tokens, `query_block` of them in each; in a captured step, at most so many."""
    chunks: list[Chunk]
    """Of the step, one a sequence; empty in a captured one."""
    most_keys: int = 0
    """That a lone decoding sequence has, where that is known of a captured step."""
    decode_work: dict[int | None, DecodeWork] = field(default_factory=dict)
    """By window: made by the first layer that has it, for all that do, of any group. Their caches are alike."""
    group: int = 0

    @property
    def kv_places(self) -> torch.Tensor:
        """[T], of this group."""
        return self.all_kv_places[self.group]

    @property
    def page_tables(self) -> torch.Tensor:
        """int32 [S, P], of this group."""
        return self.all_page_tables[self.group]

    def of_group(self, group: int) -> Batch:
        """The same step for layers of another group."""
        return self if group == self.group else replace(self, group=group)


@dataclass(frozen=True, slots=True)
class KvCache:
    """What all layers keep of earlier tokens."""

    spec: KvSpec
    pages: torch.Tensor
    """[places, sides, num_pages, page_size, heads, dim]. Of codes, numbers i and i + dim / 2 lie side by side: they are
    read as one number of 16 bits, whose halves lie in two tiles of columns."""
    scales: torch.Tensor | None
    """float32 [places, sides, num_pages, heads, page_size], what codes are multiplied by."""
    raw: torch.Tensor
    """uint8 [places, sides, num_pages, bytes], zeros at first: what both are views of."""

    @classmethod
    def over(cls, spec: KvSpec, raw: torch.Tensor, page_size: int) -> KvCache:
        """In the zeros `raw`, [places, sides, num_pages, spec.side_bytes(page_size)]."""
        shape = (page_size, spec.heads, spec.dim)
        if not spec.is_coded:
            return cls(spec, raw.view(getattr(torch, spec.dtype)).view(*raw.shape[:-1], *shape), None, raw)
        # What one program reads, a head's tokens, lies together: rows of codes are too short to be fetched one by one.
        num_codes, by_head = math.prod(shape), (spec.heads, page_size, spec.dim)
        pages = raw[..., :num_codes].view(CODE_TYPES[spec.dtype]).view(*raw.shape[:-1], *by_head)
        scales = raw[..., num_codes:].view(torch.float32).view(*raw.shape[:-1], *by_head[:2])
        return cls(spec, pages.transpose(-2, -3), scales, raw)

    def of_layer(self, layer: int, batch: Batch) -> tuple[torch.Tensor, Batch, torch.Tensor | None]:
        """A layer's part, [sides, num_pages, page_size, heads, dim], the step as this layer sees it, and its scales."""
        group, place = self.spec.located[layer]
        return self.pages[place], batch.of_group(group), None if self.scales is None else self.scales[place]
