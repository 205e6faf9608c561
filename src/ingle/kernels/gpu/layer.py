"""A layer's operators on a GPU, each by the kernels that suit its rows, types and matrix.

One or two rows go to the CUDA cores (`vector`, `coded_vector`); more become FP8 for matrices that take them so
(`fp8_layer`); else up to 16 go to the tensor cores (`few_rows` on Hopper, and `few_rows_coded`); with more, or with a
matrix of several parts, products stand alone (`products`, `coded`) with plain kernels around them. Each leaves the norm
behind a sum in the form that costs it least, not begun, begun or done, and whatever comes next takes it in any.
"""

from __future__ import annotations

import torch

from ingle.kernels.coded import Coded
from ingle.kernels.flow import Flow, Norm, Projection, Rotation
from ingle.kernels.gpu import coded_vector, few_rows, few_rows_coded, fp8_layer, sums, vector
from ingle.kernels.gpu.elementwise import add_rms_norm, rms_norm, rotate_and_store
from ingle.kernels.group import Group
from ingle.kernels.options import Activation
from ingle.kernels.reference import Composed

_HEAD_DIMS = (32, 64, 128, 256)
"""Of heads whose halves are whole tiles of a product."""
_composed = Composed(rms_norm, add_rms_norm, rotate_and_store)
normed = _composed.normed


def project_and_store(flow: Flow, projection: Projection, rotation: Rotation) -> torch.Tensor:
    """As `ingle.kernels.reference.Composed.project_and_store`."""
    weight, head_dim = _whole(projection), rotation.kv_cache.shape[-1]
    parts, rotates = projection.weight.coded_parts, head_dim in _HEAD_DIMS and rotation.cos_sin.shape[1] == head_dim
    if parts is not None and rotates and coded_vector.suits(flow.residual, parts):
        return coded_vector.project_and_store(*_to_vector(flow), parts, projection.bias, rotation)
    if weight is not None and rotates and vector.suits(flow.residual, weight):
        return vector.project_and_store(*_to_vector(flow), weight, projection.bias, rotation)
    of_fp8 = fp8_layer.takes(flow.residual, projection.weight)
    if of_fp8 is not None:
        return fp8_layer.project_and_store(flow, of_fp8, projection.bias, rotation)
    if parts is not None and rotates and few_rows_coded.suits_heads(flow.residual, parts, rotation):
        return few_rows_coded.project_and_store(flow, parts, projection.bias, rotation)
    if weight is not None and rotates and few_rows.suits(flow.residual, weight):
        return few_rows.project_and_store(flow, weight, projection.bias, rotation)
    return _composed.project_and_store(flow, projection, rotation)


def project_gated(flow: Flow, projection: Projection, activation: Activation) -> torch.Tensor:
    """As `ingle.kernels.reference.Composed.project_gated`."""
    assert activation != "swiglu_clamped", "no MLP has it, but experts alone"
    weight = _whole(projection)
    if weight is not None and vector.suits(flow.residual, weight):
        return vector.gated(*_to_vector(flow), weight, projection.bias, activation)
    of_fp8 = fp8_layer.takes(flow.residual, projection.weight)
    if of_fp8 is not None:
        return fp8_layer.project_gated(flow, of_fp8, projection.bias, activation)
    if weight is not None:
        if isinstance(weight, Coded) and coded_vector.suits(flow.residual, [weight]):
            return coded_vector.gated(*_to_vector(flow), weight, projection.bias, activation)
        if isinstance(weight, Coded) and few_rows_coded.suits(flow.residual, weight):
            return few_rows_coded.gated(flow, weight, projection.bias, activation)
        if few_rows.suits(flow.residual, weight):
            return few_rows.gated(flow, weight, projection.bias, activation)
    return _composed.project_gated(flow, projection, activation)


def project_and_add(
    x: torch.Tensor, projection: Projection, flow: Flow, norm: Norm, post_norm: Norm | None = None
) -> Flow:
    """As `ingle.kernels.reference.Composed.project_and_add`."""
    weight = _whole(projection)
    # A norm behind the product, or a sum over ranks, is of whole rows, and no program has one.
    alone = post_norm is None and projection.group is None
    if weight is not None and alone and vector.suits(x, weight):
        return Flow(vector.add(x, weight, projection.bias, flow.residual), norm)
    of_fp8 = fp8_layer.takes(x, projection.weight)
    if of_fp8 is not None:
        return fp8_layer.project_and_add(x, of_fp8, projection, flow, norm, post_norm)
    if weight is not None and alone:
        if isinstance(weight, Coded) and coded_vector.suits(x, [weight]):
            return Flow(coded_vector.add(x, weight, projection.bias, flow.residual), norm)
        if isinstance(weight, Coded) and few_rows_coded.suits(x, weight):
            return few_rows_coded.add(x, weight, projection.bias, flow.residual, norm)
        if few_rows.suits(x, weight):
            return few_rows.add(x, weight, projection.bias, flow.residual, norm)
    peers = None if projection.group is None else projection.group.peers
    if peers is not None and weight is not None and sums.sends(x, weight, flow.residual, peers):
        values, residual = sums.multiply_add_rms_norm(x, weight, projection.bias, flow.residual, norm, post_norm, peers)
        return Flow(residual, norm, values)
    return add(projection.weight.multiply(x, projection.bias), flow, norm, post_norm, projection.group)


def add(x: torch.Tensor, flow: Flow, norm: Norm, post_norm: Norm | None = None, group: Group | None = None) -> Flow:
    """As `ingle.kernels.reference.Composed.add`."""
    if group is not None and group.peers is not None and sums.suits_rows(x, group.peers):
        values, residual = sums.add_rms_norm(x, flow.residual, norm, post_norm, group.peers)
        return Flow(residual, norm, values)
    return _composed.add(x, flow, norm, post_norm, group)


def gated_mlp(
    flow: Flow,
    gate_up: Projection,
    down: Projection,
    activation: Activation,
    norm: Norm,
    post_norm: Norm | None = None,
) -> Flow:
    """As `ingle.kernels.reference.Composed.gated_mlp`."""
    weight = _whole(gate_up)
    first, second = (fp8_layer.takes(flow.residual, each.weight) for each in (gate_up, down))
    by_vector = weight is not None and vector.suits(flow.residual, weight)
    if first is not None and second is not None and not by_vector:
        rows = fp8_layer.gated_rows(flow, first, gate_up.bias, activation, second)
        return fp8_layer.project_and_add(rows, second, down, flow, norm, post_norm)
    return project_and_add(project_gated(flow, gate_up, activation), down, flow, norm, post_norm)


def _whole(projection: Projection) -> torch.Tensor | Coded | None:
    """Its matrix, where that is held in one way."""
    return projection.weight.plain if projection.weight.coded is None else projection.weight.coded


def _to_vector(flow: Flow) -> tuple[torch.Tensor, Norm | None]:
    """Rows as `vector` takes them, and the norm that is still to be taken of them."""
    if flow.values is None or flow.squares is not None:
        return flow.residual, flow.norm
    return flow.values, None
