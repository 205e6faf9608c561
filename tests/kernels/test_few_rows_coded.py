"""Products of a few rows with matrices of codes and what is fused to them, against plain operators in float32."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from ingle.kernels import reference
from ingle.kernels.coded import Coded
from ingle.kernels.flow import Flow, Rotation
from ingle.kernels.gpu import decoded
from ingle.kernels.gpu import few_rows_coded as few_rows
from ingle.kernels.gpu.device import has_warpgroups
from ingle.kernels.gpu.endings import PLAIN
from ingle.kernels.gpu.few_rows_coded import Tiling
from ingle.model.layers import RMSNorm
from ingle.weights.gguf_coded import coded_of
from ingle.weights.source import StoredRows
from tests.kernels.fused import DEVICE, DTYPE, EPS, ON_GPU, check_projection, close, norm_weight, randn
from tests.kernels.test_coded import made
from tests.weights.gguf_blocks import random_blocks
from tests.weights.test_gguf_coded import stored

HEAD_DIM = 64 if ON_GPU else 32
SIZE_IN = 384  # no multiple of what an iteration takes
MATRICES: dict[str, Callable[[int], Coded]] = {
    "int4": lambda size_out: made("int4", size_out, SIZE_IN, 128, zeros=True),
    "fp8-rows": lambda size_out: made("fp8", size_out, SIZE_IN, SIZE_IN),
    "int4-32": lambda size_out: made("int4", size_out, SIZE_IN, 32),
    "int4-rows": lambda size_out: made("int4", size_out, SIZE_IN, SIZE_IN),
    "int8": lambda size_out: made("int8", size_out, SIZE_IN, 64),
    "int8-zeros": lambda size_out: made("int8", size_out, SIZE_IN, 64, zeros=True),
    "fp8": lambda size_out: made("fp8", size_out, SIZE_IN, 128),
}

LARGE_BLOCKS = ("Q4_K", "Q5_K", "Q6_K")


@pytest.fixture(params=MATRICES if ON_GPU else list(MATRICES)[:2])
def matrix(request: pytest.FixtureRequest) -> Callable[[int], Coded]:
    return MATRICES[request.param]


@pytest.fixture(params=[(1, 3), (16, 1)], ids=str)
def num_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    rows, splits = request.param

    def tiling(coded: Coded, *, paired: bool, num_sms: int) -> Tiling:
        return Tiling(1 if paired else 2, 2, splits, splits > 1)

    monkeypatch.setattr(few_rows, "tiling", tiling)
    return int(rows)


def flowing(num_rows: int) -> tuple[Flow, torch.Tensor]:
    """Rows on their way to a norm, their squares in two pieces; and what the norm makes of them."""
    residual, norm = randn(num_rows, SIZE_IN), norm_weight(SIZE_IN)
    wide = residual.float()
    squares = wide.square().view(num_rows, 2, -1).sum(-1)
    flow = Flow(residual, RMSNorm(norm, EPS), (wide * norm.float()).to(DTYPE), squares)
    return flow, reference.rms_norm(wide, norm.float(), EPS)


def exact(coded: Coded) -> torch.Tensor:
    return coded.decoded(slice(None), torch.float32)


def test_add(num_rows: int, matrix: Callable[[int], Coded]) -> None:
    weight, x, bias = matrix(40), randn(num_rows, SIZE_IN), randn(40)
    residual, norm = randn(num_rows, 40), RMSNorm(torch.rand(40, device=DEVICE) + 0.5, EPS)
    total = x.float() @ exact(weight).T + bias.float() + residual.float()
    flow = few_rows.add(x, weight, bias, residual, norm)
    close(flow.residual, total)
    assert flow.values is not None and flow.squares is not None
    close(flow.values, total * norm.weight)
    close(flow.squares.sum(1), total.square().sum(1))


def test_gated(num_rows: int, matrix: Callable[[int], Coded]) -> None:
    flow, normed = flowing(num_rows)
    weight = matrix(2 * 24)
    total = reference.gated(normed @ exact(weight).T, "silu")
    for form in (flow, Flow(flow.residual, flow.norm)):
        close(few_rows.gated(form, weight, None, "silu"), total)


def test_project_and_store(num_rows: int, matrix: Callable[[int], Coded]) -> None:
    flow, normed = flowing(num_rows)
    weight = matrix(8 * HEAD_DIM)
    check_projection(
        lambda _, bias, rotation: few_rows.project_and_store(flow, [weight], bias, rotation), normed, HEAD_DIM,
        qk_norm=False, weight=exact(weight),
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["Q4_K", "Q8_0"])
def test_blocks(kind: str) -> None:
    """Of GGUF: those whose codes are bytes of one code or two, alone and as many rows take them."""
    coded = coded_of(stored(kind, 48, 512)[0], DEVICE)
    x = randn(5, 512)
    close(few_rows.multiply(x, coded, None), x.float() @ exact(coded).T)
    out = torch.empty(30, 512, dtype=DTYPE, device=DEVICE)
    assert decoded.by_bytes(coded)
    decoded.decode(coded, 10, out)
    close(out, exact(coded)[10:40])


@pytest.mark.parametrize("kind", MATRICES)
def test_alone(kind: str) -> None:
    coded, x, bias = MATRICES[kind](32), randn(3, SIZE_IN), randn(32)
    close(few_rows.multiply(x, coded, bias), x.float() @ exact(coded).T + bias.float())


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 2, 8, 9, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", MATRICES)
def test_both_types(kind: str, dtype: torch.dtype, num_rows: int) -> None:
    """By the tilings themselves, with all of a layer's ends."""
    coded = MATRICES[kind](8 * HEAD_DIM)
    x = torch.randn(num_rows, SIZE_IN, device=DEVICE).to(dtype)
    product = x.float() @ exact(coded).T
    close(few_rows.multiply(x, coded, None), product)
    residual, norm = (1000 * torch.randn(num_rows, 512, device=DEVICE)).to(dtype), norm_weight(512).to(dtype)
    flow = few_rows.add(x, coded, None, residual, RMSNorm(100 * norm, EPS))
    close(flow.residual, product + residual.float())
    wide = made("int4", 64, 512, 128)
    normed = reference.rms_norm(flow.residual.float(), 100 * norm.float(), EPS)
    close(few_rows.gated(flow, wide, None, "silu"), reference.gated(normed @ exact(wide).T, "silu"))


needs_ring = pytest.mark.skipif(not has_warpgroups(DEVICE), reason="needs a Hopper card")


@pytest.mark.gpu
@needs_ring
@pytest.mark.parametrize("num_rows", [2, 8, 9, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("group_size", "zeros"), [(128, True), (128, False), (256, True), (1024, False)], ids=str)
def test_through_a_ring(group_size: int, zeros: bool, dtype: torch.dtype, num_rows: int) -> None:
    """Several tiles, with all of a layer's ends."""
    coded = made("int4", 512, 1024, group_size, zeros=zeros)
    x, bias = torch.randn(num_rows, 1024, device=DEVICE).to(dtype), torch.randn(512, device=DEVICE).to(dtype)
    assert few_rows._ring(x, coded, PLAIN) is not None
    product = x.float() @ exact(coded).T
    close(few_rows.multiply(x, coded, bias), product + bias.float())
    residual, norm = torch.randn(num_rows, 512, device=DEVICE).to(dtype), norm_weight(512).to(dtype)
    flow = few_rows.add(x, coded, None, residual, RMSNorm(norm, EPS))
    close(flow.residual, product + residual.float())
    normed = reference.rms_norm(flow.residual.float(), norm.float(), EPS)
    for size_in, activation in ((512, "silu"), (512, "gelu_tanh")):
        wide = made("int4", 768, size_in, min(group_size, size_in), zeros=zeros)
        close(few_rows.gated(flow, wide, None, activation), reference.gated(normed @ exact(wide).T, activation))


@pytest.mark.gpu
@needs_ring
@pytest.mark.parametrize("num_rows", [3, 16])
def test_many_tiles_through_a_ring(num_rows: int) -> None:
    """Programs with whole rows of weights, and with three blocks of them, of which the last has fewer."""
    coded, x = made("int4", 2304, 1536, 128, zeros=True), randn(num_rows, 1536)
    residual, norm = randn(num_rows, 2304), norm_weight(2304)
    flow = few_rows.add(x, coded, None, residual, RMSNorm(norm, EPS))
    close(flow.residual, x.float() @ exact(coded).T + residual.float())
    normed = reference.rms_norm(flow.residual.float(), norm.float(), EPS)
    wide = made("int4", 25664, 2304, 128, zeros=True)
    close(few_rows.gated(flow, wide, None, "silu"), reference.gated(normed @ exact(wide).T, "silu"))


@pytest.mark.gpu
@needs_ring
@pytest.mark.parametrize("num_rows", [3, 16])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_rotation_through_a_ring(head_dim: int, num_rows: int) -> None:
    residual, norm = randn(num_rows, 1024), norm_weight(1024)
    wide = residual.float()
    flow = Flow(
        residual, RMSNorm(norm, EPS), (wide * norm.float()).to(DTYPE), wide.square().view(num_rows, 2, -1).sum(-1)
    )
    weight = made("int4", 8 * head_dim, 1024, 128, zeros=True)
    check_projection(
        lambda _, bias, rotation: few_rows.project_and_store(flow, [weight], bias, rotation),
        reference.rms_norm(wide, norm.float(), EPS), head_dim, qk_norm=False, weight=exact(weight),
    )  # fmt: skip


def blocks_of(kind: str, size_out: int, size_in: int) -> Coded:
    return coded_of(StoredRows(kind, random_blocks(kind, size_out, size_in, std=size_in**-0.5)), DEVICE)


@pytest.fixture
def hopper() -> None:
    if not has_warpgroups(DEVICE):
        pytest.skip("needs a Hopper card")


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("num_rows", [3, 4, 8, 9, 16])
@pytest.mark.parametrize("kind", LARGE_BLOCKS)
def test_blocks_through_a_ring(kind: str, num_rows: int) -> None:
    """Several tiles, with all of a layer's ends."""
    coded, x, bias = blocks_of(kind, 512, 1024), randn(num_rows, 1024), randn(512)
    assert few_rows._ring(x, coded, PLAIN) is not None
    product = x.float() @ exact(coded).T
    close(few_rows.multiply(x, coded, bias), product + bias.float())
    residual, norm = randn(num_rows, 512), norm_weight(512)
    flow = few_rows.add(x, coded, None, residual, RMSNorm(norm, EPS))
    close(flow.residual, product + residual.float())
    normed = reference.rms_norm(flow.residual.float(), norm.float(), EPS)
    wide = blocks_of(kind, 768, 512)
    for activation in ("silu", "gelu_tanh"):
        total = reference.gated(normed @ exact(wide).T, activation)
        close(few_rows.gated(flow, wide, None, activation), total)


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("num_rows", [3, 16])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("kinds", [("Q4_K",), ("Q4_K", "Q6_K")], ids=str)
def test_heads_of_blocks_through_a_ring(kinds: tuple[str, ...], head_dim: int, num_rows: int) -> None:
    """One matrix, or the values' beside that of queries and keys."""
    residual, norm = randn(num_rows, 1024), norm_weight(1024)
    sizes = (8 * head_dim,) if len(kinds) == 1 else (6 * head_dim, 2 * head_dim)
    parts = [blocks_of(kind, size, 1024) for kind, size in zip(kinds, sizes, strict=True)]
    wide, weight = residual.float(), torch.cat([exact(part) for part in parts])
    flow = Flow(
        residual, RMSNorm(norm, EPS), (wide * norm.float()).to(DTYPE), wide.square().view(num_rows, 2, -1).sum(-1)
    )

    def project(_: torch.Tensor, bias: torch.Tensor, rotation: Rotation) -> torch.Tensor:
        assert few_rows.suits_heads(flow.residual, parts, rotation)
        return few_rows.project_and_store(flow, parts, bias, rotation)

    check_projection(project, reference.rms_norm(wide, norm.float(), EPS), head_dim, qk_norm=False, weight=weight)


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("kind", LARGE_BLOCKS)
def test_odd_scales_through_a_ring(kind: str) -> None:
    """None beside a minimum, large ones, negative ones and such as float16 has below its lowest exponent."""
    coded, x = blocks_of(kind, 128, 1024), randn(5, 1024)
    held = coded.factors if coded.factor_pairs is None else coded.factor_pairs
    assert held is not None and few_rows._ring(x, coded, PLAIN) is not None
    held.view(128, 4, -1)[:, :, :] = 1e-3
    for row, factor in enumerate((0.0, 6e4, -6e4, 1e-7, -1e-3)):
        held.view(128, 4, -1)[row::8, :, 0] = factor
    coded.scales[5::8] = 0
    bias = randn(128)
    product, ours = x.float() @ exact(coded).T + bias.float(), few_rows.multiply(x, coded, bias)
    for row in range(8):
        close(ours[:, row::8], product[:, row::8])


@pytest.mark.gpu
def test_what_a_ring_leaves() -> None:
    x = torch.zeros(3, 1024, dtype=torch.bfloat16, device=DEVICE)
    six = blocks_of("Q6_K", 48, 1024)
    assert few_rows._ring(x, six, PLAIN) is None and not few_rows.fits(x, six)
    whole = blocks_of("Q6_K", 128, 1024)
    assert not few_rows.fits(x.half(), whole)
    assert not few_rows.fits(torch.zeros(17, 1024, dtype=torch.bfloat16, device=DEVICE), whole)
    assert few_rows._ring(x, blocks_of("Q3_K", 128, 1024), PLAIN) is None


@pytest.mark.gpu
def test_what_suits() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.zeros(2, SIZE_IN, dtype=dtype, device=DEVICE)
        assert all(few_rows.suits(x, make(8)) for make in MATRICES.values())
        assert not few_rows.suits(x, made("int8", 8, SIZE_IN, 32, order=True))
    assert not few_rows.suits(torch.zeros(2, SIZE_IN, device=DEVICE), MATRICES["int4"](8))
