"""What a profile calls the kernels that it sees."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest
import torch
from torch._C import _distributed_c10d as c10d

from ingle.bench.profile import COLLECTIVES, _kind
from ingle.kernels import gpu
from ingle.parallel import group
from ingle.parallel.group import TensorGroup, _gloo

RECORDED = {
    "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)": COLLECTIVES,
    "ncclDevKernel_AllReduce_Sum_f32_TREE_LL128(ncclDevKernelArgsStorage<4096ul>)": COLLECTIVES,
    "ncclKernel_AllReduce_RING_LL_Sum___nv_bfloat16(ncclDevComm*, unsigned long, ncclWork*)": COLLECTIVES,
    "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)": COLLECTIVES,
    "ncclDevKernel_Broadcast_RING_LL(ncclDevKernelArgsStorage<4096ul>)": COLLECTIVES,
    "ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)": COLLECTIVES,
    "ncclSymkDevKernel_AllReduce_AGxLL_R(ncclSymkDevWorkArgs)": COLLECTIVES,
    "void vllm::cross_device_reduce_1stage<__nv_bfloat16, 2>(vllm::RankData*, vllm::RankSignals)": COLLECTIVES,
    "_one_shot_kernel": COLLECTIVES,
    "_two_shot_kernel": COLLECTIVES,
    "_sent_kernel": COLLECTIVES,
    "_decode_kernel": "attention",
    "_rms_norm_kernel": "norms, rotation, activation",
    "nvjet_sm90_tst_128x128_64x6_2x1_v_bz_TNT": "matmuls",
    "_draw_kernel": "sampling",
    "void at::native::vectorized_gather_kernel<16, long>(char*, char*, long*, int, long, long)": "other",
    "Memcpy HtoD (Pinned -> Device)": "other",
}


@pytest.mark.parametrize("name", RECORDED)
def test_kinds_of_kernels(name: str) -> None:
    assert _kind(name) == RECORDED[name]


def test_kernels_of_our_own() -> None:
    """Have a kind, but for those that sort, place, keep and add up tokens."""
    sources = Path(gpu.__file__).parent.glob("*.py")
    names = {name for source in sources for name in re.findall(r"^def (_\w+_kernel)\(", source.read_text(), re.M)}
    others = {f"_{each}_kernel" for each in ("count", "keep", "locate", "route", "sort", "store", "sum")}
    assert {name for name in names if _kind(name) == "other"} == others
    assert _kind("_draw_share_kernel") == "sampling" and _kind("_decode_weights_kernel") == "matmuls"


def test_what_the_hosts_of_ranks_do_together_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(group, "record_function", lambda name: contextlib.nullcontext(seen.append(name)))
    alone = TensorGroup(_gloo(c10d.HashStore(), "alone", 0, 1), 0, 1, "gloo")
    alone.all_reduce(torch.ones(4))
    assert not seen, "nobody looks"
    monkeypatch.setattr(torch.autograd, "_profiler_enabled", lambda: True)
    alone.all_gather(alone.all_reduce(torch.ones(4)))
    assert seen == ["ranks: sum", "ranks: gather"] and {_kind(name) for name in seen} == {COLLECTIVES}
