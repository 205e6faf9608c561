"""The C++ kernels against plain PyTorch, as compiled for this processor and for those that it can stand in for."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, get_args

import numpy as np
import pytest
import torch

from ingle.device.torch.tables import SlotTables
from ingle.kernels import reference
from ingle.kernels.batch import Batch
from ingle.kernels.cpu import compile, library, targets
from ingle.kernels.cpu.attention import paged_attention
from ingle.kernels.options import Activation, AttentionOptions, RouterConfig
from ingle.kernels.sampling import Features, SamplingTables
from ingle.request import SamplingParams
from ingle.step import Admission, Chunk, Step
from ingle.weights.code_types import CODE_TYPES, CodeType, exact
from ingle.weights.codes import CODED_BLOCKS
from ingle.weights.gguf import BLOCK_TYPES
from ingle.weights.packed_matrix import PackedMatrix, PackedPart
from ingle.weights.source import FLOATS, StoredRows
from tests.kernels import coded_kv, cpu
from tests.kernels.coded_kv import ERRORS, check_needle, decoded, empty_cache, filled_cache, in_order_of_the_cpu

_SUITABLE = [target.name for target in reversed(targets.suitable(targets.features()))]
EXECUTED = ["native", *(pytest.param(name, marks=pytest.mark.slow if "v4+" in name else ()) for name in _SUITABLE)]
"""All targets that this processor can stand in for; what AVX-512 has beside its basis, `native` covers where it is."""
LARGEST = 127 * 256 + 127
"""The integer that the largest number of a token becomes (`kLargest` in codes.h)."""
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=EXECUTED, scope="module", autouse=True)
def kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """Takes the place of the kernels that this process may have started."""
    try:
        loaded = library.load(str(compile.library(request.param)))
    except compile.CompileError as error:
        pytest.skip(str(error))
    loaded.ingle_start(3)
    before, library._loaded = library._loaded, loaded
    yield
    library._loaded = before


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=tolerance)


# ---- matrices


SPAN = 256
"""Columns whose steps have a factor in common (`kSpan` in matrix.h)."""
KINDS = [
    CodeType(4, 32, codebook=tuple(range(-8, 8))),
    CodeType(4, 32, has_minima=True, codebook=tuple(range(16))),
    CodeType(4, 16, wide_scales=True, has_minima=True, codebook=tuple(range(16))),
    CodeType(4, 32, wide_scales=True, codebook=tuple(int(x) for x in np.linspace(-127, 113, 16))),
    CodeType(4, 32, steps=True, has_minima=True, codebook=tuple(range(16))),
    CodeType(4, 16, steps=True, codebook=tuple(range(-4, 12))),
    CodeType(4, 64, has_minima=True, minima_in_scales=True, codebook=tuple(range(-8, 8))),
    CodeType(5, 32, codebook=(-16,) * 16),
    CodeType(5, 32, steps=True, has_minima=True),
    CodeType(6, 16, steps=True, codebook=(-32,) * 16),
    CodeType(8, 32),
    CodeType(8, 16, wide_scales=True),
    CodeType(8, 32, wide_scales=True, has_minima=True),
    CodeType(16, 32),
    CodeType(32, 32),
]
_LONG = CodeType(4, 128, minima_in_scales=True, has_minima=True, codebook=tuple(range(-8, 8)))
ROUNDED = [replace(kind, operand_bits=8) for kind in (*KINDS[:-2], _LONG)]
"""The same to be multiplied with activations of 8 bits."""
SHAPES = [(1, 32), (33, 64), (96, 576), (50, 72), (40, 20)]


class Rows(NamedTuple):
    """What `ingle_pack_rows` takes."""

    codes: torch.Tensor
    scales: torch.Tensor
    minima: torch.Tensor | None = None
    factors: torch.Tensor | None = None


def coded(code_type: CodeType, num_rows: int, columns: int) -> tuple[Rows, torch.Tensor]:
    """Random rows, and the float32 matrix that they stand for."""
    if code_type.bits >= 16:
        values = torch.randn(num_rows, columns).to(torch.bfloat16 if code_type.bits == 16 else torch.float32)
        return Rows(values, torch.empty(0)), values.float()
    codes = torch.randint(0, 16, (num_rows, columns), dtype=torch.uint8)
    values = torch.tensor(code_type.codebook).float()[codes.long()]
    if code_type.bits > 4:
        least = -128 if code_type.bits == 8 else code_type.codebook[0]
        codes = torch.randint(least, least + (1 << code_type.bits), (num_rows, columns), dtype=torch.int8)
        values = codes.float()
    scale_type = torch.float32 if code_type.wide_scales else torch.float16
    groups, spans = -(-columns // code_type.group_size), -(-columns // SPAN)
    scales, minima = (torch.randn(num_rows, groups).mul(0.1).to(scale_type).float() for _ in range(2))
    factors = None
    if code_type.steps:
        groups = spans * SPAN // code_type.group_size
        scales, minima = (torch.randint(-32, 64, (num_rows, groups)).float() for _ in range(2))
        factors = torch.randn(num_rows, spans, 2).mul(0.01).half().float()
    elif code_type.minima_in_scales:
        minima = torch.randint(-8, 9, (num_rows, groups)).float()
    real = (scales, minima * scales if code_type.minima_in_scales else minima)
    if factors is not None:
        real = tuple(
            part * factors[:, :, i].repeat_interleave(SPAN // code_type.group_size, 1) for i, part in enumerate(real)
        )
    spread = [part.repeat_interleave(code_type.group_size, 1)[:, :columns] for part in real]
    if not code_type.has_minima:
        return Rows(codes, scales, None, factors), values * spread[0]
    return Rows(codes, scales, minima, factors), values * spread[0] + spread[1]


def packed(code_type: CodeType, num_rows: int, columns: int) -> tuple[PackedPart, torch.Tensor]:
    rows, values = coded(code_type, num_rows, columns)
    part = PackedPart.empty(code_type, num_rows, columns)
    pack(part, rows)
    return part, values


def pack(part: PackedPart, rows: Rows, first: int = 0) -> None:
    addresses = [None if tensor is None else tensor.data_ptr() for tensor in rows]
    library.get().ingle_pack_rows(ctypes.byref(part.matrix), *addresses, first, len(rows.codes))


@dataclass(frozen=True)
class Weight:
    """A packed matrix whose numbers are tensors."""

    matrix: PackedMatrix

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.matrix.multiply(x.contiguous().numpy()))

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.matrix.rows(indices.numpy()))


def weight_of(*parts: PackedPart) -> Weight:
    return Weight(PackedMatrix(parts, sum(part.matrix.rows for part in parts), parts[0].matrix.columns))


def product(x: torch.Tensor, weight: torch.Tensor, part: PackedPart) -> torch.Tensor:
    """x @ weight.T in float64; x as the kernels see it."""
    (factors,) = part.factors
    if factors == "bfloat16":
        x = x.bfloat16()
    elif factors == "16-bit integers":
        scale = x.abs().amax(-1, keepdim=True) / LARGEST
        x = (x / scale).round() * scale
    elif factors == "8-bit integers":
        size = min(part.matrix.group_size, 32)
        grouped = torch.nn.functional.pad(x, (0, -x.shape[1] % size)).unflatten(1, (-1, size))
        scale = grouped.abs().amax(-1, keepdim=True) / 127
        x = ((grouped * (1 / scale)).round() * scale).flatten(1)[:, : x.shape[1]]
    return (x.double() @ weight.double().T).float()


@pytest.mark.parametrize(
    ("code_type", "num_rows", "columns"),
    [
        *((kind, *shape) for kind in KINDS for shape in SHAPES),
        *((kind, *SHAPES[2 + i % 3]) for i, kind in enumerate(ROUNDED)),
    ],
    ids=str,
)
def test_products(code_type: CodeType, num_rows: int, columns: int) -> None:
    part, values = packed(code_type, num_rows, columns)
    weight = weight_of(part)
    for num_tokens in (1, 2, 3, 5, 7, 12, 13, 40, 100):
        x = torch.randn(num_tokens, columns)
        expected = product(x, values, part)
        scale = float((x.abs() @ values.abs().T).max())  # of what is added: sums themselves may cancel
        # A number between two codes may be rounded to the other one: 1 / LARGEST of the largest.
        # Of 8 bits that is more, and as rare.
        found, bound = weight.multiply(x), 2e-5 * scale
        right = (found - expected).abs() <= bound + 1e-5 * expected.abs()
        if part.factors == {"8-bit integers"}:
            torch.testing.assert_close(found, expected, atol=1e-3 * scale, rtol=1e-5)
            assert right.float().mean() > 0.9
        else:
            assert right.all()


@pytest.mark.parametrize("code_type", KINDS, ids=str)
def test_rows_are_the_stored_numbers(code_type: CodeType) -> None:
    part, values = packed(code_type, 70, 96)
    indices = torch.tensor([0, 69, 31, 32, 5, 5, 64, 1, 2, 3])
    rows = weight_of(part).rows(indices)
    torch.testing.assert_close(rows, values[indices], atol=1e-6, rtol=2e-7)  # a fused multiply-add rounds once


@pytest.mark.parametrize("name", [*CODED_BLOCKS, "F32", "F16", "BF16"])
def test_stored_blocks_are_packed_as_pytorch_splits_them(name: str) -> None:
    """In any order, and beginning amid the rows that a product takes together."""
    block = next(block for block in BLOCK_TYPES.values() if block.name == name)
    num_rows, columns, first = 75, 2 * max(block.elements, 16), 37
    most = 60 if name in CODED_BLOCKS and CODE_TYPES[name].steps else 256  # which makes no factor infinite
    stored = np.random.default_rng(5).integers(0, most, (num_rows, columns // block.elements * block.nbytes), np.uint8)
    order = np.random.default_rng(6).permutation(num_rows)
    blocks = torch.from_numpy(stored[order]).view(-1, block.nbytes)
    if name in CODED_BLOCKS:
        code_type = CODE_TYPES[name]
        rows = Rows(
            *(None if part is None else part.reshape(num_rows, -1) for part in CODED_BLOCKS[name].split(blocks))
        )
    else:
        code_type = CodeType(16, 32)
        kind = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[name]
        rows = Rows(blocks.view(kind).to(torch.bfloat16).view(num_rows, -1), torch.empty(0))
    ours, theirs = (PackedPart.empty(code_type, first + num_rows, columns) for _ in range(2))
    ours.pack(first, StoredRows(name, stored, order))
    everywhere = torch.arange(first + num_rows)
    if code_type.steps:  # which PyTorch has multiplied with their factors
        decoded = CODED_BLOCKS[name].decode(blocks).view(num_rows, -1)
        scale = float(decoded.abs().max())
        torch.testing.assert_close(weight_of(ours).rows(everywhere[first:]), decoded, atol=scale * 1e-7, rtol=3e-7)
        return
    pack(theirs, rows, first)
    np.testing.assert_array_equal(weight_of(ours).rows(everywhere), weight_of(theirs).rows(everywhere))


@pytest.mark.parametrize("name", [*CODED_BLOCKS, "F32", "F16", "BF16"])
def test_stored_blocks_are_decoded_to_float32(name: str) -> None:
    block = next(block for block in BLOCK_TYPES.values() if block.name == name)
    num_rows, columns = 37, 2 * max(block.elements, 16)
    # Bytes below 60 make no binary16 that is infinite or NaN.
    stored = np.random.default_rng(7).integers(0, 60, (num_rows, columns // block.elements * block.nbytes), np.uint8)
    if name in CODED_BLOCKS:
        values = CODED_BLOCKS[name].decode(torch.from_numpy(stored).view(-1, block.nbytes)).view(num_rows, columns)
    else:
        values = torch.from_numpy(FLOATS[name](stored))
    part = PackedPart.empty(exact(name), num_rows, columns)
    part.pack(0, StoredRows(name, stored, None))
    scale = float(values.abs().max())  # a sum may cancel, where a fused multiply-add rounds once
    ours = weight_of(part).rows(torch.arange(num_rows))
    torch.testing.assert_close(ours, values, atol=scale * 1e-7, rtol=2e-7 if name in CODED_BLOCKS else 0)


def test_parts_stand_side_by_side() -> None:
    (first, a), (second, b) = packed(KINDS[1], 70, 64), packed(KINDS[5], 33, 64)
    x = torch.randn(4, 64)
    both = weight_of(first, second).multiply(x)
    close(both, torch.cat((product(x, a, first), product(x, b, second)), 1), 1e-3)
    assert torch.equal(both[:, :70], weight_of(first).multiply(x))


@pytest.mark.parametrize("code_type", [*KINDS, *ROUNDED], ids=str)
def test_a_row_is_the_same_in_any_batch(code_type: CodeType) -> None:
    part, _ = packed(code_type, 64, 96)
    weight, x = weight_of(part), torch.randn(40, 96)
    together = weight.multiply(x)
    for row in range(40):
        assert torch.equal(weight.multiply(x[row : row + 1])[0], together[row])


def test_what_is_not_finite_stays_so() -> None:
    for code_type in (*KINDS, *ROUNDED):
        part, _ = packed(code_type, 40, 64)
        x = torch.randn(3, 64)
        x[0, 5], x[2, 60] = torch.nan, torch.inf
        y = weight_of(part).multiply(x)
        assert not y[0].isfinite().any() and y[1].isfinite().all() and not y[2].isfinite().any()


# ---- mixtures


ROUTERS = [
    RouterConfig(8, 3),
    RouterConfig(5, 1, norm_topk_prob=True),
    RouterConfig(40, 8, scoring="sigmoid", norm_topk_prob=True, routed_scaling_factor=2.5),
    RouterConfig(12, 4, num_groups=4, topk_group=2, group_experts=2, scoring="sigmoid"),
    RouterConfig(12, 3, num_groups=3, topk_group=1, routed_scaling_factor=4.0),
]


@pytest.mark.parametrize("config", ROUTERS, ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_mixtures(config: RouterConfig, biased: bool) -> None:
    hidden, inner = 64, 48
    router = torch.randn(config.num_experts, hidden).mul(0.3)
    bias = torch.randn(config.num_experts).mul(0.2) if biased else None
    gate_up, down = (
        [packed(CodeType(16, 32), *shape) for _ in range(config.num_experts)]
        for shape in ((2 * inner, hidden), (hidden, inner))
    )
    held = [[ctypes.pointer(ctypes.pointer(part.matrix)) for part, _ in each] for each in (gate_up, down)]
    projections = [
        (library.Projection * config.num_experts)(
            *(library.Projection(parts=part, num_parts=1, rows=rows) for part in parts)
        )
        for parts, rows in zip(held, (2 * inner, hidden), strict=True)
    ]
    mixture = library.Mixture(
        router=router.data_ptr(), selection_bias=None if bias is None else bias.data_ptr(), gate_up=projections[0],
        down=projections[1], num_experts=config.num_experts, top_k=config.top_k, num_groups=config.num_groups,
        topk_group=config.topk_group, group_experts=config.group_experts, scaling=config.routed_scaling_factor,
        scoring=library.SCORINGS[config.scoring], normalizes=config.norm_topk_prob,
    )  # fmt: skip
    for num_tokens in (1, 2, 30):
        x, out = torch.randn(num_tokens, hidden), torch.empty(num_tokens, hidden)
        library.get().ingle_mix(ctypes.byref(mixture), 0, x.data_ptr(), num_tokens, hidden, out.data_ptr())
        weights = [torch.stack([values for _, values in each]) for each in (gate_up, down)]
        expected = reference.experts(x, *reference.route(x @ router.T, bias, config), *weights, "silu")
        assert (out - expected).norm() < (
            0.02 if library.factors(library.Matrix(bits=16)) == "bfloat16" else 1e-5
        ) * expected.norm()


# ---- small operators


@pytest.mark.parametrize(("rows", "size"), [(1, 64), (7, 72), (40, 1536), (2, 5)])
def test_norms(rows: int, size: int) -> None:
    x, residual, weight = torch.randn(rows, size), torch.randn(rows, size), torch.randn(size)
    close(cpu.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    for post_weight in (None, torch.randn(size)):
        normed, summed = reference.add_rms_norm(x, residual, weight, 1e-5, post_weight)
        ours = cpu.add_rms_norm(x, residual.clone(), weight, 1e-5, post_weight)
        close(ours[0], normed)
        close(ours[1], summed)


@pytest.mark.parametrize(("rows", "size"), [(1, 32), (5, 1500), (30, 7)])
@pytest.mark.parametrize("activation", get_args(Activation))
def test_gated(rows: int, size: int, activation: Activation) -> None:
    gate_up = torch.randn(rows, 2 * size) * 3
    gate_up[0, :2] = torch.tensor([-200.0, 200.0])
    close(cpu.gated(gate_up, activation), reference.gated(gate_up, activation))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "rotary_dim"), [(9, 3, 64, 64), (4, 1, 24, 12), (2, 2, 8, 8)]
)
@pytest.mark.parametrize("normed", [True, False])
def test_rotate_and_store(
    heads: int, kv_heads: int, head_dim: int, rotary_dim: int, normed: bool, dtype: torch.dtype
) -> None:
    num_tokens, page_size = 19, 8
    qkv = torch.randn(num_tokens, (heads + 2 * kv_heads) * head_dim)
    cos_sin = torch.randn(num_tokens, rotary_dim)
    norms = [torch.randn(head_dim) if normed else None for _ in range(2)]
    slots = torch.randperm(5 * page_size)[:num_tokens]
    caches = [torch.zeros(2, 5, page_size, kv_heads, head_dim, dtype=t) for t in (dtype, torch.float32)]
    results = [
        run.rotate_and_store(qkv.clone(), heads, cos_sin, *norms, 1e-5, cache, slots)
        for run, cache in zip((cpu, reference), caches, strict=True)
    ]
    close(*results)
    rounding = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(caches[0].float(), caches[1], atol=1e-5, rtol=rounding)


@pytest.mark.parametrize("kind", coded_kv.KINDS)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(9, 3, 64), (4, 1, 22)])
def test_rotate_and_store_codes(heads: int, kv_heads: int, head_dim: int, kind: str) -> None:
    """The same codes and scales as PyTorch's, in another order, but for some that lie between two."""
    num_tokens, page_size = 19, 8
    sizes = torch.logspace(-4, 3, num_tokens)
    qkv = torch.randn(num_tokens, (heads + 2 * kv_heads) * head_dim) * sizes[:, None]
    qkv[3, -1], qkv[5, -1], qkv[7] = float("nan"), float("inf"), 0.0
    cos_sin = torch.randn(num_tokens, head_dim - 2)
    slots = torch.randperm(5 * page_size)[:num_tokens]
    caches = [empty_cache(kind, 5, page_size, kv_heads, head_dim, torch.device("cpu")) for _ in range(2)]
    results = [
        run.rotate_and_store(qkv.clone(), heads, cos_sin, None, None, 1e-5, cache, slots, scales)
        for run, (cache, scales) in zip((cpu, reference), caches, strict=True)
    ]
    close(*(queries / sizes[:, None, None] for queries in results))
    torch.testing.assert_close(caches[0][1], caches[1][1], rtol=1e-5, atol=0)
    ours, theirs = in_order_of_the_cpu(*caches[0]), decoded(*caches[1])
    assert torch.equal(ours.isnan(), theirs.isnan()) and ours.isnan().any()
    ours, theirs = ours.nan_to_num(), theirs.nan_to_num()
    steps = caches[1][1].transpose(-1, -2)[..., None].nan_to_num(posinf=0.0)
    steps = steps if kind == "int8" else theirs.abs() * 2 * ERRORS[kind] + steps * 0.01
    assert ((ours - theirs).abs() <= steps * 1.01).all()
    assert ((ours - theirs).abs() > theirs.abs() * 1e-4).float().mean() < 0.002


# ---- attention


def step(lengths: list[tuple[int, int]], page_size: int) -> Batch:
    """Chunks (start, count) of as many sequences, decodes first, over shuffled pages."""
    most = max(start + count for start, count in lengths)
    tables = SlotTables(len(lengths), most, page_size, 64, torch.device("cpu"))
    pages = iter(np.random.default_rng(0).permutation(len(lengths) * -(-most // page_size)) + 1)
    made = Step()
    for slot, (start, count) in enumerate(lengths):
        taken = [int(next(pages)) for _ in range(-(-(start + count) // page_size))]
        made.admissions.append(Admission(slot, [1] * (start + count), start + count, [taken], SamplingParams(), 0, ()))
        made.chunks.append(Chunk(slot, start, count, True))
        made.num_tokens += count
    made.num_decodes = sum(count == 1 for _, count in lengths)
    tables.apply(made)
    return tables.batch_of(made)


STEPS = {
    "one": [(0, 1)],
    "decodes": [(0, 1), (15, 1), (16, 1), (700, 1)],
    "long": [(1500, 1)],
    "prompt": [(0, 100)],
    "mixed": [(40, 1), (3, 1), (0, 33), (64, 50), (7, 2)],
}
OPTIONS = [
    AttentionOptions(0.3),
    AttentionOptions(0.3, window=20),
    AttentionOptions(0.3, softcap=2.0),
    AttentionOptions(0.3, window=1, softcap=5.0),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "page_size"), [(9, 3, 64, 16), (20, 2, 40, 8), (2, 2, 8, 32), (18, 1, 136, 8)]
)
def test_attention(
    heads: int, kv_heads: int, head_dim: int, page_size: int, name: str, options: AttentionOptions
) -> None:
    batch = step(STEPS[name], page_size)
    num_pages = int(batch.page_tables.max()) + 1
    cache = torch.randn(2, num_pages, page_size, kv_heads, head_dim)
    q = torch.randn(len(batch.token_ids), heads, head_dim)
    close(paged_attention(q, cache, batch, options), reference.paged_attention(q, cache, batch, options))


@pytest.mark.parametrize("name", STEPS)
def test_attention_with_sinks(name: str) -> None:
    """By their definition: a key more, whose value is zero. Some are far above all scores, some far below."""
    batch, options = step(STEPS[name], 16), AttentionOptions(0.3, window=None if name == "long" else 40)
    cache, q = torch.randn(2, int(batch.page_tables.max()) + 1, 16, 3, 64), torch.randn(len(batch.token_ids), 9, 64)
    sinks = torch.tensor([0.0, 3.0, -2.0, 300.0, -300.0, 8.0, 1e-3, -1e9, 5.0])
    ours = paged_attention(q, cache, batch, options, None, sinks)
    close(ours, reference.paged_attention(q, cache, batch, options, None, sinks))
    without = reference.paged_attention(q, cache, batch, options)
    close(ours[:, [4, 7]], without[:, [4, 7]])
    assert (ours[:, 3] == 0).all() and ours[:, 1].norm() < without[:, 1].norm()
    halves = cache.half()
    expected = reference.paged_attention(q, halves.float(), batch, options, None, sinks)
    close(paged_attention(q, halves, batch, options, None, sinks), expected)
    near(paged_attention(q, halves, batch, options, None, sinks, as_integers=True), expected)


def near(ours: torch.Tensor, expected: torch.Tensor) -> None:
    """As near as prompts' products of 16-bit integers are: what is left out is as much as binary16 leaves out."""
    assert ((ours - expected).abs() <= 1e-3 * expected.abs().max()).all()
    assert (ours - expected).norm() < 5e-4 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_attention_reads_16_bit_caches(dtype: torch.dtype) -> None:
    batch = step(STEPS["mixed"], 16)
    cache = torch.randn(2, int(batch.page_tables.max()) + 1, 16, 3, 64).to(dtype)
    q = torch.randn(len(batch.token_ids), 9, 64)
    expected = reference.paged_attention(q, cache.float(), batch, OPTIONS[0])
    close(paged_attention(q, cache, batch, OPTIONS[0]), expected)
    near(paged_attention(q, cache, batch, OPTIONS[0], as_integers=True), expected)


@pytest.mark.parametrize("window", [None, 100])
def test_attention_by_integers_over_several_blocks_of_keys(window: int | None) -> None:
    options, batch = AttentionOptions(0.3, window=window), step([(9, 1), (0, 200), (131, 40)], 16)
    cache = torch.randn(2, int(batch.page_tables.max()) + 1, 16, 2, 40).half()
    q = torch.randn(len(batch.token_ids), 4, 40)
    expected = reference.paged_attention(q, cache.float(), batch, options)
    near(paged_attention(q, cache, batch, options, as_integers=True), expected)


@pytest.mark.slow
def test_attention_by_integers_over_more_keys_than_are_prepared() -> None:
    """16 heads of 4,200 keys are 69 MB as integers: threads then make those that they need."""
    batch = step([(4160, 40)], 16)
    cache = torch.randn(2, int(batch.page_tables.max()) + 1, 16, 16, 256).half()
    q = torch.randn(40, 16, 256) * 0.1
    options = AttentionOptions(0.1, window=4100)
    expected = reference.paged_attention(q, cache.float(), batch, options)
    near(paged_attention(q, cache, batch, options, as_integers=True), expected)


@pytest.mark.parametrize("kind", coded_kv.KINDS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "page_size", "options"),
    [(20, 2, 40, 8, OPTIONS[1]), (2, 2, 8, 32, OPTIONS[2]), (18, 1, 136, 8, OPTIONS[0])],
)
def test_attention_over_codes(
    heads: int, kv_heads: int, head_dim: int, page_size: int, options: AttentionOptions, kind: str
) -> None:
    for name in ("decodes", "mixed"):
        batch = step(STEPS[name], page_size)
        cache, scales = filled_cache(
            kind, int(batch.page_tables.max()) + 1, page_size, kv_heads, head_dim, torch.device("cpu")
        )
        q = torch.randn(len(batch.token_ids), heads, head_dim) * 0.3
        expected = reference.paged_attention(q, cache, batch, options, scales)
        ours = paged_attention(q, cache, batch, options, scales)
        assert ((ours - expected).abs() <= expected.abs().amax(-1, keepdim=True) * 3e-5).all()
        near(paged_attention(q, cache, batch, options, scales, as_integers=True), expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", coded_kv.KINDS)
def test_one_key_among_131072_is_found(kind: str) -> None:
    def attend(q: torch.Tensor, cache: torch.Tensor, scales: torch.Tensor, length: int) -> torch.Tensor:
        batch = step([(length - 1, 1)], 16)
        batch.page_tables[0] = torch.arange(1, length // 16 + 1)
        return paged_attention(q, cache, batch, AttentionOptions(q.shape[-1] ** -0.5), scales)

    check_needle(attend, kind, 1 << 17, torch.float32, 2e-5)


# ---- sampling


def test_greedy_takes_the_first_of_the_largest_and_finds_what_is_not_finite() -> None:
    logits = torch.randn(5, 1003)
    logits[0, [7, 900]] = 50.0
    logits[1, 1002] = 60.0
    logits[2, 5] = torch.nan
    logits[3, 1001] = -torch.inf
    tables = SamplingTables.allocate(1, 1003, torch.device("cpu"))
    rows = torch.zeros(5, dtype=torch.int64)
    token_ids, finite, _ = cpu.sample(logits, rows, rows, tables, Features())
    assert token_ids[[0, 1, 4]].tolist() == [7, 1002, int(logits[4].argmax())]
    assert finite.tolist() == [True, True, False, False, True]


def test_draws_are_the_reference_s() -> None:
    logits, rows = torch.randn(6, 500), torch.arange(6)
    tables = SamplingTables.allocate(6, 500, torch.device("cpu"))
    tables.floats[:, :2], tables.ints[:, :2] = torch.tensor([0.8, 0.9]), torch.tensor([3, 40])
    ours = cpu.sample(logits, rows, rows + 9, tables, Features(filtered=True))
    assert torch.equal(ours[0], reference.sample(logits, rows, rows + 9, tables, Features(filtered=True))[0])
