"""Routing and experts on the GPU equal the reference; Triton's interpreter runs them where there is no GPU."""

from __future__ import annotations

import pytest
import torch

from ingle.kernels import gpu, reference
from ingle.kernels.flow import ExpertBiases
from ingle.kernels.gpu import moe
from ingle.kernels.options import Activation, RouterConfig
from tests.kernels.interpreted import pairwise
from tests.kernels.test_gpu_kernels import DEVICE, DTYPES, close, randn

ROUTERS = {
    "mixtral": RouterConfig(8, 2, norm_topk_prob=True),
    "qwen": RouterConfig(60, 4),
    "all": RouterConfig(5, 5, norm_topk_prob=True),
    "one": RouterConfig(1, 1),
    "deepseek-v2": RouterConfig(20, 3, num_groups=4, topk_group=2, routed_scaling_factor=16.0),
    "deepseek-v3": RouterConfig(
        32, 6, "sigmoid", norm_topk_prob=True, routed_scaling_factor=2.5, num_groups=8, topk_group=3, group_experts=2
    ),
}


def by_expert(ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The order of a token's experts is open."""
    ordered = ids.sort(dim=-1)
    return ordered.values, weights.gather(1, ordered.indices)


@pytest.mark.parametrize(("name", "num_tokens", "dtype"), pairwise(ROUTERS, [1, 7, 259], DTYPES))
def test_route(name: str, num_tokens: int, dtype: torch.dtype) -> None:
    config = ROUTERS[name]
    # Distinct values in every row, also in 16 bits: which of two equal experts is taken is open.
    logits = torch.stack([torch.randperm(config.num_experts, device=DEVICE) for _ in range(num_tokens)])
    logits = (logits / 8 - 2).to(dtype)
    bias = torch.rand(config.num_experts, device=DEVICE) if config.scoring == "sigmoid" else None
    ours, theirs = (by_expert(*kernel(logits, bias, config)) for kernel in (gpu.route, reference.route))
    assert ours[0].dtype == torch.int32 and torch.equal(ours[0], theirs[0])
    torch.testing.assert_close(ours[1], theirs[1], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ROUTERS)
def test_broken_tokens_choose_experts_that_exist(name: str) -> None:
    config = ROUTERS[name]
    logits = torch.full((4, config.num_experts), torch.nan, device=DEVICE)
    logits[1, 0], logits[2], logits[3, -1] = 0.0, torch.inf, -torch.inf
    bias = torch.zeros(config.num_experts, device=DEVICE) if config.scoring == "sigmoid" else None
    ids, _ = gpu.route(logits, bias, config)
    assert ids.min() >= 0 and ids.max() < config.num_experts
    assert all(len(set(row)) == config.top_k for row in ids.tolist())


def choose(kind: str, num_tokens: int, num_experts: int, top_k: int) -> torch.Tensor:
    """int32 [T, K], distinct in each row."""
    if kind == "same":  # all tokens at the same experts, the others without any
        return torch.randperm(num_experts, device=DEVICE)[:top_k].expand(num_tokens, -1).int().contiguous()
    rows = [torch.randperm(num_experts, device=DEVICE)[:top_k] for _ in range(num_tokens)]
    return torch.stack(rows).int()


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k", "kind", "rows"),
    pairwise(
        [(1, 1, 1), (1, 128, 8), (3, 5, 5), (129, 60, 4), (300, 8, 2), (90, 512, 8)], ["random", "same"], [16, 64]
    ),
)
def test_sort_by_expert(num_tokens: int, num_experts: int, top_k: int, kind: str, rows: int) -> None:
    ids = choose(kind, num_tokens, num_experts, top_k)
    order, blocks = moe.sort_by_expert(ids, num_experts, rows)
    flat = ids.flatten().cpu()
    assert torch.equal(order.cpu().long(), flat.argsort(stable=True))
    seen = []
    for expert, first, end in blocks.tolist():
        if expert < num_experts:
            assert first < end <= first + rows
            assert (flat[order[first:end].cpu().long()] == expert).all()
            seen += range(first, end)
    assert seen == list(range(num_tokens * top_k))


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k", "hidden", "inner", "activation", "kind", "dtype"),
    pairwise(
        [
            (1, 8, 2, 64, 48, "silu"),
            (1, 4, 4, 96, 130, "gelu_tanh"),
            (5, 64, 3, 40, 24, "silu"),  # few pairs among many experts: unsorted
            (8, 64, 3, 40, 24, "silu"),
            (70, 4, 2, 136, 72, "silu"),
            (150, 2, 1, 64, 64, "silu"),
        ],
        ["random", "same"],
        DTYPES,
    ),
)
def test_experts(
    num_tokens: int,
    num_experts: int,
    top_k: int,
    hidden: int,
    inner: int,
    activation: Activation,
    kind: str,
    dtype: torch.dtype,
) -> None:
    x = randn(num_tokens, hidden, dtype=dtype)
    ids = choose(kind, num_tokens, num_experts, top_k)
    weights = torch.rand(num_tokens, top_k, device=DEVICE)
    gate_up = randn(num_experts, 2 * inner, hidden, dtype=dtype) * hidden**-0.5
    down = randn(num_experts, hidden, inner, dtype=dtype) * inner**-0.5
    expected = reference.experts(x.float(), ids, weights, gate_up.float(), down.float(), activation)
    close(gpu.experts(x, ids, weights, gate_up, down, activation).float(), expected, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 40])
def test_biases_and_clamped_gates(num_tokens: int, dtype: torch.dtype) -> None:
    """With gates on both sides of their limits."""
    hidden, inner, num_experts = 40, 24, 5
    x, ids = randn(num_tokens, hidden, dtype=dtype), choose("random", num_tokens, num_experts, 2)
    weights = torch.rand(num_tokens, 2, device=DEVICE)
    gate_up = randn(num_experts, 2 * inner, hidden, dtype=dtype) * hidden**-0.5
    down = randn(num_experts, hidden, inner, dtype=dtype) * inner**-0.5 / 8
    biases = ExpertBiases(randn(num_experts, 2 * inner, dtype=dtype) * 7, randn(num_experts, hidden, dtype=dtype))
    for activation in ("silu", "swiglu_clamped"):
        exact = ExpertBiases(*(each.float() for each in biases))
        expected = reference.experts(x.float(), ids, weights, gate_up.float(), down.float(), activation, exact)
        close(gpu.experts(x, ids, weights, gate_up, down, activation, biases).float(), expected, dtype)


def test_a_token_does_not_depend_on_the_others() -> None:
    """Padding rows and broken ones leave the rest as it is: each row equals the same row alone, bit by bit."""
    x, ids = randn(9, 64), choose("random", 9, 6, 2)  # sorted together, unsorted alone
    weights = torch.rand(9, 2, device=DEVICE)
    gate_up, down = randn(6, 2 * 32, 64), randn(6, 64, 32)
    x[4] = torch.nan
    for activation in ("silu", "swiglu_clamped"):
        together = gpu.experts(x, ids, weights, gate_up, down, activation)
        assert together[4].isnan().all()
        for row in (0, 3, 8):
            alone = gpu.experts(x[row : row + 1], ids[row : row + 1], weights[row : row + 1], gate_up, down, activation)
            assert torch.equal(together[row], alone[0])


def test_tiles_grow_with_the_rows_of_an_expert() -> None:
    assert [moe._tiles(torch.bfloat16, rows).rows for rows in (0.06, 10, 16, 64, 500)] == [16, 16, 32, 64, 128]
