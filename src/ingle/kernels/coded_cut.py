"""Slices of matrices of codes that are on a device already, as tensor parallelism takes them.

Those of a quantized folder are better cut before (`ingle.weights.quantized.groups`): then none reads another's.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from ingle.kernels.coded import Coded


def by_rows(coded: Coded, start: int, stop: int) -> Coded:
    """These outputs alone, without a copy."""

    def cut(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor[start:stop]

    return replace(
        coded,
        codes=coded.codes[start:stop],
        scales=coded.scales[start:stop],
        zeros=cut(coded.zeros),
        factors=cut(coded.factors),
        minima=cut(coded.minima),
        minimum_factors=cut(coded.minimum_factors),
    )


def by_columns(coded: Coded, start: int, stop: int) -> Coded:
    """These inputs alone; input `start` is input 0 of the result. Factors are shared by what is left of their groups.

    Raises `ValueError` for columns in an order of their own, of which no range is one of inputs, and for codes of 4
    bits of which an odd one would be left.
    """
    if coded.order is not None:
        raise ValueError("columns in an order of their own are cut as they are read: Groups.columns")
    if not 0 <= start < stop <= coded.num_columns:
        raise ValueError(f"inputs {start} to {stop} are no range of {coded.num_columns}")
    if coded.kind == "int4" and (stop - start) % 2:
        raise ValueError(f"inputs {start} to {stop} leave half a byte")
    size = math.gcd(coded.group_size, start)
    groups = torch.arange(start, stop, size, device=coded.codes.device) // coded.group_size
    wide = coded.group_size * (coded.span or 1)
    keeps_factors = coded.factors is None or (start % wide == 0 and (stop - start) % wide == 0)

    def cut(values: torch.Tensor | None, factors: torch.Tensor | None) -> torch.Tensor | None:
        if values is None:
            return None
        if not keeps_factors and factors is not None:
            values = values.float() * factors.float().repeat_interleave(coded.span, 1)
        return values[:, groups].contiguous()

    def of_wide(factors: torch.Tensor | None) -> torch.Tensor | None:
        return None if factors is None or not keeps_factors else factors[:, start // wide : stop // wide].contiguous()

    scales = cut(coded.scales, coded.factors)
    assert scales is not None
    return Coded.of(
        coded.kind,
        _codes(coded, start, stop),
        scales,
        cut(coded.zeros, None),
        size,
        quantizes_inputs=coded.quantizes_inputs,
        factors=of_wide(coded.factors),
        minima=cut(coded.minima, coded.minimum_factors),
        minimum_factors=of_wide(coded.minimum_factors),
        table=coded.table,
    )


def _codes(coded: Coded, start: int, stop: int) -> torch.Tensor:
    """As `Coded.of` takes them."""
    if coded.kind != "int4":
        return coded.codes[:, start:stop].contiguous()
    blocks = coded.codes.view(coded.num_rows, -1, coded.half)
    whole = torch.stack((blocks & 15, blocks >> 4), 2).view(coded.num_rows, -1)[:, start:stop]
    return whole[:, ::2] | whole[:, 1::2] << 4
