"""What launching a kernel asks of the device.

Programmatic dependent launch: a kernel's programs start while the kernel before them ends.
A kernel launched with `pdl` waits (`await_previous`) before it touches anything that the kernel before it writes or
reads, and only then lets the next one begin. So what a program does before its wait may rely on all kernels but the
very last; behind `_sent_kernel` (`sums.py`), which lets the next begin at once, on weights alone. Of every kernel so
launched at least one program waits, else the one after it would not know that those before are done; programs that
need nothing of the kernel before need not (`BESIDE` in `attention.py`).
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@functools.cache
def pdl(device: torch.device) -> bool:
    """Whether kernels on this device may start early, in tiles that fill Hopper's SMs: cards from 12.0 on could start
    them so, but have SMs of less than half its memory, and get those of Ada."""
    return device.type == "cuda" and (9, 0) <= torch.cuda.get_device_capability(device) < (12, 0)


@functools.cache
def scales_blocks(device: torch.device) -> bool:
    """Whether the library multiplies FP8 under scales of blocks of 128 x 128: on Hopper alone."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


@functools.cache
def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether its tensor cores do: from Ampere on."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def multiplies_fp8(device: torch.device) -> bool:
    """Whether its tensor cores do: from Ada on."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


@functools.cache
def has_warpgroups(device: torch.device) -> bool:
    """Whether a copy engine fills an SM's memory, out of which four warps multiply together, as Gluon has it: on Hopper
    alone, and in the versions of Triton that were tried, for Gluon is not settled."""
    if not triton.__version__.startswith(("3.6.", "3.7.")):
        return False
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


@functools.cache
def gathers_programs() -> bool:
    """Whether kernels whose programs wait for each other have to say so, since another process's may run beside them,
    by NVIDIA's MPS: each could have some of the SMs, and wait for more. Their start takes some microseconds longer."""
    return Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"), "control").exists()


@functools.cache
def num_sms(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # Triton's interpreter
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes that the programs which an SM runs side by side have between them."""
    if device.type != "cuda":
        return 1 << 17  # Triton's interpreter
    return int(torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor)


@functools.cache
def counters(device: torch.device) -> torch.Tensor:
    """Zeros that count a tile's splits while a kernel runs; each kernel leaves them as it found them."""
    return torch.zeros(1 << 14, dtype=torch.int32, device=device)


@functools.cache
def arrivals(device: torch.device, at_least: int) -> torch.Tensor:
    """The same for the parts of sequences' heads, in attention."""
    return torch.zeros(at_least, dtype=torch.int32, device=device)


@triton.jit
def await_previous():
    """After this, all that the kernels before this one wrote is there."""
    gdc_wait()
    gdc_launch_dependents()


@triton.jit
def barrier(COMPILED: tl.constexpr):
    """Waits for the program's other threads, as `tl.debug_barrier` does, beside which Triton pipelines no loop."""
    if COMPILED:
        tl.inline_asm_elementwise("bar.sync 0; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    else:
        tl.debug_barrier()


@triton.jit
def prefetch(pointers, num_bytes):
    """Asks for `num_bytes`, a multiple of 16, from each pointer on to come into the second-level cache."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r", [pointers, num_bytes], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
