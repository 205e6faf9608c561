"""Experts of codes on the GPU equal the reference, and that the decoded ones; the interpreter runs them elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ingle.kernels import gpu, reference
from ingle.kernels.coded import Coded, CodedKind
from ingle.kernels.flow import ExpertBiases
from ingle.kernels.gpu import moe_coded_vector
from ingle.weights.coded_part import in_planes
from ingle.weights.gguf_coded import coded_of
from ingle.weights.quantized.groups import Groups
from ingle.weights.source import StoredRows
from tests.kernels.fused import DEVICE, ON_GPU
from tests.kernels.test_moe import choose
from tests.weights.gguf_blocks import random_blocks

DTYPE = torch.bfloat16 if ON_GPU else torch.float16
HIDDEN, INNER, EXPERTS = 256, 32, 3


def folder(kind: CodedKind, num_rows: int, num_columns: int, *, zeros: bool = False, order: bool = False) -> Coded:
    largest = 16 if kind == "int4" else 100
    codes = torch.randint(0, largest, (num_rows, num_columns), dtype=torch.uint8, device=DEVICE)
    groups = num_columns // 32
    scales = (torch.rand(num_rows, groups, device=DEVICE) + 0.5) / largest / 16
    some = torch.randint(0, largest, (num_rows, groups), dtype=torch.uint8, device=DEVICE) if zeros else None
    orders = torch.stack([torch.randperm(num_columns, device=DEVICE) for _ in range(EXPERTS)]) if order else None
    return Coded(kind, codes, scales.half(), some, 32, 1, orders).into_planes()


def mxfp4(num_rows: int, num_columns: int) -> Coded:
    codes = torch.randint(256, (num_rows, num_columns // 2), dtype=torch.uint8).numpy()
    scales = torch.exp2(torch.randint(-7, -3, (num_rows, num_columns // 32)).float()).numpy()
    groups = Groups("int4", codes, scales, None, 32, True, table="mxfp4")
    coded = in_planes([groups], DEVICE, orders=True)
    assert coded.is_e2m1 and np.array_equal(coded.decoded(slice(None), torch.float32).cpu().numpy(), groups.decoded())
    return coded


def blocks(kind: str, num_rows: int, num_columns: int) -> Coded:
    return coded_of(StoredRows(kind, random_blocks(kind, num_rows, num_columns, std=num_columns**-0.5)), DEVICE)


MIXTURES = {
    "Q4_K and Q6_K": lambda: ((blocks("Q4_K", EXPERTS * 2 * INNER, HIDDEN),), blocks("Q5_0", EXPERTS * HIDDEN, INNER)),
    "gate and up apart": lambda: (
        (blocks("Q6_K", EXPERTS * INNER, HIDDEN), blocks("IQ4_NL", EXPERTS * INNER, HIDDEN)),
        blocks("Q8_0", EXPERTS * HIDDEN, INNER),
    ),
    "int4 by order": lambda: (
        (folder("int4", EXPERTS * INNER, HIDDEN, zeros=True, order=True), folder("int4", EXPERTS * INNER, HIDDEN)),
        folder("int4", EXPERTS * HIDDEN, INNER, order=True),
    ),
    "fp8": lambda: (
        (folder("fp8", EXPERTS * INNER, HIDDEN), folder("fp8", EXPERTS * INNER, HIDDEN)),
        folder("fp8", EXPERTS * HIDDEN, INNER),
    ),
}


CASES = [(name, num_tokens) for name in MIXTURES for num_tokens in ((1, 6, 200) if ON_GPU else (6,))]


@pytest.mark.parametrize(("name", "num_tokens"), [*CASES, ("int4 by order", 1)])
def test_experts(name: str, num_tokens: int) -> None:
    torch.manual_seed(1)
    gate_up, down = MIXTURES[name]()
    x, ids = torch.randn(num_tokens, HIDDEN, device=DEVICE).to(DTYPE), choose("random", num_tokens, EXPERTS, 2)
    weights = torch.rand(num_tokens, 2, device=DEVICE)
    exact = reference.experts_coded(x.float(), ids, weights, gate_up, down, "silu")
    ours = gpu.experts_coded(x, ids, weights, gate_up, down, "silu")
    assert float((ours.float() - exact).norm() / exact.norm()) < (1e-2 if ON_GPU else 2e-3)


@pytest.mark.parametrize("dtype", [DTYPE, torch.float32])
@pytest.mark.parametrize("num_tokens", [1, 6, *((100, 500) if ON_GPU else ())])
def test_mxfp4_with_biases_and_clamped_gates(
    num_tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In as many blocks of columns as leave a tile half empty; one token's pairs by themselves."""
    torch.manual_seed(1)
    hidden, inner = (2880, 2880) if ON_GPU else (192, 96) if num_tokens > 1 else (96, 32)
    if not ON_GPU:  # larger tiles, and fewer, for the interpreter
        monkeypatch.setattr(moe_coded_vector, "_LINES", 64)
    gate_up = (mxfp4(EXPERTS * 2 * inner, hidden),)
    down = mxfp4(EXPERTS * hidden, inner)
    biases = ExpertBiases(
        (torch.randn(EXPERTS, 2 * inner, device=DEVICE) * 7).to(dtype),
        torch.randn(EXPERTS, hidden, device=DEVICE).to(dtype),
    )
    x, ids = torch.randn(num_tokens, hidden, device=DEVICE).to(dtype), choose("random", num_tokens, EXPERTS, 2)
    weights = torch.rand(num_tokens, 2, device=DEVICE)
    exact = reference.experts_coded(
        x.float(), ids, weights, gate_up, down, "swiglu_clamped", ExpertBiases(*(each.float() for each in biases))
    )
    ours = gpu.experts_coded(x, ids, weights, gate_up, down, "swiglu_clamped", biases)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2 if ON_GPU else 2e-3
    assert ours.dtype == dtype and float((ours.float() - exact).norm() / exact.norm()) < tolerance


def test_the_reference_is_that_of_the_decoded_experts() -> None:
    gate_up, down = MIXTURES["gate and up apart"]()
    x, ids, weights = (
        torch.randn(6, HIDDEN, device=DEVICE),
        choose("random", 6, EXPERTS, 2),
        torch.rand(6, 2, device=DEVICE),
    )
    gate, up = (each.decoded(slice(None), torch.float32).view(EXPERTS, INNER, HIDDEN) for each in gate_up)
    plain = torch.cat((gate, up), 1), down.decoded(slice(None), torch.float32).view(EXPERTS, HIDDEN, INNER)
    exact = reference.experts(x, ids, weights, *plain, "silu")
    torch.testing.assert_close(reference.experts_coded(x, ids, weights, gate_up, down, "silu"), exact)
