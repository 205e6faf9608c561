"""The Triton kernels against plain PyTorch: under Triton's interpreter where there is no GPU, else on it."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch

from ingle.device.inputs import Layout, layout_of, pack
from ingle.device.torch.tables import SlotTables, unpack
from ingle.kernels import gpu, reference
from ingle.kernels.batch import Batch, query_block
from ingle.kernels.gpu import attention
from ingle.kernels.options import Activation, AttentionOptions
from ingle.kv import first_page_seen
from ingle.request import SamplingParams
from ingle.step import RESERVED_PAGE, Admission, Chunk, Step
from tests.kernels.interpreted import pairwise

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
# The interpreter multiplies bfloat16 wrongly, so that type is tried on a GPU only.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if ON_GPU else [])
PLAIN = AttentionOptions(0.3)
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture(autouse=True)
def same_numbers_each_time() -> None:
    torch.manual_seed(0)
    np.random.seed(0)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def close(ours: torch.Tensor, theirs: torch.Tensor, dtype: torch.dtype) -> None:
    assert not torch.isnan(ours).any(), "an element was not written"
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("num_groups", [1, 3])
@pytest.mark.parametrize("num_tokens", [1, 128, 300])
def test_locate(num_tokens: int, num_groups: int) -> None:
    token_table = torch.randint(50_000, (5, 90), dtype=torch.int32, device=DEVICE)
    page_tables = torch.randint(1 << 30, (num_groups, 5, 12), dtype=torch.int32, device=DEVICE)
    slots = torch.randint(5, (num_tokens,), device=DEVICE)
    positions = torch.randint(90, (num_tokens,), device=DEVICE)
    for ours, theirs in zip(
        *(k.locate(slots, positions, token_table, page_tables, 8) for k in (gpu, reference)), strict=True
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("num_tokens", [1, 130])
def test_keep(num_tokens: int) -> None:
    places = torch.randperm(5 * 90, device=DEVICE)[:num_tokens]
    slots, positions, token_ids = places // 90, places % 90, torch.randint(50_000, (num_tokens,), device=DEVICE)
    tables = [torch.zeros(5, 90, dtype=torch.int32, device=DEVICE) for _ in range(2)]
    for k, table in zip((gpu, reference), tables, strict=True):
        k.keep(token_ids, slots, positions, table)
    assert torch.equal(*tables)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 64), (7, 96), (3, 1536)])
def test_norms(rows: int, size: int, dtype: torch.dtype) -> None:
    x, residual = randn(rows, size, dtype=dtype), randn(rows, size, dtype=dtype)
    for weight, post in ((randn(size, dtype=dtype), randn(size, dtype=dtype)), (randn(size), randn(size))):
        close(gpu.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5), dtype)
        for post_weight in (None, post):
            normed, summed = reference.add_rms_norm(x, residual, weight, 1e-5, post_weight)
            ours = gpu.add_rms_norm(x, residual.clone(), weight, 1e-5, post_weight)
            close(ours[0], normed, dtype)
            close(ours[1], summed, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_soft_cap(dtype: torch.dtype) -> None:
    x = randn(3, 5001, dtype=dtype) * 40
    x[0, :4] = torch.tensor([0.0, 1e4, -1e4, 1e-3])
    close(gpu.soft_cap(x, 30.0), reference.soft_cap(x.float(), 30.0).to(dtype), dtype)


def test_a_wide_norm_weight_is_rounded_once() -> None:
    """As Gemma's norms are: 1 + weight in float32, its product too, and one rounding."""
    x, weight = randn(5, 96, dtype=torch.float16), 1 + randn(96) * 1e-3
    wide = x.float()
    expected = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * weight).half()
    assert torch.equal(reference.rms_norm(x, weight, 1e-6), expected)
    close(gpu.rms_norm(x, weight, 1e-6), expected, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 32), (5, 1500)])
@pytest.mark.parametrize("activation", get_args(Activation))
def test_gated(rows: int, size: int, activation: Activation, dtype: torch.dtype) -> None:
    gate_up = randn(rows, 2 * size, dtype=dtype) * 3
    close(gpu.gated(gate_up, activation), reference.gated(gate_up, activation), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", ["none", "same", "wide"])
@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "head_dim", "rotary_dim"),
    [(1, 4, 2, 16, 16), (5, 9, 3, 24, 24), (3, 4, 1, 32, 16), (70, 2, 2, 16, 16)],
)
def test_rotate_and_store(
    tokens: int, heads: int, kv_heads: int, head_dim: int, rotary_dim: int, norm: str, dtype: torch.dtype
) -> None:
    qkv = randn(tokens, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    angles = torch.rand(tokens, rotary_dim // 2, device=DEVICE) * 6
    cos_sin = torch.cat((angles.cos(), angles.sin()), -1)
    norm_dtype = torch.float32 if norm == "wide" else dtype
    weights = [None if norm == "none" else randn(head_dim, dtype=norm_dtype) for _ in range(2)]
    slots = torch.randperm(10 * 8, device=DEVICE)[:tokens]
    caches = [torch.zeros(2, 10, 8, kv_heads, head_dim, dtype=dtype, device=DEVICE) for _ in range(2)]
    outs = [
        kernel(qkv, heads, cos_sin, *weights, 1e-6, cache, slots)
        for kernel, cache in zip((gpu.rotate_and_store, reference.rotate_and_store), caches, strict=True)
    ]
    close(outs[0], outs[1], dtype)
    close(caches[0], caches[1], dtype)


def attention_case(
    chunks: list[Chunk], num_decodes: int, page_size: int, padding: int = 0, head_dim: int = 16
) -> Batch:
    """A batch over shuffled pages, made as the engine makes it."""
    longest = max(chunk.start + chunk.count for chunk in chunks)
    tables = SlotTables(max(chunk.slot for chunk in chunks) + 2, longest, page_size, query_block(head_dim), DEVICE)
    pages = iter(np.random.permutation(np.arange(1, 400)).tolist())
    admissions = [
        Admission(
            slot=chunk.slot,
            token_ids=[0] * (chunk.start + chunk.count),
            num_prompt_tokens=1,
            page_ids=[[next(pages) for _ in range(-(-(chunk.start + chunk.count) // page_size))]],
            sampling=SamplingParams(),
            seed=0,
            end_token_ids=(),
        )
        for chunk in chunks
    ]
    step = Step(admissions=admissions, chunks=chunks, num_decodes=num_decodes, num_tokens=sum(c.count for c in chunks))
    tables.apply(step)
    if not padding:
        return tables.batch_of(step)
    exact = layout_of(step, tables.query_block)
    layout = Layout(
        *(getattr(exact, name) + padding for name in ("num_tokens", "num_seqs", "num_samples", "num_blocks"))
    )
    packed = pack(step, layout, tables.query_block, tables.padding_slot)
    inputs = unpack(torch.from_numpy(packed).to(DEVICE), layout)
    return tables.batch(inputs, layout.num_seqs, layout.num_blocks, [])


CASES = {
    "one-decode": ([Chunk(1, 0, 1, True)], 1),
    "decodes": ([Chunk(3, 200, 1, True), Chunk(0, 15, 1, True), Chunk(2, 64, 1, True), Chunk(1, 63, 1, True)], 4),
    "prompt": ([Chunk(0, 0, 70, True)], 0),
    "prompts": ([Chunk(1, 0, 1, True), Chunk(0, 0, 65, False), Chunk(2, 0, 3, True)], 0),
    "continued": ([Chunk(1, 130, 5, True), Chunk(0, 64, 64, False)], 0),
    "mixed": ([Chunk(4, 77, 1, True), Chunk(1, 5, 1, True), Chunk(0, 33, 100, True), Chunk(2, 0, 9, False)], 2),
}


@pytest.mark.parametrize(
    ("case", "heads", "kv_heads", "head_dim", "page_size", "dtype"),
    pairwise(CASES, [(4, 2, 16, 16), (9, 3, 24, 8), (7, 1, 32, 16), (2, 1, 160, 16)], DTYPES),
)
def test_paged_attention(
    case: str, heads: int, kv_heads: int, head_dim: int, page_size: int, dtype: torch.dtype
) -> None:
    chunks, num_decodes = CASES[case]
    batch = attention_case(chunks, num_decodes, page_size, head_dim=head_dim)
    q = randn(sum(c.count for c in chunks), heads, head_dim, dtype=dtype)
    cache = randn(2, 400, page_size, kv_heads, head_dim, dtype=dtype)
    expected = reference.paged_attention(q.float(), cache.float(), batch, PLAIN)
    close(gpu.paged_attention(q, cache, batch, PLAIN).float(), expected, dtype)


def test_wide_heads_where_little_memory_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "shared_memory", lambda device: 100 << 10)
    chunks, num_decodes = CASES["mixed"]
    batch = attention_case(chunks, num_decodes, 16, head_dim=256)
    q = randn(sum(c.count for c in chunks), 2, 256, dtype=torch.float16)
    cache = randn(2, 400, 16, 1, 256, dtype=torch.float16)
    expected = reference.paged_attention(q.float(), cache.float(), batch, PLAIN)
    close(gpu.paged_attention(q, cache, batch, PLAIN).float(), expected, torch.float16)


OPTIONS = {
    "one-key": AttentionOptions(0.3, window=1),
    "narrow": AttentionOptions(0.3, window=10),
    "wide": AttentionOptions(0.3, window=100),
    "wider": AttentionOptions(0.3, window=1000),
    "softcap": AttentionOptions(0.3, softcap=2.0),
    "both": AttentionOptions(0.3, window=70, softcap=50.0),
}


def written_out(
    q: torch.Tensor, cache: torch.Tensor, batch: Batch, options: AttentionOptions, sinks: torch.Tensor | None = None
) -> torch.Tensor:
    """Attention as its definition has it, a query at a time, in float64."""
    out = torch.empty_like(q, dtype=torch.float64)
    group, row = q.shape[1] // cache.shape[-2], 0
    for chunk in batch.chunks:
        for position in range(chunk.start, chunk.start + chunk.count):
            first = 0 if options.window is None else max(position + 1 - options.window, 0)
            places = torch.arange(first, position + 1, device=q.device)
            pages = batch.page_tables[chunk.slot].long()[places // cache.shape[2]]
            k, v = cache[:, pages, places % cache.shape[2]].double().repeat_interleave(group, dim=2)
            scores = torch.einsum("hd,khd->hk", q[row].double(), k) * options.scale
            if options.softcap is not None:
                scores = options.softcap * torch.tanh(scores / options.softcap)
            if sinks is not None:
                scores = torch.cat((scores, sinks.double()[:, None]), 1)
            out[row] = torch.einsum("hk,khd->hd", scores.softmax(-1)[:, : len(places)], v)
            row += 1
    return out


@pytest.mark.parametrize("window", [None, 100])
def test_many_sequences_on_few_processors(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled kernel, too, is to meet every way in which sequences can be shared out."""
    monkeypatch.setattr(attention, "num_sms", lambda device: 2)
    lengths = [1, 300, 64, 65, 17, 128, 5, 250, 63, 31, 192, 2, 90, 64, 111, 40, 7, 200]
    chunks = [Chunk(slot, length - 1, 1, True) for slot, length in enumerate(lengths)]
    batch = attention_case(chunks, len(chunks), 16, head_dim=32)
    q, cache = randn(len(chunks), 6, 32, dtype=torch.float16), randn(2, 400, 16, 2, 32, dtype=torch.float16)
    options = AttentionOptions(0.3, window=window)
    for _ in range(2):  # the first layer and those that find what it made
        expected = written_out(q, cache, batch, options)
        close(gpu.paged_attention(q, cache, batch, options).double(), expected, torch.float16)
        assert not batch.decode_work[window].arrived.any()
        q = randn(len(chunks), 6, 32, dtype=torch.float16)


@pytest.mark.parametrize("poison", ["query", "value"])
def test_what_is_not_finite_stays_in_its_sequence(poison: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though a program goes on from it to the next ones."""
    monkeypatch.setattr(attention, "num_sms", lambda device: 1)
    chunks = [Chunk(slot, 9 + 50 * slot, 1, True) for slot in range(8)]
    batch = attention_case(chunks, len(chunks), 16, head_dim=32)
    q, cache = randn(len(chunks), 4, 32), randn(2, 400, 16, 2, 32)
    if poison == "query":
        q[2] = float("nan")
    else:
        cache[1, batch.page_tables[2, 1].long(), 3] = float("inf")
    finite = gpu.paged_attention(q, cache, batch, PLAIN).isfinite().flatten(1).all(1)
    assert finite.tolist() == [slot != 2 for slot in range(8)]


@pytest.mark.parametrize(("name", "case", "dtype"), pairwise(OPTIONS, CASES, DTYPES))
def test_windows_and_soft_caps(name: str, case: str, dtype: torch.dtype) -> None:
    options = OPTIONS[name]
    chunks, num_decodes = CASES[case]
    batch = attention_case(chunks, num_decodes, 8)
    q = randn(sum(c.count for c in chunks), 6, 16, dtype=dtype) * 3
    cache = randn(2, 400, 8, 2, 16, dtype=dtype)
    expected = written_out(q, cache, batch, options)
    close(reference.paged_attention(q.float(), cache.float(), batch, options).double(), expected, torch.float32)
    close(gpu.paged_attention(q, cache, batch, options).double(), expected, dtype)
    for chunk in chunks if options.window is not None else ():
        batch.page_tables[chunk.slot, : first_page_seen(options.window, chunk.start, 8)] = RESERVED_PAGE
    cache[:, RESERVED_PAGE] = float("nan")  # what lies before every window is not read
    close(gpu.paged_attention(q, cache, batch, options).double(), expected, dtype)


BRIEF = ([Chunk(4, 177, 1, True), Chunk(1, 5, 1, True), Chunk(0, 80, 9, True)], 2)
SINKS = (0.0, 3.0, -2.0, 300.0, -300.0, 8.0, 1.0, 20.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("case", "window"),
    [
        ("brief", None),
        ("brief", 70),
        *(pytest.param(case, window, marks=pytest.mark.slow) for case in CASES for window in (None, 70)),
    ],
)
def test_sinks(case: str, window: int | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """On many processors, where sequences are in parts, and on one."""
    options = AttentionOptions(0.3, window=window, softcap=None if window is None else 50.0)
    chunks, num_decodes = BRIEF if case == "brief" else CASES[case]
    kv_heads, head_dim = (8, 64) if ON_GPU else (2, 16)  # as gpt-oss has them
    sinks = torch.tensor(SINKS, device=DEVICE).repeat(kv_heads // 2)
    q = randn(sum(c.count for c in chunks), len(sinks), head_dim, dtype=dtype) * 3
    cache = randn(2, 400, 8, kv_heads, head_dim, dtype=dtype)
    for num_sms in (132, 1):
        monkeypatch.setattr(attention, "num_sms", lambda device, number=num_sms: number)
        batch = attention_case(chunks, num_decodes, 8, head_dim=head_dim)
        expected = written_out(q, cache, batch, options, sinks)
        theirs = reference.paged_attention(q.float(), cache.float(), batch, options, None, sinks)
        close(theirs.double(), expected, torch.float32)
        close(gpu.paged_attention(q, cache, batch, options, None, sinks).double(), expected, dtype)


@pytest.mark.parametrize("options", [PLAIN, AttentionOptions(0.3, window=30, softcap=5.0)], ids=["plain", "both"])
@pytest.mark.parametrize("case", CASES)
def test_padding_changes_nothing(case: str, options: AttentionOptions) -> None:
    """As a captured step is padded: the real rows come out as without it."""
    chunks, num_decodes = CASES[case]
    num_tokens = sum(c.count for c in chunks)
    q, cache = randn(num_tokens, 4, 16), randn(2, 400, 8, 2, 16)
    np.random.seed(0)
    expected = reference.paged_attention(q, cache, attention_case(chunks, num_decodes, 8), options)
    np.random.seed(0)
    padded = torch.cat((q, randn(5, 4, 16)))
    ours = gpu.paged_attention(padded, cache, attention_case(chunks, num_decodes, 8, padding=5), options)
    close(ours[:num_tokens], expected, torch.float32)
