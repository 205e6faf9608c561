"""GGUF's blocks taken apart by PyTorch, on any device: small integers, and scales and minima of groups of them.

A weight is value * scale + minimum in float32, as ggml's reference computes it. The layouts are those of ggml-common.h
(`block_q4_0` and so on).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ingle.weights import grids
from ingle.weights.code_types import CODE_TYPES, CodeType


class Contents(NamedTuple):
    """The contents of blocks."""

    codes: torch.Tensor
    """uint8 (blocks, n): indices into the type's codebook; or int8, the values themselves."""
    scales: torch.Tensor
    """float32 (blocks, groups), each of n / groups neighbouring codes."""
    minima: torch.Tensor | None = None
    """float32 (blocks, groups)"""


@dataclass(frozen=True)
class CodedBlocks:
    """A block type that consists of codes."""

    type: CodeType
    split: Callable[[torch.Tensor], Contents]
    """uint8 (blocks, bytes of a block) to their contents."""

    def decode(self, blocks: torch.Tensor) -> torch.Tensor:
        """float32 (blocks, n)"""
        codes, scales, minima = self.split(blocks)
        lowest = self.type.codebook[0]
        if self.type.bits > 4:
            values = codes.float()
        elif self.type.codebook == tuple(range(lowest, lowest + 16)):  # cheaper to compute than to look up
            values = codes.float().add_(lowest)
        else:
            table = torch.tensor(self.type.codebook, dtype=torch.float32, device=codes.device)
            values = table.index_select(0, codes.view(-1).int())
        values = values.view(*scales.shape, -1).mul_(scales.unsqueeze(-1))
        return (values if minima is None else values.add_(minima.unsqueeze(-1))).view(len(blocks), -1)


def _float16(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """The scale or minimum at byte `start` of each block: float32 `(blocks, 1)`."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _int8(blocks: torch.Tensor) -> torch.Tensor:
    return blocks.contiguous().view(torch.int8)


def _fields(packed: torch.Tensor, bits: int, width: int) -> torch.Tensor:
    """Unsigned values of `bits` bits out of bytes `(blocks, n)`: uint8 `(blocks, n * 8 / bits)`.

    Each run of `width` bytes gives its lowest bits as a run of `width` values, then the next bits as the next run.
    """
    runs, mask, last = packed.contiguous().view(len(packed), -1, width), (1 << bits) - 1, 8 - bits
    between = [runs >> shift & mask for shift in range(bits, last, bits)]
    return torch.stack([runs & mask, *between, runs >> last], 2).view(len(packed), -1)


def _q4_0(blocks: torch.Tensor) -> Contents:
    return Contents(_fields(blocks[:, 2:], 4, 16), _float16(blocks, 0))


def _q4_1(blocks: torch.Tensor) -> Contents:
    return Contents(_fields(blocks[:, 4:], 4, 16), _float16(blocks, 0), _float16(blocks, 2))


def _q5_0(blocks: torch.Tensor) -> Contents:
    values = _fields(blocks[:, 6:], 4, 16) | _fields(blocks[:, 2:6], 1, 1) << 4
    return Contents(_int8(values) - 16, _float16(blocks, 0))


def _q5_1(blocks: torch.Tensor) -> Contents:
    values = _fields(blocks[:, 8:], 4, 16) | _fields(blocks[:, 4:8], 1, 1) << 4
    return Contents(_int8(values), _float16(blocks, 0), _float16(blocks, 2))


def _q8_0(blocks: torch.Tensor) -> Contents:
    return Contents(_int8(blocks[:, 2:]), _float16(blocks, 0))


def _q2_k(blocks: torch.Tensor) -> Contents:
    scales = (blocks[:, :16] & 15).float().mul_(_float16(blocks, 80))
    minima = (blocks[:, :16] >> 4).float().mul_(_float16(blocks, 82))
    return Contents(_fields(blocks[:, 16:80], 2, 32), scales, minima.neg_())


def _q3_k(blocks: torch.Tensor) -> Contents:
    codes = _fields(blocks[:, 32:96], 2, 32) | _fields(blocks[:, :32], 1, 32) << 2
    return Contents(codes, q3_k_steps(blocks).float().mul_(_float16(blocks, 108)))


def q3_k_steps(blocks: torch.Tensor) -> torch.Tensor:
    """The scales of Q3_K before they are multiplied, int8 `(blocks, 16)`."""
    return _int8(_fields(blocks[:, 96:104], 4, 8) | _fields(blocks[:, 104:108], 2, 4) << 4) - 32


def _q4_k(blocks: torch.Tensor) -> Contents:
    return Contents(_fields(blocks[:, 16:], 4, 32), *_six_bit_scales(blocks))


def _q5_k(blocks: torch.Tensor) -> Contents:
    values = _fields(blocks[:, 48:], 4, 32) | _fields(blocks[:, 16:48], 1, 32) << 4
    return Contents(_int8(values), *_six_bit_scales(blocks))


def _six_bit_scales(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales and minima of Q4_K and Q5_K, float32 `(blocks, 8)` each."""
    scales, minima = six_bit_steps(blocks)
    return scales.float().mul_(_float16(blocks, 0)), minima.float().mul_(_float16(blocks, 2)).neg_()


def six_bit_steps(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same before they are multiplied, uint8: 6 bits each, in the bytes 4 to 16 of a block."""
    first, second, rest = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat((first & 63, rest & 15 | first >> 6 << 4), 1)
    minima = torch.cat((second & 63, rest >> 4 | second >> 6 << 4), 1)
    return scales, minima


def _q6_k(blocks: torch.Tensor) -> Contents:
    values = _fields(blocks[:, :128], 4, 64) | _fields(blocks[:, 128:192], 2, 32) << 4
    return Contents(_int8(values) - 32, _int8(blocks[:, 192:208]).float().mul_(_float16(blocks, 208)))


def _iq4_nl(blocks: torch.Tensor) -> Contents:
    return Contents(_fields(blocks[:, 2:], 4, 16), _float16(blocks, 0))


def _iq4_xs(blocks: torch.Tensor) -> Contents:
    return Contents(_fields(blocks[:, 8:], 4, 16), iq4_xs_steps(blocks).float().mul_(_float16(blocks, 0)))


def iq4_xs_steps(blocks: torch.Tensor) -> torch.Tensor:
    """The scales of IQ4_XS before they are multiplied, int8 `(blocks, 8)`."""
    return _int8(_fields(blocks[:, 4:8], 4, 1) | _fields(blocks[:, 2:4], 2, 1) << 4) - 32


def _iq2_xxs(blocks: torch.Tensor) -> Contents:
    """Of 32 numbers 4 indices of the grid, and a word: 4 sets of signs of 7 bits, and the scale."""
    packed = blocks[:, 2:].view(len(blocks), 8, 8)
    words = _words(packed[:, :, 4:])
    return _of_grid("IQ2_XXS", packed[:, :, :4].int(), _eighth_sign(_sevens(words)), _odd(blocks, words >> 28, 1 / 8))


def _iq2_xs(blocks: torch.Tensor) -> Contents:
    halves = _halves(blocks[:, 2:66])
    signs, scales = _eighth_sign(halves >> 9), _fields(blocks[:, 66:74], 4, 1)
    return _of_grid("IQ2_XS", halves & 511, signs, _odd(blocks, scales, 1 / 8))


def _iq2_s(blocks: torch.Tensor) -> Contents:
    indices = blocks[:, 2:34].int() | _fields(blocks[:, 66:74], 2, 1).int() << 8
    return _of_grid("IQ2_S", indices, blocks[:, 34:66].int(), _odd(blocks, _fields(blocks[:, 74:82], 4, 1), 1 / 8))


def _iq3_xxs(blocks: torch.Tensor) -> Contents:
    words = _words(blocks[:, 66:98].view(len(blocks), 8, 4))
    return _of_grid("IQ3_XXS", blocks[:, 2:66].int(), _eighth_sign(_sevens(words)), _odd(blocks, words >> 28, 1 / 4))


def _iq3_s(blocks: torch.Tensor) -> Contents:
    indices = blocks[:, 2:66].int() | _fields(blocks[:, 66:74], 1, 1).int() << 8
    return _of_grid("IQ3_S", indices, blocks[:, 74:106].int(), _odd(blocks, _fields(blocks[:, 106:110], 4, 1), 1.0))


def _iq1_s(blocks: torch.Tensor) -> Contents:
    """Of 32 numbers a half: 3 upper bits of 4 indices, the scale, and whether an eighth is taken off or added."""
    halves = _halves(blocks[:, 34:50])
    shifts = torch.tensor((0, 3, 6, 9), device=blocks.device)
    indices = blocks[:, 2:34].int() | ((halves.unsqueeze(-1) >> shifts & 7) << 8).view(len(blocks), -1)
    less = (halves >> 15).repeat_interleave(4, 1)
    return _of_grid("IQ1_S", indices, -less, _odd(blocks, halves >> 12 & 7, 1 / 8))


def _iq1_m(blocks: torch.Tensor) -> Contents:
    """The block's scale is in the upper bits of four halves, whose lower ones have steps, each of 16 numbers."""
    upper, halves = _fields(blocks[:, 32:48], 4, 1).int(), _halves(blocks[:, 48:56])
    shifts = torch.tensor((0, 3, 6, 9), device=blocks.device)
    steps = (halves.unsqueeze(-1) >> shifts & 7).view(len(blocks), -1)
    indices = blocks[:, :32].int() | (upper & 7) << 8
    return _of_grid("IQ1_M", indices, -(upper >> 3), (2 * steps + 1).float().mul_(iq1_m_scale(blocks)).mul_(1 / 8))


def iq1_m_scale(blocks: torch.Tensor) -> torch.Tensor:
    """float32 `(blocks, 1)`"""
    halves, nibbles = _halves(blocks[:, 48:56]), torch.tensor((12, 8, 4, 0), device=blocks.device)
    bits = ((halves & 0xF000) >> nibbles).sum(1, dtype=torch.int32).to(torch.int16)
    return bits.view(torch.float16).float().unsqueeze(1)


def _words(groups: torch.Tensor) -> torch.Tensor:
    """int64 [.., n] of 4 bytes each."""
    return groups.clone(memory_format=torch.contiguous_format).view(torch.int32).squeeze(-1).long() & 0xFFFFFFFF


def _halves(packed: torch.Tensor) -> torch.Tensor:
    """int32 [blocks, n] of 2 bytes each."""
    return packed.contiguous().view(torch.int16).int() & 0xFFFF


def _sevens(words: torch.Tensor) -> torch.Tensor:
    """The lowest 28 bits of each word in four."""
    shifts = torch.tensor((0, 7, 14, 21), device=words.device)
    return (words.unsqueeze(-1) >> shifts & 127).view(len(words), -1).int()


def _eighth_sign(signs: torch.Tensor) -> torch.Tensor:
    """Seven signs and an eighth: so that their number is even."""
    parity = signs ^ signs >> 4
    parity = (parity ^ parity >> 2 ^ parity >> 1 ^ parity >> 3) & 1
    return signs | parity << 7


def _odd(blocks: torch.Tensor, steps: torch.Tensor, unit: float) -> torch.Tensor:
    """Scales that are odd multiples of the block's."""
    return (2 * steps.int() + 1).float().mul_(_float16(blocks, 0)).mul_(unit)


def _of_grid(name: str, indices: torch.Tensor, signs: torch.Tensor, scales: torch.Tensor) -> Contents:
    """Codes: magnitudes of the grid's entries and, as their highest bit, signs: a byte has those of 8 numbers."""
    table = torch.from_numpy(grids.magnitudes(name)).to(indices.device)
    codes = table[indices.flatten().long()].view(len(indices), -1)
    bits = torch.arange(8, device=signs.device)
    negative = (signs.unsqueeze(-1) >> bits & 1).view(len(signs), -1).to(torch.uint8)
    return Contents(codes | negative << (3 if name.startswith("IQ3") else 2), scales)


def _tq1_0(blocks: torch.Tensor) -> Contents:
    """Five ternary digits to a byte, as a fraction of 256: the n-th is the carry of `byte * 3**n mod 256` times 3."""
    runs = [(blocks[:, :32], 5), (blocks[:, 32:48], 5), (blocks[:, 48:52], 4)]
    digits = torch.cat([run * 3**power for run, count in runs for power in range(count)], 1)
    return Contents((digits.short() * 3 >> 8).to(torch.uint8), _float16(blocks, 52).repeat(1, 8))


def _tq2_0(blocks: torch.Tensor) -> Contents:
    return Contents(_fields(blocks[:, :64], 2, 32), _float16(blocks, 64).repeat(1, 8))


def _mxfp4(blocks: torch.Tensor) -> Contents:
    """OCP Microscaling: FP4 E2M1 under a power of two. The codebook holds doubled values, so the scale is halved."""
    exponent = blocks[:, :1].int()
    bits = torch.where(exponent < 2, 0x00200000 << exponent, (exponent - 1) << 23)
    return Contents(_fields(blocks[:, 1:], 4, 16), bits.view(torch.float32))


_SPLITS: dict[str, Callable[[torch.Tensor], Contents]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "IQ1_S": _iq1_s,
    "IQ1_M": _iq1_m,
    "IQ2_XXS": _iq2_xxs,
    "IQ2_XS": _iq2_xs,
    "IQ2_S": _iq2_s,
    "IQ3_XXS": _iq3_xxs,
    "IQ3_S": _iq3_s,
    "TQ1_0": _tq1_0,
    "TQ2_0": _tq2_0,
    "MXFP4": _mxfp4,
}
CODED_BLOCKS = {name: CodedBlocks(CODE_TYPES[name], split) for name, split in _SPLITS.items()}
"""By the name of GGUF's block type."""
