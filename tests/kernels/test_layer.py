"""A layer's operators, whichever kernels they choose, against the reference in float32: in every form of a flow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ingle import kernels
from ingle.device.torch.device import TorchDevice
from ingle.kernels import gpu, reference
from ingle.kernels.batch import KvCache
from ingle.kernels.flow import Flow
from ingle.kernels.gpu import elementwise, few_rows, vector
from ingle.kernels.options import Activation
from ingle.model.layers import Linear, RMSNorm
from ingle.request import EngineRequest, SamplingParams
from ingle.weights.matrix import PlainPart, Weight
from tests.kernels.fused import DTYPE, EPS, ON_GPU, check_projection, close, norm_weight, randn, weights
from tests.kernels.interpreted import pairwise
from tests.model.checkpoints import CHECKPOINTS
from tests.support import engine_for, random_prompt, save_checkpoint

SIZE = 192
FORMS = ("pending", "begun", "done")
NUM_ROWS = (1, 5, 20)


@pytest.fixture(autouse=True)
def in_the_interpreter_every_type_is_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """By number of rows alone: 1 and 2 as on any GPU, up to 16 as on Hopper."""
    torch.manual_seed(0)
    if not ON_GPU:
        # The interpreter runs one program after the other: larger ones, so that there are fewer.
        monkeypatch.setattr(vector, "tiling", lambda size_in, *, paired: vector.Tiling(16, 64))
        monkeypatch.setattr(vector, "suits", lambda x, weight: 0 < len(x) <= vector.MAX_ROWS)
        monkeypatch.setattr(few_rows, "suits", lambda x, weight: 0 < len(x) <= few_rows.MAX_ROWS)


def flow_of(num_rows: int, form: str) -> tuple[Flow, torch.Tensor]:
    """Rows on their way to a norm, and what that makes of them, in float32."""
    residual, norm = randn(num_rows, SIZE), RMSNorm(norm_weight(SIZE), EPS)
    wide, weight = residual.float(), norm.weight.float()
    normed = reference.rms_norm(wide, weight, EPS)
    if form == "pending":
        return Flow(residual, norm), normed
    if form == "done":
        return Flow(residual, norm, normed.to(DTYPE)), normed
    return Flow(residual, norm, (wide * weight).to(DTYPE), wide.square().view(num_rows, 3, -1).sum(-1)), normed


def linear(size_out: int, size_in: int = SIZE, *, num_parts: int = 1, bias: bool = True) -> Linear:
    parts = weights(size_out, size_in).chunk(num_parts)
    return Linear(Weight(tuple(PlainPart(part) for part in parts)), randn(size_out) if bias else None)


def product(x: torch.Tensor, projection: Linear) -> torch.Tensor:
    whole = torch.cat([part.plain for part in projection.weight.parts if part.plain is not None]).float()
    out = x.float() @ whole.T
    return out if projection.bias is None else out + projection.bias.float()


@pytest.mark.parametrize("num_rows", [1, 5, 20])
@pytest.mark.parametrize("form", FORMS)
def test_normed(form: str, num_rows: int) -> None:
    flow, normed = flow_of(num_rows, form)
    close(gpu.normed(flow), normed)
    close(reference.normed(flow), normed)


@pytest.mark.parametrize(
    ("form", "num_rows", "head_dim", "rotary_dim", "qk_norm"),
    pairwise(FORMS, NUM_ROWS, [(64, 64, False), (32, 32, True), (64, 32, False), (64, 32, True),
                               (24, 24, False), (24, 24, True)]),
)  # fmt: skip
def test_project_and_store(form: str, num_rows: int, head_dim: int, rotary_dim: int, qk_norm: bool) -> None:
    flow, normed = flow_of(num_rows, form)
    check_projection(
        lambda weight, bias, rotation: gpu.project_and_store(flow, Linear(Weight.of(weight), bias), rotation),
        normed,
        head_dim,
        rotary_dim=rotary_dim,
        qk_norm=qk_norm,
    )


@pytest.mark.parametrize(
    ("form", "num_rows", "activation", "bias", "num_parts"),
    pairwise(FORMS, NUM_ROWS, [("silu", False, 1), ("gelu_tanh", True, 1), ("silu", True, 3)]),
)
def test_project_gated(form: str, num_rows: int, activation: Activation, bias: bool, num_parts: int) -> None:
    flow, normed = flow_of(num_rows, form)
    gate_up = linear(144, num_parts=num_parts, bias=bias)
    close(gpu.project_gated(flow, gate_up, activation), reference.gated(product(normed, gate_up), activation))


@pytest.mark.parametrize(
    ("form", "num_rows", "post", "bias", "num_parts"),
    pairwise(FORMS, NUM_ROWS, [(False, False, 1), (False, True, 1), (True, True, 1), (False, True, 2)]),
)
def test_project_and_add(form: str, num_rows: int, post: bool, bias: bool, num_parts: int) -> None:
    flow, _ = flow_of(num_rows, form)
    out, x = linear(SIZE, 88, num_parts=num_parts, bias=bias), randn(num_rows, 88)
    norm, post_norm = (RMSNorm(norm_weight(SIZE), EPS) for _ in range(2))
    added = product(x, out)
    check_sum(lambda flow: gpu.project_and_add(x, out, flow, norm, post_norm if post else None), flow, added, norm,
              post_norm if post else None)  # fmt: skip


@pytest.mark.parametrize("num_rows", [1, 5, 20])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("post", [False, True])
def test_add(form: str, num_rows: int, post: bool) -> None:
    flow, _ = flow_of(num_rows, form)
    x, norm, post_norm = randn(num_rows, SIZE), *(RMSNorm(norm_weight(SIZE), EPS) for _ in range(2))
    check_sum(lambda flow: gpu.add(x, flow, norm, post_norm if post else None), flow, x.float(), norm,
              post_norm if post else None)  # fmt: skip


def check_sum(
    operator: Callable[[Flow], Flow], flow: Flow, added: torch.Tensor, norm: RMSNorm, post_norm: RMSNorm | None
) -> None:
    """What `operator` makes of the flow is the sum with `added`, on its way to the norm."""
    if post_norm is not None:
        added = reference.rms_norm(added, post_norm.weight.float(), EPS)
    total = flow.residual.float() + added
    after = operator(flow)
    close(after.residual, total)
    assert after.norm is norm
    close(gpu.normed(after), reference.rms_norm(total, norm.weight.float(), EPS))


def test_which_rows_and_types_the_tensor_cores_of_hopper_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(few_rows, "pdl", lambda device: True)
    x, weight = torch.zeros(16, 64, dtype=torch.bfloat16), torch.zeros(8, 64, dtype=torch.bfloat16)
    assert few_rows.suits(x, weight) and few_rows.suits(x[:3], weight)
    assert not few_rows.suits(x[:0], weight) and not few_rows.suits(torch.cat([x, x]), weight)
    assert not few_rows.suits(x.half(), weight.half()) and not few_rows.suits(x.float(), weight.float())
    assert not few_rows.suits(x[:, :60].contiguous(), weight[:, :60].contiguous())
    monkeypatch.setattr(few_rows, "pdl", lambda device: False)
    assert not few_rows.suits(x, weight)


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"head_dim": 32}),
    "qwen2": ("qwen2", {"head_dim": 32}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3-moe": ("qwen3_moe", {"head_dim": 32, "num_experts": 8, "num_experts_per_tok": 2,
                                "moe_intermediate_size": 40, "num_hidden_layers": 3, "mlp_only_layers": [1]}),
    **{name: CHECKPOINTS[name] for name in ("phi3-partial", "gemma2-untied", "gemma3-linear", "deepseek-v3")},
}  # fmt: skip


def step(name: str, num_rows: int, folder: Path) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """One step of a tiny decoder in float32, to be run again and again: its hidden states, and its cache."""
    model_type, overrides = FAMILIES[name]
    engine = engine_for(save_checkpoint(folder, model_type, **overrides), block_size=8, cpu_kernels="torch")
    engine.add(EngineRequest("step", random_prompt(3, num_rows), SamplingParams(temperature=0.0, max_tokens=1)))
    plan, device = engine.scheduler.plan(), engine.worker.device
    assert plan is not None and isinstance(device, TorchDevice)
    device.apply(plan.step)

    def forward() -> tuple[torch.Tensor, torch.Tensor]:
        cache = KvCache.over(device.kv_cache.spec, torch.zeros_like(device.kv_cache.raw), 8)
        return device.model.forward(device.tables.batch_of(plan.step), cache), cache.pages

    return forward


class Watched:
    """A kernel that writes into `launched` what it is asked for, by `told` of its options."""

    def __init__(self, kernel: Any, launched: list[str], told: Callable[[dict[str, Any]], str]) -> None:
        self.kernel, self.launched, self.told = kernel, launched, told

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **options: Any) -> None:
            self.launched.append(self.told(options))
            self.kernel[grid](*args, **options)

        return launch


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    launched: list[str] = []
    products = ("product", "store", "gated", "gated")
    for module, name, told in (
        (vector, "_vector_kernel", lambda options: products[options["EPILOGUE"]]),
        (few_rows, "_few_rows_kernel", lambda options: products[options["EPILOGUE"]] + " of few"),
        (elementwise, "_rms_norm_kernel", lambda options: "sum" if options["ADD"] else "norm"),
        (elementwise, "_rotate_and_store_kernel", lambda options: "rotate"),
    ):
        monkeypatch.setattr(module, name, Watched(getattr(module, name), launched, told))
    return launched


DENSE = ["store", "product", "gated", "product"]
DENSE_OF_FEW = [f"{kernel} of few" for kernel in DENSE]
QK_NORMED = ["product", "rotate"]  # of whole heads, which no program on the CUDA cores has
LAUNCHES = {
    # By family and rows: products with what is fused to them, norms with or without a sum, rotations.
    # The last norm stands alone: no product follows it.
    ("llama", 1): [*(2 * DENSE), "norm"],
    ("llama", 11): ["norm", *(2 * DENSE_OF_FEW), "norm"],
    ("llama", 20): ["norm", *(2 * ["rotate", "sum", "sum"])],
    # Experts take normed rows; what they give is added with the norm that follows.
    ("qwen3-moe", 1): [
        *QK_NORMED, "product", "norm", "sum", *QK_NORMED, *DENSE[1:], *QK_NORMED, "product", "norm", "sum",
    ],
    ("qwen3-moe", 11): [
        "norm", *DENSE_OF_FEW[:2], "norm", "sum", *DENSE_OF_FEW, *DENSE_OF_FEW[:2], "norm", "sum",
    ],
    ("qwen3-moe", 20): ["norm", *(3 * ["rotate", "sum", "sum"])],
    # A post-norm keeps apart the product before it and the sum behind it; all else is fused.
    ("gemma2-untied", 1): 2 * ["store", "product", "sum", "gated", "product", "sum"],
    ("gemma2-untied", 11): ["norm", *(2 * ["store of few", "sum", "gated of few", "sum"])],
    ("gemma2-untied", 20): ["norm", *(2 * ["rotate", "sum", "sum"])],
}  # fmt: skip


@pytest.mark.skipif(ON_GPU, reason="float32 on a GPU is never fused; tests/engine/test_gpu_engine.py compares bfloat16")
@pytest.mark.parametrize("num_rows", [2, 11, *(pytest.param(count, marks=pytest.mark.slow) for count in (1, 20))])
@pytest.mark.parametrize("name", FAMILIES)
@torch.inference_mode()
def test_a_fused_step_is_that_of_the_reference(
    name: str, num_rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launched: list[str]
) -> None:
    """And launches no more than it should: one kernel more in a layer is time on a GPU."""
    forward = step(name, num_rows, tmp_path)
    exact, exact_cache = forward()
    monkeypatch.setattr(kernels, "of", lambda x: gpu)
    ours, cache = forward()
    torch.testing.assert_close(ours, exact, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(cache, exact_cache, atol=2e-5, rtol=2e-5)
    assert launched == LAUNCHES.get((name, num_rows), launched)
