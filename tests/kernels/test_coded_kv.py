"""Keys and values in codes: what they stand for, how operators write them, and what attention makes of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from ingle.kernels import gpu, reference, reference_kv
from ingle.kernels.batch import CODE_TYPES
from ingle.kernels.flow import Flow, Rotation
from ingle.kernels.gpu import attention, few_rows, kv_codes
from ingle.kernels.options import AttentionOptions
from ingle.model.layers import Linear, RMSNorm
from ingle.step import Chunk
from ingle.weights.matrix import Weight
from tests.kernels.coded_kv import ERRORS, KINDS, check_needle, decoded, empty_cache, filled_cache
from tests.kernels.fused import EPS, norm_weight, weights
from tests.kernels.fused import randn as of_layers
from tests.kernels.test_gpu_kernels import CASES, DEVICE, DTYPES, OPTIONS, PLAIN, attention_case, randn, written_out

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def same_numbers_each_time() -> None:
    torch.manual_seed(0)
    np.random.seed(0)


@pytest.mark.parametrize("kind", KINDS)
def test_what_codes_stand_for(kind: str) -> None:
    cache, scales = empty_cache(kind, 8, 16, 3, 40, DEVICE)
    k, v = torch.randn(2, 128, 3, 40, device=DEVICE) * torch.logspace(-6, 6, 128, device=DEVICE)[None, :, None, None]
    places = torch.randperm(128, device=DEVICE)
    reference_kv.store(k, v, cache, scales, places)
    numbers = decoded(cache, scales).flatten(1, 2)[:, places]
    for held, given in zip(numbers, (k, v), strict=True):
        most = given.abs().amax(-1, keepdim=True)
        error = (held - given).abs()
        if kind == "int8":
            assert (error <= most * ERRORS[kind] * 1.001).all()
        else:
            assert (error <= torch.maximum(given.abs() * ERRORS[kind] * 1.001, most * 2e-5)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_zeros_and_what_is_not_finite(kind: str) -> None:
    """A row that is not finite comes back as none of its numbers; its neighbours come back as they were."""
    cache, scales = empty_cache(kind, 2, 8, 1, 16, DEVICE)
    k = torch.ones(4, 1, 16, device=DEVICE)
    k[0], k[1, 0, 3], k[2, 0, 5] = 0.0, float("nan"), float("inf")
    for run in (reference.rotate_and_store, gpu.rotate_and_store):
        cache.view(torch.uint8).zero_()
        qkv = torch.cat((k, k, k), 1).flatten(1)
        cos_sin = torch.cat((torch.ones(4, 8), torch.zeros(4, 8)), -1).to(DEVICE)
        run(qkv, 1, cos_sin, None, None, EPS, cache, torch.arange(4, device=DEVICE), scales)
        held = decoded(cache, scales)[:, 0, :4]
        assert (held[:, 0] == 0).all() and held[:, 3].allclose(k[3], rtol=1e-2)
        assert held[:, 1:3].isnan().all()


@pytest.mark.parametrize("kind", ["int8", "fp8_e4m3", pytest.param("fp8_e5m2", marks=pytest.mark.slow)])
def test_every_number_that_a_code_can_stand_for(kind: str) -> None:
    """And every number half way between two of them, in Triton as in PyTorch."""
    dtype = CODE_TYPES[kind]
    numbers = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    numbers = numbers[numbers.isfinite() & (numbers.abs() <= reference_kv.LARGEST[dtype])].unique()
    between = (numbers[1:] + numbers[:-1]) / 2
    rows = torch.cat((numbers, between, between * 1.001))
    rows = torch.nn.functional.pad(rows, (0, -len(rows) % 15)).view(-1, 15)
    rows = torch.cat((rows, torch.full((len(rows), 1), reference_kv.LARGEST[dtype])), -1).to(DEVICE)  # a scale of 1
    caches = [empty_cache(kind, len(rows), 8, 1, 16, DEVICE) for _ in range(2)]
    places = torch.arange(len(rows), device=DEVICE) * 8
    reference_kv.store(rows[:, None], rows[:, None], *caches[0], places)
    kv_codes.store(rows[None, :, None].expand(2, -1, -1, -1).contiguous(), *caches[1], places)
    for ours, theirs in zip(*caches, strict=True):
        assert torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8))
    exact = decoded(*caches[0])[0, :, 0, 0].flatten()
    assert torch.isin(numbers.to(DEVICE), exact).all()


@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "head_dim", "rotary_dim", "norm", "kind"),
    [(1, 4, 2, 16, 16, False, "int8"), (5, 9, 3, 24, 24, True, "fp8_e4m3"), (3, 4, 1, 32, 16, False, "fp8_e5m2"),
     (9, 4, 1, 32, 16, True, "int8"), pytest.param(66, 1, 1, 16, 16, False, "fp8_e4m3", marks=pytest.mark.slow)],
)  # fmt: skip
def test_rotate_and_store(
    tokens: int, heads: int, kv_heads: int, head_dim: int, rotary_dim: int, norm: bool, kind: str
) -> None:
    qkv = randn(tokens, (heads + 2 * kv_heads) * head_dim)
    angles = torch.rand(tokens, rotary_dim // 2, device=DEVICE) * 6
    cos_sin = torch.cat((angles.cos(), angles.sin()), -1)
    norms = [randn(head_dim) if norm else None for _ in range(2)]
    slots = torch.randperm(80, device=DEVICE)[:tokens]
    caches = [empty_cache(kind, 10, 8, kv_heads, head_dim, DEVICE) for _ in range(2)]
    outs = [
        run.rotate_and_store(qkv, heads, cos_sin, *norms, 1e-6, cache, slots, scales)
        for run, (cache, scales) in zip((gpu, reference), caches, strict=True)
    ]
    torch.testing.assert_close(outs[0], outs[1], atol=2e-5, rtol=2e-5)
    check_caches(kind, *caches)


def check_caches(
    kind: str, ours: tuple[torch.Tensor, ...], theirs: tuple[torch.Tensor, ...], off: float = 1e-5
) -> None:
    """Equal but for a code next to the other where a number lay between them.

    `off`: what a head's numbers were rounded by before they became codes, over its largest.
    """
    torch.testing.assert_close(ours[1], theirs[1], atol=0, rtol=max(off, 1e-5))
    a, b = decoded(*ours), decoded(*theirs)
    steps = theirs[1].transpose(-1, -2)[..., None] if kind == "int8" else b.abs() * 2 * ERRORS[kind] + 1e-6
    assert ((a - b).abs() <= steps * 1.01 + b.abs().amax(-1, keepdim=True) * off).all()
    if off <= 1e-5:
        assert ((a - b).abs() > b.abs() * off * 2).float().mean() < 0.002
    elif kind != "int8":  # what cut numbers off instead of rounding them would lose twice as much
        assert (a - b).norm() / b.norm() < ERRORS[kind] * 0.6


@pytest.mark.parametrize(
    ("num_rows", "head_dim", "qk_norm", "kind"),
    [(5, 64, False, "int8"), (3, 32, True, "fp8_e4m3"), (1, 32, False, "fp8_e5m2"),
     pytest.param(20, 32, True, "int8", marks=pytest.mark.slow),
     pytest.param(2, 24, False, "fp8_e4m3", marks=pytest.mark.slow)],
)  # fmt: skip
def test_project_and_store(
    num_rows: int, head_dim: int, qk_norm: bool, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By products that write codes themselves, and by those that leave it to others."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(few_rows, "suits", lambda x, weight: 0 < len(x) <= few_rows.MAX_ROWS)
    heads, kv_heads, size = 4, 2, 96
    weight, bias = weights((heads + 2 * kv_heads) * head_dim, size), of_layers((heads + 2 * kv_heads) * head_dim)
    residual, norm = of_layers(num_rows, size), RMSNorm(norm_weight(size), EPS)
    angles = torch.randn(num_rows, head_dim // 2, device=DEVICE)
    cos_sin = torch.cat((angles.cos(), angles.sin()), -1)
    norms = [norm_weight(head_dim) if qk_norm else None for _ in range(2)]
    slots = torch.randperm(96, device=DEVICE)[:num_rows]
    caches = [empty_cache(kind, 12, 8, kv_heads, head_dim, DEVICE) for _ in range(2)]
    rotation = Rotation(heads, cos_sin, *norms, EPS, caches[0][0], slots, caches[0][1])
    q = gpu.project_and_store(Flow(residual, norm), Linear(Weight.of(weight), bias), rotation)
    normed = reference.rms_norm(residual.float(), norm.weight.float(), EPS)
    exact = reference.rotate_and_store(
        normed @ weight.float().T + bias.float(), heads, cos_sin, *[n if n is None else n.float() for n in norms], EPS,
        caches[1][0], slots, caches[1][1],
    )  # fmt: skip
    off = 1e-5 if q.dtype == torch.float32 else 2e-2
    assert (q.float() - exact).norm() / exact.norm() < off
    check_caches(kind, *caches, off=min(off, 1e-2))


SHAPES = [(4, 2, 16, 16), (7, 1, 24, 8), (2, 1, 160, 16)]


@pytest.mark.parametrize(
    ("kind", "dtype"), [("int8", torch.float32), ("fp8_e4m3", torch.float16), ("fp8_e5m2", torch.float16)]
)
def test_attention(kind: str, dtype: torch.dtype) -> None:
    check_attention("decodes", SHAPES[1], kind, dtype)


def test_attention_of_prompts() -> None:
    check_attention("mixed", SHAPES[0], "fp8_e4m3", torch.float16)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_of_every_kind(shape: tuple[int, int, int, int], case: str, kind: str, dtype: torch.dtype) -> None:
    check_attention(case, shape, kind, dtype)


def check_attention(case: str, shape: tuple[int, int, int, int], kind: str, dtype: torch.dtype) -> None:
    """Against its definition, in float64 over what the codes stand for."""
    heads, kv_heads, head_dim, page_size = shape
    chunks, num_decodes = CASES[case]
    batch = attention_case(chunks, num_decodes, page_size, head_dim=head_dim)
    q = randn(sum(c.count for c in chunks), heads, head_dim, dtype=dtype)
    cache, scales = filled_cache(kind, 400, page_size, kv_heads, head_dim, DEVICE)
    expected = written_out(q, decoded(cache, scales), batch, PLAIN)
    out = gpu.paged_attention(q, cache, batch, PLAIN, scales)
    assert out.dtype == dtype
    check(out, expected, dtype)
    check(reference.paged_attention(q.float(), cache, batch, PLAIN, scales), expected, torch.float32)


def check(out: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert not out.isnan().any(), "an element was not written"
    most = expected.abs().amax(-1, keepdim=True)
    assert ((out.double() - expected).abs() <= most * TOLERANCE[dtype]).all()


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.slow) for kind in ("int8", "fp8_e4m3")])
def test_windows_and_soft_caps(kind: str) -> None:
    options = OPTIONS["both"]
    chunks, num_decodes = [Chunk(4, 77, 1, True), Chunk(0, 33, 70, True)], 1
    batch = attention_case(chunks, num_decodes, 8)
    q = randn(sum(c.count for c in chunks), 2, 16)
    cache, scales = filled_cache(kind, 400, 8, 1, 16, DEVICE)
    expected = written_out(q, decoded(cache, scales), batch, options)
    for run in (reference, gpu):
        check(run.paged_attention(q, cache, batch, options, scales), expected, torch.float32)


@pytest.mark.parametrize("kind", ["int8"])
def test_many_sequences_on_few_processors(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "num_sms", lambda device: 2)
    lengths = [1, 300, 64, 65, 17, 128, 5, 250, 63, 31, 192, 2, 90]
    chunks = [chunk_at(slot, length) for slot, length in enumerate(lengths)]
    batch = attention_case(chunks, len(chunks), 16, head_dim=32)
    q = randn(len(chunks), 6, 32, dtype=torch.float16)
    cache, scales = filled_cache(kind, 400, 16, 2, 32, DEVICE)
    expected = written_out(q, decoded(cache, scales), batch, PLAIN)
    check(gpu.paged_attention(q, cache, batch, PLAIN, scales), expected, torch.float16)


def chunk_at(slot: int, length: int) -> Chunk:
    """A sequence that decodes."""
    return Chunk(slot, length - 1, 1, True)


def test_a_value_that_is_not_finite_stays_in_its_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "num_sms", lambda device: 1)
    chunks = [chunk_at(slot, 10 + 50 * slot) for slot in range(8)]
    batch = attention_case(chunks, len(chunks), 16, head_dim=32)
    q = randn(len(chunks), 4, 32)
    cache, scales = filled_cache("int8", 400, 16, 2, 32, DEVICE)
    scales[1, batch.page_tables[2, 1].long(), :, 3] = float("inf")
    finite = gpu.paged_attention(q, cache, batch, PLAIN, scales).isfinite().flatten(1).all(1)
    assert finite.tolist() == [slot != 2 for slot in range(8)]


@pytest.mark.gpu
@pytest.mark.parametrize("num_programs", [4, None])
@pytest.mark.parametrize("kind", KINDS)
def test_one_key_among_131072_is_found(kind: str, num_programs: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """By as many programs as there are, and by few, each of which adds up tens of thousands of keys."""
    if num_programs is not None:
        monkeypatch.setattr(attention, "num_sms", lambda device: num_programs // 2)

    def attend(q: torch.Tensor, cache: torch.Tensor, scales: torch.Tensor, length: int) -> torch.Tensor:
        batch = attention_case([chunk_at(0, 64)], 1, 16, head_dim=64)
        pages = torch.arange(length // 16 + 2, dtype=torch.int32, device=DEVICE)[1 : length // 16 + 1]
        lengths = torch.tensor([length], device=DEVICE)
        inputs = batch.inputs._replace(kv_lengths=lengths, decode_lengths=lengths)
        batch = replace(batch, inputs=inputs, all_page_tables=(pages.expand(2, -1).contiguous(),))
        return gpu.paged_attention(q, cache, batch, AttentionOptions(q.shape[-1] ** -0.5), scales)

    check_needle(attend, kind, 1 << 17, torch.bfloat16, 5e-3)
