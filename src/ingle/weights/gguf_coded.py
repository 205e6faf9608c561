"""GGUF's blocks as codes with scales for products on a GPU: what blocks consist of, apart from each other, no less.

A type is a row of `TYPES`. Codes of 2, 3, 5 and 6 bits are in planes of as many bits, so that a number takes no more
room than in the file; ternary digits take 2 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ingle.kernels.coded import MIDDLE, Coded, CodedKind
from ingle.weights import codes
from ingle.weights.code_types import CODE_TYPES, GRIDS
from ingle.weights.gguf import BLOCK_TYPES
from ingle.weights.source import StoredRows

_BLOCK_BYTES = {block.name: block.nbytes for block in BLOCK_TYPES.values()}


@dataclass(frozen=True)
class _Contents:
    """Of blocks, each tensor [blocks, n]."""

    codes: torch.Tensor
    """uint8, or int8 where they have signs."""
    scales: torch.Tensor
    factors: torch.Tensor | None = None
    minima: torch.Tensor | None = None
    minimum_factors: torch.Tensor | None = None


@dataclass(frozen=True)
class _Type:
    kind: CodedKind
    take: Callable[[torch.Tensor], _Contents]
    lowest: int = 0
    """What the code 0 stands for, of codes without signs."""
    shares_bytes: bool = False
    """As `Coded` has it."""
    looks_up: bool = False
    """Codes stand for the numbers of their type's codebook."""


def _simple(name: str) -> Callable[[torch.Tensor], _Contents]:
    """Of a type whose blocks have a scale, and maybe a minimum, of float16."""

    def take(blocks: torch.Tensor) -> _Contents:
        held = codes.CODED_BLOCKS[name].split(blocks)
        return _Contents(held.codes, held.scales.half(), minima=None if held.minima is None else held.minima.half())

    return take


def _half(blocks: torch.Tensor, start: int) -> torch.Tensor:
    return blocks[:, start : start + 2].contiguous().view(torch.float16)


def _q2_k(blocks: torch.Tensor) -> _Contents:
    held = codes.CODED_BLOCKS["Q2_K"].split(blocks)
    return _Contents(held.codes, blocks[:, :16].contiguous(), _half(blocks, 80), minimum_factors=-_half(blocks, 82))


def _q3_k(blocks: torch.Tensor) -> _Contents:
    held = codes.CODED_BLOCKS["Q3_K"].split(blocks)
    return _Contents(held.codes, codes.q3_k_steps(blocks), _half(blocks, 108))


def _six_bit(name: str) -> Callable[[torch.Tensor], _Contents]:
    def take(blocks: torch.Tensor) -> _Contents:
        scales, minima = codes.six_bit_steps(blocks)
        held = codes.CODED_BLOCKS[name].split(blocks)
        return _Contents(held.codes.view(torch.uint8), scales, _half(blocks, 0), minima, -_half(blocks, 2))

    return take


def _q6_k(blocks: torch.Tensor) -> _Contents:
    held = codes.CODED_BLOCKS["Q6_K"].split(blocks)
    return _Contents(held.codes, blocks[:, 192:208].contiguous().view(torch.int8), _half(blocks, 208))


def _iq4_xs(blocks: torch.Tensor) -> _Contents:
    held = codes.CODED_BLOCKS["IQ4_XS"].split(blocks)
    return _Contents(held.codes, codes.iq4_xs_steps(blocks), _half(blocks, 0))


def _ternary(name: str) -> Callable[[torch.Tensor], _Contents]:
    def take(blocks: torch.Tensor) -> _Contents:
        held = codes.CODED_BLOCKS[name].split(blocks)
        return _Contents(held.codes, held.scales[:, :1].half())

    return take


def _mxfp4(blocks: torch.Tensor) -> _Contents:
    held = codes.CODED_BLOCKS["MXFP4"].split(blocks)
    return _Contents(held.codes, held.scales.bfloat16())  # which has every power of two that they are


def _of_grid(name: str) -> Callable[[torch.Tensor], _Contents]:
    def take(blocks: torch.Tensor) -> _Contents:
        held = codes.CODED_BLOCKS[name].split(blocks)
        scale = codes.iq1_m_scale(blocks) if name == "IQ1_M" else _half(blocks, 0).float()
        factors = scale * CODE_TYPES[name].unit
        steps = (held.scales / factors).nan_to_num_(1, 1, 1)  # odd numbers up to 31, exactly
        return _Contents(held.codes, steps.to(torch.uint8), factors)

    return take


TYPES = {
    "Q4_0": _Type("int4", _simple("Q4_0"), -8),
    "Q4_1": _Type("int4", _simple("Q4_1")),
    "Q5_0": _Type("int5", _simple("Q5_0")),
    "Q5_1": _Type("int5", _simple("Q5_1")),
    "Q8_0": _Type("int8", _simple("Q8_0")),
    "Q2_K": _Type("int2", _q2_k, shares_bytes=True),
    "Q3_K": _Type("int3", _q3_k, -4),
    "Q4_K": _Type("int4", _six_bit("Q4_K")),
    "Q5_K": _Type("int5", _six_bit("Q5_K")),
    "Q6_K": _Type("int6", _q6_k),
    "IQ4_NL": _Type("int4", _simple("IQ4_NL"), looks_up=True),
    "IQ4_XS": _Type("int4", _iq4_xs, looks_up=True),
    **{name: _Type("int4", _of_grid(name), looks_up=True) for name in GRIDS},
    "TQ1_0": _Type("int2", _ternary("TQ1_0"), -1),
    "TQ2_0": _Type("int2", _ternary("TQ2_0"), -1),
    "MXFP4": _Type("int4", _mxfp4, looks_up=True),
}
"""By the names of GGUF's block types."""


def coded_of(rows: StoredRows, device: torch.device) -> Coded:
    """Of a type in `TYPES`."""
    kind, num_rows = TYPES[rows.type], len(rows.data)
    data = rows.data.copy() if rows.order is None else rows.data[rows.order]
    held = kind.take(torch.from_numpy(data).to(device).view(-1, _BLOCK_BYTES[rows.type]))
    size = held.codes.shape[1] // held.scales.shape[1]

    def of_rows(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.reshape(num_rows, -1)

    codebook = CODE_TYPES[rows.type].codebook
    return Coded(
        kind.kind,
        _without_signs(held, kind).reshape(num_rows, -1),
        held.scales.reshape(num_rows, -1),
        None,
        size,
        half=1,
        factors=of_rows(held.factors),
        minima=of_rows(held.minima),
        minimum_factors=of_rows(held.minimum_factors),
        shares_bytes=kind.shares_bytes,
        table=torch.tensor(codebook, dtype=torch.int8, device=device) if kind.looks_up else None,
        is_e2m1=rows.type == "MXFP4" and bool((held.scales <= 1).all()),
    ).into_planes()


def _without_signs(held: _Contents, kind: _Type) -> torch.Tensor:
    """uint8: codes whose zero is the middle, or which have none beside minima, or are looked up."""
    stored = held.codes
    if held.minima is not None or kind.shares_bytes or kind.looks_up:
        return stored.view(torch.uint8)
    middle = MIDDLE[kind.kind]
    has_signs = stored.dtype == torch.int8
    return stored.view(torch.uint8) + middle if has_signs else stored + (middle + kind.lowest)
