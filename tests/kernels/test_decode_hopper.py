"""Decoding sequences on Hopper: attention against its definition, in every form that its kernel takes."""

from __future__ import annotations

import pytest
import torch

from ingle.kernels import gpu
from ingle.kernels.gpu import attention
from ingle.kernels.gpu.device import has_warpgroups
from ingle.kernels.options import AttentionOptions
from ingle.step import Chunk
from tests.kernels.coded_kv import KINDS, decoded, filled_cache
from tests.kernels.test_gpu_kernels import CASES, DEVICE, PLAIN, attention_case, randn, written_out

pytestmark = pytest.mark.gpu
if not torch.cuda.is_available() or not has_warpgroups(DEVICE):
    pytest.skip("needs a Hopper card", allow_module_level=True)

LENGTHS = [1, 300, 64, 65, 17, 128, 5, 250, 63, 31, 192, 2, 90, 64, 111, 40, 7, 200, 16, 15]
DECODES = [Chunk(slot, length - 1, 1, True) for slot, length in enumerate(LENGTHS)]
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
TOLERANCE = {"float16": 4e-3, "bfloat16": 2e-2}


def check(
    kind: str, shape: tuple[int, int, int, int], options: AttentionOptions = PLAIN, chunks: list[Chunk] = DECODES,
    num_decodes: int = len(DECODES), with_sinks: bool = False,
) -> None:  # fmt: skip
    """Twice: the first layer, and one that finds what it made."""
    heads, kv_heads, head_dim, page_size = shape
    dtype = DTYPES.get(kind, torch.bfloat16)
    batch = attention_case(chunks, num_decodes, page_size, head_dim=head_dim)
    sinks = randn(heads) if with_sinks else None
    scales = None
    if kind in DTYPES:
        cache = randn(2, 400, page_size, kv_heads, head_dim, dtype=dtype)
        numbers = cache.clone()
        for chunk in chunks[:num_decodes]:  # what lies behind the end is not read
            page, first = divmod(chunk.start + 1, page_size)
            if first:
                cache[:, batch.page_tables[chunk.slot, page].long(), first:] = float("nan")
    else:
        cache, scales = filled_cache(kind, 400, page_size, kv_heads, head_dim, DEVICE)
        numbers = decoded(cache, scales)
    for _ in range(2):
        q = randn(sum(chunk.count for chunk in chunks), heads, head_dim, dtype=dtype)
        assert attention._hopper(q, cache, scales, options) is not None
        expected = written_out(q, numbers, batch, options, sinks)
        out = gpu.paged_attention(q, cache, batch, options, scales, sinks).double()
        assert not out.isnan().any()
        assert ((out - expected).abs() <= expected.abs().amax(-1, keepdim=True) * TOLERANCE.get(kind, 2e-2)).all()
        assert not batch.decode_work[None].arrived.any()


@pytest.mark.parametrize("num_sms", [1, 2, 132])
@pytest.mark.parametrize("kind", [*DTYPES, *KINDS])
def test_shares_of_every_length(kind: str, num_sms: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "num_sms", lambda device: num_sms)
    check(kind, (14, 2, 128, 16))


@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        ("bfloat16", (8, 8, 64, 16)),
        ("bfloat16", (9, 1, 64, 32)),
        ("bfloat16", (4, 2, 256, 16)),
        ("bfloat16", (32, 1, 256, 64)),
        ("float16", (24, 2, 128, 32)),
        ("fp8_e4m3", (8, 2, 256, 16)),
        ("int8", (32, 1, 128, 32)),
    ],
)
def test_shapes(kind: str, shape: tuple[int, int, int, int]) -> None:
    check(kind, shape)


@pytest.mark.parametrize("kind", ["bfloat16", "fp8_e4m3"])
@pytest.mark.parametrize("num_sms", [1, 132])
def test_sinks_and_soft_caps(kind: str, num_sms: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "num_sms", lambda device: num_sms)
    check(kind, (14, 2, 128, 16), AttentionOptions(0.3, softcap=2.0), with_sinks=True)


@pytest.mark.parametrize("kind", ["bfloat16", "fp8_e4m3"])
@pytest.mark.parametrize("case", CASES)
def test_beside_prompts(case: str, kind: str) -> None:
    chunks, num_decodes = CASES[case]
    if num_decodes:
        check(kind, (8, 2, 128, 16), chunks=chunks, num_decodes=num_decodes)


def test_what_is_not_finite_stays_in_its_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "num_sms", lambda device: 1)
    chunks = [Chunk(slot, 9 + 50 * slot, 1, True) for slot in range(8)]
    batch = attention_case(chunks, len(chunks), 16, head_dim=128)
    q, cache = randn(8, 4, 128, dtype=torch.bfloat16), randn(2, 400, 16, 2, 128, dtype=torch.bfloat16)
    cache[1, batch.page_tables[2, 1].long(), 3] = float("inf")
    q[5] = float("nan")
    finite = gpu.paged_attention(q, cache, batch, PLAIN).isfinite().flatten(1).all(1)
    assert finite.tolist() == [slot not in (2, 5) for slot in range(8)]


def test_what_it_leaves_to_others() -> None:
    q, cache = randn(4, 4, 128, dtype=torch.bfloat16), randn(2, 9, 16, 2, 128, dtype=torch.bfloat16)
    assert attention._hopper(q, cache, None, PLAIN) is not None
    assert attention._hopper(q.float(), cache.float(), None, PLAIN) is None
    assert attention._hopper(q, cache, None, AttentionOptions(0.3, window=10)) is None
    assert attention._hopper(q, randn(2, 9, 8, 2, 128, dtype=torch.bfloat16), None, PLAIN) is None
    assert attention._hopper(q, cache[:, 1:], None, PLAIN) is None
