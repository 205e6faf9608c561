"""A layer's operators over rows that become FP8 on their way, against the same in floats: in every form of a flow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ingle import kernels
from ingle.kernels import gpu, reference
from ingle.kernels.coded import Coded
from ingle.kernels.flow import Flow
from ingle.kernels.gpu import fp8, fp8_layer, fp8_rows
from ingle.kernels.gpu.fp8_rows import GROUP
from ingle.model.layers import Linear, RMSNorm
from ingle.weights.coded_part import CodedPart
from ingle.weights.matrix import Weight
from tests.kernels.fused import DEVICE, EPS, ON_GPU, check_projection, close, norm_weight, randn
from tests.kernels.interpreted import exact_fp8
from tests.kernels.test_fp8 import stands_for
from tests.model.test_quantized import FORMATS, quantize
from tests.support import engine_for, engine_logits, random_prompt, save_checkpoint

DTYPE = torch.bfloat16 if ON_GPU else torch.float32
ROWS, (SIZE, INNER) = 19, (512, 1024) if ON_GPU else (256, 384)  # the library wants lines of four blocks
EPSILON = 0.06
"""What is off where both sides of a product have three bits behind the point."""


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    if ON_GPU:
        return
    exact_fp8(monkeypatch)

    def library(x: torch.Tensor, matrix: torch.Tensor, *scales: Any, fast: bool) -> torch.Tensor:
        of_x, of_matrix, bias = scales
        of_x, of_matrix = (each if each.dim() == 0 else each.contiguous() for each in (of_x, of_matrix))
        if of_x.dim() and of_x.shape[1] > 1:
            wide = of_matrix.repeat_interleave(GROUP, 0).repeat_interleave(GROUP, 1)[:, : matrix.shape[1]]
            out = stands_for(x, of_x) @ (matrix.double() * wide)
        else:
            out = x.double() @ matrix.double() * of_x * of_matrix
        return (out if bias is None else out + bias.double()).to(DTYPE)

    monkeypatch.setattr(fp8, "_library", library)
    monkeypatch.setattr(fp8, "multiplies_fp8", lambda device: True)
    monkeypatch.setattr(fp8, "_by_blocks", lambda coded: coded.blocks is not None)
    monkeypatch.setattr(
        fp8, "suits", lambda x, coded: len(x) >= fp8.MIN_ROWS and coded.kind == "fp8" and coded.quantizes_inputs
    )


def also(*values: object) -> list[Any]:
    """What is tried where there is time."""
    return [pytest.param(value, marks=() if ON_GPU else pytest.mark.slow) for value in values]


@pytest.fixture(params=["one", *also("rows", "blocks")])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Of the scales that the library applies."""
    monkeypatch.setattr(fp8, "_scales_rows", lambda num_rows, coded, *, fast: request.param == "rows")
    return str(request.param)


def weight_of(size_out: int, size_in: int, form: str) -> tuple[Weight, torch.Tensor]:
    """A matrix, and what it stands for."""
    codes = (torch.randn(size_out, size_in, device=DEVICE) * 64).to(torch.float8_e4m3fn).view(torch.uint8)
    group = GROUP if form == "blocks" else size_in
    scales = (torch.rand(size_out // GROUP, size_in // group, device=DEVICE) + 0.5) / 64 / size_in**0.5
    if form != "blocks":
        scales = (torch.rand(size_out, 1, device=DEVICE) + 0.5) / 64 / size_in**0.5
    spread = scales.repeat_interleave(size_out // len(scales), 0)
    coded = Coded.of("fp8", codes, spread, None, group, quantizes_inputs=True)
    return Weight((CodedPart(coded, DTYPE),)), coded.decoded(slice(None), torch.float32)


def linear(size_out: int, size_in: int, form: str, *, bias: bool = True) -> tuple[Linear, torch.Tensor]:
    weight, numbers = weight_of(size_out, size_in, form)
    return Linear(weight, randn(size_out).to(DTYPE) if bias else None), numbers


def flow_of(kind: str, norm: RMSNorm) -> tuple[Flow, torch.Tensor]:
    """Rows on their way to a norm, and what that makes of them."""
    residual = randn(ROWS, SIZE).to(DTYPE)
    normed = reference.rms_norm(residual.float(), norm.weight.float(), EPS)
    if kind == "pending":
        return Flow(residual, norm), normed
    if kind == "begun":
        weighted = (residual.float() * norm.weight.float()).to(DTYPE)
        return Flow(residual, norm, weighted, residual.float().square().sum(1, keepdim=True)), normed
    if kind == "done":
        return Flow(residual, norm, normed.to(DTYPE)), normed
    assert norm.before is not None and norm.before.coded is not None
    rows = fp8_rows.normed_rows(residual, norm, fp8.group_of(norm.before.coded))
    return Flow(residual, norm, quantized=rows), normed


FLOWS = ("pending", "begun", "done", "quantized")


def test_normed(form: str) -> None:
    weight, _ = weight_of(128, SIZE, form)
    flow, normed = flow_of("quantized", RMSNorm(norm_weight(SIZE).to(DTYPE), EPS, weight))
    close(gpu.normed(flow), normed, 1e-2)


@pytest.mark.parametrize("kind", ["quantized", *also("pending", "begun", "done")])
@pytest.mark.parametrize("qk_norm", [False, *also(True)])
def test_project_and_store(kind: str, qk_norm: bool, form: str) -> None:
    weight, numbers = weight_of(8 * 32, SIZE, form)
    flow, normed = flow_of(kind, RMSNorm(norm_weight(SIZE).to(DTYPE), EPS, weight))

    def project(_: torch.Tensor, bias: torch.Tensor, rotation: Any) -> torch.Tensor:
        return gpu.project_and_store(flow, Linear(weight, bias), rotation)

    check_projection(project, normed, 32, qk_norm=qk_norm, weight=numbers, tolerance=EPSILON)


@pytest.mark.parametrize("kind", ["quantized", *also("pending", "begun", "done")])
@pytest.mark.parametrize("bias", [True, *also(False)])
def test_project_gated(kind: str, bias: bool, form: str) -> None:
    gate_up, numbers = linear(2 * INNER, SIZE, form, bias=bias)
    flow, normed = flow_of(kind, RMSNorm(norm_weight(SIZE).to(DTYPE), EPS, gate_up.weight))
    both = normed @ numbers.T + (gate_up.bias.float() if gate_up.bias is not None else 0)
    close(gpu.project_gated(flow, gate_up, "silu"), reference.gated(both, "silu"), 1.5 * EPSILON)


@pytest.mark.parametrize(("bias", "post", "behind"), [
    (True, False, "rows"), (False, True, ""), *(pytest.param(*each, marks=pytest.mark.slow) for each in [
        (False, False, "blocks"), (True, True, "blocks"), (True, True, "rows"), (True, False, ""),
    ]),
])  # fmt: skip
def test_project_and_add(bias: bool, post: bool, behind: str, form: str) -> None:
    """On the way to a norm before a matrix of floats, or of FP8."""
    out, numbers = linear(SIZE, INNER, form, bias=bias)
    before = weight_of(128, SIZE, behind)[0] if behind else Weight.of(randn(16, SIZE).to(DTYPE))
    norm, post_norm = (RMSNorm(norm_weight(SIZE).to(DTYPE), EPS, each) for each in (before, None))
    flow, _ = flow_of("pending", norm)
    x, total = randn(ROWS, INNER).to(DTYPE), flow.residual.float()
    added = x.float() @ numbers.T + (out.bias.float() if out.bias is not None else 0)
    total = total + (reference.rms_norm(added, post_norm.weight.float(), EPS) if post else added)
    after = gpu.project_and_add(x, out, flow, norm, post_norm if post else None)
    check_sum(after, total, norm)


def check_sum(after: Flow, total: torch.Tensor, norm: RMSNorm) -> None:
    """What comes next has the form that it takes; all have the same numbers."""
    close(after.residual, total, EPSILON)
    assert after.norm is norm and norm.before is not None
    normed = reference.rms_norm(total, norm.weight.float(), EPS)
    close(gpu.normed(after), normed, EPSILON)
    assert (after.quantized is not None) == (norm.before.coded is not None)
    if after.quantized is not None:
        close(stands_for(*after.quantized).float(), normed, EPSILON)


@pytest.mark.parametrize("kind", FLOWS)
@pytest.mark.parametrize("down_form", ["rows", *also("", "blocks")])
def test_gated_mlp(kind: str, down_form: str, form: str) -> None:
    gate_up, numbers = linear(2 * INNER, SIZE, form)
    down, of_down = linear(SIZE, INNER, down_form or "rows")
    if not down_form:
        down = replace(down, weight=Weight.of(of_down.to(DTYPE)))
    norm = RMSNorm(norm_weight(SIZE).to(DTYPE), EPS, gate_up.weight)
    flow, normed = flow_of(kind, norm)
    assert gate_up.bias is not None and down.bias is not None
    inner = reference.gated(normed @ numbers.T + gate_up.bias.float(), "gelu_tanh")
    total = flow.residual.float() + inner @ of_down.T + down.bias.float()
    after = gpu.gated_mlp(flow, gate_up, down, "gelu_tanh", norm)
    if down_form:
        check_sum(after, total, norm)
    close(after.residual, total, EPSILON)


@pytest.mark.parametrize("group", [True, *also(False)])
def test_what_ranks_add_up(group: bool, form: str) -> None:
    """Products are finished before they are added up."""

    class Doubling:
        size, place = 2, 0

        def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
            assert x.dtype == DTYPE
            return x.mul_(2)

        def all_gather(self, x: torch.Tensor) -> torch.Tensor:
            raise AssertionError

    out, numbers = linear(SIZE, INNER, form)
    norm = RMSNorm(norm_weight(SIZE).to(DTYPE), EPS, weight_of(128, SIZE, "rows")[0])
    flow, _ = flow_of("pending", norm)
    x, total = randn(ROWS, INNER).to(DTYPE), flow.residual.float()
    assert out.bias is not None
    added = x.float() @ numbers.T + out.bias.float()
    total = total + (2 * added if group else added)
    check_sum(gpu.project_and_add(x, replace(out, group=Doubling() if group else None), flow, norm), total, norm)


def test_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """And few rows are not FP8 either."""
    weight, _ = weight_of(128, SIZE, "rows")
    rows = randn(ROWS, SIZE).to(DTYPE)
    assert fp8_layer.takes(rows, weight) is weight.coded
    assert fp8_layer.takes(rows[:1], weight) is None and fp8_layer.takes(rows, None) is None
    assert fp8_layer.takes(rows, Weight((*weight.parts, *weight.parts))) is None
    monkeypatch.setattr(fp8, "FUSED", False)
    assert fp8_layer.takes(rows, weight) is None


@pytest.mark.slow
@pytest.mark.skipif(ON_GPU, reason="tests/model/test_quantized.py runs whole models on a GPU")
@torch.inference_mode()
def test_a_whole_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, with a chunk of a prompt that is long enough."""
    plain = save_checkpoint(tmp_path / "plain", "qwen2", intermediate_size=96)
    coded = quantize(plain, tmp_path / "coded", FORMATS["fp8-whole"])
    prompt = random_prompt(3, 20)
    exact = engine_logits(engine_for(plain, cpu_kernels="torch"), prompt)
    engine = engine_for(coded, cpu_kernels="torch", enable_prefix_caching=False)
    seen, product = [], fp8.product
    monkeypatch.setattr(fp8, "product", lambda *given: seen.append(given[1].codes.shape) or product(*given))
    monkeypatch.setattr(kernels, "of", lambda x: gpu)
    monkeypatch.setattr(fp8, "_scales_rows", lambda num_rows, coded, *, fast: False)
    close(engine_logits(engine, prompt), exact, 0.15)
    assert seen and len(seen) % (2 * 4 - 1) == 0  # of the second layer gate and up are held in two ways
