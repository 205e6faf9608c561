"""Latent attention: the plain operators against its definition, and the Triton kernels against those."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ingle.kernels import gpu, reference
from ingle.kernels.batch import Batch
from ingle.kernels.gpu import latent
from ingle.step import Chunk
from tests.kernels.interpreted import pairwise
from tests.kernels.test_gpu_kernels import CASES, DEVICE, DTYPES, attention_case, close, randn

SCALE = 0.3
NUM_PAGES = 400


@pytest.fixture(autouse=True)
def same_numbers_each_time() -> None:
    torch.manual_seed(0)
    np.random.seed(0)


def written_out(q_latent: torch.Tensor, q_rope: torch.Tensor, cache: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Attention to latents as the definition has it, a sequence at a time, in float64."""
    rank, page_size = q_latent.shape[-1], cache.shape[1]
    q, outs, row = torch.cat((q_latent, q_rope), -1).double(), [], 0
    for chunk in batch.chunks:
        end = chunk.start + chunk.count
        places = torch.arange(end, device=DEVICE)
        keys = cache[batch.page_tables[chunk.slot].long()[places // page_size], places % page_size].double()
        future = places > torch.arange(chunk.start, end, device=DEVICE)[:, None]
        scores = torch.einsum("thd,kd->htk", q[row : row + chunk.count], keys) * SCALE
        outs.append(torch.einsum("htk,kr->thr", scores.masked_fill(future, -torch.inf).softmax(-1), keys[:, :rank]))
        row += chunk.count
    return torch.cat(outs)


def inputs(
    num_tokens: int, heads: int, rank: int, rope: int, page_size: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries in the latent's space, their rotated part, and a layer's part of a cache of several."""
    caches = randn(2, 1, NUM_PAGES, page_size, 1, rank + rope, dtype=dtype)
    q_latent, q_rope = randn(num_tokens, heads, rank, dtype=dtype), randn(num_tokens, heads, rope, dtype=dtype)
    return q_latent, q_rope, caches[1, 0, :, :, 0]


def test_absorbed_is_expanded() -> None:
    """What the operators give, times W_UV, is attention to keys and values made of the latents by W_UK and W_UV."""
    heads, rank, rope, nope, values, page_size = 3, 24, 8, 10, 14, 8
    chunks, num_decodes = CASES["mixed"]
    batch = attention_case(chunks, num_decodes, page_size)
    _, q_rope, cache = inputs(sum(c.count for c in chunks), heads, rank, rope, page_size, torch.float32)
    q_nope = randn(len(q_rope), heads, nope)
    key_up, value_up = randn(heads, nope, rank) / rank**0.5, randn(heads, values, rank) / rank**0.5
    q_latent = torch.einsum("thn,hnr->thr", q_nope, key_up)
    attended = reference.latent_attention(q_latent, q_rope, cache, batch, SCALE)
    row = num_decodes  # of a prompt that continues at 33
    for position in range(33, 133, 11):
        places = torch.arange(position + 1, device=DEVICE)
        latents = cache[batch.page_tables[0].long()[places // page_size], places % page_size]
        k_nope = torch.einsum("kr,hnr->khn", latents[:, :rank], key_up)
        v = torch.einsum("kr,hvr->khv", latents[:, :rank], value_up)
        scores = torch.einsum("hn,khn->hk", q_nope[row], k_nope) + q_rope[row] @ latents[:, rank:].T
        expected = torch.einsum("hk,khv->hv", (scores * SCALE).softmax(-1), v)
        close(torch.einsum("hr,hvr->hv", attended[row], value_up), expected, torch.float32)
        row += 11


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("wide_norm", [False, True])
@pytest.mark.parametrize(
    ("tokens", "heads", "rank", "rope", "page_size"), [(1, 1, 24, 8, 8), (5, 3, 24, 6, 16), (3, 16, 512, 64, 16)]
)
def test_store_latent(
    tokens: int,
    heads: int,
    rank: int,
    rope: int,
    page_size: int,
    wide_norm: bool,
    interleaved: bool,
    dtype: torch.dtype,
) -> None:
    down, q = randn(tokens, rank + rope, dtype=dtype), randn(tokens, heads, 10 + rope, dtype=dtype)
    norm = randn(rank, dtype=torch.float32 if wide_norm else dtype)
    angles = torch.rand(tokens, rope // 2, device=DEVICE) * 6
    cos_sin = torch.cat((angles.cos(), angles.sin()), -1)
    slots = torch.randperm(10 * page_size, device=DEVICE)[:tokens]
    caches = [torch.zeros(2, 1, 10, page_size, 1, rank + rope, dtype=dtype, device=DEVICE) for _ in range(2)]
    outs = [
        kernels.store_latent(
            down, q[..., 10:], norm, 1e-6, cos_sin, cache[1, 0, :, :, 0], slots, interleaved=interleaved
        )
        for kernels, cache in zip((gpu, reference), caches, strict=True)
    ]
    close(outs[0], outs[1], dtype)
    close(caches[0], caches[1], dtype)
    assert outs[0].is_contiguous() and outs[1].is_contiguous()
    # Each pair is turned by its angle: as complex numbers, whose product is computed here in float64.
    pairs = q[..., 10:].double()
    pairs = pairs.unflatten(-1, (-1, 2)) if interleaved else pairs.unflatten(-1, (2, -1)).transpose(-1, -2)
    turned = torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angles), angles).cdouble()[:, None]
    close(outs[1].double(), torch.cat((turned.real, turned.imag), -1), dtype)


@pytest.mark.parametrize(
    ("case", "heads", "rank", "rope", "page_size", "dtype"),
    pairwise(CASES, [(1, 24, 8, 8), (16, 24, 6, 16), (4, 200, 24, 8)], DTYPES),
)
def test_latent_attention(case: str, heads: int, rank: int, rope: int, page_size: int, dtype: torch.dtype) -> None:
    chunks, num_decodes = CASES[case]
    batch = attention_case(chunks, num_decodes, page_size, head_dim=rank + rope)
    q_latent, q_rope, cache = inputs(sum(c.count for c in chunks), heads, rank, rope, page_size, dtype)
    q_latent, q_rope = q_latent / 4, q_rope / 4
    expected = written_out(q_latent, q_rope, cache, batch)
    close(reference.latent_attention(q_latent, q_rope, cache, batch, SCALE).double(), expected, dtype)
    close(gpu.latent_attention(q_latent, q_rope, cache, batch, SCALE).double(), expected, dtype)


@pytest.mark.parametrize("heads", [16, 80])
def test_the_sizes_of_deepseeks_models(heads: int) -> None:
    """512 and 64, the tiles of which are those that a GPU runs; more heads than a tile has rows."""
    chunks = [Chunk(1, 80, 1, True), Chunk(2, 4, 1, True), Chunk(0, 20, 3, True)]
    batch = attention_case(chunks, 2, 16, head_dim=576)
    q_latent, q_rope, cache = inputs(5, heads, 512, 64, 16, torch.float16)
    expected = reference.latent_attention(q_latent.float() / 16, q_rope.float() / 16, cache.float(), batch, SCALE)
    close(gpu.latent_attention(q_latent / 16, q_rope / 16, cache, batch, SCALE).float(), expected, torch.float16)


@pytest.mark.parametrize("heads", [4, 80])
def test_many_sequences_on_few_processors(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way in which sequences can be shared out, by the first layer and by those that find what it made."""
    monkeypatch.setattr(latent, "num_sms", lambda device: 3)
    lengths = [1, 300, 64, 65, 17, 128, 5, 250, 63, 31, 192, 2, 90, 64, 111, 40, 7, 200]
    chunks = [Chunk(slot, length - 1, 1, True) for slot, length in enumerate(lengths)]
    batch = attention_case(chunks, len(chunks), 16)
    for _ in range(2):
        q_latent, q_rope, cache = inputs(len(chunks), heads, 32, 8, 16, torch.float16)
        expected = written_out(q_latent, q_rope, cache, batch)
        close(gpu.latent_attention(q_latent, q_rope, cache, batch, SCALE).double(), expected, torch.float16)
        assert not batch.decode_work[None].arrived.any()


@pytest.mark.parametrize("poison", ["query", "latent"])
def test_what_is_not_finite_stays_in_its_sequence(poison: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent, "num_sms", lambda device: 1)
    chunks = [Chunk(slot, 9 + 50 * slot, 1, True) for slot in range(8)]
    batch = attention_case(chunks, len(chunks), 16)
    q_latent, q_rope, cache = inputs(len(chunks), 4, 32, 8, 16, torch.float32)
    if poison == "query":
        q_latent[2] = float("nan")
    else:
        cache[batch.page_tables[2, 1].long(), 3, :32] = float("inf")
    finite = gpu.latent_attention(q_latent, q_rope, cache, batch, SCALE).isfinite().flatten(1).all(1)
    assert finite.tolist() == [slot != 2 for slot in range(8)]


@pytest.mark.parametrize("case", CASES)
def test_padding_changes_nothing(case: str) -> None:
    """As a captured step is padded: the real rows come out as without it."""
    chunks, num_decodes = CASES[case]
    num_tokens = sum(c.count for c in chunks)
    q_latent, q_rope, cache = inputs(num_tokens + 5, 4, 24, 8, 8, torch.float32)
    np.random.seed(0)
    batch = attention_case(chunks, num_decodes, 8)
    expected = reference.latent_attention(q_latent[:num_tokens], q_rope[:num_tokens], cache, batch, SCALE)
    np.random.seed(0)
    batch = attention_case(chunks, num_decodes, 8, padding=5)
    ours = gpu.latent_attention(q_latent, q_rope, cache, batch, SCALE)
    close(ours[:num_tokens], expected, torch.float32)


def test_a_cache_of_another_type_than_the_queries() -> None:
    """As on a CPU, where activations are float32 and the cache has 16 bits."""
    chunks, num_decodes = CASES["mixed"]
    batch = attention_case(chunks, num_decodes, 8)
    q_latent, q_rope, cache = inputs(sum(c.count for c in chunks), 4, 24, 8, 8, torch.float32)
    narrow = cache.to(torch.bfloat16)
    ours = reference.latent_attention(q_latent, q_rope, narrow, batch, SCALE)
    close(ours.double(), written_out(q_latent, q_rope, narrow.float(), batch), torch.float32)
    norm, cos_sin = randn(24), randn(len(q_rope), 8)
    down = randn(len(q_rope), 32)
    for target in (narrow, cache):
        reference.store_latent(down, q_rope, norm, 1e-6, cos_sin, target, batch.kv_places, interleaved=True)
    assert torch.equal(narrow.flatten(0, 1)[batch.kv_places], cache.flatten(0, 1)[batch.kv_places].to(torch.bfloat16))
