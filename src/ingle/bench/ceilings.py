"""What a device reaches at best, measured: the other half of the roofline (`ingle.engine.roofline`)."""

from __future__ import annotations

import time

import torch

from ingle.engine.roofline import Ceilings


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Memory reads in bytes/s and matrix products in FLOP/s, each the best of several tries of a few milliseconds.

    On a CPU, whose kernels multiply in a type of their own, products are those of its fastest float type.
    """
    on_gpu = device.type == "cuda"
    if on_gpu:  # a copy reads and writes; each byte counts once each way
        source = torch.empty(1 << 31, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        bytes_per_s = 2 * source.numel() / _best(lambda: target.copy_(source), device)
    else:
        floats = torch.ones(1 << 26)
        bytes_per_s = floats.numel() * 4 / _best(floats.sum, device)
    dtypes, size = ([dtype], 8192) if on_gpu else ([torch.bfloat16, torch.float32], 1024)
    return Ceilings(bytes_per_s, max(_product_rate(device, each, size) for each in dtypes))


def _product_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / _best(lambda: torch.mm(a, b), device)


def _best(function: object, device: torch.device, tries: int = 10) -> float:
    assert callable(function)
    times = []
    for _ in range(tries):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)
