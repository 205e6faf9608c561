"""A layer's operators over many rows, where tensor cores multiply FP8 by FP8: rows become FP8 as they are made.

So a layer is its four products, and the kernels that there would be without FP8: rotation, attention, sums with norms,
activation. Only what attention gives becomes FP8 by a kernel of its own, for no program of attention has a whole row.
"""

from __future__ import annotations

import torch

from ingle.kernels.coded import Coded
from ingle.kernels.flow import Flow, Matrix, Norm, Projection, Quantized, Rotation
from ingle.kernels.gpu import elementwise, fp8, fp8_rows
from ingle.kernels.gpu.scaled import Product
from ingle.kernels.options import Activation


def takes(rows: torch.Tensor, matrix: Matrix | None) -> Coded | None:
    """The matrix, where as many rows as these are to come in FP8."""
    coded = None if matrix is None or not fp8.FUSED else matrix.coded
    return coded if coded is not None and fp8.suits(rows, coded) else None


def project_and_store(flow: Flow, coded: Coded, bias: torch.Tensor | None, rotation: Rotation) -> torch.Tensor:
    """As `ingle.kernels.reference.Composed.project_and_store`."""
    product = fp8.product(_normed(flow, coded), coded, bias, flow.residual.dtype)
    return elementwise.rotate_product(product, flow.residual.dtype, rotation)


def project_gated(flow: Flow, coded: Coded, bias: torch.Tensor | None, activation: Activation) -> torch.Tensor:
    """As `ingle.kernels.reference.Composed.project_gated`."""
    return elementwise.gated(_of_norm(flow, coded, bias), activation)


def gated_rows(flow: Flow, coded: Coded, bias: torch.Tensor | None, activation: Activation, down: Coded) -> Quantized:
    """The same, as the matrix `down` takes it."""
    product = fp8.product(_normed(flow, coded), coded, bias, flow.residual.dtype)
    return fp8_rows.gated(product, flow.residual, activation, fp8.group_of(down))


def project_and_add(
    x: torch.Tensor | Quantized, coded: Coded, projection: Projection, flow: Flow, norm: Norm, post_norm: Norm | None
) -> Flow:
    """As `ingle.kernels.reference.Composed.project_and_add`, of a projection whose matrix is `coded`."""
    dtype = flow.residual.dtype
    rows = x if isinstance(x, Quantized) else fp8_rows.quantize(x, fp8.group_of(coded))
    product = fp8.product(rows, coded, projection.bias, dtype)
    if projection.group is not None:
        product = Product(projection.group.all_reduce(fp8.finished(product, dtype)))
    behind = takes(flow.residual, norm.before)
    if behind is None:
        post_weight = None if post_norm is None else post_norm.weight
        done = fp8.finished(product, dtype)
        values, residual = elementwise.add_rms_norm(done, flow.residual, norm.weight, norm.eps, post_weight)
        return Flow(residual, norm, values)
    group = fp8.group_of(behind)
    quantized = fp8_rows.add_normed(product, flow.residual, norm, post_norm, group)
    return Flow(flow.residual, norm, quantized=quantized)


def _of_norm(flow: Flow, coded: Coded, bias: torch.Tensor | None) -> torch.Tensor:
    """The product of the normed rows."""
    dtype = flow.residual.dtype
    return fp8.finished(fp8.product(_normed(flow, coded), coded, bias, dtype), dtype)


def _normed(flow: Flow, coded: Coded) -> Quantized:
    if flow.quantized is not None:
        return flow.quantized
    if flow.values is not None and flow.squares is None:
        return fp8_rows.quantize(flow.values, fp8.group_of(coded))
    return fp8_rows.normed_rows(flow.residual, flow.norm, fp8.group_of(coded))
