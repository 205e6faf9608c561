"""The experts of a mixture as codes with scales, from GGUF's blocks or from a quantized folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from ingle.errors import ModelError
from ingle.kernels.coded import PLANES_BLOCK, Coded
from ingle.weights import gguf_coded
from ingle.weights.coded_part import in_planes, kind_of, suits_planes
from ingle.weights.experts import CodedExperts
from ingle.weights.quantized.groups import Groups
from ingle.weights.source import ExpertNames, StoredRows, WeightSource, check_sizes

_ALTERNATIVE = "run it on a CPU by ingle's kernels, or take another quantization of this model"


class _Role(NamedTuple):
    """What a matrix of an expert is, such as its gate: the same matrix of all experts."""

    names: list[str]
    num_rows: int
    num_columns: int


def _roles(names: Sequence[ExpertNames], hidden_size: int, intermediate_size: int) -> list[_Role]:
    """Those that make gate and up, then down."""
    count = len(names[0].gate_up)
    size = 2 * intermediate_size // count
    firsts = [_Role([expert.gate_up[i] for expert in names], size, hidden_size) for i in range(count)]
    return [*firsts, _Role([expert.down for expert in names], hidden_size, intermediate_size)]


def load_blocks(
    source: WeightSource,
    names: Sequence[ExpertNames],
    hidden_size: int,
    intermediate_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> CodedExperts | None:
    """Of a GGUF file; None where their types are floats, or those of different experts differ."""
    stored: list[list[StoredRows]] = []
    for role in _roles(names, hidden_size, intermediate_size):
        check_sizes(source, role.names, [role.num_rows * role.num_columns] * len(role.names))
        stored.append([source.stored_rows(name, role.num_rows, role.num_columns) for name in role.names])
    types = [{rows.type for rows in of_role} for of_role in stored]
    if any(len(each) > 1 or not each <= gguf_coded.TYPES.keys() for each in types):
        return None

    def coded(*roles: Sequence[StoredRows]) -> Coded:
        """Of each expert one role after the other."""
        data = np.concatenate([rows.data for of_expert in zip(*roles, strict=True) for rows in of_expert])
        return gguf_coded.coded_of(StoredRows(roles[0][0].type, data), device)

    *gate_up, down = stored
    alike = all(each == types[0] for each in types[:-1])
    return CodedExperts((coded(*gate_up),) if alike else tuple(map(coded, gate_up)), coded(down), dtype)


def load_groups(
    source: WeightSource,
    names: Sequence[ExpertNames],
    hidden_size: int,
    intermediate_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> CodedExperts:
    """Of a folder of which some expert is quantized.

    Raises `ModelError` where some are not, or otherwise, or in groups that tiles of weights cannot be cut into.
    """
    coded: list[Coded] = []
    for role in _roles(names, hidden_size, intermediate_size):
        plain = next((name for name in role.names if not source.is_coded(name)), None)
        if plain is not None:
            raise ModelError(
                f"{plain} is an expert's, and not quantized as others are: on a GPU all experts of a layer have to be",
                alternative=_ALTERNATIVE,
            )
        stored = [source.groups(name, role.num_rows, role.num_columns) for name in role.names]
        coded.append(_joined(role, stored, device))
    *gate_up, down = coded
    return CodedExperts(_one_below_the_other(gate_up, len(names)), down, dtype)


def _one_below_the_other(gate_up: Sequence[Coded], num_experts: int) -> tuple[Coded, ...]:
    """Of each expert its gate and its up projection in one matrix, of E2M1."""
    if len(gate_up) < 2 or not all(each.is_e2m1 for each in gate_up):
        return tuple(gate_up)

    def joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.cat([each.view(num_experts, -1, each.shape[1]) for each in tensors], 1).flatten(0, 1)

    codes, scales = joined([each.codes for each in gate_up]), joined([each.scales for each in gate_up])
    return (replace(gate_up[0], codes=codes, scales=scales),)


def _joined(role: _Role, stored: Sequence[Groups], device: torch.device) -> Coded:
    first = stored[0]
    for name, groups in zip(role.names, stored, strict=True):
        if kind_of(groups)[:-1] != kind_of(first)[:-1] or (groups.order is None) != (first.order is None):
            raise ModelError(
                f"{name} is quantized otherwise than {role.names[0]}: on a GPU experts of a layer have to be alike",
                alternative=_ALTERNATIVE,
            )
    if not suits_planes(first):
        raise ModelError(
            f"{role.names[0]} has {first.num_columns} inputs in groups of {first.group_size}: on a GPU those of "
            f"experts have to be multiples of {PLANES_BLOCK}",
            alternative=_ALTERNATIVE,
        )
    return in_planes(stored, device, orders=True)
