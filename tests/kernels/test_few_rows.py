"""Products of a few rows with what is fused to them, against the plain operators in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ingle.device.torch.device import TorchDevice
from ingle.kernels import reference
from ingle.kernels.gpu import few_rows
from ingle.kernels.gpu.few_rows import Scaled, Tiling
from ingle.kernels.options import Activation
from ingle.model import few_rows as fused
from ingle.model.decoder import Decoder
from ingle.request import EngineRequest, SamplingParams
from tests.kernels.fused import DEVICE, DTYPE, EPS, ON_GPU, check_projection, close, norm_weight, randn, weights
from tests.support import engine_for, random_prompt, save_checkpoint

SIZE_IN = 200  # no multiple of what an iteration takes


@pytest.fixture(params=[(1, 1, 64), (1, 3, 16), (5, 2, 64), (16, 1, 32)], ids=lambda p: "{}x{}x{}".format(*p))
def num_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    rows, splits, outs = request.param

    def tiling(size_in: int, size_out: int, outs: int, *, paired: bool, num_processors: int) -> Tiling:
        return Tiling(outs, splits, 64, 3, 64)

    monkeypatch.setattr(few_rows, "tiling", tiling)
    monkeypatch.setattr(few_rows, "_OUTS", outs)
    torch.manual_seed(rows)
    return int(rows)


def scaled(num_rows: int) -> tuple[Scaled, torch.Tensor]:
    """Rows on their way to a norm, their squares in four pieces; and what the norm makes of them."""
    residual, norm = randn(num_rows, SIZE_IN), norm_weight(SIZE_IN)
    wide = residual.float()
    squares = wide.square().view(num_rows, 4, -1).sum(-1)
    rows = Scaled(residual, (wide * norm.float()).to(DTYPE), squares)
    return rows, reference.rms_norm(wide, norm.float(), EPS)


@pytest.mark.parametrize("size_out", [64, 96])
def test_add(num_rows: int, size_out: int) -> None:
    x, weight, bias = randn(num_rows, SIZE_IN), weights(size_out, SIZE_IN), randn(size_out)
    residual, norm = randn(num_rows, size_out), torch.rand(size_out, device=DEVICE) + 0.5
    exact = x.float() @ weight.float().T + bias.float() + residual.float()
    rows = few_rows.add(x, weight, bias, residual, norm)
    close(rows.residual, exact)
    close(rows.values, exact * norm)
    assert rows.squares is not None
    close(rows.squares.sum(1), exact.square().sum(1))
    close(few_rows.add(x, weight, None, residual, norm).residual, exact - bias.float())


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("size", [64, 72])
def test_gated(num_rows: int, size: int, activation: Activation) -> None:
    rows, normed = scaled(num_rows)
    weight = weights(2 * size, SIZE_IN)
    close(
        few_rows.gated(rows, EPS, weight, None, activation), reference.gated(normed @ weight.float().T, activation)
    )  # fmt: skip
    done = Scaled(rows.residual, normed.to(DTYPE), None)
    close(
        few_rows.gated(done, EPS, weight, None, activation), reference.gated(normed @ weight.float().T, activation)
    )  # fmt: skip


@pytest.mark.parametrize("qk_norm", [False, True])
def test_project_and_store(num_rows: int, qk_norm: bool) -> None:
    rows, normed = scaled(num_rows)
    check_projection(
        lambda weight, bias, rotation: few_rows.project_and_store(rows, EPS, weight, bias, rotation), normed, 128,
        qk_norm=qk_norm,
    )  # fmt: skip


def test_the_counters_are_left_at_zero() -> None:
    assert not few_rows._counters(DEVICE).any()


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("size_out", [64, 576, 3584, 37888])
@pytest.mark.parametrize("size_in", [64, 576, 3584, 18944])
def test_tilings_fill_the_device_once(size_in: int, size_out: int, paired: bool) -> None:
    outs, splits, depth, *_ = few_rows.tiling(size_in, size_out, 64, paired=paired, num_processors=132)
    num_tiles = -(-size_out // (outs * (1 + paired)))
    assert 1 <= splits <= -(-size_in // depth), "a split without inputs"
    assert splits == 1 or splits * num_tiles <= 132


@pytest.mark.skipif(ON_GPU, reason="float32 on a GPU is never fused; tests/engine/test_gpu_engine.py compares bfloat16")
@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [
        ("llama", {}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("qwen3_moe", {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "num_hidden_layers": 3,
                       "mlp_only_layers": [1]}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("num_rows", [1, 2, 11])
@torch.inference_mode()
def test_a_fused_step_is_that_of_the_decoder(
    model_type: str, overrides: dict[str, Any], num_rows: int, tmp_path: Path
) -> None:
    save_checkpoint(tmp_path, model_type, head_dim=32, **overrides)
    engine = engine_for(tmp_path, block_size=8)
    engine.add(EngineRequest("fused", random_prompt(3, num_rows), SamplingParams(temperature=0.0, max_tokens=1)))
    plan, device = engine.scheduler.plan(), engine.worker.device
    assert plan is not None and isinstance(device, TorchDevice)
    model = device.model
    assert isinstance(model, Decoder) and not model.fused_rows
    device.apply(plan.step)
    caches = [torch.zeros_like(device.kv_cache) for _ in range(2)]
    batches = [device.tables.batch_of(plan.step) for _ in caches]
    exact = model.forward(batches[0], caches[0])
    ours = fused.forward(model, batches[1], caches[1])
    torch.testing.assert_close(ours, exact, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(*caches, atol=2e-5, rtol=2e-5)
