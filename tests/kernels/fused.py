"""What the tests of fused products share: inputs, and the plain operators in float32 as the answer."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ingle.kernels import reference
from ingle.kernels.flow import Rotation

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
# The interpreter multiplies bfloat16 wrongly.
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
TOLERANCE = 1e-2 if ON_GPU else 1e-6
EPS = 1e-6


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(DTYPE)


def weights(num_rows: int, size_in: int) -> torch.Tensor:
    return (torch.randn(num_rows, size_in, device=DEVICE) / size_in**0.5).to(DTYPE)


def norm_weight(size: int) -> torch.Tensor:
    return (torch.rand(size, device=DEVICE) + 0.5).to(DTYPE)


def close(ours: torch.Tensor, exact: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    error = (ours.float() - exact).norm() / exact.norm()
    assert error < tolerance, f"off by {float(error):.1e} of the norm"  # also where an element was not written: NaN


def check_projection(
    project: Callable[[torch.Tensor, torch.Tensor, Rotation], torch.Tensor],
    normed: torch.Tensor,
    head_dim: int,
    *,
    rotary_dim: int | None = None,
    qk_norm: bool,
    weight: torch.Tensor | None = None,
    tolerance: float = TOLERANCE,
) -> None:
    """`project` is given weight, bias and rotation, and returns the queries of the rows `normed`."""
    heads, kv_heads = 4, 2
    num_rows, num_outs = len(normed), (heads + 2 * kv_heads) * head_dim
    weight = weights(num_outs, normed.shape[1]) if weight is None else weight
    bias = randn(num_outs)
    angles = torch.randn(num_rows, (rotary_dim or head_dim) // 2, device=DEVICE)
    cos_sin = torch.cat((angles.cos(), angles.sin()), -1)
    norms = [norm_weight(head_dim) if qk_norm else None for _ in range(2)]
    slots = torch.randperm(96, device=DEVICE)[:num_rows]
    cache = torch.zeros(2, 12, 8, kv_heads, head_dim, dtype=DTYPE, device=DEVICE)
    exact_cache = cache.float()
    q = project(weight, bias, Rotation(heads, cos_sin, *norms, EPS, cache, slots))
    exact = reference.rotate_and_store(
        normed @ weight.float().T + bias.float(), heads, cos_sin,
        *[norm if norm is None else norm.float() for norm in norms], EPS, exact_cache, slots,
    )  # fmt: skip
    close(q, exact, tolerance)
    close(cache, exact_cache, tolerance)
